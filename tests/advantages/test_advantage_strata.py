"""Strata: the worked example, float64 loops, the identities of the decomposition, and what does not matter."""

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.advantages.group import group_z_score
from grpo_jax.advantages.strata import stratified as function

stratified = jax.jit(function, static_argnames=("alpha", "ddof", "epsilon"))

REWARDS, STRATA, ONE_GROUP = np.array([1, 0, 0.8, 0.2, 0.4, 0]), np.array([1, 1, 2, 2, 2, 0]), np.zeros(6, int)


def oracle(rewards, groups, strata, alpha=0.8, ddof=0, epsilon=1e-6):
    def score(i, rows):
        inside = rewards[rows]
        return (rewards[i] - inside.mean()) / (inside.std(ddof=ddof) + epsilon) if len(set(inside)) > 1 else 0.0

    result = np.zeros(len(rewards))
    for i in range(len(rewards)):
        if groups[i] < 0 or np.isnan(rewards[i]):
            continue
        group = [j for j in range(len(rewards)) if groups[j] == groups[i] and not np.isnan(rewards[j])]
        like = [j for j in group if strata[j] == strata[i] >= 0]
        result[i] = (alpha * score(i, like) if strata[i] >= 0 else 0) + (1 - alpha) * score(i, group)
    return result


def ragged(seed):
    """Groups and strata of all sizes with labels that are no running numbers, rows in neither, missing rewards."""
    draw = np.random.default_rng(seed)
    rewards, groups = draw.normal(0, 2, 40), draw.integers(-1, 5, 40)
    strata = draw.choice([-1, 0, 3, 1000], 40, p=[0.1, 0.3, 0.4, 0.2])
    rewards[draw.random(40) < 0.12] = np.nan
    rewards[groups == 3] = 0.85
    rewards[(groups == 2) & (strata == 3)] = -0.1
    return rewards, groups, strata


@pytest.mark.parametrize(
    ("ddof", "alpha", "expected"),
    [
        (0, 1.0, [0.999998, -0.999998, 1.336301, -1.069041, -0.267260, 0]),
        (0, 0.0, [1.566695, -1.044463, 1.044463, -0.522232, 0, -1.044463]),
        (0, 0.8, [1.113337, -1.008891, 1.277933, -0.959679, -0.213808, -0.208893]),
        (1, 1.0, [0.707106, -0.707106, 1.091086, -0.872869, -0.218217, 0]),
        (1, 0.8, [0.851723, -0.756377, 1.063561, -0.793641, -0.174574, -0.190692]),
    ],
)
def test_worked_example(ddof, alpha, expected):
    got = stratified(REWARDS, ONE_GROUP, STRATA, alpha=alpha, ddof=ddof)
    np.testing.assert_allclose(got, expected, atol=1.5e-6)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("options", [{}, {"alpha": 0.3, "ddof": 1, "epsilon": 1e-8}, {"epsilon": 0.5}])
def test_against_float64(seed, options):
    got = stratified(*ragged(seed), **options)
    np.testing.assert_allclose(got, oracle(*ragged(seed), **options), rtol=2e-5, atol=2e-6)
    assert got.dtype == jnp.float32


def test_rows_do_not_know_their_neighbours():
    rewards, groups, strata = ragged(3)
    rewards = rewards.round(1)
    laws.rows(stratified, {"rewards": rewards, "group_ids": groups, "strata": strata})


def test_gradients():
    rewards, groups, strata = ragged(4)
    pull, dirty = np.random.default_rng(1).normal(size=40), np.where(groups < 0, -np.inf, rewards)
    gradient = jax.grad(lambda r: jnp.sum(pull * stratified(r, groups, strata, ddof=1)))(jnp.float32(dirty))
    assert np.isfinite(gradient).all() and not np.asarray(gradient)[np.isnan(rewards) | (groups < 0)].any()
    smooth = ~np.isnan(rewards) & (groups >= 0) & (groups != 3) & ~((groups == 2) & (strata == 3))
    for i in np.flatnonzero(smooth):
        up, down = rewards.copy(), rewards.copy()
        up[i] += 1e-6
        down[i] -= 1e-6
        slope = pull @ (oracle(up, groups, strata, ddof=1) - oracle(down, groups, strata, ddof=1)) / 2e-6
        np.testing.assert_allclose(gradient[i], slope, rtol=3e-3, atol=3e-3)


def test_the_group_score_is_the_stratum_score_and_an_offset():
    """A_GN = (sigma_k + eps) / (sigma + eps) A_SAN + (mu_k - mu) / (sigma + eps), and the gap of the variances."""
    draw = np.random.default_rng(0)
    rewards, strata = draw.normal(0, 3, 20), draw.integers(0, 3, 20)
    one, eps = np.zeros(20, int), 0.3
    within = np.asarray(stratified(rewards, one, strata, alpha=1.0, epsilon=eps))
    whole = np.asarray(stratified(rewards, one, strata, alpha=0.0, epsilon=eps))
    mean = np.array([rewards[strata == s].mean() for s in strata])
    deviation = np.array([rewards[strata == s].std() for s in strata])
    np.testing.assert_allclose(
        whole,
        (deviation + eps) / (rewards.std() + eps) * within + (mean - rewards.mean()) / (rewards.std() + eps),
        atol=1e-5,
    )


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(-5, 5), min_size=12, max_size=12),
    st.lists(st.integers(-1, 2), min_size=12, max_size=12),
    st.lists(st.integers(0, 2), min_size=12, max_size=12),
    st.sampled_from([0.5, 4.0]),
)
def test_within_strata_mean_0_variance_1_whatever_the_level_and_scale_of_rewards(rewards, groups, strata, scale):
    rewards, groups, strata = np.array(rewards, np.float32), np.array(groups), np.array(strata)
    a = np.asarray(stratified(rewards, groups, strata, alpha=1.0, epsilon=0.0))
    shifted = rewards * np.float32(scale) + 3 * strata  # a level per stratum does not matter either
    np.testing.assert_allclose(stratified(np.float32(shifted), groups, strata, alpha=1.0, epsilon=0.0), a, atol=2e-5)
    for group in range(3):
        for stratum in range(3):
            mine = (groups == group) & (strata == stratum)
            if mine.any():
                varied = len(set(rewards[mine])) > 1
                assert abs(a[mine].mean()) < 1e-5 and a[mine].var() == pytest.approx(float(varied), abs=1e-4)


def test_one_stratum_is_plain_grpo():
    rewards, groups, _ = ragged(5)
    plain = group_z_score(rewards, groups, ddof=0)
    np.testing.assert_allclose(stratified(rewards, groups, np.full(40, 7), alpha=0.4), plain, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(
        stratified(rewards, groups, np.full(40, -1), alpha=0.4), 0.6 * plain, rtol=1e-6, atol=1e-7
    )


def test_refusals():
    with pytest.raises(ValueError, match=r"lies in \[0, 1\], got 1.5"):
        stratified(REWARDS, ONE_GROUP, STRATA, alpha=1.5)
    with pytest.raises(ValueError, match=r"strata \[5\] for group_ids \[6\]"):
        stratified(REWARDS, ONE_GROUP, STRATA[:5])
