"""Blocked attention against a softmax in float64, one query at a time, and its gradient against JAX's of the same."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from grpo_jax.models import blocked
from grpo_jax.models.blocked import blocked_attention

C, G, T, H, HKV, D, P = 3, 2, 10, 4, 2, 6, 7
LENGTHS = np.array([7, 3, 0], np.int32)
CASES = [(None, None), (2.0, None), (None, 4), (1.5, 1)]


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """Four bands for ten columns, the last shorter, each cut in a loop."""
    monkeypatch.setattr(blocked, "_NARROWEST", 2)
    monkeypatch.setattr(blocked, "_BANDS", 4)
    monkeypatch.setattr(blocked, "_SCORES_TO_QUERIES", 0.3)


def inputs(dtype=np.float32, c=C, p=P, t=T):
    rng = np.random.default_rng(0)
    make = lambda *shape: rng.normal(size=shape).astype(np.float32).astype(dtype)  # noqa: E731
    own = make(c, G, t, H, D) * np.array(2, dtype), make(c, G, t, HKV, D), make(c, G, t, HKV, D)
    return *own, make(c, p, HKV, D), make(c, p, HKV, D)


def ours(arrays, lengths=LENGTHS, cap=None, window=None):
    return blocked_attention(*arrays[:3], arrays[3:], lengths, scale=0.4, softcap=cap, window=window)


def plain(xp, arrays, lengths=LENGTHS, cap=None, window=None):
    """All keys of a query side by side, one softmax."""
    queries, keys, values, there_keys, there_values = arrays
    c, g, t, h, d = queries.shape
    p = there_keys.shape[1]

    def beside(own, there):
        joined = xp.concatenate([xp.broadcast_to(there[:, None], (c, g, *there.shape[1:])), own], axis=2)
        return xp.repeat(joined, h // joined.shape[3], axis=3)

    scores = xp.einsum("cgthd,cgkhd->cghtk", queries, beside(keys, there_keys)) * 0.4
    scores = scores if cap is None else cap * xp.tanh(scores / cap)
    at = np.concatenate([np.broadcast_to(np.arange(p), (c, p)), lengths[:, None] + np.arange(t)], axis=1)
    here = lengths[:, None] + np.arange(t)
    seen = at[:, None] <= here[..., None]
    seen[:, :, :p] &= (np.arange(p) < lengths[:, None])[:, None]
    if window is not None:
        seen &= at[:, None] > here[..., None] - window
    weights = xp.where(seen[:, None, None], xp.exp(scores - scores.max(-1, keepdims=True)), 0)
    weights = weights / weights.sum(-1, keepdims=True)
    return xp.einsum("cghtk,cgkhd->cgthd", weights, beside(values, there_values))


@pytest.mark.parametrize("cap, window, few", [*((*case, 0) for case in CASES), (None, None, 8)])
def test_values_and_gradients(cap, window, few, monkeypatch):
    monkeypatch.setattr(blocked, "_FEW", few)
    arrays = inputs()
    probe = np.random.default_rng(1).normal(size=arrays[0].shape)
    wide = [x.astype(np.float64) for x in arrays]

    def slope(function, *args):
        return jax.jit(jax.grad(lambda a: jnp.sum(probe.astype(a[0].dtype) * function(*args, a, LENGTHS, cap, window))))

    got = jax.jit(lambda a: ours(a, LENGTHS, cap, window))(arrays)
    np.testing.assert_allclose(got, plain(np, wide, LENGTHS, cap, window), atol=2e-6)
    with jax.enable_x64(True):
        expected = slope(plain, jnp)(tuple(wide))
    for got, want in zip(slope(ours)(arrays), expected):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_what_lies_beyond_a_context_may_be_nan_and_has_no_gradient():
    arrays = inputs()
    hidden = (np.arange(P) >= LENGTHS[:, None])[..., None, None]
    poisoned = *arrays[:3], *(np.where(hidden, np.nan, x).astype(np.float32) for x in arrays[3:])
    run = jax.jit(jax.value_and_grad(lambda a: jnp.sum(jnp.sin(ours(a, cap=2.0, window=6)))))
    for clean, got in zip(jax.tree.leaves(run(arrays)), jax.tree.leaves(run(poisoned))):
        np.testing.assert_array_equal(got, clean)
    for gradient in run(poisoned)[1][3:]:
        assert (np.where(hidden, gradient, 0) == 0).all() and np.abs(gradient).max() > 0


@pytest.mark.parametrize("t, p", [(1, 0), (1, 3), (5, 0)])
def test_one_token_and_no_context(t, p):
    arrays = inputs(c=2, t=t, p=p)
    lengths = np.array([p, 0], np.int32)
    context = arrays[3:] if p else None
    got = blocked_attention(*arrays[:3], context, lengths, scale=0.4)
    np.testing.assert_allclose(got, plain(np, [x.astype(np.float64) for x in arrays], lengths), atol=2e-6)


def test_bfloat16_sums_in_float32():
    arrays = inputs(jnp.bfloat16)
    wide = [np.asarray(x, np.float64) for x in arrays]
    got = jax.jit(ours)(arrays)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got, np.float64), plain(np, wide), atol=0.03)
    run = jax.jit(jax.grad(lambda a: jnp.sum(ours(a).astype(jnp.float32) ** 2)))
    for got, want in zip(run(arrays), run(tuple(np.float32(x) for x in wide))):
        assert got.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.float32(got), want, atol=0.02 * np.abs(want).max())


def test_scores_of_all_queries_never_exist(monkeypatch):
    monkeypatch.undo()
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in [(2, 3, 256, 4, 16), *[(2, 3, 256, 2, 16)] * 2]]
    context = [jax.ShapeDtypeStruct((2, 128, 2, 16), jnp.float32)] * 2
    attend = functools.partial(blocked_attention, scale=0.3)
    loss = lambda q, k, v, *c: jnp.sum(attend(q, k, v, c, jnp.full(2, 128)) ** 2)  # noqa: E731
    text = jax.jit(jax.grad(loss, range(5))).lower(*shapes, *context).compile().as_text()
    largest = max(np.prod([int(n) for n in s.split(",")]) for s in re.findall(r"f32\[([\d,]+)\]", text))
    assert largest <= 2 * 3 * 4 * 256 * 128 / 2  # half of the scores of the context alone


def test_contexts_divided_over_devices():
    arrays = inputs(c=8)
    lengths = np.resize(LENGTHS, 8)
    run = jax.jit(jax.value_and_grad(lambda a, n: jnp.sum(jnp.sin(ours(a, n, window=6)))))
    expected = run(arrays, lengths)
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    heads = [PartitionSpec("data", *[None] * (x.ndim - 3), "tensor") for x in arrays]
    placed = tuple(jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(arrays, heads))
    got = run(placed, jax.device_put(lengths, NamedSharding(mesh, PartitionSpec("data"))))
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
