"""Attention over kept keys and values against one float64 softmax over all of them, and what a write touches."""

import jax
import numpy as np
import pytest

from grpo_jax.models import KeysValues, cached
from grpo_jax.models.cached import arranged, attend_cached, moved, written

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


def in_blocks(own, width, *, shards=1, room=0):
    """Own keys and values as they are kept, `width` columns a block; 7 in columns beyond the last, NaN in `room` places
    of rows that are not in hand."""
    more = -own[0].shape[3] % width
    own = (np.pad(x, [(0, 0)] * 3 + [(0, more)] + [(0, 0)] * 2, constant_values=7.0) for x in own)
    blocks = [arranged(*pair) for pair in zip(*(np.split(x, x.shape[3] // width, axis=3) for x in own))]
    blocks = (np.stack(x, axis=1) for x in zip(*blocks))
    runs = (x.reshape(*x.shape[:2], shards, -1, *x.shape[4:]) for x in blocks)
    return KeysValues(*(np.pad(x, [(0, 0)] * 3 + [(0, room)] + [(0, 0)] * 3, constant_values=np.nan) for x in runs))


def attended(queries, prefix, own, column, scale=0.4, cap=None, window=None, *, width=8, **places):
    kept = KeysValues(*arranged(*prefix)), in_blocks(own, width, **places)
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


@pytest.mark.parametrize("on_cpu", [True, False], ids=["a loop", "a switch"])
@pytest.mark.parametrize("S, column", [(1, 0), (1, 31), (1, 32), (1, 69), (40, 20)])
def test_blocks_are_read_as_far_as_they_are_filled(S, column, on_cpu, monkeypatch):
    monkeypatch.setattr(cached, "on_cpu", lambda: on_cpu)
    queries, prefix, own = inputs(S, 70)
    assert cached.block_columns(1600) == (32 if on_cpu else 512)
    for x in own:  # blocks that nothing is in yet
        x[:, :, :, (column + S + 31) // 32 * 32 :] = np.nan
    for window in (None, 33):
        want = plain(queries, prefix, own, column, 0.4, None, window)
        got = attended(queries, prefix, own, column, window=window, width=32)
        np.testing.assert_allclose(got, want, atol=3e-6)


@pytest.mark.parametrize("S, column", [(1, 9), (4, 5)])
def test_rows_in_hand_have_the_first_places_of_each_device(S, column):
    queries, prefix, own = inputs(S, 12)
    want = plain(queries, prefix, own, column, 0.4, None, None)
    got = attended(queries, prefix, own, column, width=4, shards=3, room=5)
    np.testing.assert_allclose(got, want, atol=3e-6)


def test_scores_far_apart_between_the_parts_stay_exact():
    queries, prefix, own = inputs(1, 7)
    prefix = (prefix[0] * 100, prefix[1])
    want = plain(queries, prefix, own, 3, 1.0, None, None)
    np.testing.assert_allclose(attended(queries, prefix, own, 3, 1.0), want, atol=1e-4)


@pytest.mark.parametrize(
    "width, S, column", [(8, 2, 3), (3, 1, 5), (3, 1, 6), (3, 2, 5), (3, 2, 6), (3, 4, 2), (3, 8, 0)]
)
@pytest.mark.parametrize("places", [{}, {"shards": 3, "room": 2}], ids=["all rows", "fewer rows"])
def test_a_write_touches_its_columns_of_its_layer_alone(width, S, column, places):
    _, _, own = inputs(1, 8)
    _, _, new = inputs(1, S, seed=1)
    got = jax.jit(written)(in_blocks(own, width, **places), new[0][0], new[1][0], np.int32(LAYER), np.int32(column))
    for whole, part in zip(own, new):
        whole[LAYER, :, :, column : column + S] = part[0]
    for x, want in zip(got, in_blocks(own, width, **places)):
        np.testing.assert_array_equal(x, want)


def test_rows_move_within_the_cache_as_far_as_it_is_filled():
    _, _, own = inputs(1, 9)
    before = in_blocks(own, 3, shards=3, room=2)  # of two rows in hand on each device
    rows, filled = np.array([[1], [0], [1]]), 5
    after = jax.jit(moved, static_argnums=2)(before, rows, 2, np.int32(filled))
    for old, new in zip(before, after):
        for device, (row,) in enumerate(rows):
            np.testing.assert_array_equal(new[:, :2, device, 0], old[:, :2, device, row])
        np.testing.assert_array_equal(new[:, 2:], old[:, 2:])
        np.testing.assert_array_equal(new[:, :, :, 1:], old[:, :, :, 1:])
