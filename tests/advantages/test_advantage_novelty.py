"""Novelty sharpening: the worked example, float64 loops, bounds, laws."""

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.advantages import group_z_score
from grpo_jax.advantages.novelty import novelty_sharpened


def test_worked_example():
    """Five in a group; the third is right and the least likely, and reaches the cap."""
    rewards, groups = jnp.array([1, 1, 1, 0, 0.0]), jnp.zeros(5, jnp.int32)
    logps = jnp.array([-0.2, -0.5, -0.9, -0.3, -0.7])
    advantages = group_z_score(rewards, groups)
    np.testing.assert_allclose(advantages, [0.730295] * 3 + [-1.095443] * 2, atol=2e-6)
    got = novelty_sharpened(advantages, logps, rewards == 1, groups)
    np.testing.assert_allclose(got, [0.730295, 0.730295, 1.095443, -1.095443, -1.095443], atol=2e-6)
    free = novelty_sharpened(advantages, logps, rewards == 1, groups, cap=100.0)
    assert float(free[2] - advantages[2]) == pytest.approx(0.790346, abs=2e-6)


def by_hand(advantages, logps, correct, groups, strength=2.5, cap=0.5):
    result = np.where(groups < 0, 0, advantages)
    for i in range(len(groups)):
        if groups[i] < 0 or np.isnan(logps[i]) or not correct[i] or advantages[i] <= 0:
            continue
        mean = np.mean([x for x, g in zip(logps, groups) if g == groups[i] and not np.isnan(x)])
        result[i] += min(max(strength * (1 - np.exp(logps[i] - mean)), 0), cap * advantages[i])
    return result


@pytest.fixture(params=[0, 1])
def ragged(request):
    draw = np.random.default_rng(request.param)
    groups = draw.permutation(np.repeat([0, 1, 2, 7, -1], [6, 5, 1, 9, 4]))
    logps = -draw.exponential(0.4, 25)
    logps[draw.random(25) < 0.15] = np.nan
    correct = draw.random(25) < 0.8
    return draw.normal(0.7, 0.7, 25), logps, correct, groups


@pytest.mark.parametrize("options", [{}, {"strength": 0.7, "cap": 2.0}])
def test_against_float64(ragged, options):
    expected = by_hand(*ragged, **options)
    np.testing.assert_allclose(novelty_sharpened(*ragged, **options), expected, rtol=1e-5, atol=1e-6)
    assert (expected > np.where(ragged[3] < 0, 0, ragged[0]) + 1e-3).sum() >= 2


@pytest.mark.parametrize("ragged", [0], indirect=True)
def test_laws(ragged):
    advantages, logps, correct, groups = ragged
    laws.rows(
        jax.jit(novelty_sharpened),
        {"advantages": advantages, "mean_logps": logps, "correct": correct, "group_ids": groups},
        garbage={"mean_logps": -np.inf},
    )


def test_gradient(ragged):
    """With respect to the advantages, and none of it NaN where a log-prob is."""
    advantages, logps, correct, groups = ragged
    pull = np.random.default_rng(2).normal(size=25)
    both = jax.grad(lambda a, x: (pull * novelty_sharpened(a, x, correct, groups)).sum(), argnums=(0, 1))
    by_advantage, by_logp = both(jnp.float32(advantages), jnp.float32(logps))
    for i in range(25):
        for got, which in ((by_advantage[i], 0), (by_logp[i], 1)):
            if which == 1 and np.isnan(logps[i]):
                assert float(got) == 0
                continue
            up, down = [[x.copy() for x in ragged] for _ in range(2)]
            up[which][i] += 1e-6
            down[which][i] -= 1e-6
            slope = pull @ (by_hand(*up) - by_hand(*down)) / 2e-6
            np.testing.assert_allclose(got, slope, rtol=1e-3, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31))
def test_bounds_and_shift(seed):
    """The bonus lies in [0, cap A], wrong rows keep theirs, and a shift of all log-probs of a group is nothing."""
    draw = np.random.default_rng(seed)
    groups, advantages = draw.integers(0, 3, 12), draw.normal(size=12).astype(np.float32)
    logps, correct = -draw.exponential(1.0, 12), draw.random(12) < 0.5
    bonus = np.asarray(novelty_sharpened(advantages, logps, correct, groups)) - advantages
    assert (bonus >= 0).all() and (bonus <= 0.5 * np.maximum(advantages, 0) + 1e-6).all()
    assert not bonus[~correct].any()
    moved = novelty_sharpened(advantages, logps + np.array([-1, 3, 0.5])[groups], correct, groups)
    np.testing.assert_allclose(moved - advantages, bonus, atol=1e-4)


def test_alike_and_decided_groups_get_nothing():
    ids = jnp.zeros(4, jnp.int32)
    zeros = novelty_sharpened(jnp.zeros(4), jnp.array([-1.0, -2, -3, -4]), jnp.ones(4, bool), ids)
    assert not np.asarray(zeros).any()
    one = jnp.full(4, 0.7)
    np.testing.assert_array_equal(novelty_sharpened(one, jnp.full(4, -0.85), jnp.ones(4, bool), ids), one)


def test_what_is_refused():
    with pytest.raises(ValueError, match="strength -1, cap 0.5"):
        novelty_sharpened(jnp.ones(2), jnp.ones(2), jnp.ones(2), jnp.zeros(2, int), strength=-1)
    with pytest.raises(ValueError, match=r"\[\[2\], \[2, 3\], \[2\], \[2\]\]"):
        novelty_sharpened(jnp.ones(2), jnp.ones((2, 3)), jnp.ones(2), jnp.zeros(2, int))
