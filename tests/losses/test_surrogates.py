"""Surrogates against the published min/max form and the closed form of their gradients."""

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest

from grpo_jax import losses
from grpo_jax.losses import surrogates


def clip_oracle(ratio, advantages, low, high, dual):
    loss = np.maximum(-advantages * ratio, -advantages * np.clip(ratio, 1 - low, 1 + high))
    return loss if dual is None else np.where(advantages < 0, np.minimum(loss, -advantages * dual), loss)


@pytest.fixture
def draws():
    draw = np.random.default_rng(0)
    ratio = np.exp(draw.normal(0, 0.8, (40, 25)))
    return ratio, draw.choice([-1.5, 0.0, 0.7], ratio.shape)


@pytest.mark.parametrize(
    ("low", "high", "dual"), [(0.2, 0.2, None), (0.2, 0.28, 3.0), (3e-4, 4e-4, None), (1.0, 9.0, 1.1)]
)
def test_ppo_clip(draws, low, high, dual, slope):
    ratio, advantages = draws
    got, pull = jax.vjp(lambda r: losses.ppo_clip(r, advantages, low=low, high=high, dual=dual), jnp.float32(ratio))
    np.testing.assert_allclose(got, clip_oracle(ratio, advantages, low, high, dual), rtol=1e-6)
    step = 1e-6  # elementwise, so that all differences can be taken at once
    differences = (
        clip_oracle(ratio + step, advantages, low, high, dual) - clip_oracle(ratio - step, advantages, low, high, dual)
    ) / (2 * step)
    np.testing.assert_allclose(pull(jnp.ones_like(got))[0], differences, atol=1e-5)


def test_gradient_on_the_bounds_is_whole():
    """At a ratio of 1 with an empty range the surrogate is the policy gradient, not half of it."""
    gradient = jax.grad(lambda r: losses.ppo_clip(r, jnp.array([2.0, -2.0]), low=0.0, high=0.0).sum())(jnp.ones(2))
    np.testing.assert_array_equal(gradient, [-2.0, 2.0])


def test_clip_events_are_where_the_gradient_vanishes(draws):
    ratio, advantages = draws
    below, above = losses.clip_events(ratio, advantages, 0.2, 0.28)
    gradient = jax.grad(lambda r: losses.ppo_clip(r, advantages, low=0.2, high=0.28).sum())(jnp.float32(ratio))
    np.testing.assert_array_equal(np.asarray(below | above), (np.asarray(gradient) == 0) & (advantages != 0))
    assert below.any() and above.any()
    assert not np.asarray(below & above).any()
    np.testing.assert_array_equal(np.asarray(below)[advantages >= 0], False)
    np.testing.assert_array_equal(np.asarray(above)[advantages <= 0], False)


def test_reinforce_gradient_is_minus_the_advantage(draws):
    logps, advantages = np.log(draws[0]), draws[1]
    value, gradient = jax.value_and_grad(lambda lp: losses.reinforce(lp, advantages).sum())(jnp.float32(logps))
    assert float(value) == pytest.approx(-(logps * advantages).sum(), rel=1e-5)
    np.testing.assert_allclose(gradient, -advantages, rtol=1e-6)


def test_first_update_equals_reinforce(ragged):
    """At old = new, PPO's gradient is the policy gradient."""
    logps = jnp.asarray(ragged.logps, jnp.float32)
    clipped = jax.grad(lambda lp: losses.ppo_clip(losses.token_ratio(lp, ragged.logps), ragged.advantages).sum())(logps)
    plain = jax.grad(lambda lp: losses.reinforce(lp, ragged.advantages).sum())(logps)
    np.testing.assert_allclose(clipped, plain, rtol=1e-6)


def test_advantages_are_constants(draws):
    ratio, advantages = jnp.float32(draws[0]), jnp.float32(draws[1])
    assert not np.asarray(jax.grad(lambda a: losses.ppo_clip(ratio, a).sum())(advantages)).any()
    assert not np.asarray(jax.grad(lambda a: losses.reinforce(ratio, a).sum())(advantages)).any()


def test_vmap_over_clip_ranges(draws):
    ratio, advantages = draws
    highs = jnp.array([0.1, 0.2, 0.5])
    together = jax.jit(jax.vmap(lambda high: losses.ppo_clip(ratio, advantages, high=high)))(highs)
    for row, high in zip(together, (0.1, 0.2, 0.5)):
        np.testing.assert_allclose(row, losses.ppo_clip(ratio, advantages, high=high), rtol=1e-6)


