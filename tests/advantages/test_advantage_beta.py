"""The Beta normalisation: the worked example, float64 loops with scipy's density, its special cases, corners."""

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta as beta_distribution

from grpo_jax.advantages import beta as library
from grpo_jax.advantages.group import group_centered, group_z_score

beta_normalized = jax.jit(library.beta_normalized, static_argnames=("low", "high", "limit"))
beta_parameters, beta_weights = jax.jit(library.beta_parameters), jax.jit(library.beta_weights)

REWARDS, GROUPS = np.array([1, 0, 0, 0, 1, 1, 0, 0, 1, 1, 1, 0.0]), np.repeat([0, 1, 2], 4)


def fit(rates):
    if len(rates) < 2 or np.ptp(rates) < 1e-5:
        return 1.0, 1.0
    m, v = np.mean(rates), np.var(rates, ddof=1)
    c = m * (1 - m) / v - 1
    return max(1 + c * m / 3, 1), max(1 + c * (1 - m) / 3, 1)


def oracle(rewards, groups, low=0.0, high=1.0, limit=1e6):
    result, scaled, rates = np.zeros(len(rewards)), (rewards - low) / (high - low), {}
    for group in sorted(set(groups[groups >= 0])):
        rows = [i for i in range(len(rewards)) if groups[i] == group and not np.isnan(rewards[i])]
        if len(rows) > 1:
            rates[group] = rows, scaled[rows].mean()
    alpha, beta = fit([p for _, p in rates.values()])
    for rows, p in rates.values():
        if np.ptp(scaled[rows]) > 0:
            with np.errstate(divide="ignore"):
                weight = min(1 / beta_distribution.pdf(p, alpha, beta), limit)
            for i in rows:
                result[i] = weight * (scaled[i] - p)
    return result


def ragged(seed, binary=True):
    """Groups of all sizes, one all right, one all wrong, one of one; rows in none, missing rewards."""
    draw = np.random.default_rng(seed)
    rewards, groups = draw.uniform(0, 1, 40), draw.integers(-1, 9, 40)
    rewards = np.where(binary, rewards > draw.uniform(0, 1, 9)[groups], rewards).astype(float)
    rewards[draw.random(40) < 0.1] = np.nan
    rewards[groups == 3], rewards[groups == 4] = 1, 0
    groups[np.flatnonzero(groups == 5)[1:]] = -1
    return rewards, groups


def test_worked_example():
    """Rates 1/4, 1/2, 3/4 fit alpha = beta = 3/2 exactly: the point at which this is GRPO."""
    rates = np.array([0.25, 0.5, 0.75])
    np.testing.assert_allclose(beta_parameters(rates, np.ones(3, bool)), [1.5, 1.5], rtol=1e-6)
    np.testing.assert_allclose(beta_weights(rates, 1.5, 1.5), [0.906900, 0.785398, 0.906900], atol=1e-6)
    rare, even, common = [0.680175] + [-0.226725] * 3, [0.392699] * 2 + [-0.392699] * 2, [0.226725] * 3 + [-0.680175]
    np.testing.assert_allclose(beta_normalized(REWARDS, GROUPS), rare + even + common, atol=1e-6)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("binary", [True, False])
def test_against_float64(seed, binary):
    rewards, groups = ragged(seed, binary)
    got = beta_normalized(rewards, groups)
    np.testing.assert_allclose(got, oracle(rewards, groups), rtol=5e-5, atol=1e-6)
    assert got.dtype == jnp.float32 and np.abs(got).max() > 0.3
    got = beta_normalized(7 * rewards - 3, groups, low=-3.0, high=4.0, limit=1.2)
    np.testing.assert_allclose(got, oracle(7 * rewards - 3, groups, -3, 4, 1.2), rtol=1e-4, atol=2e-6)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 16), min_size=6, max_size=6),
    st.floats(1, 40),
    st.floats(1, 40),
)
def test_weights_against_scipy(counts, alpha, beta):
    rates, alpha, beta = np.array(counts) / 16, float(np.float32(alpha)), float(np.float32(beta))
    with np.errstate(divide="ignore"):
        expected = np.minimum(1 / beta_distribution.pdf(rates, alpha, beta), 1e6)
    np.testing.assert_allclose(beta_weights(rates, alpha, beta), expected, rtol=1e-4)
    np.testing.assert_allclose(beta_weights(1 - rates, beta, alpha), expected, rtol=1e-4)  # right and wrong exchanged


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 8), min_size=5, max_size=5), st.integers(1, 5))
def test_parameters_against_float64(counts, number):
    rates, where = np.array(counts) / 8, np.arange(5) < number
    got = beta_parameters(np.where(where, rates, np.nan), where)
    np.testing.assert_allclose(got, fit(rates[:number]), rtol=3e-5)
    assert min(got) >= 1


