"""Aggregation weights against loops, and the promise that the cut of a batch does not matter."""

import functools

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from grpo_jax import losses
from grpo_jax.losses import aggregation

SCHEMES = {
    "token_mean": losses.token_mean,
    "sequence_mean": losses.sequence_mean,
    "sequence_sum": losses.sequence_sum,
    "fixed_length": functools.partial(losses.fixed_length, length=11),
}


def oracle(name, values, weights, mask):
    """The loss by loops: every row repeated as a weight of it in numerator and denominator."""
    numerator = denominator = 0.0
    for row in range(len(values)):
        length = int(mask[row].sum())
        if length == 0:
            continue
        total = sum(values[row, t] for t in range(mask.shape[1]) if mask[row, t])
        numerator += weights[row] * (total / length if name == "sequence_mean" else total)
        denominator += weights[row] * {"token_mean": length, "fixed_length": 11}.get(name, 1)
    return numerator / denominator


@pytest.mark.parametrize("name", SCHEMES)
def test_against_float64(name, ragged):
    weights = jax.jit(SCHEMES[name])(ragged.weights, ragged.mask)
    values = np.random.default_rng(1).normal(size=ragged.mask.shape)
    got = float(losses.weighted_sum(values, weights))
    assert got == pytest.approx(oracle(name, values, ragged.weights, ragged.mask), rel=1e-5)
    assert not np.asarray(weights)[~ragged.mask].any()
    assert not np.asarray(weights)[ragged.weights == 0].any()


@pytest.mark.parametrize("name", SCHEMES)
def test_a_weight_of_c_is_c_copies(name, ragged):
    counts = np.array([1, 3, 2, 0, 1, 1, 2, 1])
    values = np.random.default_rng(1).normal(size=ragged.mask.shape)
    weighted = losses.weighted_sum(values, SCHEMES[name](counts, ragged.mask))
    copied = losses.weighted_sum(
        values.repeat(counts, 0), SCHEMES[name](np.ones(counts.sum()), ragged.mask.repeat(counts, 0))
    )
    assert float(weighted) == pytest.approx(float(copied), rel=1e-5)


@pytest.mark.parametrize("name", SCHEMES)
def test_padding_rows_and_decisions_and_order_do_not_matter(name, ragged):
    base = np.asarray(SCHEMES[name](ragged.weights, ragged.mask))
    order = np.random.default_rng(0).permutation(len(base))
    np.testing.assert_allclose(SCHEMES[name](ragged.weights[order], ragged.mask[order]), base[order], rtol=1e-6)
    padded_weights = np.concatenate([ragged.weights, [0, 0, 5]])  # the last is empty, whatever its weight
    padded_mask = np.pad(ragged.mask, ((0, 3), (0, 4)))
    padded_mask[-3, 0] = True  # a padding row may claim decisions; its weight is 0
    np.testing.assert_allclose(
        SCHEMES[name](padded_weights, padded_mask)[: len(base), : base.shape[1]], base, rtol=1e-6
    )


@pytest.mark.parametrize("name", SCHEMES)
def test_nothing_to_train_gives_zeros(name):
    for weights, mask in ((np.zeros(3), np.ones((3, 2), bool)), (np.ones(3), np.zeros((3, 2), bool))):
        np.testing.assert_array_equal(SCHEMES[name](weights, mask), np.zeros((3, 2)))


def test_truncated_rows_leave_the_loss_and_its_denominator():
    mask = jnp.array([[True, True], [True, False], [True, True]])
    left = losses.without_truncated(mask, jnp.array([True, True, False]))
    np.testing.assert_array_equal(left, [[True, True], [True, False], [False, False]])
    np.testing.assert_allclose(losses.token_mean(jnp.ones(3), left), [[1 / 3, 1 / 3], [1 / 3, 0], [0, 0]], rtol=1e-6)
    np.testing.assert_allclose(losses.sequence_mean(jnp.ones(3), left), [[0.25, 0.25], [0.5, 0], [0, 0]], rtol=1e-6)


def test_errors_say_what_was_given():
    with pytest.raises(ValueError, match=r"weights .* \[2\] for \[3, 4\]"):
        losses.token_mean(jnp.ones(2), jnp.ones((3, 4), bool))
    with pytest.raises(ValueError, match=r"finished .* \[3, 4\] for \[3, 4\]"):
        losses.without_truncated(jnp.ones((3, 4), bool), jnp.ones((3, 4), bool))
    with pytest.raises(ValueError, match="got 0"):
        losses.fixed_length(jnp.ones(3), jnp.ones((3, 4), bool), length=0)


# ---- units, the mesh, compositions ---------------------------------------------------------------------


def unit_oracle(values, weights, mask, unit_ids):
    """The mean over all units of all rows of the unit's mean, a row of weight c counting c times."""
    total = count = 0.0
    for row in range(len(values)):
        for unit in sorted(set(unit_ids[row][mask[row]]) - {-1}):
            members = [t for t in range(mask.shape[1]) if mask[row, t] and unit_ids[row, t] == unit]
            total += weights[row] * sum(values[row, t] for t in members) / len(members)
            count += weights[row]
    return total / count


