"""Shaped probabilities and ratios, edited texts, explanations: worked examples, float64 loops, garbage, laws."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax import losses
from grpo_jax.losses.off_policy import (
    advantage_aware_ratio,
    explanation_likelihood,
    shaped_probability,
    shaped_ratio,
    think_tuning,
)

# ---- LUFFY and RGR ---------------------------------------------------------------------------------------------------


def test_shaped_probability_of_the_worked_example():
    """A revision among four rows of the policy's own: rubric rewards, advantages, and the token mean of both losses."""
    rewards = jnp.array([5 / 7, 4 / 7, 2 / 7, 1 / 7, 6 / 7])
    advantage = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)
    np.testing.assert_allclose(advantage, [0.675138, 0.192896, -0.771586, -1.253827, 1.157379], atol=2e-6)
    ratio = jnp.array([[1.3, 1], [0.9, 1.1], [1, 1], [0.7, 1], [1, 1]])
    off = jnp.arange(5) == 4

    def loss(logps):
        spread = jnp.broadcast_to(advantage[:, None], (5, 2))
        shaped = losses.reinforce(shaped_probability(logps), spread)
        each = jnp.where(off[:, None], shaped, losses.ppo_clip(ratio, spread))
        return losses.weighted_sum(each, losses.token_mean(jnp.ones(5), jnp.ones((5, 2), bool))), each

    logps = jnp.log(jnp.array([[1, 1], [1, 1], [1, 1], [1, 1], [0.5, 0.05]]))
    np.testing.assert_allclose(shaped_probability(logps)[4], [0.833333, 0.333333], atol=1e-6)
    (value, each), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(logps)
    np.testing.assert_allclose(each[4], [-0.964482, -0.385793], atol=2e-6)
    assert float(value) == pytest.approx(0.057869, abs=1e-6)
    np.testing.assert_allclose(gradient[4], [-0.016075, -0.025720], atol=1e-6)


@pytest.mark.parametrize("gamma", [0.01, 0.1, 2.0])
def test_shaped_probability_against_the_formula(ragged, slope, gamma):
    formula = lambda lp: np.exp(lp) / (np.exp(lp) + gamma)  # noqa: E731
    logps = np.array([*ragged.logps.ravel(), 0.0, -40.0, -90.0])
    np.testing.assert_allclose(shaped_probability(logps, gamma=gamma), formula(logps), rtol=2e-6, atol=1e-37)
    gradient = jax.grad(lambda lp: shaped_probability(lp, gamma=gamma).sum())(jnp.asarray(logps, jnp.float32))
    np.testing.assert_allclose(gradient, slope(lambda lp: formula(lp).sum(), logps), atol=1e-6)


@given(st.floats(0.01, 0.9))
@settings(max_examples=20, deadline=None)
def test_the_slope_is_largest_at_gamma(gamma):
    slopes = jax.grad(lambda lp: shaped_probability(lp, gamma=gamma).sum())(
        jnp.log(gamma * jnp.array([1, 0.5, 0.9, 1.1, 2]))
    )
    assert slopes.argmax() == 0 and float(slopes[0]) == pytest.approx(0.25, rel=1e-5)


# ---- Guide -----------------------------------------------------------------------------------------------------------


def test_shaped_ratio_of_the_worked_example():
    old, new = jnp.array([[-1, -0.5, -2, -0.2]]), jnp.array([[-1.4, -0.9, -1.6, -0.3]])
    mask = jnp.ones((1, 4), bool)

    def loss(new):
        each = losses.reinforce(shaped_ratio(losses.token_ratio(new, old), mask), jnp.full((1, 4), 1.2))
        return losses.weighted_sum(each, losses.sequence_mean(jnp.ones(1), mask))

    np.testing.assert_allclose(
        shaped_ratio(losses.token_ratio(new, old), mask), [[0.337514, 0.337514, 0.531361, 0.407481]], atol=1e-6
    )
    value, gradient = jax.jit(jax.value_and_grad(loss))(new)
    assert float(value) == pytest.approx(-0.484161, abs=1e-6)
    np.testing.assert_allclose(gradient, [[-0.067080, -0.067080, -0.074705, -0.072432]], atol=1e-6)


