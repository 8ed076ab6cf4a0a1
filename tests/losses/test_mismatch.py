"""The gap between sampler and trainer, and the weights that make up for it."""

import functools

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest

from grpo_jax import losses
from grpo_jax.losses import mismatch


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


# ---- weights, bands, rejection ----------------------------------------------------------------------

ARRAYS = ("old_logps", "sampler_logps", "mask")


def drawn(ragged):
    """Sampler log-probs with NaN where nothing was drawn, inside the mask and outside."""
    sampler = ragged.sampler_logps.copy()
    sampler[1, 0] = sampler[4, 1] = np.nan
    return sampler


def loop_weights(old, sampler, mask, *, over):
    result = np.ones(mask.shape)
    for row in range(mask.shape[0]):
        logs = [0.0 if np.isnan(sampler[row, t]) else old[row, t] - sampler[row, t] for t in range(mask.shape[1])]
        for t in range(mask.shape[1]):
            inside = [logs[u] for u in range(mask.shape[1]) if mask[row, u]]
            if over == "token" or mask[row, t]:
                result[row, t] = np.exp(logs[t] if over == "token" else sum(inside))
    return result


@pytest.mark.parametrize("over", ["token", "sequence"])
def test_weights_and_what_becomes_of_them(ragged, over):
    sampler = drawn(ragged)
    expected = loop_weights(ragged.old_logps, sampler, ragged.mask, over=over)
    if over == "token":
        weights = jax.jit(mismatch.token_importance)(ragged.old_logps, sampler)
    else:
        weights = jax.jit(mismatch.sequence_importance)(ragged.old_logps, sampler, ragged.mask)
    np.testing.assert_allclose(weights, expected, rtol=1e-5)
    np.testing.assert_allclose(mismatch.capped(weights, cap=1.5, floor=0.7), expected.clip(0.7, 1.5), rtol=1e-5)
    for low, high in ((0.5, 5.0), (0.8, 1.25), (0.0, 1.5)):
        band = np.where((expected >= low) & (expected <= high), expected, 0)
        np.testing.assert_allclose(mismatch.banded(weights, low=low, high=high), band, rtol=1e-5)
    assert (band == 0).any() and (band > 0).any()


def test_sequence_weights_are_constants_and_clamped(ragged):
    gradient = jax.grad(lambda a, b: mismatch.sequence_importance(a, b, ragged.mask).sum(), (0, 1))(
        jnp.float32(ragged.old_logps), jnp.float32(ragged.sampler_logps)
    )
    assert not np.asarray(gradient).any()
    ones = jnp.ones((1, 2), bool)
    got = mismatch.sequence_importance(jnp.full((1, 2), 30.0), jnp.zeros((1, 2)), ones)
    np.testing.assert_allclose(got, np.full((1, 2), np.exp(20)), rtol=1e-5)


@pytest.mark.parametrize("over", mismatch.SPANS)
@pytest.mark.parametrize(("estimator", "bounds"), [("k1", (0.6, 1.5)), ("k2", (None, 0.2)), ("k3", (None, 0.15))])
def test_rejection(ragged, estimator, over, bounds):
    """By loops; for k1 the bounds are on the inverse of the weight, so they mirror."""
    low, high = bounds
    sampler = drawn(ragged)
    expected = np.zeros(ragged.mask.shape, bool)
    for row in range(8):
        places = np.flatnonzero(ragged.mask[row])
        gaps = np.array(
            [0.0 if np.isnan(sampler[row, t]) else sampler[row, t] - ragged.old_logps[row, t] for t in places]
        )
        each = {"k1": gaps, "k2": gaps**2 / 2, "k3": np.exp(-gaps) - 1 + gaps}[estimator]
        if len(each):
            joined = {
                "token": each,
                "sequence_sum": np.full(len(each), each.sum()),
                "sequence_mean": np.full(len(each), each.mean()),
                "sequence_max": np.full(len(each), each.max()),
            }[over]
            kept = joined <= (np.log(high) if estimator == "k1" else high)
            expected[row, places] = kept & (joined >= np.log(low)) if estimator == "k1" else kept
    got = jax.jit(functools.partial(mismatch.rejection_mask, estimator=estimator, over=over, high=high, low=low))(
        ragged.old_logps, sampler, ragged.mask
    )
    np.testing.assert_array_equal(got, expected)
    assert expected.any() and (ragged.mask & ~expected).any()
    # garbage outside the mask is not read
    dirty = np.where(ragged.mask, sampler, np.inf)
    again = mismatch.rejection_mask(
        ragged.old_logps, dirty, ragged.mask, estimator=estimator, over=over, high=high, low=low
    )
    np.testing.assert_array_equal(again, expected)


