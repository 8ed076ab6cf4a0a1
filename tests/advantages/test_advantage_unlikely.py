"""The unlikeliness discount: the worked example, loops in float64, and what must not matter."""

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from hypothesis import given, settings, strategies

from grpo_jax.advantages.group import group_z_score
from grpo_jax.advantages.unlikely import discount_likely

RIGHT, LIKELIHOODS, TOGETHER = np.array([1, 1, 0, 1.0]), np.array([-0.2, -0.9, -0.5, -0.4]), np.zeros(4, int)


def test_worked_example():
    def both(rewards, **options):
        earned = discount_likely(rewards, LIKELIHOODS, TOGETHER, **options)
        return earned, group_z_score(earned, TOGETHER)

    earned, scores = both(RIGHT)
    np.testing.assert_allclose(earned, [0.8125, 1, 0, 0.875])
    np.testing.assert_allclose(scores, [0.309304, 0.721709, -1.477785, 0.446772], atol=1e-6)
    earned, scores = both(RIGHT, form="paper")
    np.testing.assert_allclose(earned, [0.75, 0.9375, 0, 0.8125])
    np.testing.assert_allclose(scores, [0.294883, 0.737208, -1.474416, 0.442325], atol=1e-6)
    np.testing.assert_allclose(both(RIGHT, penalty=0.0)[1], [0.499999, 0.499999, -1.499997, 0.499999], atol=1e-6)
    earned, scores = both(np.ones(4))  # why groups without a wrong row are dropped first
    np.testing.assert_allclose(earned, [0.8125, 1, 0.9375, 0.875])
    np.testing.assert_allclose(scores, [-1.161881, 1.161881, 0.387294, -0.387294], atol=2e-6)


def oracle(rewards, likelihoods, groups, penalty=0.25, form="code"):
    result = np.array(rewards, np.float64)
    for i in range(len(groups)):
        if groups[i] < 0 or np.isnan(rewards[i]) or np.isnan(likelihoods[i]):
            continue
        members = [
            j
            for j in range(len(groups))
            if groups[j] == groups[i] and not np.isnan(rewards[j]) and not np.isnan(likelihoods[j])
        ]
        order = sorted(members, key=lambda j: (likelihoods[j], j))
        place = order.index(i) + (form == "paper")
        result[i] *= 1 - penalty * place / len(members)
    return result


def rows(seed, n=30):
    draw = np.random.default_rng(seed)
    groups = draw.integers(-1, 5, n)
    rewards = draw.integers(0, 2, n) * draw.choice([1.0, 0.5], n)
    rewards[draw.random(n) < 0.15] = np.nan
    likelihoods = draw.normal(size=n).round(1)  # with ties
    likelihoods[draw.random(n) < 0.1] = np.nan
    return rewards, likelihoods, groups


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("form", ["code", "paper"])
@pytest.mark.parametrize("penalty", [0.25, 1.0])
def test_against_float64(seed, form, penalty):
    given = rows(seed)
    got = jax.jit(lambda *a: discount_likely(*a, penalty=penalty, form=form))(*given)
    np.testing.assert_allclose(got, oracle(*given, penalty, form), rtol=1e-6, atol=1e-6)
    assert got.dtype == jnp.float32


@given(seed=strategies.integers(0, 10**6))
@settings(max_examples=15, deadline=None)
def test_rarer_never_earns_less(seed):
    """Of two right rows of a group the unlikelier earns more; only the order of likelihoods matters; wrong stays 0."""
    draw = np.random.default_rng(seed)
    rewards, groups = draw.integers(0, 2, 20).astype(float), draw.integers(0, 3, 20)
    likelihoods = draw.permutation(20) / 7.0
    got = np.asarray(discount_likely(rewards, likelihoods, groups, penalty=0.5))
    assert not got[rewards == 0].any() and (got <= rewards).all() and (got[rewards == 1] > 0.5).all()
    for i, j in zip(*np.nonzero((groups[:, None] == groups) & (likelihoods[:, None] < likelihoods))):
        assert got[i] > got[j] or rewards[i] == 0 or rewards[j] == 0
    stretched = discount_likely(rewards, np.exp(3 * likelihoods), groups, penalty=0.5)
    np.testing.assert_array_equal(got, stretched)


def test_laws():
    rewards, _, groups = rows(2)
    rewards, draw = np.nan_to_num(rewards, nan=0.5), np.random.default_rng(0)
    arrays = {"rewards": rewards, "likelihoods": draw.normal(size=30), "group_ids": groups}
    laws.rows(discount_likely, arrays)


def test_ties_follow_the_rows():
    got = discount_likely(np.ones(4), np.zeros(4), TOGETHER, penalty=0.4)
    np.testing.assert_allclose(got, [1, 0.9, 0.8, 0.7], rtol=1e-6)


def test_gradient_is_that_of_the_reward_alone():
    rewards, likelihoods, groups = rows(3)
    pull = np.random.default_rng(1).normal(size=30)

    def total(rewards, likelihoods):
        return jnp.sum(jnp.where(jnp.isnan(rewards), 0, pull * discount_likely(rewards, likelihoods, groups)))

    by_reward, by_likelihood = jax.grad(total, (0, 1))(jnp.float32(rewards), jnp.float32(likelihoods))
    present = ~np.isnan(rewards)
    slope = pull * oracle(np.where(present, 1.0, np.nan), likelihoods, groups)
    np.testing.assert_allclose(by_reward[present], slope[present], rtol=1e-5, atol=1e-6)
    assert not np.asarray(by_likelihood).any()


def test_messages():
    with pytest.raises(ValueError, match=r"one of \('code', 'paper'\), got 'bonus'"):
        discount_likely(RIGHT, LIKELIHOODS, TOGETHER, form="bonus")
    with pytest.raises(ValueError, match=r"lies in \[0, 1\], got 1\.5"):
        discount_likely(RIGHT, LIKELIHOODS, TOGETHER, penalty=1.5)
    with pytest.raises(ValueError, match=r"rewards \[4\] and likelihoods \[3\]"):
        discount_likely(RIGHT, LIKELIHOODS[:3], TOGETHER)