def test_special_cases_are_reinforce_and_grpo():
    """alpha = beta = 1 leaves r - p; 3/2 divides it by the standard deviation (ddof 0), but for pi / 8."""
    rewards, groups = ragged(5)
    groups[np.isnan(rewards)] = -1
    rates = np.array([np.mean(rewards[groups == g]) for g in groups])
    centred = np.asarray(group_centered(rewards, groups))
    np.testing.assert_allclose(beta_weights(rates, 1.0, 1.0), 1, rtol=2e-6)
    got = np.asarray(beta_weights(rates, 1.5, 1.5)) * centred
    np.testing.assert_allclose(got, np.pi / 8 * group_z_score(rewards, groups, ddof=0, epsilon=0), rtol=2e-6, atol=1e-6)


def test_rates_that_do_not_differ_leave_the_centred_reward():
    """So do a single prompt and rates too far apart for any Beta; where all is right or wrong nothing is left."""
    for rewards, groups in (
        ([1, 0, 0, 0, 0, 1], [0, 0, 0, 1, 1, 1]),
        ([1, 0, 0], [2, 2, 2]),
        ([1] * 4 + [1] * 3 + [0], [0] * 4 + [1] * 4),
    ):
        rewards, groups = np.array(rewards, float), np.array(groups)
        got = beta_normalized(rewards, groups)
        np.testing.assert_allclose(got, oracle(rewards, groups), atol=1e-6)
        assert np.asarray(got).any()
    same = beta_normalized(np.array([1, 0, 0, 0, 0, 1.0]), np.array([0, 0, 0, 1, 1, 1]))
    np.testing.assert_allclose(same, [2 / 3, -1 / 3, -1 / 3, -1 / 3, -1 / 3, 2 / 3], atol=1e-6)
    far = beta_normalized(np.array([1, 1, 0, 0.0, 1, 0]), np.array([0, 0, 1, 1, 2, 2]))  # v = m (1 - m): c = 0
    np.testing.assert_allclose(far, [0, 0, 0, 0, 0.5, -0.5], atol=1e-6)
    for value in (0.0, 1.0, 0.85):
        assert not np.asarray(beta_normalized(np.full(9, value), np.repeat([0, 1, 2], [1, 3, 5]))).any()


def test_a_single_row_and_missing_rewards_are_not_in_the_fit():
    alone = beta_normalized(np.append(REWARDS, [1, np.nan, np.nan, np.inf]), np.append(GROUPS, [3, 1, 4, -1]))
    np.testing.assert_allclose(alone[:12], beta_normalized(REWARDS, GROUPS), atol=1e-6)
    assert not np.asarray(alone[12:]).any()


def test_a_wrong_range_shows():
    got = beta_normalized(np.array([2, 0, 1, 0, 5.0]), np.array([0, 0, 1, 1, -1]))
    assert np.isnan(np.asarray(got[:4])).all() and got[4] == 0
    with pytest.raises(ValueError, match="low < high, got 1.0 and 0.0"):
        beta_normalized(REWARDS, GROUPS, low=1.0, high=0.0)


def test_rows_do_not_know_their_neighbours():
    rewards, groups = ragged(6)
    laws.rows(beta_normalized, {"rewards": rewards, "group_ids": groups})

    @jax.jit
    def both(rates, where):
        alpha, beta = library.beta_parameters(rates, where)
        return alpha, beta, jnp.where(where, library.beta_weights(rates, alpha, beta), 0)

    rates, where = np.random.default_rng(0).uniform(size=20), np.arange(20) % 3 > 0
    laws.rows(both, {"rates": rates, "where": where}, ids=())


def test_gradients():
    rewards, groups = ragged(7, binary=False)
    pull, dirty = np.random.default_rng(1).normal(size=40), np.where(groups < 0, np.inf, rewards)
    gradient = jax.grad(lambda r: jnp.sum(pull * beta_normalized(r, groups)))(jnp.float32(dirty))
    assert np.isfinite(gradient).all() and not np.asarray(gradient)[np.isnan(rewards) | (groups < 0)].any()
    for i in np.flatnonzero(~np.isnan(rewards) & (groups >= 0) & (groups != 3) & (groups != 4)):
        up, down = rewards.copy(), rewards.copy()
        up[i] += 1e-6
        down[i] -= 1e-6
        slope = pull @ (oracle(up, groups) - oracle(down, groups)) / 2e-6
        np.testing.assert_allclose(gradient[i], slope, rtol=3e-3, atol=3e-3)
