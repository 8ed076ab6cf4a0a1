"""Aggregation weights against loops, and the promise that the cut of a batch does not matter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import losses

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
