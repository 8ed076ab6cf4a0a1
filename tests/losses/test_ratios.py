"""Ratios against float64 loops, their gradients against finite differences and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import losses


def unit_oracle(logps, old_logps, mask, unit_ids):
    """Geometric mean of the ratios of each unit, by loops in float64."""
    result = np.ones(mask.shape)
    for row in range(mask.shape[0]):
        for unit in range(mask.shape[1]):
            members = [t for t in range(mask.shape[1]) if mask[row, t] and unit_ids[row, t] == unit]
            for t in members:
                result[row, t] = np.exp(np.mean([logps[row, u] - old_logps[row, u] for u in members]))
    return result


def test_token_ratio(ragged):
    got = jax.jit(losses.token_ratio)(ragged.logps, ragged.old_logps)
    np.testing.assert_allclose(got, np.exp(ragged.logps - ragged.old_logps), rtol=2e-6)


def test_unit_ratio(ragged):
    got = jax.jit(losses.unit_ratio)(ragged.logps, ragged.old_logps, ragged.mask, ragged.unit_ids)
    expected = unit_oracle(ragged.logps, ragged.old_logps, ragged.mask, ragged.unit_ids)
    np.testing.assert_allclose(got, expected, rtol=2e-6)
    assert (np.asarray(got)[~ragged.mask | (ragged.unit_ids < 0)] == 1).all()


def test_sequence_ratio_is_one_unit_and_token_ratio_a_unit_each(ragged):
    arguments = ragged.logps, ragged.old_logps, ragged.mask
    whole = np.zeros(ragged.mask.shape, int)
    sequence = losses.sequence_ratio(*arguments)
    np.testing.assert_allclose(sequence, unit_oracle(*arguments, whole), rtol=2e-6)
    np.testing.assert_allclose(losses.unit_ratio(*arguments, whole), sequence, rtol=1e-6)
    own = np.broadcast_to(np.arange(ragged.mask.shape[1]), ragged.mask.shape)
    token = np.where(ragged.mask, losses.token_ratio(*arguments[:2]), 1)
    np.testing.assert_allclose(losses.unit_ratio(*arguments, own), token, rtol=1e-6)


def test_on_policy_is_exactly_one(ragged):
    units = jnp.asarray(ragged.unit_ids)
    for ratio in (
        losses.token_ratio(ragged.logps, ragged.logps),
        losses.sequence_ratio(ragged.logps, ragged.logps, ragged.mask),
        losses.sequence_product(ragged.logps, ragged.logps, ragged.mask),
        losses.unit_ratio(ragged.logps, ragged.logps, ragged.mask, units),
    ):
        assert (np.asarray(ratio) == 1).all()


def test_sequence_gradient_is_that_of_gspo(ragged, slope):
    """Straight-through per decision, with one advantage per row, against differences of GSPO's own definition."""
    mask, count = ragged.mask, (ragged.mask.any(1) & (ragged.weights > 0)) * ragged.weights

    def gspo(logps):
        total = 0.0
        for row in np.flatnonzero(count):
            log_ratio = (logps - ragged.old_logps)[row][mask[row]].mean()
            total += count[row] * -ragged.advantages[row, 0] * np.exp(log_ratio)
        return total / count.sum()

    def ours(logps):
        ratio = losses.sequence_ratio(logps, ragged.old_logps, mask)
        return losses.weighted_sum(-ragged.advantages * ratio, losses.sequence_mean(ragged.weights, mask))

    value, gradient = jax.value_and_grad(ours)(jnp.asarray(ragged.logps, jnp.float32))
    assert float(value) == pytest.approx(gspo(ragged.logps), rel=1e-5)
    np.testing.assert_allclose(gradient, slope(gspo, ragged.logps), atol=1e-6)


def test_sequence_product(ragged, slope):
    """Value and gradient of REINFORCE over whole completions, each with its own importance weight."""
    mask, count = ragged.mask, (ragged.mask.any(1) & (ragged.weights > 0)) * ragged.weights

    def definition(logps):
        products = np.exp(np.where(mask, logps - ragged.old_logps, 0).sum(1))
        return -(count * ragged.advantages[:, 0] * products).sum() / count.sum()

    def ours(logps):
        ratio = losses.sequence_product(logps, ragged.old_logps, mask)
        return losses.weighted_sum(-ragged.advantages * ratio, losses.sequence_mean(ragged.weights, mask))

    value, gradient = jax.jit(jax.value_and_grad(ours))(jnp.asarray(ragged.logps, jnp.float32))
    assert float(value) == pytest.approx(definition(ragged.logps), rel=1e-5)
    np.testing.assert_allclose(gradient, slope(definition, ragged.logps), rtol=1e-4, atol=1e-6)


