"""Edges that a trainer of one's own meets: wrong ids, cut batches on a mesh, masked steps, nothing at all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from grpo_jax import advantages, losses, segments
from grpo_jax.losses.discriminative import forward_divergence, kl_constraint
from grpo_jax.losses.gaussian import flow_transition, gaussian_ratio

ROWS = PartitionSpec("data")
MESH = Mesh(np.array(jax.devices()[:8]), ("data",))


def test_ids_of_another_numbering_are_refused_and_under_jit_seen():
    rewards, ids = jnp.array([1.0, 0, 1, 0]), jnp.array([101, 101, 202, 202])
    with pytest.raises(ValueError, match=r"group ids lie in \[0, N\), here N = 4 .* got 202; segments.join"):
        advantages.group_z_score(rewards, ids)
    for estimator in (advantages.group_z_score, advantages.group_centered, advantages.leave_one_out):
        assert np.isnan(jax.jit(estimator)(rewards, ids)).all()
    np.testing.assert_allclose(advantages.leave_one_out(rewards, segments.join(ids)), [1, -1, 1, -1])


def test_a_nan_that_counts_is_seen_in_a_z_score():
    ids = jnp.zeros(3, jnp.int32)
    assert np.isnan(segments.z_score(jnp.array([1, jnp.nan, 0]), ids)).any()
    with pytest.raises(ValueError, match="not negative, got -1"):
        segments.z_score(jnp.ones(3), ids, epsilon=-1)


@pytest.mark.parametrize("broken", [0.0, np.nan, -1.0])
def test_a_masked_step_of_a_flow_leaves_the_gradient_alone(broken):
    draw = np.random.default_rng(0)
    x, v, after = draw.normal(size=(3, 2, 3, 4)).astype(np.float32)
    mask, steps = np.array([[True, True, False]] * 2), np.array([0.6, 0.3, 0.1], np.float32)

    def loss(scale, last):
        times = jnp.broadcast_to(jnp.array([0.9, 0.6, last]), (2, 3))
        to, noise = jnp.broadcast_to(steps, (2, 3)), jnp.full((2, 3), 0.7)
        old, _ = flow_transition(x, v, times, to, noise)
        mean, std = flow_transition(x, scale * v, times, to, noise)
        ratio = gaussian_ratio(after, mean, old, std)
        weights = losses.token_mean(jnp.ones(2), mask)
        return losses.weighted_sum(losses.ppo_clip(ratio, jnp.ones((2, 3)), low=1.0, high=9.0), weights)

    slope = jax.grad(loss)
    expected, got = slope(1.1, 0.3), slope(1.1, broken)
    assert np.isfinite(got) and abs(expected) > 1e-3
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize("what", ["divergence", "explanation"])
def test_means_over_decisions_on_a_mesh_are_those_of_one_device(what):
    draw = np.random.default_rng(0)
    logps = -draw.exponential(1.0, (16, 5)).astype(np.float32)
    old = logps + draw.normal(0, 0.2, logps.shape).astype(np.float32)
    mask = np.arange(5) < draw.integers(0, 6, 16)[:, None]

    def value(logps, old, mask, axis_name=None):
        if what == "divergence":
            return kl_constraint(forward_divergence(logps, old, mask, axis_name=axis_name), budget=0.0, penalty=3.0)
        return losses.explanation_likelihood(logps, mask, axis_name=axis_name)

    divided = jax.shard_map(
        lambda *a: value(*a, axis_name="data"), mesh=MESH, in_specs=(ROWS,) * 3, out_specs=PartitionSpec()
    )
    whole, parts = (jax.value_and_grad(f)(logps, old, mask) for f in (value, divided))
    assert abs(whole[0]) > 1e-4
    for a, b in zip(parts, whole):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_shapes_that_only_seem_to_fit():
    weights = jnp.ones((2, 2))
    for wrong in (jnp.ones((2, 1)), jnp.ones(2)):
        with pytest.raises(ValueError, match="must have one shape"):
            losses.weighted_sum(wrong, weights)


def test_no_decisions_at_all():
    none, mask = jnp.zeros((3, 0)), jnp.zeros((3, 0), bool)
    assert losses.shaped_ratio(none, mask).shape == (3, 0)
    assert losses.rejection_mask(none, none, mask, over="sequence_max", high=2.0).shape == (3, 0)


def test_sweeps_over_a_bound_under_vmap():
    gap = jnp.array([[0.0, 0.5, -0.9]])
    kept = jax.vmap(lambda high: losses.rejection_mask(gap, jnp.zeros_like(gap), gap == gap, high=high))
    np.testing.assert_array_equal(kept(jnp.array([1.5, 3.0]))[:, 0], [[True, False, False], [True, True, True]])


def test_the_constraint_is_float32():
    assert kl_constraint(jnp.bfloat16(0.5), budget=0.1).dtype == jnp.float32


def test_channels_that_cancel_leave_nothing():
    draw = np.random.default_rng(0)
    first = draw.random(8).astype(np.float32)
    rewards, ids = np.stack([first, 1 - first], axis=1), np.arange(8) // 4
    np.testing.assert_array_equal(advantages.decoupled_over_rows(rewards, ids, (1.0, 1.0), epsilon=1e-8), np.zeros(8))


def test_tempo_sees_rounding_for_what_it_is():
    """Two sums that should be equal, and rewards far from 0."""
    weights, tokens = np.float32([0.7, 0.6, 0.2, 0.3]), np.array([[1], [2], [1], [2]])
    scores = np.float32([[1, 0, 1, 0], [0, 1, 0, 1]])[[0, 1, 0, 1]]
    sums = np.float32([np.float32(sum(np.float32(a * b) for a, b in zip(row, weights))) for row in scores])
    ids, lengths = np.zeros(4, int), np.ones(4, int)
    if sums.max() > sums.min():
        np.testing.assert_array_equal(advantages.prefix_tree(sums, ids, tokens, lengths), np.zeros((4, 1)))
    rewards = np.array([0.0, 0.1, 0.025, 0.075])
    near = advantages.prefix_tree(rewards, ids, tokens, lengths)
    far = advantages.prefix_tree((rewards + 1024).astype(np.float32), ids, tokens, lengths)
    exact = (rewards + 1024).astype(np.float32).astype(np.float64) - 1024
    np.testing.assert_allclose(far, advantages.prefix_tree(exact, ids, tokens, lengths), atol=1e-5)
    assert np.abs(near).max() > 1
