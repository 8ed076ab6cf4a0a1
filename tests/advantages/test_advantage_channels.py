"""Several rewards at once: the worked example, float64 loops, gradients, and what does not matter."""

import itertools

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.advantages import channels

decoupled = jax.jit(channels.decoupled, static_argnames="epsilon")
decoupled_over_rows = jax.jit(channels.decoupled_over_rows)
decoupled_over_decisions = jax.jit(channels.decoupled_over_decisions)
gate = jax.jit(channels.gate, static_argnames="at_least")

TWO_PROMPTS = np.array([(1, 1), (1, 0), (0, 1), (0, 0), (0, 0), (0, 1), (0, 1), (1, 1)], float)
GROUPS = np.repeat([0, 1], 4)
WEIGHTS = (1.0, 0.5, -2.0)


def sums(rewards, groups, weights, epsilon):
    result = np.zeros(len(rewards))
    for k, weight in enumerate(weights):
        for i in range(len(rewards)):
            members = [j for j in range(len(rewards)) if groups[j] == groups[i] >= 0 and not np.isnan(rewards[j, k])]
            inside = rewards[members, k]
            if i in members and len(set(inside)) > 1:
                result[i] += weight * (rewards[i, k] - inside.mean()) / (inside.std(ddof=1) + epsilon)
    return result


def compared(rewards, groups):
    return [i for i in range(len(rewards)) if groups[i] >= 0 and not np.isnan(rewards[i]).all()]


def over_rows(rewards, groups, weights):
    s, inside, result = sums(rewards, groups, weights, 1e-4), compared(rewards, groups), np.zeros(len(rewards))
    for i in inside:
        result[i] = (s[i] - s[inside].mean()) / (s[inside].std(ddof=1) + 1e-4)
    return result


def over_decisions(rewards, groups, weights, mask):
    s, result = sums(rewards, groups, weights, 1e-6), np.zeros(mask.shape)
    places = [(i, t) for i in compared(rewards, groups) for t in range(mask.shape[1]) if mask[i, t]]
    values = np.array([s[i] for i, _ in places])
    for i, t in places:
        result[i, t] = (s[i] - values.mean()) / np.sqrt(values.var(ddof=1) + 1e-8)
    return result


def ragged(seed):
    """Groups of all sizes, rows in none, a constant channel in one group, missing channels, a row without any."""
    draw = np.random.default_rng(seed)
    rewards, groups = draw.normal(0, 2, (30, 3)), draw.integers(-1, 6, 30)
    rewards[:, 0] = draw.integers(0, 2, 30)
    rewards[draw.random((30, 3)) < 0.15] = np.nan
    rewards[groups == 3, 1] = 0.85
    rewards[groups == 4] = 0.85
    rewards[np.flatnonzero(groups == 2)[0]] = np.nan
    groups[np.flatnonzero(groups == 5)[1:]] = -1
    mask = (np.arange(6) < draw.integers(0, 7, (30, 1))) & (draw.random((30, 6)) > 0.2)
    return rewards, groups, mask


def test_worked_example():
    """The rarer success on the first channel counts more; sums of rewards cannot tell the prompts apart."""
    s = decoupled(TWO_PROMPTS, GROUPS, (1, 1))
    np.testing.assert_allclose(s, [1.731751, 0, 0, -1.731751, -1.999600, 0, 0, 1.999600], atol=1e-6)
    a = decoupled_over_rows(TWO_PROMPTS, GROUPS, (1, 1))
    np.testing.assert_allclose(a, [1.224677, 0, 0, -1.224677, -1.414097, 0, 0, 1.414097], atol=1e-6)


def test_long_completions_weigh_more_over_decisions():
    """z of two groups of two is +-1/sqrt(2); lengths 3, 1, 1, 1: mean and variance of [+++, -, +, -] in those units."""
    mask = np.arange(3) < np.array([3, 1, 1, 1])[:, None]
    a = decoupled_over_decisions(np.array([[1.0], [0], [1], [0]]), np.array([0, 0, 1, 1]), (1,), mask)
    entries = np.array([1, 1, 1, -1, 1, -1])
    expected = (entries - entries.mean()) / entries.std(ddof=1)
    np.testing.assert_allclose(np.asarray(a)[mask], expected, atol=1e-5)
    assert not np.asarray(a)[~mask].any() and abs(np.asarray(a)[:, 0].sum()) > 0.5


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_against_float64(seed):
    rewards, groups, mask = ragged(seed)
    for epsilon in (1e-4, 0.5):
        got = decoupled(rewards, groups, WEIGHTS, epsilon=epsilon)
        np.testing.assert_allclose(got, sums(rewards, groups, WEIGHTS, epsilon), rtol=2e-5, atol=2e-6)
    got = decoupled_over_rows(rewards, groups, WEIGHTS)
    np.testing.assert_allclose(got, over_rows(rewards, groups, WEIGHTS), rtol=2e-5, atol=3e-6)
    got = decoupled_over_decisions(rewards, groups, WEIGHTS, mask)
    np.testing.assert_allclose(got, over_decisions(rewards, groups, WEIGHTS, mask), rtol=2e-5, atol=3e-6)
    absent = (groups < 0) | np.isnan(rewards).all(1)
    assert not np.asarray(got)[absent | ~mask.any(1)].any() and not np.asarray(got)[~mask].any()


