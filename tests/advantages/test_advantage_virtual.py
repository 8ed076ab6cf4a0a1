"""With an imagined best: worked examples, float64 loops, closed forms, and what does not matter."""

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.advantages import virtual
from grpo_jax.advantages.group import group_z_score

with_virtual_best = jax.jit(virtual.with_virtual_best, static_argnames=("r_max", "n_v", "epsilon"))
weighted_signs = jax.jit(virtual.weighted_signs, static_argnames=("positive", "negative"))


def oracle(rewards, groups, r_max=1.0, n_v=1, epsilon=1e-6):
    result = np.zeros(len(rewards))
    for i in range(len(rewards)):
        rows = [j for j in range(len(rewards)) if groups[j] == groups[i] >= 0 and not np.isnan(rewards[j])]
        if i in rows and len(rows) > 1:
            inside = np.array([rewards[j] for j in rows] + [r_max] * n_v)
            if len(set(inside)) > 1:
                result[i] = (rewards[i] - inside.mean()) / (inside.std(ddof=1) + epsilon)
    return result


def ragged(seed):
    """Groups of all sizes, one all right, one all wrong, one of one; rows in none, missing rewards."""
    draw = np.random.default_rng(seed)
    rewards, groups = draw.uniform(-1, 1, 30), draw.integers(-1, 7, 30)
    rewards = np.where(draw.random(30) < 0.5, draw.integers(0, 2, 30), rewards)
    rewards[draw.random(30) < 0.15] = np.nan
    rewards[groups == 3], rewards[groups == 4] = 1, 0
    groups[np.flatnonzero(groups == 5)[1:]] = -1
    return rewards, groups


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([0, 0, 0, 0], [-0.447213] * 4),
        ([1, 0, 0, 0], [1.095443, -0.730295, -0.730295, -0.730295]),
        ([1, 1, 1, 0], [0.447213, 0.447213, 0.447213, -1.788850]),
        ([1, 1, 1, 1], [0, 0, 0, 0]),
        ([1], [0]),
        ([0], [0]),
    ],
)
def test_worked_example(rewards, expected):
    got = with_virtual_best(np.array(rewards), np.zeros(len(rewards), int))
    np.testing.assert_allclose(got, expected, atol=2e-6)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("options", [{}, {"r_max": 2.5, "n_v": 3, "epsilon": 0.1}, {"n_v": 0}])
def test_against_float64(seed, options):
    rewards, groups = ragged(seed)
    got = with_virtual_best(rewards, groups, **options)
    np.testing.assert_allclose(got, oracle(rewards, groups, **options), rtol=2e-5, atol=2e-6)
    assert got.dtype == jnp.float32


def test_without_imagined_completions_it_is_plain_grpo():
    rewards, groups = ragged(3)
    np.testing.assert_allclose(with_virtual_best(rewards, groups, n_v=0), group_z_score(rewards, groups), atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 64), st.data())
def test_closed_forms(n, data):
    """k right of n: mu' = (k + 1) / (n + 1); the sum over the group is below 0 unless all are right."""
    k = data.draw(st.integers(0, n))
    rewards, groups = np.repeat([1.0, 0.0, 0.0], [k, n - k, 64 - n]), np.repeat([0, -1], [n, 64 - n])
    a = np.asarray(with_virtual_best(rewards, groups), float)
    mean = (k + 1) / (n + 1)
    if k == n:
        assert not a.any()
        return
    sigma = np.sqrt((n + 1) * mean * (1 - mean) / n)
    assert a[:n].sum() == pytest.approx((mean - 1) / sigma, rel=1e-4)
    if k == 0:
        np.testing.assert_allclose(a[:n], -1 / np.sqrt(n + 1), rtol=1e-5)


def test_all_right_gives_exactly_nothing_however_the_best_was_added_up():
    """0.1 + 0.2 + 0.7 is not 1 in float32, nor is every sum of seven 0.85 / 7."""
    best = np.float32(0.1) + np.float32(0.2) + np.float32(0.7)
    assert not np.asarray(with_virtual_best(np.full(8, np.nextafter(best, np.float32(2))), np.zeros(8, int))).any()
    assert not np.asarray(with_virtual_best(np.full(7, 0.85), np.zeros(7, int), r_max=0.85)).any()
    assert np.asarray(with_virtual_best(np.full(7, 0.85), np.zeros(7, int), r_max=0.86)).all()


def test_rows_do_not_know_their_neighbours():
    rewards, groups = ragged(4)

    @jax.jit
    def all_of_them(rewards, group_ids):
        several = virtual.with_virtual_best(rewards, group_ids, r_max=2.0, n_v=2)
        return virtual.with_virtual_best(rewards, group_ids), several, virtual.weighted_signs(rewards, group_ids)

    laws.rows(all_of_them, {"rewards": rewards, "group_ids": groups})


def test_gradients():
    rewards, groups = ragged(5)
    pull, dirty = np.random.default_rng(1).normal(size=30), np.where(groups < 0, np.inf, rewards)
    gradient = jax.grad(lambda r: jnp.sum(pull * with_virtual_best(r, groups)))(jnp.float32(dirty))
    assert np.isfinite(gradient).all() and not np.asarray(gradient)[np.isnan(rewards) | (groups < 0)].any()
    for i in np.flatnonzero(~np.isnan(rewards) & (groups >= 0) & (groups != 3)):  # 3: all right, a jump
        up, down = rewards.copy(), rewards.copy()
        up[i] += 1e-6
        down[i] -= 1e-6
        slope = pull @ (oracle(up, groups) - oracle(down, groups)) / 2e-6
        np.testing.assert_allclose(gradient[i], slope, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "right", "wrong"),
    [({}, 0.1, -1), ({"positive": 1, "negative": 0}, 1, 0), ({"positive": 0, "negative": 1}, 0, -1)],
)
def test_weighted_signs(options, right, wrong):
    got = weighted_signs(np.array([1, 0, np.nan, 1, np.inf]), np.array([0, 0, 0, 1, -1]), **options)
    np.testing.assert_allclose(got, [right, wrong, 0, right, 0], atol=1e-7)


def test_refusals():
    with pytest.raises(ValueError, match="0 or more, got -1"):
        with_virtual_best(np.ones(2), np.zeros(2, int), n_v=-1)
    with pytest.raises(ValueError, match=r"rewards \[2, 1\]"):
        with_virtual_best(np.ones((2, 1)), np.zeros(2, int))
