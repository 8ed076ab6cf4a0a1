"""Two sequences worked by hand: every loss, KL term and correction on the same few numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import losses
from grpo_jax.losses import mismatch, surrogates

LOGPS = jnp.array([[-0.6, -0.9, -2.1], [-1.5, 0.0, 0.0]])
OLD = jnp.array([[-1.0, -0.5, -2.0], [-0.7, 0.0, 0.0]])
MASK = jnp.array([[True, True, True], [True, False, False]])
ADVANTAGES = jnp.where(MASK, jnp.array([[1.0], [-2.0]]), 0)
WEIGHTS = jnp.ones(2)


def clipped():
    return losses.ppo_clip(losses.token_ratio(LOGPS, OLD), ADVANTAGES, low=0.2, high=0.28, dual=3.0)


def test_token_losses():
    np.testing.assert_allclose(clipped()[MASK], [-1.28, -0.670320, -0.904837, 1.6], atol=1e-6)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        (losses.token_mean(WEIGHTS, MASK), -0.313789),
        (losses.sequence_mean(WEIGHTS, MASK), 0.324140),
        (losses.sequence_sum(WEIGHTS, MASK), -0.627579),
        (losses.fixed_length(WEIGHTS, MASK, length=4), -0.156895),  # TRL's Dr. GRPO
        (2 * losses.fixed_length(WEIGHTS, MASK, length=3), -0.418386),  # verl's does not divide by the number of rows
    ],
)
def test_aggregations(weights, expected):
    assert float(losses.weighted_sum(clipped(), weights)) == pytest.approx(expected, abs=1e-6)


def test_gspo():
    ratio = losses.sequence_ratio(LOGPS, OLD, MASK)
    loss = losses.ppo_clip(ratio, ADVANTAGES, low=0.2, high=0.28)
    value = losses.weighted_sum(loss, losses.sequence_mean(WEIGHTS, MASK))
    assert float(value) == pytest.approx(0.316392, abs=1e-6)


def test_dual_clip_bounds_a_negative_advantage():
    loss = losses.ppo_clip(jnp.array([[5.0, 2.0, 5.0]]), jnp.array([[-2.0, -2.0, 2.0]]), dual=3.0)
    np.testing.assert_allclose(loss, [[6.0, 4.0, -2.4]], rtol=1e-6)


@pytest.mark.parametrize(
    ("term", "value", "gradient"),
    [
        (losses.kl.k1, 0.5, 1.0),
        (losses.kl.k2, 0.125, 0.5),
        (losses.kl.k3, 0.106531, 0.393469),
        (losses.kl.absolute, 0.5, 1.0),
        (losses.kl.unbiased, 0.106531, 0.5),
    ],
)
def test_kl(term, value, gradient):
    got = jax.value_and_grad(term)(jnp.float32(-1.0), jnp.float32(-1.5))
    np.testing.assert_allclose(got, (value, gradient), atol=1e-6)


def test_mismatch():
    log_weights = jnp.array([[0.2, -0.9, 1.1], [0.05, 0.0, 0.0]])
    mask = jnp.array([[True, True, True], [True, False, False]])
    got = losses.truncated_importance(log_weights, jnp.zeros((2, 3)), cap=2.0)[mask]
    np.testing.assert_allclose(got, [1.221403, 0.406570, 2.0, 1.051271], atol=1e-6)
    uncapped = losses.truncated_importance(log_weights, jnp.zeros((2, 3)), cap=1e9)[mask]
    np.testing.assert_allclose(uncapped, [1.221403, 0.406570, 3.004166, 1.051271], atol=1e-6)
    geometric = losses.sequence_ratio(log_weights, jnp.zeros((2, 3)), mask)[:, 0]
    np.testing.assert_allclose(geometric, [1.142631, 1.051271], atol=1e-6)
    mean_k3 = jax.vmap(lambda k, m: jnp.where(m, k, 0).sum() / m.sum())(
        losses.kl.k3(-log_weights, 0 * log_weights), mask
    )
    np.testing.assert_allclose(mean_k3, [0.410713, 0.001271], atol=1e-6)


@pytest.mark.parametrize(
    ("each", "scheme", "expected"),
    [
        (lambda r: surrogates.cispo(LOGPS, r, ADVANTAGES, low=0.2, high=0.28), losses.token_mean, 0.247040),  # verl
        (lambda r: surrogates.cispo(LOGPS, r, ADVANTAGES, high=1.2 - 1), losses.token_mean, 0.468865),  # TRL, cap 1.2
        (lambda r: surrogates.sapo(r, ADVANTAGES), losses.sequence_mean, 0.358882),
        (lambda r: surrogates.gmpo(LOGPS, OLD, ADVANTAGES, MASK), losses.sequence_mean, 0.186712),
    ],
)
def test_further_surrogates(each, scheme, expected):
    loss = each(losses.token_ratio(LOGPS, OLD))
    assert float(losses.weighted_sum(loss, scheme(WEIGHTS, MASK))) == pytest.approx(expected, abs=1e-6)


def test_further_corrections():
    log_weights = jnp.array([[0.2, -0.9, 1.1], [0.05, 0.0, 0.0]])
    zeros = jnp.zeros((2, 3))
    token = mismatch.token_importance(log_weights, zeros)
    shown = [1.221403, 0.406570, 3.004166, 1.051271]
    np.testing.assert_allclose(token[MASK], shown, atol=1e-6)
    np.testing.assert_allclose(mismatch.capped(token)[MASK], [*shown[:2], 2.0, shown[3]], atol=1e-6)
    np.testing.assert_allclose(mismatch.banded(token, low=0.5, high=2.0)[MASK], [shown[0], 0, 0, shown[3]], atol=1e-6)
    np.testing.assert_allclose(mismatch.banded(token)[MASK], [shown[0], 0, *shown[2:]], atol=1e-6)  # IcePop
    whole = mismatch.sequence_importance(log_weights, zeros, MASK)
    np.testing.assert_allclose(whole[MASK], [1.491825] * 3 + [1.051271], atol=1e-6)
    # the mean k3 of the rows are 0.410713 and 0.001271
    for bound, kept in ((0.42, 2), (0.40, 1), (0.001, 0)):
        left = mismatch.rejection_mask(log_weights, zeros, MASK, estimator="k3", over="sequence_mean", high=bound)
        assert int(left.any(1).sum()) == kept