def shaped_by_loops(ratio, mask, quantile, gamma_of):
    result = np.zeros_like(ratio)
    for i, row in enumerate(mask):
        values = np.sort(gamma_of[i][row])
        gamma = 1e-4
        if len(values):
            place = quantile * (len(values) - 1)
            low = int(place)
            between = values[low] + (place - low) * (values[min(low + 1, len(values) - 1)] - values[low])
            gamma = max(between, 1e-4)
        for t in np.flatnonzero(row):
            result[i, t] = ratio[i, t] / (ratio[i, t] + gamma)
    return result


@pytest.mark.parametrize("quantile", [0.0, 0.37, 0.9, 1.0])
def test_shaped_ratio_against_loops(ragged, slope, quantile):
    """The quantile is over what is trained, and a constant: padding and its NaN do not matter."""
    ratio = np.exp(ragged.logps - ragged.old_logps)
    ratio[3] = 1e-7  # below the floor
    expected = shaped_by_loops(ratio, ragged.mask, quantile, ratio)
    shaped = jax.jit(shaped_ratio)
    for fill in (5.0, np.nan, np.inf):
        given_ratio = np.where(ragged.mask, ratio, fill).astype(np.float32)
        got = np.asarray(shaped(given_ratio, ragged.mask, quantile=quantile))
        np.testing.assert_allclose(np.where(ragged.mask, got, 0), expected, rtol=3e-6)
        gradient = jax.grad(
            lambda r: losses.weighted_sum(shaped(r, ragged.mask, quantile=quantile), jnp.asarray(ragged.mask, float))
        )(jnp.asarray(given_ratio))
        differences = slope(
            lambda r: shaped_by_loops(r, ragged.mask, quantile, ratio).sum(), np.where(ragged.mask, ratio, 1)
        )
        rows = np.arange(len(ratio)) != 3
        np.testing.assert_allclose(gradient[rows], differences[rows], atol=2e-5)
        assert not np.asarray(gradient)[~ragged.mask].any()


# ---- ThinkTuning -----------------------------------------------------------------------------------------------------

P = np.array([[0.5, 0.02, 0.0005], [0.3, 0.004, 0.9]])
OLD_P = np.array([[0.45, 0.02, 0.0005], [0.3, 0.005, 0.7]])
ADVANTAGE = np.array([[1.0] * 3, [-1.0] * 3])


def test_think_tuning_of_the_worked_example():
    new, old = jnp.log(P), jnp.log(OLD_P)
    shaped = advantage_aware_ratio(new, ADVANTAGE)
    np.testing.assert_allclose(shaped, [[1.002004, 1.052632, 1.000100], [1.003344, 1.333333, 1.001112]], atol=1e-6)
    each = think_tuning(new, old, ADVANTAGE, np.ones((2, 3), bool))
    np.testing.assert_allclose(each, [[-1.002004, -1.052632, -1.000100], [1.003344, 0.8, 1.001112]], atol=1e-6)
    assert float(each.mean()) == pytest.approx(-0.041713, abs=1e-6)
    plain = think_tuning(new, old, ADVANTAGE, np.zeros((2, 3), bool))
    np.testing.assert_allclose(plain, [[-1.111111, -1, -1], [1, 0.8, 1.285714]], atol=1e-6)


def ratio_by_loops(p, a, offset, bound=math.inf):
    gamma = -0.001 if offset == "released" else np.clip(a, -4, 4) / 4000
    below = p + gamma
    below = p / 1.0001 if below <= 0 else p / 0.9999 if below > 1 else below
    return min(p / below, bound)


