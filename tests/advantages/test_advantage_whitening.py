"""Returns, whitening over the batch and REINFORCE++: numbers worked by hand, float64 loops, gradients, laws."""

import functools

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.advantages.group import group_centered, keep_singletons
from grpo_jax.advantages.returns import at_last, discounted_returns
from grpo_jax.advantages.shaping import per_decision
from grpo_jax.advantages.whitening import (
    reinforce_plus_plus,
    reinforce_plus_plus_baseline,
    whiten_rows,
    whiten_tokens,
)

REWARDS = np.array([1, 0, 0, 0, 1, 1, 0, 1.0])
GROUPS = np.array([0, 0, 0, 0, 1, 1, 1, 2])
MASK = np.arange(3) < np.array([3, 1, 2, 2, 1, 3, 2, 2])[:, None]


def test_worked_example():
    """Rows of 3, 1, 2, 2, 1, 3, 2, 2 decisions. The single row's reward is its difference where it is kept."""
    got = reinforce_plus_plus(at_last(REWARDS, MASK), MASK)
    np.testing.assert_allclose(got, np.where(MASK, np.where(REWARDS == 1, 0.853913, -1.097888)[:, None], 0), atol=1e-6)
    kept = keep_singletons(group_centered(REWARDS, GROUPS), REWARDS, GROUPS)
    expected = np.array([0.997404, *[-0.775759] * 3, 0.258586, 0.258586, -1.514576, 1.440694])
    np.testing.assert_allclose(
        whiten_tokens(per_decision(kept, MASK), MASK), np.where(MASK, expected[:, None], 0), atol=2e-6
    )
    # Without the single row both are one.
    ours = reinforce_plus_plus_baseline(REWARDS[:-1], GROUPS[:-1], MASK[:-1])
    theirs = whiten_tokens(per_decision(kept[:-1], MASK[:-1]), MASK[:-1])
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_returns_worked_example():
    """A half of what comes one decision later; a tool's words in between end the sum or are passed over."""
    rewards, mask = jnp.array([[0, 1, 9, 0, 4.0]]), jnp.array([[1, 1, 0, 1, 1]], bool)
    np.testing.assert_allclose(discounted_returns(rewards, mask, gamma=0.5), [[0.5, 1, 0, 2, 4]])
    np.testing.assert_allclose(discounted_returns(rewards, mask, gamma=0.5, across_gaps=True), [[1, 2, 0, 2, 4]])
    np.testing.assert_allclose(at_last(jnp.array([3.0]), mask), [[0, 0, 0, 0, 3]])
    np.testing.assert_allclose(at_last(jnp.array([3.0]), mask[:, :4]), [[0, 0, 0, 3]])
    assert not np.asarray(at_last(jnp.array([3.0]), jnp.zeros((1, 4), bool))).any()


def returns_oracle(rewards, mask, gamma, across_gaps):
    result = np.zeros(mask.shape)
    for i in range(len(mask)):
        running = 0.0
        for t in reversed(range(mask.shape[1])):
            if mask[i, t]:
                running = rewards[i, t] + gamma * running
                result[i, t] = running
            elif not across_gaps:
                running = 0.0
    return result


def whiten_oracle(values, mask, epsilon, inside_root, ddof=1):
    some = [values[place] for place in np.ndindex(mask.shape) if mask[place]]
    if len(some) < 2 or np.ptp(some) == 0:
        return np.zeros(mask.shape)
    mean = sum(some) / len(some)
    variance = sum((x - mean) ** 2 for x in some) / (len(some) - ddof)
    scale = np.sqrt(variance + epsilon) if inside_root else np.sqrt(variance) + epsilon
    return np.where(mask, (np.where(mask, values, 0) - mean) / scale, 0)


@functools.cache
def ragged(seed):
    """Rows of several lengths, with gaps, one empty; groups of several sizes, rows in none, rewards missing."""
    draw = np.random.default_rng(seed)
    n, t = 21, 7
    lengths = np.concatenate([[0, t, 1], draw.integers(2, t + 1, n - 3)])
    mask = (np.arange(t) < lengths[:, None]) & (draw.random((n, t)) > 0.15)
    groups = draw.integers(-1, 6, n)
    scalar = draw.normal(0.7, 1, n).round(2)
    scalar[groups == 2] = 0.85
    scalar[draw.random(n) < 0.15] = np.nan
    rewards = np.where(mask, draw.normal(size=(n, t)), np.nan)
    return {"rewards": rewards, "mask": mask, "group_ids": groups, "scalar": scalar}