def test_the_bounds_of_k1_are_mirrored():
    """The weight is 1.8, its inverse 0.56: [0.7, 2] on the inverse rejects it, [0.5, 1.1] keeps it."""
    old, sampler, mask = jnp.log(jnp.array([[1.8]])), jnp.zeros((1, 1)), jnp.ones((1, 1), bool)
    assert not mismatch.rejection_mask(old, sampler, mask, low=0.7, high=2.0)[0, 0]
    assert mismatch.rejection_mask(old, sampler, mask, low=0.5, high=1.1)[0, 0]
    assert mismatch.rejection_mask(old, sampler, mask, high=2.0)[0, 0]  # [1/2, 2]
    assert not mismatch.rejection_mask(old, sampler, mask, high=1.7)[0, 0]
    # the largest of what was sampled, not the 0 of what was not
    wide, first = jnp.concatenate([old, 0 * old], 1), jnp.array([[True, False]])
    assert not mismatch.rejection_mask(wide, 0 * wide, first, over="sequence_max", high=1.7).any()


def test_drifted(ragged):
    for threshold in (-0.2, 0.0, 0.1):
        expected = np.zeros(8, bool)
        for row in range(8):
            m = ragged.mask[row]
            if m.any():
                mean = (ragged.sampler_logps - ragged.logps)[row][m].mean()
                expected[row] = ragged.advantages[row, 0] < 0 and mean > threshold
        arguments = [
            np.where(ragged.mask, getattr(ragged, k), np.nan) for k in ("logps", "sampler_logps", "advantages")
        ]
        got = mismatch.drifted(*arguments, ragged.mask, threshold=threshold)
        np.testing.assert_array_equal(got, expected)
    assert expected.any() and not expected.all()


def test_statistics(ragged):
    weights = np.asarray(mismatch.token_importance(ragged.old_logps, ragged.sampler_logps))
    w = np.exp(ragged.old_logps - ragged.sampler_logps)[ragged.mask]
    cut = jax.jit(mismatch.importance_statistics)(weights, mismatch.capped(weights, cap=1.2), ragged.mask)
    expected = {
        "mean": w.mean(),
        "max": w.max(),
        "truncated": (w > 1.2).mean(),
        "masked": 0,
        "effective": w.sum() ** 2 / (w**2).sum() / len(w),
        "k3": (w - 1 - np.log(w)).mean(),
    }
    assert {k: float(v) for k, v in cut.items()} == pytest.approx(expected, rel=1e-4)
    band = mismatch.importance_statistics(weights, mismatch.banded(weights, low=0.9, high=1.2), ragged.mask)
    assert float(band["masked"]) == pytest.approx(((w > 1.2) | (w < 0.9)).mean(), rel=1e-5)
    assert float(band["truncated"]) == 0
    dirty = np.where(ragged.mask, weights, np.nan)
    again = mismatch.importance_statistics(
        dirty, np.where(ragged.mask, mismatch.capped(dirty, cap=1.2), 7), ragged.mask
    )
    assert {k: float(v) for k, v in again.items()} == pytest.approx(expected, rel=1e-4)
    nothing = mismatch.importance_statistics(weights, weights, ragged.mask & False)
    assert {k: float(v) for k, v in nothing.items()} == dict.fromkeys(expected, 0)


@pytest.mark.parametrize("weight", [0.0, 1e-9, 1e9])
def test_statistics_of_extreme_weights_are_finite(weight):
    given = jnp.full((2, 2), weight)
    got = mismatch.importance_statistics(given, mismatch.capped(given), jnp.ones((2, 2), bool))
    assert np.isfinite(list(got.values())).all()
    assert float(got["masked"]) == 0
    assert float(got["effective"]) == pytest.approx(1 if weight else 0)


def test_laws_of_corrections(ragged):
    arrays = {k: getattr(ragged, k) for k in ARRAYS}

    def everything(old_logps, sampler_logps, mask):
        token = mismatch.token_importance(old_logps, sampler_logps)
        whole = mismatch.sequence_importance(old_logps, sampler_logps, mask)
        kept = mismatch.rejection_mask(old_logps, sampler_logps, mask, over="sequence_mean", high=1.3)
        report = mismatch.importance_statistics(token, mismatch.banded(token), mask)
        return {"capped": mismatch.capped(token), "whole": whole, "kept": kept.astype(jnp.float32), **report}

    laws.rows(everything, arrays, ids=(), half=None)
    half = mismatch.banded(mismatch.token_importance(*(jnp.bfloat16(arrays[k]) for k in ARRAYS[:2])))
    assert half.dtype == jnp.float32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: mismatch.capped(x, cap=0), "cap is the largest weight .* got 0"),
        (lambda x: mismatch.capped(x, cap=1.0, floor=2.0), "got floor 2.0, got 1.0"),
        (lambda x: mismatch.banded(x, low=-1.0), "got low -1.0"),
        (lambda x: mismatch.rejection_mask(x, x, x, estimator="k4", high=1.0), "got 'k4'"),
        (lambda x: mismatch.rejection_mask(x, x, x, over="row", high=1.0), "got 'k1', 'row'"),
        (lambda x: mismatch.rejection_mask(x, x, x, estimator="k3", low=0.5, high=1.0), "leave out low, got 0.5"),
        (lambda x: mismatch.rejection_mask(x, x, x, high=0.5), "got 2.0 and 0.5"),
        (lambda x: mismatch.sequence_importance(x, x[0], x), r"sampler_logps \[2\]"),
    ],
)
def test_corrections_refuse_bad_options(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.ones((2, 2)))
