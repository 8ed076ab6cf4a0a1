"""Channels to rewards, lengths to punishments, rows to decisions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import advantages


def test_combine():
    nan = jnp.nan
    rewards = jnp.array([[1.0, 2.0, 3.0], [1.0, nan, 3.0], [nan, nan, nan], [nan, nan, -1.0]])
    got = jax.jit(advantages.combine)(rewards, jnp.array([1.0, 0.5, -2.0]))
    np.testing.assert_allclose(got, [-4.0, -5.0, nan, 2.0])
    np.testing.assert_allclose(advantages.combine(rewards, (1.0, 0.5, -2.0)), got)


def test_combine_passes_gradient_around_what_is_missing():
    rewards = jnp.array([[1.0, jnp.nan], [2.0, 3.0]])
    gradient = jax.grad(lambda r: advantages.combine(r, (2.0, 5.0)).sum())(rewards)
    np.testing.assert_array_equal(gradient, [[2.0, 0.0], [2.0, 5.0]])
    weights = jax.grad(lambda w: advantages.combine(rewards, w).sum())(jnp.ones(2))
    np.testing.assert_array_equal(weights, [3.0, 3.0])


def test_combine_needs_a_weight_per_channel():
    with pytest.raises(ValueError, match=r"\[4, 2\] and \[3\]"):
        advantages.combine(jnp.ones((4, 2)), (1, 1, 1))
    with pytest.raises(ValueError, match=r"\[2\] and \[2\]"):
        advantages.combine(jnp.ones(2), (1, 1))


def test_soft_overlong():
    """The worked example, and no discontinuity at either end."""
    lengths = jnp.array([0, 79, 80, 81, 90, 99, 100, 101, 500])
    got = advantages.soft_overlong(lengths, maximum=100, buffer=20)
    np.testing.assert_allclose(got, [0, 0, 0, -0.05, -0.5, -0.95, -1, -1, -1], atol=1e-7)
    np.testing.assert_allclose(advantages.soft_overlong(lengths[:3], maximum=100, buffer=100), [0, -0.79, -0.8])


@pytest.mark.parametrize("buffer", [0, -1, 101])
def test_soft_overlong_buffer_out_of_range(buffer):
    with pytest.raises(ValueError, match=f"buffer {buffer}, maximum 100"):
        advantages.soft_overlong(jnp.ones(3), maximum=100, buffer=buffer)


def test_per_decision():
    mask = jnp.array([[True, True, False], [False, False, False]])
    got = jax.jit(advantages.per_decision)(jnp.array([1.5, jnp.nan]), mask)
    np.testing.assert_array_equal(got, [[1.5, 1.5, 0], [0, 0, 0]])
    gradient = jax.grad(lambda x: advantages.per_decision(x, mask).sum())(jnp.array([1.5, jnp.nan]))
    np.testing.assert_array_equal(gradient, [2.0, 0.0])


def test_per_decision_needs_a_value_per_row():
    with pytest.raises(ValueError, match=r"\[3\] and \[2, 3\]"):
        advantages.per_decision(jnp.ones(3), jnp.ones((2, 3), bool))
