"""V_0.5's baseline and its test: the worked example, float64 loops, bounds, no prior."""

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.advantages.shrunk import another_is_worth_it, shrinkage, shrunk_mean


@pytest.mark.parametrize(
    ("rewards", "prior", "baseline", "more"),
    [
        ([1, 1, -1, 1], 0.4, 0.4, False),
        ([1, 1, 1, 1], -0.6, 0.843750, True),
        ([-1, -1, -1, 1], 0.8, -0.307692, True),
    ],
)
def test_worked_example(rewards, prior, baseline, more):
    arguments = jnp.float32(rewards), jnp.full(4, prior), jnp.zeros(4, int)
    np.testing.assert_allclose(shrunk_mean(*arguments), baseline, atol=1e-6)
    np.testing.assert_allclose(shrinkage(*arguments), np.array(rewards) - baseline, atol=1e-6)
    assert another_is_worth_it(*arguments).tolist() == [more] * 4


def test_gain_of_the_worked_example():
    """0.041522 and 0.037408: a cost between them and the gain decides."""
    one = jnp.ones(4), jnp.full(4, -0.6), jnp.zeros(4, int)
    assert another_is_worth_it(*one, cost=0.04152).all() and not another_is_worth_it(*one, cost=0.04153).any()
    other = jnp.array([-1.0, -1, -1, 1]), jnp.full(4, 0.8), jnp.zeros(4, int)
    assert another_is_worth_it(*other, cost=0.03740).all() and not another_is_worth_it(*other, cost=0.03742).any()


def oracle(rewards, priors, groups, half_range=1.0, cost=1 / 256, most=16):
    baselines, more = np.zeros(len(rewards)), np.zeros(len(rewards), bool)
    for i in range(len(rewards)):
        mates = [rewards[j] for j in range(len(rewards)) if groups[j] == groups[i] >= 0 and not np.isnan(rewards[j])]
        if np.isnan(rewards[i]) or not mates:
            continue
        k, mean = len(mates), np.mean(mates)
        if np.isnan(priors[i]):
            baselines[i], gain = mean, 1 / k - 1 / (k + 1)
        else:
            noise = half_range**2 / k
            d2 = max(0.0, (mean - priors[i]) ** 2 - noise)
            w = d2 / (d2 + noise)
            baselines[i] = w * mean + (1 - w) * priors[i]
            now, then = (d2 * (half_range**2 / n) / (d2 + half_range**2 / n) for n in (k, k + 1))
            gain = (now - then) / half_range**2
        more[i] = k < most and gain > cost
    return baselines, more


def ragged(seed, low=-1.0):
    draw = np.random.default_rng(seed)
    groups = draw.integers(-1, 7, 40)
    rewards = draw.choice([low, 1.0], 40, p=[0.25, 0.75])
    rewards[draw.random(40) < 0.15] = np.nan
    rewards[groups == 3] = 1.0
    of_group = draw.uniform(low, 1, 8)
    of_group[4] = np.nan
    return {"rewards": rewards, "priors": of_group[groups], "group_ids": groups}


@pytest.mark.parametrize(("low", "half_range"), [(-1.0, 1.0), (0.0, 0.5)])
@pytest.mark.parametrize("seed", [0, 1])
def test_against_float64(seed, low, half_range):
    rows = ragged(seed, low)
    baselines, more = oracle(*rows.values(), half_range)
    counted = (rows["group_ids"] >= 0) & ~np.isnan(rows["rewards"])

    def compared(**rows):
        return {
            "baseline": shrunk_mean(**rows, half_range=half_range),
            "advantage": shrinkage(**rows, half_range=half_range),
            "more": another_is_worth_it(**rows, half_range=half_range),
        }

    got = laws.rows(compared, rows) if seed == 0 else jax.tree.map(np.asarray, jax.jit(compared)(**rows))
    np.testing.assert_allclose(got["baseline"][counted], baselines[counted], rtol=1e-5, atol=1e-6)
    expected = np.where(counted, rows["rewards"] - baselines, 0)
    np.testing.assert_allclose(got["advantage"], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(got["more"][counted], more[counted])
    assert not got["more"][~counted].any() and len(set(more[counted])) == 2


def test_scale_of_rewards_does_not_matter_to_the_decision():
    """{-1, 1} and {0, 1} are the same question."""
    rows = ragged(0)
    half = {**rows, "rewards": (rows["rewards"] + 1) / 2, "priors": (rows["priors"] + 1) / 2}
    np.testing.assert_allclose(shrinkage(**half, half_range=0.5), shrinkage(**rows) / 2, atol=1e-6)
    np.testing.assert_array_equal(another_is_worth_it(**half, half_range=0.5), another_is_worth_it(**rows))


@pytest.mark.parametrize("prior", [jnp.nan, -1e6])
def test_a_useless_prior_draws_until_sixteen(prior):
    sizes = np.repeat(np.arange(1, 20), np.arange(1, 20))
    arguments = jnp.ones(190), jnp.full(190, prior), jnp.asarray(sizes)
    np.testing.assert_array_equal(another_is_worth_it(*arguments), sizes < 16)
    np.testing.assert_allclose(shrunk_mean(*arguments), 1.0, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 16), st.floats(0, 1), st.floats(-1, 1))
def test_baseline_lies_between_prior_and_mean(k, share, prior):
    rewards = np.where(np.arange(16) < share * k, 1.0, -1.0)
    mean = rewards[:k].mean()
    groups = np.where(np.arange(16) < k, 0, -1)
    baseline = float(jax.jit(shrunk_mean)(rewards, np.full(16, prior), groups)[0])
    assert min(mean, prior) - 1e-5 <= baseline <= max(mean, prior) + 1e-5
    if (mean - prior) ** 2 < 1 / k:
        assert baseline == pytest.approx(prior, abs=1e-6)


def test_gradient_and_garbage():
    rows = ragged(0)
    rewards, priors, groups = rows.values()
    out = (groups < 0) | np.isnan(rewards)
    dirty = jnp.float32(np.where(groups < 0, np.inf, rewards)), np.where(out, np.nan, priors)
    pull = np.random.default_rng(0).normal(size=40)
    slope = jax.grad(lambda r: jnp.sum(pull * shrinkage(r, dirty[1], groups)))(dirty[0])
    for i in range(40):
        up, down = rewards.copy(), rewards.copy()
        up[i], down[i] = up[i] + 1e-5, down[i] - 1e-5
        advantage = lambda r: np.where(out, 0, r - oracle(r, priors, groups)[0])  # noqa: E731
        moved = 0 if out[i] else np.nansum(pull * (advantage(up) - advantage(down))) / 2e-5
        np.testing.assert_allclose(slope[i], moved, rtol=2e-3, atol=2e-3)


def test_errors():
    with pytest.raises(ValueError, match=r"priors must have one value per row, got \[1\] for \[4\]"):
        shrinkage(jnp.ones(4), jnp.ones(1), jnp.zeros(4, int))
    with pytest.raises(ValueError, match="half_range .* above 0, got 0"):
        shrunk_mean(jnp.ones(4), jnp.ones(4), jnp.zeros(4, int), half_range=0)