def rf_oracle(rewards, mask, gamma, across_gaps):
    applies = ~np.array([any(np.isnan(r[m])) for r, m in zip(rewards, mask)])
    mask = mask & applies[:, None]
    return whiten_oracle(returns_oracle(rewards, mask, gamma, across_gaps), mask, 1e-8, True)


def baseline_oracle(scalar, group_ids, mask):
    rewards = scalar
    there = (group_ids >= 0) & ~np.isnan(rewards)
    difference = np.zeros(len(rewards))
    for i in np.flatnonzero(there):
        difference[i] = rewards[i] - np.mean(rewards[there & (group_ids == group_ids[i])])
    mask = mask & there[:, None]
    return whiten_oracle(np.where(mask, difference[:, None], 0), mask, 1e-8, True)


@pytest.mark.parametrize("across_gaps", [False, True])
@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_returns_against_float64(seed, gamma, across_gaps):
    data = ragged(seed)
    expected = returns_oracle(data["rewards"], data["mask"], gamma, across_gaps)
    got = jax.jit(lambda r, m: discounted_returns(r, m, gamma=gamma, across_gaps=across_gaps))(
        jnp.float32(data["rewards"]), data["mask"]
    )
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    gaps = returns_oracle(data["rewards"], data["mask"], gamma, not across_gaps)
    assert gamma == 0 or np.abs(gaps - expected).max() > 0.1  # there are gaps, and they matter


CASES = {
    "whiten_tokens": (
        lambda rewards, mask: whiten_tokens(rewards, mask),
        lambda rewards, mask: whiten_oracle(rewards, mask, 1e-8, True),
        ("rewards", "mask"),
    ),
    "whiten_rows": (
        lambda scalar: whiten_rows(scalar),
        lambda scalar: whiten_oracle(scalar, ~np.isnan(scalar), 1e-4, False),
        ("scalar",),
    ),
    "reinforce_plus_plus": (
        lambda rewards, mask: reinforce_plus_plus(rewards, mask, gamma=0.9),
        lambda rewards, mask: rf_oracle(rewards, mask, 0.9, False),
        ("rewards", "mask"),
    ),
    "reinforce_plus_plus_baseline": (
        lambda scalar, group_ids, mask: reinforce_plus_plus_baseline(scalar, group_ids, mask),
        baseline_oracle,
        ("scalar", "group_ids", "mask"),
    ),
}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", CASES)
def test_against_float64_and_laws(name, seed):
    function, expected, wanted = CASES[name]
    arrays = {k: ragged(seed)[k] for k in wanted}
    ids = tuple(k for k in wanted if k == "group_ids")
    got = laws.rows(function, arrays, ids=ids)
    np.testing.assert_allclose(got, expected(**arrays), rtol=1e-5, atol=2e-6)
    assert np.abs(got).max() > 1


