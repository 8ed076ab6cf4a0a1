"""Group means with other scales, and further baselines: numbers worked by hand, float64 loops, gradients, laws."""

import functools

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.advantages.baselines import length_weighted, over_greedy, signal_scaled
from grpo_jax.advantages.group import batch_scaled, group_centered, group_z_score, keep_singletons, leave_one_out

REWARDS = np.array([1, 0, 0, 0, 1, 1, 0, 1.0])
GROUPS = np.array([0, 0, 0, 0, 1, 1, 1, 2])
LENGTHS = np.array([3, 1, 2, 2, 1, 3, 2, 2])


def test_worked_example():
    """Groups of 4, 3 and 1; the single row has 0, or its reward where it is kept."""
    weighted = length_weighted(REWARDS, LENGTHS, GROUPS)
    np.testing.assert_allclose(weighted, [0.625, *[-0.375] * 3, 1 / 3, 1 / 3, -2 / 3, 0], atol=1e-6)
    np.testing.assert_allclose(keep_singletons(weighted, REWARDS, GROUPS)[-1], 1)
    # half of the rewards are not 0, so the differences from the mean double
    scaled = signal_scaled(REWARDS, GROUPS)
    np.testing.assert_allclose(scaled, 2 * np.array([0.75, *[-0.25] * 3, 1 / 3, 1 / 3, -2 / 3, 0]), atol=1e-6)
    # 4 of 8 are 1: variance 8/4/7
    divided = batch_scaled(REWARDS, GROUPS)
    expected = np.array([0.75, *[-0.25] * 3, 1 / 3, 1 / 3, -2 / 3, 0]) / (np.sqrt(2 / 7) + 1e-4)
    np.testing.assert_allclose(divided, expected, atol=1e-6)
    for estimator, alone in ((group_z_score, 1), (group_centered, 1), (leave_one_out, 1)):
        kept = np.asarray(keep_singletons(estimator(REWARDS, GROUPS), REWARDS, GROUPS))
        np.testing.assert_allclose(kept[-1], alone, atol=1e-6)
        np.testing.assert_array_equal(kept[:-1], estimator(REWARDS, GROUPS)[:-1])


def test_over_greedy_worked_example():
    """Each sampled row against its prompt's greedy one; no greedy row, nothing to compare with."""
    greedy = np.array([0, 0, 1, 0, 0, 1, 0, 0], bool)
    got = over_greedy(np.array([1, 0.5, 0.25, 0, 1, 1, 0, 1]), GROUPS, greedy)
    np.testing.assert_allclose(got, [0.75, 0.25, 0, -0.25, 0, 0, -1, 0], atol=1e-6)


def oracle(name, rewards, groups, lengths=None, greedy=None):
    n = len(rewards)
    there = [i for i in range(n) if groups[i] >= 0 and not np.isnan(rewards[i])]
    result = np.zeros(n)
    for i in there:
        members = [j for j in there if groups[j] == groups[i]]
        if name == "length_weighted":
            weight = sum(lengths[j] for j in members)
            result[i] = rewards[i] - sum(lengths[j] * rewards[j] for j in members) / weight if weight else 0
        elif name == "over_greedy":
            best = [rewards[j] for j in members if greedy[j]]
            result[i] = rewards[i] - np.mean(best) if best and not greedy[i] else 0
        elif name == "keep_singletons":
            result[i] = rewards[i] if len(members) == 1 else rewards[i] - np.mean([rewards[j] for j in members])
        else:
            result[i] = rewards[i] - np.mean([rewards[j] for j in members])
    if name == "signal_scaled":
        result *= len(there) / max(1, sum(rewards[i] != 0 for i in there))
    if name == "batch_scaled":
        result /= (np.std([rewards[i] for i in there], ddof=1) if len(there) > 1 else 0) + 1e-4
    return result


@functools.cache
def ragged(seed):
    """Groups of several sizes, one of equal rewards, one of empty rows, rows in none, rewards that are missing."""
    draw = np.random.default_rng(seed)
    groups = draw.integers(-1, 7, 40)
    rewards = np.where(draw.random(40) < 0.3, draw.integers(0, 2, 40), draw.normal(0, 2, 40))
    rewards[draw.random(40) < 0.3] = 0
    rewards[draw.random(40) < 0.1] = np.nan
    rewards[groups == 3] = 0.85
    groups[7] = 20  # alone
    lengths = draw.integers(0, 9, 40)
    lengths[groups == 4] = 0
    return {"rewards": rewards, "group_ids": groups, "lengths": lengths, "greedy": draw.random(40) < 0.2}


def keep_centered(rewards, group_ids):
    return keep_singletons(group_centered(rewards, group_ids), rewards, group_ids)


ESTIMATORS = {
    "length_weighted": (length_weighted, ("rewards", "lengths", "group_ids")),
    "signal_scaled": (signal_scaled, ("rewards", "group_ids")),
    "batch_scaled": (batch_scaled, ("rewards", "group_ids")),
    "over_greedy": (over_greedy, ("rewards", "group_ids", "greedy")),
    "keep_singletons": (keep_centered, ("rewards", "group_ids")),
}


