"""Around the median: worked examples, float64 loops, the pivot, and what does not matter."""

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.advantages import median

compensated = jax.jit(median.compensated)
median_centered = jax.jit(median.median_centered, static_argnames=("scale", "epsilon"))


def lower_median(values):
    return sorted(values)[(len(values) - 1) // 2]


def oracle(rewards, groups, scale="mad", epsilon=1e-3):
    result, pivot = np.zeros(len(rewards)), np.zeros(len(rewards), bool)
    for group in set(groups[groups >= 0]):
        rows = [i for i in range(len(rewards)) if groups[i] == group and not np.isnan(rewards[i])]
        if not rows:
            continue
        middle = lower_median(rewards[rows])
        deviations = [abs(rewards[i] - middle) for i in rows]
        spread = {
            "mad": lower_median(deviations) + epsilon,
            "std": (rewards[rows].std(ddof=1) if len(rows) > 1 else 0) + epsilon,
            "none": 1.0,
        }[scale]
        for i in rows:
            result[i] = (rewards[i] - middle) / spread
        pivot[next(i for i in rows if rewards[i] == middle)] = True
    return result, pivot


def ragged(seed):
    """Groups of odd and even sizes, rows in none, ties, a constant group, a group of one, missing rewards."""
    draw = np.random.default_rng(seed)
    rewards, groups = draw.normal(0, 2, 30), draw.integers(-1, 6, 30)
    rewards = np.float32(np.where(draw.random(30) < 0.3, draw.integers(0, 2, 30), rewards)).astype(float)
    rewards[draw.random(30) < 0.15] = np.nan
    rewards[groups == 3] = np.float32(0.85)
    groups[np.flatnonzero(groups == 5)[1:]] = -1
    return rewards, groups


@pytest.mark.parametrize(
    ("rewards", "expected", "dropped"),
    [
        ([0.1, 0.9, 0.4], [-0.996678, 1.661130, 0.0], 2),
        ([0, 0.2, 0.3, 0.5, 1.0], [-1.492537, -0.497512, 0, 0.995025, 3.482587], 2),
        ([0, 0, 1], [0, 0, 1000], 0),
        ([5, 5, 5], [0, 0, 0], 0),
    ],
)
def test_worked_examples(rewards, expected, dropped):
    a, pivot = median_centered(np.array(rewards), np.zeros(len(rewards), int))
    np.testing.assert_allclose(a, expected, rtol=1e-6, atol=2e-6)
    assert np.flatnonzero(pivot).tolist() == [dropped] and pivot.dtype == bool


def test_worked_example_of_the_compensation():
    """The middle one got nothing: the others count 3/2. A group without any stays 0."""
    a = np.array([-0.996678, 1.661130, 0.0, 0, 0, 7, np.nan])
    got = compensated(a, np.array([0, 0, 0, 1, 1, -1, 0]))
    np.testing.assert_allclose(got, [-1.495017, 2.491694, 0, 0, 0, 0, 0], atol=2e-6)


@pytest.mark.parametrize("scale", ["mad", "std", "none"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_against_float64(seed, scale):
    rewards, groups = ragged(seed)
    a, pivot = median_centered(rewards, groups, scale=scale)
    expected, dropped = oracle(rewards, groups, scale)
    np.testing.assert_allclose(a, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(pivot, dropped)
    shared = expected.copy()
    for i in np.flatnonzero(groups >= 0):
        rows = [j for j in range(30) if groups[j] == groups[i] and not np.isnan(rewards[j])]
        if abs(expected[i]) > 1e-6:
            shared[i] *= len(rows) / sum(abs(expected[j]) > 1e-6 for j in rows)
    told = jnp.where(jnp.isnan(rewards), jnp.nan, a)  # a row without reward has no share
    np.testing.assert_allclose(compensated(told, groups), shared, rtol=1e-5, atol=1e-6)


def test_rows_do_not_know_their_neighbours():
    draw = np.random.default_rng(3)
    rewards, groups = draw.normal(size=30), draw.integers(-1, 6, 30)
    rewards[draw.random(30) < 0.15] = np.nan

    @jax.jit
    def all_of_them(rewards, group_ids):
        mad, pivot = median.median_centered(rewards, group_ids)
        std, none = (median.median_centered(rewards, group_ids, scale=s)[0] for s in ("std", "none"))
        return mad, pivot, std, none, median.compensated(jnp.where(jnp.isnan(rewards), jnp.nan, mad), group_ids)

    laws.rows(all_of_them, {"rewards": rewards, "group_ids": groups})


@pytest.mark.parametrize("scale", ["mad", "std", "none"])
def test_gradients(scale):
    rewards, groups = ragged(4)
    rewards += np.where(groups == 3, 0, np.random.default_rng(5).normal(0, 0.1, 30))  # ties have no derivative
    pull = np.random.default_rng(1).normal(size=30)
    dirty = np.where(groups < 0, np.inf, rewards)
    gradient = jax.grad(lambda r: jnp.sum(pull * median_centered(r, groups, scale=scale)[0]))(jnp.float32(dirty))
    assert np.isfinite(gradient).all() and not np.asarray(gradient)[np.isnan(rewards) | (groups < 0)].any()
    for i in np.flatnonzero(~np.isnan(rewards) & (groups >= 0) & (groups != 3)):
        up, down = rewards.copy(), rewards.copy()
        up[i] += 1e-5
        down[i] -= 1e-5
        slope = pull @ (oracle(up, groups, scale)[0] - oracle(down, groups, scale)[0]) / 2e-5
        np.testing.assert_allclose(gradient[i], slope, rtol=2e-3, atol=2e-3)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(-5, 5), min_size=9, max_size=9),
    st.lists(st.integers(-1, 2), min_size=9, max_size=9),
    st.integers(-8, 8),
)
def test_one_row_of_each_group_goes_and_at_most_half_lie_above(rewards, groups, shift):
    rewards, groups = np.array(rewards, np.float32), np.array(groups)
    a, pivot = (np.asarray(x) for x in median_centered(rewards, groups, epsilon=0.25))
    np.testing.assert_allclose(median_centered(rewards + shift, groups, epsilon=0.25)[0], a, atol=1e-5)
    for group in set(groups[groups >= 0]):
        mine = groups == group
        assert pivot[mine].sum() == 1 and a[mine & pivot] == 0
        assert (a[mine] > 0).sum() <= mine.sum() / 2 and (a[mine] < 0).sum() < mine.sum() / 2
    assert not pivot[groups < 0].any() and not a[groups < 0].any()


def test_another_scale():
    with pytest.raises(ValueError, match=r"one of \('mad', 'std', 'none'\), got 'range'"):
        median_centered(np.zeros(3), np.zeros(3, int), scale="range")
