"""Whole objectives: garbage under the mask, any cut of the batch, the mesh, other dtypes, and unbiasedness."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from grpo_jax import advantages, losses
from grpo_jax.losses import mismatch, ratios, surrogates

# Each with the arguments (logps, old_logps, ref_logps, sampler_logps, advantages, mask, unit_ids).
OBJECTIVES = {
    "grpo": lambda lp, old, ref, sampler, a, m, u: (
        losses.ppo_clip(losses.token_ratio(lp, old), a) + 0.04 * losses.kl.k3(lp, ref)
    ),
    "gspo": lambda lp, old, ref, sampler, a, m, u: losses.ppo_clip(
        losses.sequence_ratio(lp, old, m), a, low=3e-2, high=4e-2, dual=3.0
    ),
    "units": lambda lp, old, ref, sampler, a, m, u: (
        losses.ppo_clip(losses.unit_ratio(lp, old, m, u), a) + 0.1 * losses.kl.unbiased(lp, ref)
    ),
    "rloo": lambda lp, old, ref, sampler, a, m, u: (
        losses.reinforce(lp, a) + 0.1 * losses.kl.k1(lp, ref) + 0.1 * losses.kl.absolute(lp, ref)
    ),
    "product": lambda lp, old, ref, sampler, a, m, u: losses.ppo_clip(losses.sequence_product(lp, old, m), a),
    "corrected": lambda lp, old, ref, sampler, a, m, u: (
        losses.truncated_importance(old, sampler) * losses.ppo_clip(losses.token_ratio(lp, old), a)
        + 0.1 * losses.kl.k2(lp, ref)
    ),
    "cispo": lambda lp, old, ref, sampler, a, m, u: (
        mismatch.banded(mismatch.sequence_importance(old, sampler, m), low=0.2)
        * surrogates.cispo(lp, losses.token_ratio(lp, old), a, low=0.2, high=0.2)
        + 0.1 * losses.kl.corrected(losses.token_ratio(lp, old), lp, ref)
    ),
    "sapo": lambda lp, old, ref, sampler, a, m, u: surrogates.sapo(ratios.unit_arithmetic(lp, old, m, u), a),
    "gmpo": lambda lp, old, ref, sampler, a, m, u: (
        surrogates.gmpo(lp, old, a, m)
        + losses.ppo_clip(ratios.unit_product(lp, old, m, u), a)
        + losses.ppo_clip(ratios.unit_geometric(lp, old, m, u), a)
    ),
}
FIELDS = ("logps", "old_logps", "ref_logps", "sampler_logps", "advantages")


@functools.partial(jax.jit, static_argnums=0)
def compiled(name, logps, *rest_and_weights):
    *rest, weights = rest_and_weights
    return jax.value_and_grad(lambda lp: losses.weighted_sum(OBJECTIVES[name](lp, *rest), weights))(logps)


def loss_and_gradient(name, logps, *rest, weights):
    return compiled(name, jnp.asarray(logps, jnp.float32), *rest, weights)


def arguments(ragged):
    return [getattr(ragged, field) for field in FIELDS] + [ragged.mask, ragged.unit_ids]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_garbage_under_the_mask_changes_nothing(name, ragged):
    weights = losses.token_mean(ragged.weights, ragged.mask)
    clean = loss_and_gradient(name, *arguments(ragged), weights=weights)
    assert np.asarray(clean[1]).any()
    dirty = [ragged.garbage(field, seed) for seed, field in enumerate(FIELDS)]
    got = loss_and_gradient(name, *dirty, ragged.mask, ragged.unit_ids, weights=weights)
    np.testing.assert_array_equal(got[0], clean[0])
    np.testing.assert_array_equal(got[1], clean[1])


@pytest.mark.parametrize("field", ["logps", "old_logps", "advantages"])
def test_a_nan_that_counts_is_seen(field, ragged):
    for name in ("grpo", "gspo"):
        poisoned = arguments(ragged)
        at = FIELDS.index(field)
        poisoned[at] = poisoned[at].copy()
        poisoned[at][1, 0] = np.nan
        weights = losses.token_mean(ragged.weights, ragged.mask)
        assert np.isnan(loss_and_gradient(name, *poisoned, weights=weights)[0])


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("scheme", [losses.token_mean, losses.sequence_mean])
def test_any_cut_into_micro_batches_gives_the_same(name, scheme, ragged):
    weights = scheme(ragged.weights, ragged.mask)
    whole = loss_and_gradient(name, *arguments(ragged), weights=weights)
    for cuts in ([2, 4, 6], range(1, 8)):
        parts = [
            loss_and_gradient(name, *(x[rows] for x in arguments(ragged)), weights=weights[rows])
            for rows in np.split(np.arange(8), cuts)
        ]
        np.testing.assert_allclose(sum(part[0] for part in parts), whole[0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(np.concatenate([part[1] for part in parts]), whole[1], rtol=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_rows_sharded_by_shard_map(name, ragged):
    """Weights from the whole mini-batch, loss and gradient from each device's rows."""
    weights = losses.sequence_mean(ragged.weights, ragged.mask)
    whole = loss_and_gradient(name, *arguments(ragged), weights=weights)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = PartitionSpec("data")

    def local(logps, *rest_and_weights):
        *rest, weights = rest_and_weights
        value, gradient = jax.value_and_grad(lambda lp: losses.weighted_sum(OBJECTIVES[name](lp, *rest), weights))(
            logps
        )
        return jax.lax.psum(value, "data"), gradient

    given = [jnp.asarray(x) for x in arguments(ragged)]
    mapped = jax.shard_map(local, mesh=mesh, in_specs=rows, out_specs=(PartitionSpec(), rows))
    got = jax.jit(mapped)(*given, weights)
    np.testing.assert_allclose(got[0], whole[0], rtol=1e-5)
    np.testing.assert_allclose(got[1], whole[1], rtol=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_vmap_over_batches(name, ragged):
    stacked = [np.stack([x, x[::-1]]) for x in arguments(ragged)]
    together = jax.vmap(OBJECTIVES[name])(*stacked)
    for half, given in zip(together, zip(*stacked)):
        np.testing.assert_allclose(half, OBJECTIVES[name](*given), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_half_precision_is_read_and_float32_is_returned(name, ragged):
    halves = [jnp.asarray(x, jnp.bfloat16) for x in arguments(ragged)[:5]]
    got = OBJECTIVES[name](*halves, ragged.mask, ragged.unit_ids)
    assert got.dtype == jnp.float32
    expected = OBJECTIVES[name](*(x.astype(jnp.float32) for x in halves), ragged.mask, ragged.unit_ids)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(("estimator", "scale"), [("leave_one_out", 1.0), ("group_centered", 2 / 3)])
def test_expected_update_is_the_policy_gradient(estimator, scale):
    """All 4^3 groups of three completions of one decision, each with its probability, against the exact gradient.

    Leave-one-out is unbiased; the plain group mean shrinks it by (n - 1) / n.
    """
    parameters, outcome_rewards = jnp.array([0.3, -0.5, 0.1, 0.9]), jnp.array([1.0, 0.0, 0.5, -0.3])
    groups = jnp.array(list(itertools.product(range(4), repeat=3)))
    ids, mask = jnp.zeros(3, jnp.int32), jnp.ones((3, 1), bool)

    def loss(parameters, group):
        advantage = getattr(advantages, estimator)(outcome_rewards[group], ids)
        logps = jax.nn.log_softmax(parameters)[group][:, None]
        surrogate = losses.ppo_clip(
            losses.token_ratio(logps, jax.lax.stop_gradient(logps)), advantages.per_decision(advantage, mask)
        )
        return losses.weighted_sum(surrogate, losses.sequence_sum(jnp.ones(3), mask))

    chance = jnp.exp(jax.nn.log_softmax(parameters)[groups].sum(1))
    update = chance @ jax.vmap(jax.grad(loss), (None, 0))(parameters, groups)
    exact = jax.grad(lambda parameters: -jax.nn.softmax(parameters) @ outcome_rewards)(parameters)
    np.testing.assert_allclose(update, scale * exact, atol=1e-6)