@pytest.mark.parametrize("options", [{"low": -0.1}, {"low": 1.5}, {"high": -0.2}, {"dual": 1.0}])
def test_bounds_out_of_range(options):
    with pytest.raises(ValueError, match=str(next(iter(options.values())))):
        losses.ppo_clip(jnp.ones((1, 2)), jnp.ones((1, 2)), **options)


def test_one_advantage_per_row_is_refused():
    """[N] against [N, T] with N = T would broadcast to something plausible and wrong."""
    with pytest.raises(ValueError, match="per_decision"):
        losses.ppo_clip(jnp.ones((3, 3)), jnp.ones(3))


# ---- CISPO, SAPO, GMPO ------------------------------------------------------------------------------


def differences(formula, x, step=1e-6):
    """Slopes of an elementwise formula, all at once."""
    return (formula(x + step) - formula(x - step)) / (2 * step)


@pytest.mark.parametrize(("low", "high"), [(1.0, 4.0), (0.2, 0.28), (1.0, 0.2)])
def test_cispo(draws, low, high):
    """Value -w A log p with w the bounded ratio; gradient -w A everywhere, on either side of the bounds."""
    ratio, advantages = draws
    logps = np.random.default_rng(2).normal(-1, 1, ratio.shape)
    weight = np.minimum(np.maximum(ratio, 1 - low), 1 + high)

    def loss(logps, ratio):
        return surrogates.cispo(logps, ratio, advantages, low=low, high=high)

    got, pull = jax.vjp(loss, jnp.float32(logps), jnp.float32(ratio))
    np.testing.assert_allclose(got, -weight * advantages * logps, rtol=2e-6)
    to_logps, to_ratio = pull(jnp.ones_like(got))
    np.testing.assert_allclose(to_logps, -weight * advantages, rtol=2e-6)
    assert not np.asarray(to_ratio).any()
    assert (weight != ratio).any() and (weight == ratio).any()


def test_cispo_without_bounds_is_the_gradient_of_the_ratio(draws):
    ratio, advantages = draws
    old = np.zeros(ratio.shape)
    logps = jnp.float32(np.log(ratio))
    ours = jax.grad(lambda lp: surrogates.cispo(lp, losses.token_ratio(lp, old), advantages, high=1e3).sum())(logps)
    np.testing.assert_allclose(ours, -advantages * ratio, rtol=1e-5, atol=1e-6)


def sapo_oracle(ratio, advantages, positive, negative):
    tau = np.where(advantages > 0, positive, negative)
    return -advantages * 4 / tau / (1 + np.exp(-tau * (ratio - 1)))


@pytest.mark.parametrize(("positive", "negative"), [(1.0, 1.05), (3.0, 0.5)])
def test_sapo(draws, positive, negative):
    ratio, advantages = draws
    got, pull = jax.vjp(
        lambda r: surrogates.sapo(r, advantages, tau_positive=positive, tau_negative=negative), jnp.float32(ratio)
    )
    np.testing.assert_allclose(got, sapo_oracle(ratio, advantages, positive, negative), rtol=2e-6)
    expected = differences(lambda r: sapo_oracle(r, advantages, positive, negative), ratio)
    np.testing.assert_allclose(pull(jnp.ones_like(got))[0], expected, atol=1e-5)


def test_sapo_is_on_policy_at_a_ratio_of_one():
    gradient = jax.grad(lambda r: surrogates.sapo(r, jnp.array([2.0, -2.0])).sum())(jnp.ones(2))
    np.testing.assert_allclose(gradient, [-2.0, 2.0], rtol=1e-6)


def gmpo_oracle(logps, data, low, high):
    """Mean over rows of -A_i exp(mean of one-sidedly clipped log-ratios), by loops."""
    total = count = 0.0
    for row in range(len(logps)):
        m = data.mask[row]
        if not m.any() or data.weights[row] == 0:
            continue
        sign, a = np.sign(data.advantages[row, 0]), data.advantages[row, 0]
        d = (logps - data.old_logps)[row][m]
        bounded = [sign * min(sign * x, sign * min(max(x, -low), high)) for x in d]
        total += data.weights[row] * -a * np.exp(sum(bounded) / len(bounded))
        count += data.weights[row]
    return total / count


