"""TEMPO's tree: the worked example, completions compared prefix by prefix in float64, telescoping, exact zeros."""

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.advantages.group import group_z_score
from grpo_jax.advantages.tree import prefix_gains, prefix_tree

TOKENS = jnp.array([[5, 7, 1, 0], [5, 7, 2, 9], [5, 8, 1, 0], [6, 7, 1, 0]])
LENGTHS = jnp.array([3, 4, 3, 3])
EXPECTED = [
    [1.666667, 1.833333, 2.5, 0],
    [-0.333333, -0.166667, -1.5, -0.5],
    [-0.333333, -1.166667, -0.5, 0],
    [-1.0, -0.5, -0.5, 0],
]


def test_worked_example():
    rewards, groups = jnp.array([1.0, 0, 0, 0]), jnp.zeros(4, int)
    np.testing.assert_allclose(prefix_tree(rewards, groups, TOKENS, LENGTHS), EXPECTED, atol=1e-6)
    gains = prefix_gains(rewards, groups, TOKENS, LENGTHS)
    np.testing.assert_allclose(gains[0], [0.083333, 0.166667, 0.5, 0], atol=1e-6)
    assert not np.asarray(gains)[[1, 2, 2, 3, 3], [3, 2, 3, 1, 2]].any()  # unique, or beyond the end


def value(i, t, rewards, groups, tokens, lengths):
    """Mean reward of the rows of i's group that have i's first t tokens."""
    below = [
        rewards[j]
        for j in range(len(rewards))
        if groups[j] == groups[i]
        and not np.isnan(rewards[j])
        and lengths[j] >= t
        and list(tokens[j][:t]) == list(tokens[i][:t])
    ]
    return np.mean(below)


def oracle(rewards, groups, tokens, lengths):
    gains, result = np.zeros(tokens.shape), np.zeros(tokens.shape)
    for i in range(len(rewards)):
        group = [r for r, g in zip(rewards, groups) if g == groups[i] and not np.isnan(r)]
        if groups[i] < 0 or np.isnan(rewards[i]):
            continue
        for t in range(lengths[i]):
            arguments = rewards, groups, tokens, lengths
            gains[i, t] = value(i, t + 1, *arguments) - value(i, t, *arguments)
            if len(group) > 1 and np.std(group) > 1e-8:
                result[i, t] = (rewards[i] - np.mean(group) + gains[i, t]) / np.std(group, ddof=1)
    return gains, result


def ragged(seed, n=26, width=6, vocabulary=3):
    """Few symbols, so that prefixes are shared; groups in any order, an empty row, copies."""
    draw = np.random.default_rng(seed)
    rows = {
        "rewards": np.where(draw.random(n) < 0.5, draw.integers(0, 2, n), draw.normal(size=n).round(2)),
        "group_ids": draw.integers(-1, 4, n),
        "tokens": draw.integers(0, vocabulary, (n, width)),
        "lengths": draw.integers(0, width + 1, n),
    }
    rows["rewards"][draw.random(n) < 0.15] = np.nan
    rows["rewards"][rows["group_ids"] == 2] = 0.85
    twin = np.flatnonzero((rows["group_ids"] == 1) & ~np.isnan(rows["rewards"]))[:2]
    for name in ("tokens", "lengths"):
        rows[name][twin[1]] = rows[name][twin[0]]
    return rows


