"""Attention over kept keys and values against one float64 softmax over all of them, and what a write touches."""

import jax
import numpy as np
import pytest

from grpo_jax.models import KeysValues, cached
from grpo_jax.models.cached import arranged, attend_cached, written

L, C, G, H, HKV, D, P = 2, 3, 2, 6, 2, 8, 5
LENGTHS = np.array([5, 2, 0])
LAYER = 1


def inputs(S, T, seed=0):
    """Queries [C, G, S, H, D]; natural keys and values [L, C, (G,) tokens, Hkv, D], as pairs."""
    rng = np.random.default_rng(seed)
    make = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    pair = lambda *tokens: (make(L, C, *tokens, HKV, D), make(L, C, *tokens, HKV, D))  # noqa: E731
    return 2 * make(C, G, S, H, D), pair(P), pair(G, T)


def plain(queries, prefix, own, column, scale, cap, window):
    """One query at a time, its keys laid side by side, in float64."""
    out = np.zeros(queries.shape)
    for c, g, s, h in np.ndindex(*queries.shape[:4]):
        n, here = LENGTHS[c], LENGTHS[c] + column + s
        keys, values = (np.concatenate([x[LAYER, c, :n], y[LAYER, c, g]]) for x, y in zip(prefix, own))
        there = np.arange(len(keys))
        keys, values = (x[:, h // (H // HKV)].astype(np.float64) for x in (keys, values))
        scores = keys @ queries[c, g, s, h].astype(np.float64) * scale
        scores = scores if cap is None else cap * np.tanh(scores / cap)
        seen = (there <= here) & (there > here - (10**9 if window is None else window))
        weights = np.exp(scores[seen] - scores[seen].max())
        out[c, g, s, h] = weights / weights.sum() @ values[seen]
    return out


def attended(queries, prefix, own, column, scale=0.4, cap=None, window=None):
    kept = KeysValues(*arranged(*prefix)), KeysValues(*arranged(*own))
    positions = (LENGTHS[:, None] + column + np.arange(queries.shape[2])).astype(np.int32)
    call = lambda q, far, near, at: attend_cached(  # noqa: E731
        q, positions, far, LENGTHS, near, LAYER, at + q.shape[2], scale=scale, cap=cap, window=window
    )
    return jax.jit(call)(queries, *kept, np.int32(column))


@pytest.mark.parametrize("cap, window", [(None, None), (2.0, None), (None, 3), (1.5, 1)])
@pytest.mark.parametrize("S, column", [(1, 4), (4, 2)])
def test_one_softmax_over_all_keys(S, column, cap, window):
    queries, prefix, own = inputs(S, 7)
    want = plain(queries, prefix, own, column, 0.4, cap, window)
    np.testing.assert_allclose(attended(queries, prefix, own, column, 0.4, cap, window), want, atol=3e-6)


@pytest.mark.parametrize("column", [0, 127, 128, 250, 299])
def test_stages_read_all_that_is_filled(column):
    queries, prefix, own = inputs(1, 300)
    assert cached._widths(300) == [128, 256, 300]
    want = plain(queries, prefix, own, column, 0.4, None, None)
    np.testing.assert_allclose(attended(queries, prefix, own, column), want, atol=3e-6)


def test_a_stage_does_not_read_on():
    queries, prefix, own = inputs(1, 300)
    for x in own:
        x[:, :, :, 128:] = np.nan
    assert np.isfinite(attended(queries, prefix, own, 100)).all()


def test_scores_far_apart_between_the_parts_stay_exact():
    queries, prefix, own = inputs(1, 7)
    prefix = (prefix[0] * 100, prefix[1])
    want = plain(queries, prefix, own, 3, 1.0, None, None)
    np.testing.assert_allclose(attended(queries, prefix, own, 3, 1.0), want, atol=1e-4)


def test_a_write_touches_its_columns_of_its_layer_alone():
    _, _, own = inputs(1, 7)
    _, _, new = inputs(1, 2, seed=1)
    got = written(KeysValues(*arranged(*own)), new[0][0], new[1][0], LAYER, 3)
    for whole, part, x in zip(own, new, (np.moveaxis(got.keys, -1, -3), np.swapaxes(got.values, -2, -3))):
        whole[LAYER, :, :, 3:5] = part[0]
        np.testing.assert_array_equal(x, whole)