@pytest.mark.parametrize(("low", "high"), [(0.4, 0.4), (0.1, 0.2)])
def test_gmpo(ragged, slope, low, high):
    weights = losses.sequence_mean(ragged.weights, ragged.mask)

    @jax.jit
    @jax.value_and_grad
    def ours(logps):
        each = surrogates.gmpo(logps, ragged.old_logps, ragged.advantages, ragged.mask, low=low, high=high)
        return losses.weighted_sum(each, weights)

    value, gradient = ours(jnp.asarray(ragged.logps, jnp.float32))
    assert float(value) == pytest.approx(gmpo_oracle(ragged.logps, ragged, low, high), rel=1e-5)
    expected = slope(lambda lp: gmpo_oracle(lp, ragged, low, high), ragged.logps)
    np.testing.assert_allclose(gradient, expected, atol=1e-6)
    trained = ragged.mask & (ragged.weights > 0)[:, None]
    assert (expected[trained] == 0).any() or low == 0.4  # some decision is clipped


def test_gmpo_without_bounds_is_the_geometric_ratio(ragged):
    arguments = ragged.logps, ragged.old_logps
    free = surrogates.gmpo(*arguments, ragged.advantages, ragged.mask, low=9.0, high=9.0)
    expected = np.where(ragged.mask, -ragged.advantages * losses.sequence_ratio(*arguments, ragged.mask), 0)
    np.testing.assert_allclose(free, expected, rtol=1e-5, atol=1e-6)


def test_gspo_token_keeps_its_own_advantages(ragged):
    """The composition in the docstring: with an advantage per decision the gradient is s A_t inside the range."""
    advantages = np.random.default_rng(3).normal(size=ragged.mask.shape)

    def loss(logps):
        ratio = losses.sequence_ratio(logps, ragged.old_logps, ragged.mask)
        return losses.weighted_sum(
            losses.ppo_clip(ratio, advantages, low=0.9, high=9.0), losses.sequence_mean(np.ones(8), ragged.mask)
        )

    gradient = jax.grad(loss)(jnp.asarray(ragged.logps, jnp.float32))
    for row in np.flatnonzero(ragged.mask.any(1)):
        m = ragged.mask[row]
        s = np.exp((ragged.logps - ragged.old_logps)[row][m].mean())
        np.testing.assert_allclose(gradient[row][m], -advantages[row][m] * s / m.sum() / 7, rtol=1e-4)


def test_new_surrogates_take_advantages_as_constants_and_refuse_bad_options(ragged):
    ratio, a = jnp.float32(np.exp(ragged.logps)), jnp.float32(ragged.advantages)
    for function in (
        lambda a: surrogates.cispo(ragged.logps, ratio, a),
        lambda a: surrogates.sapo(ratio, a),
        lambda a: surrogates.gmpo(ragged.logps, ragged.old_logps, a, ragged.mask),
    ):
        assert not np.asarray(jax.grad(lambda a, f=function: f(a).sum())(a)).any()
    with pytest.raises(ValueError, match="high .* got -0.5"):
        surrogates.cispo(ragged.logps, ratio, a, high=-0.5)
    with pytest.raises(ValueError, match="tau_negative .* got 0"):
        surrogates.sapo(ratio, a, tau_negative=0)
    with pytest.raises(ValueError, match="low .* got -1"):
        surrogates.gmpo(ratio, ratio, a, ragged.mask, low=-1)
    with pytest.raises(ValueError, match="per_decision"):
        surrogates.sapo(ratio, a[:, 0])


@pytest.mark.parametrize("name", ["cispo", "sapo", "gmpo"])
def test_laws_of_surrogates(name, ragged):
    arrays = {k: getattr(ragged, k) for k in ("logps", "old_logps", "advantages", "mask")}

    def function(logps, old_logps, advantages, mask):
        ratio = losses.token_ratio(logps, old_logps)
        return {
            "cispo": lambda: surrogates.cispo(logps, ratio, advantages, low=0.2, high=0.2),
            "sapo": lambda: surrogates.sapo(ratio, advantages),
            "gmpo": lambda: surrogates.gmpo(logps, old_logps, advantages, mask),
        }[name]()

    laws.rows(function, arrays, ids=(), half=0.1)