def test_rows_do_not_know_their_neighbours():
    rewards, groups, mask = ragged(3)

    @jax.jit
    def all_of_them(rewards, group_ids, mask):
        return (
            channels.decoupled(rewards, group_ids, WEIGHTS),
            channels.decoupled_over_rows(rewards, group_ids, WEIGHTS),
            channels.decoupled_over_decisions(rewards, group_ids, WEIGHTS, mask),
            channels.gate(rewards[:, 0], rewards[:, 1], at_least=0.3),
        )

    laws.rows(all_of_them, {"rewards": rewards, "group_ids": groups, "mask": mask})


@pytest.mark.parametrize("name", ["decoupled", "rows", "decisions"])
def test_gradients(name):
    """Missing rewards, infinities outside every group and constant channels spoil nothing."""
    rewards, groups, mask = ragged(4)
    pull = np.random.default_rng(1).normal(size=mask.shape)
    ours, theirs = {
        "decoupled": (lambda r: decoupled(r, groups, WEIGHTS), lambda r: sums(r, groups, WEIGHTS, 1e-4)),
        "rows": (lambda r: decoupled_over_rows(r, groups, WEIGHTS), lambda r: over_rows(r, groups, WEIGHTS)),
        "decisions": (
            lambda r: decoupled_over_decisions(r, groups, WEIGHTS, mask),
            lambda r: over_decisions(r, groups, WEIGHTS, mask),
        ),
    }[name]
    pull = pull if name == "decisions" else pull[:, 0]
    dirty = np.where((groups < 0)[:, None], np.inf, rewards)
    gradient = np.asarray(jax.jit(jax.grad(lambda r: jnp.sum(pull * ours(r))))(jnp.float32(dirty)))
    assert not gradient[np.isnan(rewards) | (groups < 0)[:, None]].any()
    for i, k in itertools.product(range(30), range(3)):
        alike = [j for j in range(30) if groups[j] == groups[i] >= 0 and not np.isnan(rewards[j, k])]
        if np.isnan(rewards[i, k]) or len(set(rewards[alike, k])) < 2:
            assert gradient[i, k] == 0  # the jump from 0 has no derivative
            continue
        up, down = rewards.copy(), rewards.copy()
        up[i, k] += 1e-5
        down[i, k] -= 1e-5
        slope = np.sum(pull * (theirs(up) - theirs(down))) / 2e-5
        np.testing.assert_allclose(gradient[i, k], slope, rtol=2e-3, atol=2e-3)


def test_what_says_nothing_gives_exactly_nothing():
    rewards, groups = np.full((9, 2), 0.85), np.array([0] * 7 + [1, -1])
    for got in (
        decoupled(rewards, groups, (1, 3)),
        decoupled_over_rows(rewards, groups, (1, 3)),
        decoupled_over_decisions(rewards, groups, (1, 3), np.ones((9, 4), bool)),
    ):
        assert got.dtype == jnp.float32 and not np.asarray(got).any()


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(-5, 5)), min_size=8, max_size=8),
    st.lists(st.integers(-1, 3), min_size=8, max_size=8),
    st.sampled_from([0.5, 2.0, 16.0]),
    st.integers(-3, 3),
)
def test_neither_scale_nor_level_of_a_channel_matters(rewards, groups, scale, shift):
    rewards, groups = np.array(rewards, np.float32), np.array(groups)
    moved = rewards * [scale, 1] + [shift, 0]
    base = np.asarray(decoupled(rewards, groups, (1.0, 2.0), epsilon=0.0))
    np.testing.assert_allclose(
        decoupled(np.float32(moved), groups, (1.0, 2.0), epsilon=0.0), base, rtol=1e-5, atol=1e-5
    )
    assert all(abs(base[groups == g].sum()) < 1e-4 for g in range(4))


def test_one_channel_is_plain_grpo_on_the_scale_of_the_batch():
    rewards, groups, _ = ragged(5)
    one = rewards[:, :1]
    plain, a = np.asarray(decoupled(one, groups, (1,))), np.asarray(decoupled_over_rows(one, groups, (1,)))
    np.testing.assert_allclose(plain, sums(one, groups, (1,), 1e-4), atol=2e-6)
    inside = compared(one, groups)
    assert np.std(a[inside], ddof=1) == pytest.approx(1, abs=1e-3)
    np.testing.assert_allclose(a[inside] * np.std(plain[inside], ddof=1), plain[inside], atol=1e-3)


def test_gate():
    """Below the threshold the easy reward is 0; where either does not apply, so is the result."""
    got = gate(np.array([1, 1, 0.5, np.nan, 1, np.nan]), np.array([1, 0.9, 3, 1, np.nan, 0]), at_least=1.0)
    np.testing.assert_array_equal(got, [1, 0, 0.5, np.nan, np.nan, np.nan])


def test_refusals():
    with pytest.raises(ValueError, match=r"rewards \[8, 2\], group_ids \[8\] and weights \[3\]"):
        decoupled(TWO_PROMPTS, GROUPS, WEIGHTS)
    with pytest.raises(ValueError, match=r"rewards \[8\], group_ids \[8\]"):
        decoupled_over_rows(TWO_PROMPTS[:, 0], GROUPS, (1,))
    with pytest.raises(ValueError, match=r"\[N, T\] with N = 8 completions, got \[4, 2\]"):
        decoupled_over_decisions(TWO_PROMPTS, GROUPS, (1, 1), np.ones((4, 2)))
    with pytest.raises(ValueError, match=r"rewards \[2\] and on \[3\]"):
        gate(np.ones(2), np.ones(3), at_least=0.0)
