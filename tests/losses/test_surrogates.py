"""Surrogates against the published min/max form and the closed form of their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import losses


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