def think_by_loops(new, frozen, old, a, edited, offset, bound=math.inf):
    """frozen: the same numbers as new, of which no derivative is taken."""
    result = np.zeros_like(new)
    for at in np.ndindex(new.shape):
        p, rho = math.exp(frozen[at]), math.exp(new[at] - old[at])
        if edited[at] and not (a[at] < 0 and p < 0.01):
            result[at] = -a[at] * ratio_by_loops(p, a[at], offset, bound) * math.exp(new[at] - frozen[at])
        else:
            result[at] = max(-a[at] * rho, -a[at] * np.clip(rho, 0.8, 1.2))
            result[at] = min(result[at], -3 * a[at]) if a[at] < 0 else result[at]
    return result


@pytest.mark.parametrize("offset", ["released", "intended"])
@pytest.mark.parametrize("bound", [math.inf, 1.5])
def test_think_tuning_against_loops(slope, offset, bound):
    draw = np.random.default_rng(0)
    new = np.log(np.exp(draw.uniform(-9, 0, (6, 9))))
    new[:, 0], new[0, 1], new[1, 1] = np.log([1.0, 0.9999, 0.00101, 0.0015, 0.009, 0.011]), -60.0, -1e-7
    old, a = new + draw.normal(0, 0.4, new.shape), np.repeat(draw.normal(0, 3, (6, 1)), 9, 1)
    edited = draw.random(new.shape) < 0.7
    loops = functools.partial(think_by_loops, old=old, a=a, edited=edited, offset=offset, bound=bound)
    loss = jax.jit(functools.partial(think_tuning, offset=offset, bound=bound))
    np.testing.assert_allclose(loss(new, old, a, edited), loops(new, new), rtol=3e-4)
    gradient = jax.grad(lambda lp: loss(lp, old, a, edited).sum())(jnp.asarray(new, jnp.float32))
    differences = slope(lambda lp: loops(lp, new).sum(), new)
    np.testing.assert_allclose(gradient, differences, rtol=1e-3, atol=1e-3)
    assert np.isfinite(gradient).all()


def test_intended_offset_follows_the_advantage():
    """gamma = A / 4000, within +-0.001: at p = 0.5 and A = +-1, 0.5 / 0.50025 and 0.5 / 0.49975."""
    f = advantage_aware_ratio(jnp.full(4, math.log(0.5)), jnp.array([1.0, -1, 4, 40]), offset="intended")
    np.testing.assert_allclose(f, [0.5 / 0.50025, 0.5 / 0.49975, 0.5 / 0.501, 0.5 / 0.501], atol=1e-6)


def test_offsets_that_leave_the_probabilities():
    """Where p + gamma is below 0 or above 1, 1.0001 or 0.9999; underflow does no harm."""
    high = advantage_aware_ratio(jnp.zeros(1), jnp.full(1, 4.0), offset="intended")
    low = advantage_aware_ratio(jnp.array([math.log(5e-4), -200.0]), jnp.ones(2))
    np.testing.assert_allclose([*high, *low], [0.9999, 1.0001, 1.0001], atol=1e-6)


# ---- ExPO ------------------------------------------------------------------------------------------------------------


def test_explanation_of_the_worked_example():
    logps, mask = jnp.log(jnp.array([[0.4, 0.2, 0.6, 0.9, 0.05]])), np.ones((1, 5), bool)
    value, gradient = jax.value_and_grad(lambda lp: 0.04 * explanation_likelihood(lp, mask))(logps)
    assert float(value) == pytest.approx(0.245506, abs=1e-6)
    np.testing.assert_allclose(gradient, -0.04 * mask, rtol=1e-6)
    assert float(0.04 * explanation_likelihood(logps, mask, per_token=True)) == pytest.approx(0.049101, abs=1e-6)


