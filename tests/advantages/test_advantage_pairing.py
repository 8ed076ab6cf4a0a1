"""Weights of a pair of prompts: the worked example, loops in float64, and what must not matter."""

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from hypothesis import given, settings, strategies

from grpo_jax.advantages.pairing import NORMS, pair_advantages, pair_z_score, success_bands

OUTCOMES = np.array([1] + [0] * 7 + [1] * 7 + [0.0])
PROMPTS = np.repeat([0, 1], 8)
EACH = [0, 1, 8, 15]  # success and failure on the hard prompt, success and failure on the easy one


def of_each(**options):
    return np.asarray(pair_advantages(OUTCOMES, PROMPTS, **options))[EACH]


def test_worked_example():
    np.testing.assert_allclose(of_each(), [2.474870, -0.353553, 0.353553, -2.474870], atol=1e-6)
    np.testing.assert_allclose(of_each(failure=0.5)[0], 2.474869, atol=1e-6)
    np.testing.assert_allclose(of_each(failure=2.0)[0], 2.474871, atol=1e-6)
    np.testing.assert_allclose(of_each(norm="prompt_mean"), [1.75, -0.25, 0.25, -1.75], atol=1e-6)
    half = of_each(norm="prompt_mean", failure=0.5)
    np.testing.assert_allclose(half, [1.3125, -0.1875, 0.1875, -1.3125], atol=1e-6)
    np.testing.assert_allclose(of_each(norm="prompt_mean", failure=2), [2.625, -0.375, 0.375, -2.625], atol=1e-6)
    middle = pair_advantages(np.repeat([0, 1.0], 4), np.zeros(8, int))
    np.testing.assert_allclose(middle[4:], 0.935413, atol=2e-6)
    joint = pair_z_score(OUTCOMES, np.zeros(16, int), PROMPTS == 0)
    np.testing.assert_allclose(np.abs(joint), 0.968245, atol=1e-6)


def test_modes_really_differ():
    """A weight on failures is lost under the z-score of a group, is a scale without it, and acts in the other two."""
    np.testing.assert_allclose(of_each(failure=0.2), of_each(), rtol=2e-6)
    np.testing.assert_allclose(of_each(norm="prompt_mean", failure=0.2), 0.6 * of_each(norm="prompt_mean"), rtol=1e-6)
    np.testing.assert_allclose(of_each(norm="post", failure=0.2), of_each() * [1, 0.2, 1, 0.2], rtol=2e-6)
    joint = np.asarray(pair_z_score(OUTCOMES, np.zeros(16, int), PROMPTS == 0, common=0.2))[EACH]
    np.testing.assert_allclose(joint[0] / joint[2], 5, rtol=1e-5)
    np.testing.assert_allclose(joint[1] / joint[3], 0.2, rtol=1e-5)


def oracle(outcomes, groups, norm, failure, epsilon=1e-6):
    result = np.zeros(len(groups))
    reward = outcomes - failure * (1 - outcomes)
    for i in range(len(groups)):
        members = [j for j in range(len(groups)) if groups[j] == groups[i] >= 0 and not np.isnan(outcomes[j])]
        if i not in members or len(members) < 2 or np.ptp(reward[members]) == 0:
            continue
        result[i] = reward[i] - reward[members].mean()
        if norm != "prompt_mean":
            result[i] /= reward[members].std(ddof=1) + epsilon
        if norm == "post" and result[i] < 0:
            result[i] *= failure
    return result


def joint_oracle(outcomes, pairs, hard, common, epsilon=1e-6):
    reward = [y - common * (1 - y) if h else common * y - (1 - y) for y, h in zip(outcomes, hard)]
    reward, result = np.array(reward), np.zeros(len(pairs))
    for i in range(len(pairs)):
        members = [j for j in range(len(pairs)) if pairs[j] == pairs[i] >= 0 and not np.isnan(outcomes[j])]
        if i in members and len(members) > 1 and np.ptp(reward[members]) > 0:
            result[i] = (reward[i] - reward[members].mean()) / (reward[members].std(ddof=1) + epsilon)
    return result


