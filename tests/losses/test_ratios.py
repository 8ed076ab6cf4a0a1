"""Ratios against float64 loops, their gradients against finite differences and closed forms."""

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest

from grpo_jax import losses
from grpo_jax.losses import ratios


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


# ---- whole gradients over units -----------------------------------------------------------------------------------


def units_oracle(name, logps, old_logps, mask, unit_ids):
    """Each unit's ratio by loops in float64, on its decisions; 1 elsewhere."""
    result = np.ones(mask.shape)
    for row in range(mask.shape[0]):
        for unit in range(mask.shape[1]):
            members = [t for t in range(mask.shape[1]) if mask[row, t] and unit_ids[row, t] == unit]
            logs = [logps[row, t] - old_logps[row, t] for t in members]
            for t in members:
                result[row, t] = {
                    "unit_geometric": lambda logs=logs: np.exp(sum(logs) / len(logs)),
                    "unit_product": lambda logs=logs: np.exp(sum(logs)),
                    "unit_arithmetic": lambda logs=logs: sum(np.exp(d) for d in logs) / len(logs),
                }[name]()
    return result


WHOLE = ("unit_geometric", "unit_product", "unit_arithmetic")


@pytest.mark.parametrize("name", WHOLE)
def test_whole_unit_ratios(name, ragged, slope):
    """Values, and gradients under coefficients that differ within a unit."""
    mask, units = ragged.mask, ragged.unit_ids
    coefficients = np.random.default_rng(5).normal(size=mask.shape)

    def expected(logps):
        return (coefficients * units_oracle(name, logps, ragged.old_logps, mask, units)).sum()

    @jax.jit
    def ours(logps):
        ratio = getattr(ratios, name)(logps, ragged.old_logps, mask, units)
        return jnp.sum(coefficients * ratio), ratio

    (_, ratio), gradient = jax.value_and_grad(ours, has_aux=True)(jnp.asarray(ragged.logps, jnp.float32))
    oracle = units_oracle(name, ragged.logps, ragged.old_logps, mask, units)
    np.testing.assert_allclose(ratio, oracle, rtol=3e-6)
    np.testing.assert_allclose(gradient, slope(expected, ragged.logps), rtol=1e-4, atol=2e-5)
    assert not np.asarray(gradient)[~mask | (units < 0)].any()
    assert (np.asarray(getattr(ratios, name)(ragged.logps, ragged.logps, mask, units)) == 1).all()


def test_one_unit_per_row_is_the_sequence(ragged):
    whole = np.zeros(ragged.mask.shape, int)
    arguments = ragged.logps, ragged.old_logps, ragged.mask
    np.testing.assert_allclose(
        ratios.unit_product(*arguments, whole), losses.sequence_product(*arguments), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(ratios.unit_geometric(*arguments, whole), losses.sequence_ratio(*arguments), rtol=1e-5)


@pytest.mark.parametrize("same", [True, False])
def test_whole_and_straight_through_gradients_agree_for_one_advantage_per_unit(same, ragged):
    mask, units = ragged.mask, ragged.unit_ids
    draw = np.random.default_rng(1)
    per_unit = np.take_along_axis(draw.normal(size=mask.shape), np.maximum(units, 0), 1)
    advantages = per_unit if same else draw.normal(size=mask.shape)

    def gradient(ratio):
        return jax.grad(lambda lp: jnp.sum(jnp.where(mask, advantages * ratio(lp, ragged.old_logps, mask, units), 0)))(
            jnp.asarray(ragged.logps, jnp.float32)
        )

    gap = np.abs(np.asarray(gradient(ratios.unit_geometric)) - np.asarray(gradient(ratios.unit_ratio))).max()
    assert gap < 1e-5 if same else gap > 0.1


def test_arithmetic_is_never_below_geometric(ragged):
    arguments = ragged.logps, ragged.old_logps, ragged.mask, ragged.unit_ids
    assert (np.asarray(ratios.unit_arithmetic(*arguments) - ratios.unit_geometric(*arguments)) > -1e-6).all()


@pytest.mark.parametrize("name", [*WHOLE, "unit_ratio"])
def test_laws_of_unit_ratios(name, ragged):
    function = getattr(ratios, name)
    arrays = {k: getattr(ragged, k) for k in ("logps", "old_logps", "mask", "unit_ids")}
    laws.rows(function, arrays, ids=(), half=0.1)
    mask = ragged.mask & (ragged.weights > 0)[:, None]

    def total(lp, old):
        return function(lp, old, mask, ragged.unit_ids).sum()

    clean = jax.value_and_grad(total)(jnp.asarray(ragged.logps, jnp.float32), ragged.old_logps)
    dirty = jax.value_and_grad(total)(jnp.asarray(ragged.garbage("logps"), jnp.float32), ragged.garbage("old_logps", 1))
    np.testing.assert_array_equal(clean[0], dirty[0])
    np.testing.assert_array_equal(clean[1], dirty[1])


def test_rank_ratios_worked_by_hand():
    """Two of three ranked lists; the last decision of a row closes its last item."""
    logps = jnp.array([[-0.5, -0.1, -1, -0.4, -0.2], [-0.9, -0.3, -0.1, -0.7, -0.3]])
    old = jnp.array([[-0.6, -0.12, -0.9, -0.5, -0.2], [-0.8, -0.3, -0.1, -0.9, -0.35]])
    items = jnp.array([[0, 0, 1, 1, 1], [0, 0, 0, 1, 1]])
    got = ratios.unit_geometric(logps, old, jnp.ones((2, 5), bool), items)
    expected = [[1.061837] * 2 + [1.0] * 3, [0.967216] * 3 + [1.133148] * 2]
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_whole_ratios_are_bounded():
    logps, mask, whole = jnp.full((1, 3), 300.0), jnp.ones((1, 3), bool), jnp.zeros((1, 3), int)
    for name, bound in (("unit_geometric", 10), ("unit_product", 20), ("unit_arithmetic", 20)):
        ratio, pull = jax.vjp(lambda lp, name=name: getattr(ratios, name)(lp, jnp.zeros((1, 3)), mask, whole), logps)
        np.testing.assert_allclose(ratio, np.full((1, 3), np.exp(bound)), rtol=1e-5)
        assert not np.asarray(pull(jnp.ones((1, 3)))[0]).any()