def transcribed(name, arrays):
    extra = {k: arrays[k] for k in ("lengths", "greedy") if k in arrays}
    return oracle(name, arrays["rewards"], arrays["group_ids"], **extra)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_against_float64_and_laws(name, seed):
    function, wanted = ESTIMATORS[name]
    arrays = {k: ragged(seed)[k] for k in wanted}
    # signal_scaled reads a reward that rounds to 0 in no other way, and none of these does
    got = laws.rows(function, arrays, half=0.05)
    expected = transcribed(name, arrays)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=2e-6)
    assert np.abs(expected).max() > 0.5
    silent = (arrays["group_ids"] < 0) | np.isnan(arrays["rewards"])
    assert silent.any() and not got[silent].any() and got.dtype == np.float32


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("value", [0.85, 1 / 3, -0.1, 1e6])
def test_equal_rewards_give_exactly_nothing(name, value):
    function, wanted = ESTIMATORS[name]
    sizes = (2, 7, 64)
    n = sum(sizes)
    arrays = {
        "rewards": jnp.full(n, value),
        "group_ids": jnp.asarray(np.repeat(range(3), sizes)),
        "lengths": jnp.arange(n) % 13,
        "greedy": jnp.arange(n) % 3 == 0,
    }
    assert not np.asarray(function(**{k: arrays[k] for k in wanted})).any()


@pytest.mark.parametrize("name", ESTIMATORS)
def test_gradients(name):
    """Learned rewards may be differentiated; missing ones spoil nothing."""
    function, wanted = ESTIMATORS[name]
    arrays = {k: ragged(0)[k] for k in wanted}
    arrays["rewards"] = np.where(arrays["rewards"] == 0, 0.5, arrays["rewards"])  # the count of zeros has jumps
    pull = np.random.default_rng(1).normal(size=40)
    gradient = jax.jit(jax.grad(lambda r: jnp.sum(pull * function(**{**arrays, "rewards": r}))))
    gradient = np.asarray(gradient(jnp.float32(arrays["rewards"])))
    for i in np.flatnonzero(~np.isnan(arrays["rewards"])):
        sides = []
        for step in (1e-5, -1e-5):
            rewards = arrays["rewards"].copy()
            rewards[i] += step
            sides.append(pull @ transcribed(name, {**arrays, "rewards": rewards}))
        np.testing.assert_allclose(gradient[i], (sides[0] - sides[1]) / 2e-5, rtol=1e-3, atol=1e-4)
    assert not gradient[np.isnan(arrays["rewards"]) | (arrays["group_ids"] < 0)].any() and np.abs(gradient).max() > 0.1


@given(st.integers(0, 2**32 - 1), st.floats(-5, 5), st.floats(0.1, 10))
@settings(deadline=None, max_examples=20)
def test_shift_and_scale(seed, shift, scale):
    """A shift of all rewards changes nothing (GPG reads zeros, so it is no law there); a scale scales, or nothing."""
    draw = np.random.default_rng(seed)
    arrays = {
        "rewards": draw.normal(size=40),
        "group_ids": draw.integers(-1, 7, 40),
        "lengths": draw.integers(1, 9, 40),
        "greedy": draw.random(40) < 0.2,
    }
    for name in ("length_weighted", "batch_scaled", "over_greedy"):
        function, wanted = ESTIMATORS[name]
        given_ = {k: arrays[k] for k in wanted}
        base = np.asarray(jax.jit(function)(**given_))
        got = jax.jit(function)(**{**given_, "rewards": arrays["rewards"] * scale + shift})
        np.testing.assert_allclose(got, base * (1 if name == "batch_scaled" else scale), rtol=2e-3, atol=2e-4 * scale)


def test_equal_lengths_are_plain_centering_and_twice_as_long_is_there_twice():
    data = ragged(1)
    rewards, groups = data["rewards"], data["group_ids"]
    same = length_weighted(rewards, np.full(40, 7), groups)
    np.testing.assert_allclose(same, group_centered(rewards, groups), rtol=1e-5, atol=1e-6)
    doubled = length_weighted(rewards, np.where(np.arange(40) < 10, 2, 1), groups)
    copied = group_centered(np.append(rewards, rewards[:10]), np.append(groups, groups[:10]))
    np.testing.assert_allclose(doubled, copied[:40], rtol=1e-5, atol=1e-6)


def test_no_reward_at_all():
    for function in (signal_scaled, batch_scaled):
        assert not np.asarray(function(jnp.zeros(6), jnp.zeros(6, jnp.int32))).any()
        assert not np.asarray(function(jnp.full(6, jnp.nan), jnp.zeros(6, jnp.int32))).any()
        assert not np.asarray(function(jnp.ones(6), jnp.full(6, -1))).any()


def test_refusals():
    with pytest.raises(ValueError, match=r"lengths must have one value per row, got \[2\] for \[8\] rewards"):
        length_weighted(REWARDS, jnp.ones(2), GROUPS)
    with pytest.raises(ValueError, match=r"greedy must have one value per row, got \[8, 1\]"):
        over_greedy(REWARDS, GROUPS, jnp.ones((8, 1), bool))
    with pytest.raises(ValueError, match=r"an advantage per row, got \[3\] and rewards \[8\]"):
        keep_singletons(jnp.ones(3), REWARDS, GROUPS)
    for function in (signal_scaled, batch_scaled):
        with pytest.raises(ValueError, match="`combine`"):
            function(REWARDS[:, None], GROUPS)
