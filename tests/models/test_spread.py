"""Context parallelism: tokens of contexts and rows divided over devices, with the numbers of one device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.models import TransformerConfig, create, evaluate, logical_axes, shardings
from grpo_jax.models.kernels import attend_sequence, attention_path
from grpo_jax.models.kernels.sequence import SharedContext, padded
from grpo_jax.models.spread import attend_together, laid, parted
from grpo_jax.training.mesh import make_mesh
from grpo_jax.types import Batch, Contexts

PLAIN = TransformerConfig(
    vocab_size=64, hidden_size=32, intermediate_size=96, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8
)
SLIDING = dataclasses.replace(PLAIN, sliding_window=4, sliding_layers=(True, False), attention_softcap=5.0)
C, P, G, T = 4, 7, 2, 8


def test_each_part_holds_its_part_of_the_context_and_of_every_row():
    contexts, rows = np.arange(4)[None], 10 + np.arange(8).reshape(1, 2, 4)
    together = laid(contexts, rows, 2)
    assert together.tolist() == [[0, 1, 10, 11, 14, 15, 2, 3, 12, 13, 16, 17]]
    for got, want in zip(parted(together, 4, 2, 2), (contexts, rows)):
        np.testing.assert_array_equal(got, want)


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.integers(0, 64, shape).astype(np.int32)  # noqa: E731
    none = np.zeros(C * G, np.int32)
    return Batch(
        contexts=Contexts(tokens=draw(C, P), lengths=np.array([7, 1, 4, 5], np.int32)),
        sampled_under=none,
        trained_under=none,
        completions=draw(C * G, T),
        lengths=none + T,
        completion_mask=np.ones((C * G, T), bool),
        behavior_logps=np.zeros((C * G, T), np.float32),
        sampler_logps=np.zeros((C * G, T), np.float32),
        finished=none > 0,
        temperature=np.linspace(0.5, 2, C * G).astype(np.float32),
        prompt_ids=none,
        index=none,
        group_ids=none,
        weights=np.ones(C * G, np.float32),
        update_ids=none,
        role="policy",
        scores=np.zeros((C * G, 1), np.float32),
        columns={},
    )


@pytest.mark.parametrize(
    "config, sizes",
    [(PLAIN, {"fsdp": 2, "sequence": 2, "tensor": 2}), (SLIDING, {"data": 1, "sequence": 8})],
    ids=["plain", "sliding"],
)
def test_log_probs_and_their_gradients_are_those_of_one_device(config, sizes, rows):
    graphdef, params = create(config, jax.random.key(0))
    weigh = np.random.default_rng(1).normal(size=(C * G, T))

    def run(mesh):
        def loss(params, rows):
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                logps = evaluate(graphdef, params, rows).logps
            return (logps * weigh).sum(), logps

        placed = jax.device_put(params, shardings(logical_axes(config), mesh))
        return jax.device_get(jax.jit(jax.grad(loss, has_aux=True))(placed, rows))

    gradients, logps = run(make_mesh(data=1, devices=jax.devices()[:1]))
    others, said = run(make_mesh(**sizes))
    np.testing.assert_allclose(said, logps, atol=2e-6)
    for got, want in zip(*map(jax.tree.leaves, (others, gradients)), strict=True):
        np.testing.assert_allclose(got, want, atol=3e-6 * np.abs(want).max())


def test_the_mask_in_parts_is_the_mask_of_the_sequence_in_another_order():
    P, T, G, parts = 16, 24, 2, 4
    n = (P + G * T) // parts
    whole = SharedContext(P, T, P + G * T)[:, :]
    order = np.asarray(laid(np.arange(P)[None], P + np.arange(G * T).reshape(1, G, T), parts))[0]
    size, _ = padded(n, P // parts, T // parts)
    real = (np.arange(parts)[:, None] * size + np.arange(n)).reshape(-1)  # each part is filled up to whole blocks
    mask = SharedContext(P, T, size * parts, parts=parts)[:, :]
    np.testing.assert_array_equal(mask[np.ix_(real, real)], whole[np.ix_(order, order)])
    others = np.setdiff1d(np.arange(len(mask)), real)
    assert not mask[np.ix_(real, others)].any() and mask.diagonal().all()


def test_the_kernel_in_parts_is_the_plain_path_forward_and_backward():
    parts, P, T, G, H = 2, 8, 16, 2, 4
    rng, lengths = np.random.default_rng(0), np.array([8, 3])
    arrays = [jnp.asarray(rng.normal(size=(2, P + G * T, heads, 16)), jnp.float32) for heads in (H, 2, 2)]
    there = ((np.arange(P + G * T) < lengths[:, None]) | (np.arange(P + G * T) >= P))[..., None, None]
    probe = np.where(there, rng.normal(size=arrays[0].shape), 0)
    order = np.asarray(laid(np.arange(P)[None], P + np.arange(G * T).reshape(1, G, T), parts))[0]
    options = {"P": P, "scale": 0.3, "softcap": 2.0}

    def cut(*arrays):
        queries, keys, values = (x[:, order] for x in arrays)
        out = attend_sequence(queries, keys, values, lengths, **options, T=T, parts=parts, interpret=True)
        return out[:, np.argsort(order)]

    def run(attend):
        def loss(*arrays):
            out = attend(*arrays)
            return jnp.sum(out * probe), jnp.where(there, out, 0)

        return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*arrays)

    want = run(lambda *arrays: attend_together(*arrays, lengths, **options, G=G))
    with jax.set_mesh(make_mesh(data=2, sequence=2, tensor=2)):
        got = run(cut)
    for x, y in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_allclose(x, y, atol=5e-6)


def test_the_log_says_how_attention_is_computed_and_why():
    mesh = make_mesh(sequence=2)
    assert attention_path(PLAIN, mesh) == (
        "attention: matrix products, a block of queries at a time (kernels are for TPU)"
    )