@pytest.mark.parametrize("per_token", [False, True])
def test_explanation_against_loops(ragged, slope, per_token):
    def loops(logps):
        rows = [i for i in range(len(logps)) if ragged.mask[i].any() and ragged.weights[i] > 0]
        each = {i: sum(logps[i][ragged.mask[i]]) / (ragged.mask[i].sum() if per_token else 1) for i in rows}
        return -sum(ragged.weights[i] * each[i] for i in rows) / sum(ragged.weights[i] for i in rows)

    term = jax.jit(
        jax.value_and_grad(
            lambda lp: explanation_likelihood(lp, ragged.mask, weights=ragged.weights, per_token=per_token)
        )
    )
    value, gradient = term(jnp.asarray(ragged.garbage("logps"), jnp.float32))
    assert float(value) == pytest.approx(loops(ragged.logps), rel=1e-6)
    np.testing.assert_allclose(gradient, slope(loops, ragged.logps), atol=1e-6)
    ones = explanation_likelihood(ragged.logps, ragged.mask, weights=np.ones(8), per_token=per_token)
    assert float(explanation_likelihood(ragged.logps, ragged.mask, per_token=per_token)) == float(ones)


# ---- all of them -----------------------------------------------------------------------------------------------------

ALL = {
    "probability": lambda lp, old, a, m: losses.reinforce(shaped_probability(lp), a),
    "ratio": lambda lp, old, a, m: losses.reinforce(shaped_ratio(losses.token_ratio(lp, old), m), a),
    "released": lambda lp, old, a, m: think_tuning(lp, old, a, jnp.arange(7) % 2 == jnp.zeros((8, 1))),
    "intended": lambda lp, old, a, m: think_tuning(lp, old, a, jnp.ones((8, 7), bool), offset="intended"),
}


@pytest.mark.parametrize("name", ALL)
def test_garbage_halves_and_constants(name, ragged):
    """What has no weight is not seen, half precision is read, no gradient reaches old log-probs and advantages."""
    weights = losses.token_mean(ragged.weights, ragged.mask)
    total = jax.jit(
        jax.value_and_grad(lambda *x: losses.weighted_sum(ALL[name](*x, ragged.mask), weights), argnums=(0, 1, 2))
    )
    fields = ("logps", "old_logps", "advantages")
    clean = total(*(jnp.asarray(getattr(ragged, f), jnp.float32) for f in fields))
    dirty = total(*(jnp.asarray(ragged.garbage(f, i), jnp.float32) for i, f in enumerate(fields)))
    for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(dirty)):
        np.testing.assert_array_equal(a, b)
    assert np.asarray(clean[1][0]).any() and not np.asarray(clean[1][1]).any() and not np.asarray(clean[1][2]).any()
    halves = [jnp.asarray(getattr(ragged, f), jnp.bfloat16) for f in fields]
    got = ALL[name](*halves, ragged.mask)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, ALL[name](*(x.astype(jnp.float32) for x in halves), ragged.mask))
    poisoned = np.array(ragged.logps, np.float32)
    poisoned[1, 0] = np.nan
    assert np.isnan(total(jnp.asarray(poisoned), *map(jnp.asarray, (ragged.old_logps, ragged.advantages)))[0])


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: shaped_probability(np.ones((1, 2)), gamma=0.0), "gamma .* must be above 0, got 0.0"),
        (lambda: shaped_ratio(*[np.ones((1, 2))] * 2, quantile=1.5), r"lies in \[0, 1\], got 1.5"),
        (lambda: shaped_ratio(np.ones((1, 2)), np.ones(2)), "one shape"),
        (lambda: advantage_aware_ratio(*[np.ones((1, 2))] * 2, offset="none"), "one of .*, got 'none'"),
        (lambda: advantage_aware_ratio(*[np.ones((1, 2))] * 2, bound=0.5), "at least 1, got 0.5"),
        (lambda: think_tuning(*[np.ones((1, 2))] * 3, np.ones((1, 3))), "one shape"),
        (lambda: explanation_likelihood(np.ones((1, 2)), np.ones((2, 2))), "one shape"),
    ],
)
def test_refusals(call, said):
    with pytest.raises(ValueError, match=said):
        call()
