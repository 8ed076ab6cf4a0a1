"""The gap between sampler and trainer, and the weights that make up for it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import losses


def test_sampler_gap(ragged):
    gap = np.abs(ragged.old_logps - ragged.sampler_logps)[ragged.mask]
    got = jax.jit(losses.sampler_gap)(
        np.where(ragged.mask, ragged.old_logps, np.nan),
        np.where(ragged.mask, ragged.sampler_logps, np.inf),
        ragged.mask,
    )
    assert float(got["max"]) == pytest.approx(gap.max(), rel=1e-5)
    assert float(got["mean"]) == pytest.approx(gap.mean(), rel=1e-5)


def test_sampler_gap_hides_nothing_and_survives_nothing():
    ones = jnp.ones((2, 2))
    assert np.isnan(losses.sampler_gap(ones.at[0, 0].set(jnp.nan), ones, ones > 0)["max"])
    empty = losses.sampler_gap(ones, 0 * ones, ones < 0)
    assert {name: float(value) for name, value in empty.items()} == {"max": 0, "mean": 0}


def test_truncated_importance(ragged):
    got = jax.jit(losses.truncated_importance)(ragged.old_logps, ragged.sampler_logps)
    np.testing.assert_allclose(got, np.minimum(np.exp(ragged.old_logps - ragged.sampler_logps), 2.0), rtol=1e-5)
    assert (np.asarray(got) == 2).any()  # the cap was reached, so it was tested


def test_truncated_importance_is_a_constant(ragged):
    for argument in (0, 1):
        gradient = jax.grad(lambda a, b: losses.truncated_importance(a, b).sum(), argument)(
            jnp.float32(ragged.old_logps), jnp.float32(ragged.sampler_logps)
        )
        assert not np.asarray(gradient).any()


def test_what_was_not_drawn_is_not_corrected():
    old = jnp.array([-1.0, -1.0, jnp.nan, -1.0, -1.0])
    sampler = jnp.array([-2.0, jnp.nan, -1.0, -jnp.inf, jnp.inf])
    got = losses.truncated_importance(old, sampler, cap=10.0)
    np.testing.assert_allclose(got, [np.e, 1, 1, 10, np.exp(-20)], rtol=1e-5)


def test_a_cap_of_nothing():
    with pytest.raises(ValueError, match="got 0"):
        losses.truncated_importance(jnp.ones((1, 1)), jnp.ones((1, 1)), cap=0)