def test_unit_gradient_is_that_of_the_geometric_mean(ragged, slope):
    """With one advantage and one weight per unit the decisions' gradients add up to the unit's."""
    mask, units = ragged.mask & (ragged.unit_ids >= 0), ragged.unit_ids

    def definition(logps):
        return (unit_oracle(logps, ragged.old_logps, mask, units) * ragged.advantages)[mask].sum()

    def ours(logps):
        ratio = losses.unit_ratio(logps, ragged.old_logps, mask, units)
        return jnp.sum(jnp.where(mask, ratio * ragged.advantages, 0))

    gradient = jax.grad(ours)(jnp.asarray(ragged.logps, jnp.float32))
    np.testing.assert_allclose(gradient, slope(definition, ragged.logps), rtol=2e-5, atol=1e-5)


def test_each_decision_keeps_its_own_gradient(ragged):
    """GSPO-token: with advantages per decision the gradient is s A_t, not a mixture over the row."""
    mask = ragged.mask
    advantages = np.random.default_rng(3).normal(size=mask.shape)
    gradient = jax.grad(
        lambda lp: jnp.sum(jnp.where(mask, advantages * losses.sequence_ratio(lp, ragged.old_logps, mask), 0))
    )(jnp.asarray(ragged.logps, jnp.float32))
    whole = unit_oracle(ragged.logps, ragged.old_logps, mask, np.zeros(mask.shape, int))
    np.testing.assert_allclose(gradient, np.where(mask, whole * advantages, 0), rtol=1e-5, atol=1e-6)


def test_clamps():
    logps, old = jnp.array([[0.0, -300.0, -1.0]]), jnp.array([[-300.0, 0.0, -2.0]])
    ratio, pull = jax.vjp(lambda lp: losses.token_ratio(lp, old), logps)
    np.testing.assert_allclose(ratio, np.exp([[20.0, -20.0, 1.0]]), rtol=1e-5)
    np.testing.assert_allclose(pull(jnp.ones((1, 3)))[0], [[0, 0, np.e]], rtol=1e-5)
    mask = jnp.ones((1, 3), bool)
    ratio, pull = jax.vjp(lambda lp: losses.sequence_ratio(lp, jnp.full((1, 3), -300.0), mask), logps)
    np.testing.assert_allclose(ratio, np.full((1, 3), np.exp(10)), rtol=1e-5)
    assert not np.asarray(pull(jnp.ones((1, 3)))[0]).any()


def test_the_old_policy_gets_no_gradient(ragged):
    mask = ragged.mask
    old = jnp.asarray(ragged.old_logps, jnp.float32)
    for ratio in (
        lambda o: losses.token_ratio(ragged.logps, o),
        lambda o: losses.sequence_ratio(ragged.logps, o, mask),
        lambda o: losses.unit_ratio(ragged.logps, o, mask, ragged.unit_ids),
    ):
        assert not np.asarray(jax.grad(lambda o, ratio=ratio: ratio(o).sum())(old)).any()


def test_garbage_under_the_mask_is_not_seen(ragged):
    for function, extra in (
        (losses.sequence_ratio, ()),
        (losses.sequence_product, ()),
        (losses.unit_ratio, (ragged.unit_ids,)),
    ):
        mask = ragged.mask & (ragged.weights > 0)[:, None]

        def total(lp, old, function=function, extra=extra, mask=mask):
            return function(lp, old, mask, *extra).sum()

        clean = jax.value_and_grad(total)(jnp.asarray(ragged.logps, jnp.float32), ragged.old_logps)
        dirty = jax.value_and_grad(total)(
            jnp.asarray(ragged.garbage("logps"), jnp.float32), ragged.garbage("old_logps", 1)
        )
        np.testing.assert_array_equal(clean[0], dirty[0])
        np.testing.assert_array_equal(clean[1], dirty[1])


def test_padding_and_order_do_not_matter(ragged):
    arguments = [ragged.logps, ragged.old_logps, ragged.mask, ragged.unit_ids]
    base = np.asarray(losses.unit_ratio(*arguments))
    order = np.random.default_rng(0).permutation(len(base))
    np.testing.assert_array_equal(losses.unit_ratio(*(x[order] for x in arguments)), base[order])
    fills = (9.0, -9.0, False, 0)
    longer = [np.pad(x, ((0, 0), (0, 3)), constant_values=fill) for x, fill in zip(arguments, fills)]
    np.testing.assert_allclose(losses.unit_ratio(*longer)[:, :-3], base, rtol=1e-6)
    np.testing.assert_allclose(
        losses.sequence_ratio(*longer[:3])[:, :-3], losses.sequence_ratio(*arguments[:3]), rtol=1e-6
    )


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"logps \[2, 3\], old_logps \[2\]"):
        losses.token_ratio(jnp.zeros((2, 3)), jnp.zeros(2))
    with pytest.raises(ValueError, match="mask"):
        losses.sequence_ratio(jnp.zeros((2, 3)), jnp.zeros((2, 3)), jnp.ones(3, bool))
    with pytest.raises(ValueError, match="one id per decision"):
        losses.unit_ratio(jnp.zeros((2, 3)), jnp.zeros((2, 3)), jnp.ones((2, 3), bool), jnp.zeros(3, int))