def test_unit_mean(ragged):
    values = np.random.default_rng(1).normal(size=ragged.mask.shape)
    weights = jax.jit(aggregation.unit_mean)(ragged.weights, ragged.mask, ragged.unit_ids)
    expected = unit_oracle(values, ragged.weights, ragged.mask, ragged.unit_ids)
    assert float(losses.weighted_sum(values, weights)) == pytest.approx(expected, rel=1e-5)
    assert not np.asarray(weights)[~ragged.mask | (ragged.unit_ids < 0)].any()
    assert float(weights.sum()) == pytest.approx(1, rel=1e-5)
    assert not np.asarray(aggregation.unit_mean(ragged.weights, ragged.mask, ragged.unit_ids * 0 - 1)).any()


def test_unit_mean_between_sequence_and_token(ragged):
    whole, own = np.zeros(ragged.mask.shape, int), np.broadcast_to(np.arange(7), ragged.mask.shape)
    for units, scheme in ((whole, losses.sequence_mean), (own, losses.token_mean)):
        np.testing.assert_allclose(
            aggregation.unit_mean(ragged.weights, ragged.mask, units), scheme(ragged.weights, ragged.mask), rtol=1e-6
        )


ALL = {**SCHEMES, "unit_mean": aggregation.unit_mean}


def arguments(name, ragged):
    return (ragged.weights, ragged.mask, ragged.unit_ids)[: 3 if name == "unit_mean" else 2]


@pytest.mark.parametrize("name", ALL)
def test_on_a_mesh_the_denominator_is_that_of_all_rows(name, ragged):
    """Each of 8 devices sees one row, and with the axis named gets the weights of the whole; without it, its own."""
    given = [jnp.asarray(x) for x in arguments(name, ragged)]
    whole = ALL[name](*given)
    mesh, rows = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)), PartitionSpec("data")

    def mapped(**options):
        return jax.jit(jax.shard_map(functools.partial(ALL[name], **options), mesh=mesh, in_specs=rows, out_specs=rows))

    np.testing.assert_allclose(mapped(axis_name="data")(*given), whole, rtol=1e-6)
    assert np.abs(np.asarray(mapped()(*given)) - whole).max() > 0.01


@pytest.mark.parametrize("name", ALL)
def test_loss_and_gradient_inside_shard_map(name, ragged):
    """Everything made inside, weights too: the loss summed over devices and its gradient are those of one device."""
    given = [jnp.asarray(x) for x in arguments(name, ragged)]
    logps = jnp.asarray(ragged.logps, jnp.float32)

    def loss(scale, logps, given, axis_name=None):
        weights = ALL[name](*given, axis_name=axis_name)
        each = losses.weighted_sum(jnp.exp(scale * logps), weights)
        return each if axis_name is None else jax.lax.psum(each, axis_name)

    mesh, rows = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)), PartitionSpec("data")
    spread = jax.shard_map(
        functools.partial(loss, axis_name="data"),
        mesh=mesh,
        in_specs=(PartitionSpec(), rows, rows),
        out_specs=PartitionSpec(),
    )
    one = jax.value_and_grad(loss, (0, 1))(1.0, logps, given)
    many = jax.jit(jax.value_and_grad(spread, (0, 1)))(1.0, logps, given)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), many, one)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("cut", [[1, 2, 5], [4]])
def test_weights_of_the_mini_batch_carry_its_denominator(name, cut, ragged):
    """Cut before or after: only weights made for the whole give the loss of the whole."""
    values = np.random.default_rng(1).normal(size=ragged.mask.shape)
    weights = ALL[name](*arguments(name, ragged))
    parts = np.split(np.arange(8), cut)
    whole = float(losses.weighted_sum(values, weights))
    assert sum(float(losses.weighted_sum(values[p], weights[p])) for p in parts) == pytest.approx(whole, rel=1e-5)
    alone = [ALL[name](*(x[p] for x in arguments(name, ragged))) for p in parts]
    assert abs(sum(float(losses.weighted_sum(values[p], w)) for p, w in zip(parts, alone)) - whole) > 0.1 * abs(whole)


@pytest.mark.parametrize("name", ALL)
def test_laws_of_aggregation(name, ragged):
    arrays = dict(zip(("weights", "mask", "unit_ids"), arguments(name, ragged)))
    laws.rows(ALL[name], arrays, ids=())


def test_documented_compositions(ragged):
    """LUSPO by loops; verl's sum without a number of rows."""
    lengths, ones = ragged.mask.sum(1), np.ones(8)
    rows = np.random.default_rng(1).normal(size=8)
    values = np.repeat(rows[:, None], 7, 1)
    luspo = losses.weighted_sum(values, losses.sequence_sum(ones, ragged.mask))
    assert float(luspo) == pytest.approx((lengths * rows).sum() / 7, rel=1e-5)  # one row is empty
    summed = losses.weighted_sum(values, ones[:, None] * ragged.mask / 11)
    assert float(summed) == pytest.approx((lengths * rows).sum() / 11, rel=1e-5)


def test_units_that_do_not_fit():
    with pytest.raises(ValueError, match=r"one id per decision, got \[3\] for \[3, 4\]"):
        aggregation.unit_mean(jnp.ones(3), jnp.ones((3, 4), bool), jnp.ones(3, int))