@pytest.mark.parametrize("seed", [0, 1])
def test_against_float64(seed):
    rows = ragged(seed)
    gains, advantages = oracle(*rows.values())
    np.testing.assert_allclose(jax.jit(prefix_gains)(**rows), gains, atol=2e-6)
    got = laws.rows(prefix_tree, rows) if seed == 0 else jax.jit(prefix_tree)(**rows)
    np.testing.assert_allclose(got, advantages, rtol=1e-5, atol=5e-6)
    assert np.abs(gains).max() > 0.3 and np.abs(advantages).max() > 1
    assert not np.asarray(got)[rows["group_ids"] == 2].any()  # equal rewards give exactly nothing
    dirty = np.where(np.arange(6) < rows["lengths"][:, None], rows["tokens"], -999)
    np.testing.assert_array_equal(jax.jit(prefix_tree)(rows["rewards"], rows["group_ids"], dirty, rows["lengths"]), got)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_gains_add_up_and_are_zero_where_nothing_branches(seed):
    draw = np.random.default_rng(seed)
    rewards, groups = draw.normal(size=12).astype(np.float32), draw.integers(0, 3, 12)
    tokens, lengths = draw.integers(0, 2, (12, 5)), draw.integers(1, 6, 12)
    gains = np.asarray(jax.jit(prefix_gains)(rewards, groups, tokens, lengths))
    for i in range(12):
        arguments = i, rewards, groups, tokens, lengths
        whole = value(i, lengths[i], *arguments[1:]) - value(i, 0, *arguments[1:])
        assert gains[i].sum() == pytest.approx(whole, abs=3e-6)
        for t in range(lengths[i]):
            mates = [j for j in range(12) if groups[j] == groups[i] and lengths[j] >= t]
            mates = [j for j in mates if list(tokens[j][:t]) == list(tokens[i][:t])]
            if all(lengths[j] > t and tokens[j][t] == tokens[i][t] for j in mates):
                assert gains[i, t] == 0


def test_without_branches_it_is_grpo():
    """First tokens all differ but for a common one: after it every completion is alone."""
    rewards, groups = jnp.array([1.0, 0, 0.5, 0]), jnp.zeros(4, int)
    tokens = jnp.stack([jnp.full(4, 9), jnp.arange(4), jnp.full(4, 2)], axis=1)
    got = prefix_tree(rewards, groups, tokens, jnp.full(4, 3))
    plain = group_z_score(rewards, groups, epsilon=0)
    np.testing.assert_allclose(got[:, 0], plain, rtol=1e-6)
    np.testing.assert_allclose(got[:, 2], plain, rtol=1e-6)
    np.testing.assert_allclose(got[:, 1], 2 * plain, rtol=1e-6)


def test_shift_and_scale_do_not_matter():
    rows = ragged(4)
    base = np.asarray(prefix_tree(**rows))
    moved = prefix_tree(**{**rows, "rewards": 4 * rows["rewards"] + 3})
    np.testing.assert_allclose(moved, base, rtol=1e-4, atol=1e-5)


def test_groups_with_the_same_texts_stay_apart():
    rewards = jnp.array([1.0, 0, 0, 1, 0, 0, 0.5, 0.5])
    both = prefix_tree(rewards, jnp.repeat(jnp.array([5, 2]), 4), jnp.tile(TOKENS, (2, 1)), jnp.tile(LENGTHS, 2))
    for part in (slice(0, 4), slice(4, 8)):
        alone = prefix_tree(rewards[part], jnp.zeros(4, int), TOKENS, LENGTHS)
        np.testing.assert_allclose(both[part], alone, atol=1e-6)


def test_gradient_against_finite_differences():
    """With NaN and infinite rewards in the rows that are not compared."""
    rows = ragged(0, n=16)
    rewards, others = rows["rewards"], tuple(rows.values())[1:]
    dirty = np.where(rows["group_ids"] < 0, np.inf, rewards)
    pull = np.random.default_rng(0).normal(size=rows["tokens"].shape)
    slope = jax.jit(jax.grad(lambda r: jnp.sum(pull * prefix_tree(r, *others))))(jnp.float32(dirty))
    for i in range(len(rewards)):
        if np.isnan(rewards[i]) or rows["group_ids"][i] in (-1, 2):  # equal rewards: the jump from 0 has no derivative
            assert slope[i] == 0
            continue
        up, down = rewards.copy(), rewards.copy()
        up[i], down[i] = up[i] + 1e-5, down[i] - 1e-5
        moved = np.sum(pull * (oracle(up, *others)[1] - oracle(down, *others)[1])) / 2e-5
        np.testing.assert_allclose(slope[i], moved, rtol=2e-3, atol=2e-3)


def test_errors():
    rewards, groups = jnp.zeros(4), jnp.zeros(4, int)
    with pytest.raises(ValueError, match=r"tokens \[N, T\] and lengths \[N\] for 4 rewards, got \[3, 4\] and \[4\]"):
        prefix_tree(rewards, groups, TOKENS[:3], LENGTHS)
    with pytest.raises(ValueError, match="one reward and one id per row"):
        prefix_gains(rewards[:, None], groups, TOKENS, LENGTHS)