def test_a_row_whose_reward_is_missing_takes_no_part():
    data = ragged(0)
    rewards, mask = data["rewards"].copy(), data["mask"]
    row = int(np.flatnonzero(mask.sum(1) > 2)[0])
    rewards[row, np.flatnonzero(mask[row])[1]] = np.nan
    got = reinforce_plus_plus(rewards, mask, gamma=0.9)
    without = mask.copy()
    without[row] = False
    np.testing.assert_array_equal(got, reinforce_plus_plus(rewards, without, gamma=0.9))
    np.testing.assert_allclose(got, rf_oracle(rewards, mask, 0.9, False), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", CASES)
def test_gradients(name):
    """By finite differences of the oracle, with NaN or infinities under the mask."""
    function, oracle, wanted = CASES[name]
    arrays = {k: ragged(0)[k] for k in wanted}
    values = arrays[wanted[0]]
    pull = np.random.default_rng(1).normal(size=np.shape(oracle(**arrays)))
    gradient = jax.jit(jax.grad(lambda v: jnp.sum(pull * function(**{**arrays, wanted[0]: v}))))
    found = np.asarray(gradient(jnp.float32(values)))
    garbage = np.where(np.isnan(values), np.inf, values) if wanted[0] == "rewards" else values
    np.testing.assert_array_equal(gradient(jnp.float32(garbage)), found)
    for place in map(tuple, np.argwhere(~np.isnan(values))):
        sides = []
        for step in (1e-6, -1e-6):
            moved = values.copy()
            moved[place] += step
            sides.append(np.sum(pull * oracle(**{**arrays, wanted[0]: moved})))
        np.testing.assert_allclose(found[place], (sides[0] - sides[1]) / 2e-6, rtol=1e-3, atol=1e-4)
    assert not found[np.isnan(values)].any() and np.abs(found).max() > 0.1


@pytest.mark.parametrize("value", [0.85, 1 / 3, -1e-7, 12345.678])
def test_equal_values_become_exactly_nothing(value):
    mask = np.arange(37) < np.random.default_rng(0).integers(1, 38, 50)[:, None]
    row = jnp.full(50, value)
    everything = jax.jit(
        lambda row: (
            whiten_tokens(jnp.broadcast_to(row[:, None], mask.shape), mask),
            whiten_rows(row),
            reinforce_plus_plus(at_last(row, mask), mask),
            reinforce_plus_plus_baseline(row, jnp.arange(50) % 7, mask),
        )
    )
    assert not any(np.asarray(whitened).any() for whitened in everything(row))


@pytest.mark.parametrize("allowed", [0, 1])
def test_none_and_one(allowed):
    """Nothing to whiten, or a single value: 0, and a gradient of 0."""
    mask = np.arange(12).reshape(3, 4) < allowed
    for function in (whiten_tokens, reinforce_plus_plus):
        value, gradient = jax.jit(jax.value_and_grad(lambda x, f=function: f(x, mask).sum()))(jnp.full((3, 4), 2.5))
        assert float(value) == 0 and not np.asarray(gradient).any()
    value, gradient = jax.jit(jax.value_and_grad(lambda x: whiten_rows(x, mask[:, 0]).sum()))(jnp.full(3, 2.5))
    assert float(value) == 0 and not np.asarray(gradient).any()


def test_half_a_million_decisions_far_from_zero():
    """Sums in float32 hold where there are many terms, and where the mean is a thousand spreads away."""
    draw = np.random.default_rng(0)
    mask = np.arange(1024) < draw.integers(1, 1025, 1024)[:, None]
    values = np.float32(1000 + draw.normal(size=mask.shape))
    some = np.float64(values[mask])
    got = np.asarray(jax.jit(whiten_tokens)(values, mask))[mask]
    np.testing.assert_allclose(got, (some - some.mean()) / some.std(ddof=1), atol=2e-5)


@given(st.integers(0, 2**32 - 1), st.floats(-10, 10), st.floats(0.1, 10))
@settings(deadline=None, max_examples=20)
def test_what_is_whitened(seed, shift, scale):
    """Mean 0, variance 1, whatever the shift and scale; and whitening twice is whitening once."""
    draw = np.random.default_rng(seed)
    values, mask = draw.normal(size=(8, 6)), draw.random((8, 6)) < 0.7
    if mask.sum() < 2:
        return
    whiten = jax.jit(whiten_tokens)
    got = np.asarray(whiten(values, mask))
    assert abs(got[mask].mean()) < 1e-5 and abs(got[mask].var(ddof=1) - 1) < 1e-4
    np.testing.assert_allclose(whiten(values * scale + shift, mask), got, atol=1e-3)
    np.testing.assert_allclose(whiten(got, mask), got, atol=1e-5)


def test_refusals():
    with pytest.raises(ValueError, match=r"got \[3\] and \[3, 4\]; `at_last` puts one reward per row"):
        discounted_returns(jnp.ones(3), jnp.ones((3, 4), bool))
    with pytest.raises(ValueError, match=r"got \[3\] and \[3, 4\]; `at_last`"):
        reinforce_plus_plus(jnp.ones(3), jnp.ones((3, 4), bool))
    with pytest.raises(ValueError, match=r"gamma is a discount in \[0, 1\], got 1.5"):
        discounted_returns(jnp.ones((3, 4)), jnp.ones((3, 4), bool), gamma=1.5)
    with pytest.raises(ValueError, match=r"at_last needs values \[N\] and a mask \[N, T\], got \[2\]"):
        at_last(jnp.ones(2), jnp.ones((3, 4), bool))
    with pytest.raises(ValueError, match=r"`per_decision` spreads a value per row"):
        whiten_tokens(jnp.ones(3), jnp.ones((3, 4), bool))
    with pytest.raises(ValueError, match=r"one value per row, got \[3, 4\]"):
        whiten_rows(jnp.ones((3, 4)))
    with pytest.raises(ValueError, match=r"got rewards \[3, 4\] and group_ids \[3\]"):
        reinforce_plus_plus_baseline(jnp.ones((3, 4)), jnp.zeros(3, jnp.int32), jnp.ones((3, 4), bool))