def rows(seed, n=30):
    draw = np.random.default_rng(seed)
    groups, outcomes = draw.integers(-1, 6, n), draw.integers(0, 2, n).astype(float)
    outcomes[draw.random(n) < 0.15] = np.nan
    outcomes[groups == 3] = 1
    return outcomes, groups, draw.random(n) < 0.5


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("weight", [0.3, 1.0, 2.0])
def test_against_float64(seed, weight):
    outcomes, groups, hard = rows(seed)
    for norm in NORMS:
        got = jax.jit(lambda y, g, norm=norm: pair_advantages(y, g, norm=norm, failure=weight))(outcomes, groups)
        np.testing.assert_allclose(got, oracle(outcomes, groups, norm, weight), rtol=1e-5, atol=1e-5, err_msg=norm)
        assert got.dtype == jnp.float32 and not np.asarray(got)[groups == 3].any()
    got = jax.jit(lambda *a: pair_z_score(*a, common=weight))(outcomes, groups, hard)
    np.testing.assert_allclose(got, joint_oracle(outcomes, groups, hard, weight), rtol=1e-5, atol=1e-5)


def test_epsilon_is_beside_the_root():
    outcomes, groups, hard = rows(2)
    for norm in ("prompt_std", "post"):
        got = pair_advantages(outcomes, groups, norm=norm, failure=2.0, epsilon=0.5)
        np.testing.assert_allclose(got, oracle(outcomes, groups, norm, 2.0, 0.5), rtol=1e-5, atol=1e-5)
    got = pair_z_score(outcomes, groups, hard, epsilon=0.5)
    np.testing.assert_allclose(got, joint_oracle(outcomes, groups, hard, 1.0, 0.5), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_gradients_of_soft_outcomes(norm):
    outcomes, groups, hard = rows(4, n=14)
    outcomes = np.clip(outcomes + np.random.default_rng(0).normal(0, 0.2, 14), 0, 1.2)
    pull = np.random.default_rng(1).normal(size=14)

    def slopes(function):
        result = np.zeros(14)
        for i in np.flatnonzero(~np.isnan(outcomes)):
            up, down = outcomes.copy(), outcomes.copy()
            up[i] += 1e-6
            down[i] -= 1e-6
            result[i] = pull @ (function(up) - function(down)) / 2e-6
        return result

    gradient = jax.jit(jax.grad(lambda y: pull @ pair_advantages(y, groups, norm=norm, failure=0.5)))(
        jnp.float32(outcomes)
    )
    np.testing.assert_allclose(gradient, slopes(lambda y: oracle(y, groups, norm, 0.5)), rtol=1e-3, atol=1e-3)
    gradient = jax.jit(jax.grad(lambda y: pull @ pair_z_score(y, groups, hard, common=0.5)))(jnp.float32(outcomes))
    np.testing.assert_allclose(gradient, slopes(lambda y: joint_oracle(y, groups, hard, 0.5)), rtol=1e-3, atol=1e-3)


def test_laws():
    outcomes, groups, hard = rows(3)
    outcomes = np.nan_to_num(outcomes)

    def advantages(outcomes, group_ids):
        return pair_advantages(outcomes, group_ids, norm="post", failure=0.5)

    laws.rows(advantages, {"outcomes": outcomes, "group_ids": groups})
    laws.rows(pair_z_score, {"outcomes": outcomes, "pair_ids": groups, "hard": hard}, ids=("pair_ids",))


@given(size=strategies.sampled_from([5, 7, 8, 49, 64]), width=strategies.integers(1, 2))
@settings(max_examples=12, deadline=None)
def test_bands(size, width):
    """By counts, whatever the rounding of k / G."""
    hard, easy = success_bands(np.arange(size + 1) / size, group_size=size, width=width)
    np.testing.assert_array_equal(np.flatnonzero(hard), np.arange(1, width + 1))
    np.testing.assert_array_equal(np.flatnonzero(easy), np.arange(size - width, size))


def test_messages():
    with pytest.raises(ValueError, match=r"one of \('prompt_std', 'prompt_mean', 'post'\), got 'role'"):
        pair_advantages(OUTCOMES, PROMPTS, norm="role")
    with pytest.raises(ValueError, match="failure is how much an outcome weighs beside 1 and must be above 0, got 0"):
        pair_advantages(OUTCOMES, PROMPTS, failure=0)
    with pytest.raises(ValueError, match="common is how much"):
        pair_z_score(OUTCOMES, PROMPTS, PROMPTS == 0, common=-1.0)
    with pytest.raises(ValueError, match=r"one entry per row, got \[3\] for \[16\]"):
        pair_z_score(OUTCOMES, PROMPTS, PROMPTS[:3] == 0)
    with pytest.raises(ValueError, match="from 1 to less than half of 8, got 4"):
        success_bands(OUTCOMES, group_size=8, width=4)
