"""The TPU kernels, interpreted on CPU, against float64 sums over the keys that a query sees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from grpo_jax.models import kernels
from grpo_jax.models.kernels.decoding import Tiles, _plan, decode_attention, tiles
from grpo_jax.models.kernels.placement import per_device
from grpo_jax.models.kernels.sequence import SharedContext, padded, sequence_attention

H, HKV = 4, 2


def weighed(query, keys, values, scale, cap):
    """One query against the keys it sees."""
    scores = keys @ query * scale
    scores = scores if cap is None else cap * np.tanh(scores / cap)
    weights = np.exp(scores - scores.max())
    return weights / weights.sum() @ values


def cached(C, G, P, T, D, dtype=jnp.float32, L=2):
    rng = np.random.default_rng(0)
    make = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    pair = lambda *shape: (make(*shape), make(*shape))  # noqa: E731
    return make(C, G, H, D), pair(L, C, HKV, P, D), pair(L, C, G, HKV, T, D)


def newest(queries, prefix, lengths, own, filled, layer, scale, cap, window):
    queries, *parts = (np.asarray(x, np.float64) for x in jax.tree.leaves((queries, prefix, own)))
    far_keys, far_values, keys, values = (x[layer] for x in parts)
    out = np.zeros(queries.shape)
    for c, g, h in np.ndindex(out.shape[:3]):
        k, p, n = h // (H // HKV), lengths[c], filled[c, g]
        first = max(0, p + n - window) if window else 0
        seen = np.concatenate([far_keys[c, k, :p], keys[c, g, k, :n]])[first:]
        heard = np.concatenate([far_values[c, k, :p], values[c, g, k, :n]])[first:]
        if len(seen):
            out[c, g, h] = weighed(queries[c, g, h], seen, heard, scale, cap)
    return out


def hidden(pair, exists):
    return tuple(jnp.where(exists[None, ..., None], x, jnp.nan) for x in pair)


@pytest.mark.parametrize(
    "P, T, lengths, filled, cap, window",
    [
        (140, 150, [140, 129, 0], [[150, 1], [128, 129], [7, 0]], None, None),
        (140, 150, [140, 3, 128], [[150, 140], [5, 9], [131, 129]], 1.5, 12),
    ],
    ids=["ragged", "softcap and window"],
)
def test_the_newest_token_hears_its_context_and_its_own_columns_and_nothing_else(P, T, lengths, filled, cap, window):
    queries, prefix, own = cached(3, 2, P, T, 16)
    lengths, filled = np.array(lengths), np.array(filled)
    expected = newest(queries, prefix, lengths, own, filled, 1, 0.4, cap, window)
    prefix = hidden(prefix, (np.arange(P) < lengths[:, None])[:, None])
    own = hidden(own, (np.arange(T) < filled[..., None])[:, :, None])
    call = jax.jit(lambda *x: decode_attention(*x, scale=0.4, softcap=cap, window=window, interpret=True))
    np.testing.assert_allclose(call(queries, prefix, lengths, own, filled, 1), expected, atol=1e-6)


@pytest.mark.parametrize("runs", [1, 2])
def test_rows_in_hand_have_the_first_places_of_each_run(runs):
    queries, prefix, own = cached(4, 2, 20, 24, 16)
    lengths, filled = np.array([20, 11, 0, 7]), np.array([[24, 3], [1, 17], [9, 9], [24, 24]])
    expected = newest(queries, prefix, lengths, own, filled, 1, 0.4, None, None)
    laid = (x.reshape(len(x), runs, 8 // runs, *x.shape[3:]) for x in own)
    own = tuple(jnp.pad(x, [(0, 0)] * 2 + [(0, 3)] + [(0, 0)] * 3, constant_values=jnp.nan) for x in laid)
    got = decode_attention(queries, prefix, lengths, own, filled, 1, scale=0.4, interpret=True)
    np.testing.assert_allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize("G, kv_heads, T", [(16, 2, 512), (64, 8, 4096), (256, 1, 4096), (1, 4, 100)])
def test_tiles_fit_into_fast_memory_and_divide_the_heads(G, kv_heads, T):
    size = tiles(G, kv_heads, 512, T, 128, 2)
    assert G * size.heads * size.columns * 128 * 2 <= 2**20
    assert kv_heads % size.heads == 0
    assert size.columns == T or size.columns % 16 == 0


def sequences(C, P, G, T, D=8):
    rng = np.random.default_rng(1)
    make = lambda heads: rng.normal(size=(C, P + G * T, heads, D)).astype(np.float32)  # noqa: E731
    return make(H), make(HKV), make(HKV)


def whole(queries, keys, values, lengths, P, T, scale, cap, window):
    """Each query against the context tokens that exist and its own row, in float64; what stands in padding is noise."""
    row = np.concatenate([np.full(P, -1), np.repeat(np.arange((queries.shape[1] - P) // T), T)])
    column = np.where(row < 0, np.arange(len(row)), (np.arange(len(row)) - P) % T)
    out = np.zeros(queries.shape)
    for c, h in np.ndindex(len(lengths), H):
        place = column + np.where(row < 0, 0, lengths[c])
        seen = (place <= place[:, None]) & ((row < 0) & (column < lengths[c]) | (row == row[:, None]))
        seen &= place > place[:, None] - (window or 10**9)
        query, key, value = (x[c, :, k].astype(np.float64) for x, k in ((queries, h), (keys, h // 2), (values, h // 2)))
        scores = query @ key.T * scale
        weights = np.exp(scores if cap is None else cap * np.tanh(scores / cap)) * seen
        out[c, :, h] = weights @ value / weights.sum(axis=1, keepdims=True)
    return out


@pytest.mark.parametrize("cap, window", [(None, None), (1.5, 6)], ids=["plain", "softcap and window"])
def test_rows_of_a_sequence_hear_their_context_and_themselves_forward_and_backward(cap, window):
    P, G, T, lengths = 10, 3, 7, np.array([10, 4])
    arrays = sequences(2, P, G, T)
    rng = np.random.default_rng(2)
    real = np.concatenate([np.arange(P) < lengths[:, None], np.ones((2, G * T), bool)], axis=1)[..., None, None]
    probe = np.where(real, rng.normal(size=arrays[0].shape), 0)
    options = {"P": P, "T": T, "scale": 0.5, "softcap": cap, "window": window}

    @jax.jit
    def loss(*arrays):
        out = sequence_attention(*arrays, lengths, **options, interpret=True)
        return jnp.sum(out * probe), out

    (_, out), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(*arrays)
    at = lambda *x: whole(*x, lengths, P, T, 0.5, cap, window)  # noqa: E731
    np.testing.assert_allclose(np.where(real, out - at(*arrays), 0), 0, atol=2e-6)
    for which, gradient in enumerate(gradients):
        direction = rng.normal(size=gradient.shape)
        moved = lambda e: [x + e * direction if i == which else x for i, x in enumerate(map(np.float64, arrays))]  # noqa: B023, E731
        slope = np.sum((at(*moved(1e-5)) - at(*moved(-1e-5))) * probe) / 2e-5
        np.testing.assert_allclose(np.sum(gradient * direction), slope, rtol=1e-4)


@pytest.mark.parametrize("window", [None, 30])
def test_the_mask_in_blocks_is_who_sees_whom(window):
    P, T, G = 70, 40, 2
    size, _ = padded(P + G * T, P, T)
    mask = SharedContext(P, T, size, window)
    parts = [slice(i, i + 32) for i in range(0, size, 32)]
    place = [(-1, n) if n < P else ((n - P) // T, P + (n - P) % T) for n in range(size)]
    expected = [
        [there <= here and other in (-1, row) and here - there < (window or size) for other, there in place]
        for row, here in place
    ]
    np.testing.assert_array_equal(np.block([[mask[i, j] for j in parts] for i in parts]), expected)
    assert mask[:, :].diagonal().all()  # nobody sees nothing, not even in the padding


def test_on_a_mesh_each_device_attends_for_its_own_contexts_and_heads_in_bfloat16_summed_in_float32():
    queries, prefix, own = cached(4, 2, 16, 16, 8, jnp.bfloat16)
    lengths, filled = np.array([16, 5, 1, 9]), np.array([[3, 16]] * 4)
    expected = newest(queries, prefix, lengths, own, filled, 0, 0.4, None, None)
    mesh = jax.make_mesh((2, 1, 2), ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3, devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        call = jax.jit(lambda *x: kernels.attend_newest(*x, scale=0.4, interpret=True))
        got = call(queries, prefix, lengths, own, filled, 0)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), expected, rtol=2**-7, atol=2**-8)


def test_what_does_not_divide_over_the_mesh_stays_whole():
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3)
    shapes = {}

    def local(x, y):
        shapes.update(x=x.shape, y=y.shape)
        return x

    with jax.set_mesh(mesh):
        per_device(local, [jnp.zeros((8, 6)), jnp.zeros((8, 3))], ["CH", "CH"], "CH")
    assert shapes == {"x": (2, 6), "y": (2, 3)}  # three heads do not divide over two devices
    assert not kernels.on_tpu()


def test_only_blocks_that_some_row_sees_are_fetched():
    size = Tiles(heads=1, tokens=128, columns=64)
    lengths, filled = jnp.array([300, 128, 0]), jnp.array([[65, 200], [1, 64], [10, 129]])
    *_, ranges = (plan := _plan(lengths, filled, 0, None, size, 512, 512))[0]
    np.testing.assert_array_equal(ranges, [[0, 0, 0], [2, 0, 0], [0, 0, 0], [3, 0, 2]])
    assert plan[1] == 3 + 4  # the longest context takes three steps, the longest row four
    *_, ranges = (plan := _plan(lengths, filled, 0, 100, size, 512, 512))[0]
    np.testing.assert_array_equal(ranges, [[2, 0, 0], [2, 0, 0], [0, 0, 0], [3, 0, 2]])
    assert plan[1] == 1 + 4
