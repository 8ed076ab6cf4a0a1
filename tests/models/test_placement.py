"""On a mesh that divides the weights, they are gathered, and activations stay where their contexts are."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from grpo_jax.models import TransformerConfig, create, logical_axes, merge, shardings
from grpo_jax.training.mesh import make_mesh

CONFIG = TransformerConfig(
    vocab_size=64, hidden_size=32, intermediate_size=96, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8
)
C, P, G, T = 8, 7, 2, 5


@pytest.fixture(scope="module")
def compiled():
    mesh = make_mesh(fsdp=8, data=1)
    graphdef, params = create(CONFIG, jax.random.key(0))
    placed = jax.device_put(params, shardings(logical_axes(CONFIG), mesh))
    rng = np.random.default_rng(0)
    arrays = (
        rng.integers(0, 64, (C, P)).astype(np.int32),
        np.full(C, P - 1, np.int32),
        rng.integers(0, 64, (C, G, T)).astype(np.int32),
    )
    rows = jax.device_put(arrays, NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))

    def loss(params, *arrays):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return jnp.sum(merge(graphdef, params)(*arrays) ** 2)

    program = jax.jit(jax.value_and_grad(loss)).lower(placed, *rows).compile()
    alone = jax.jit(jax.value_and_grad(lambda p, *x: jnp.sum(merge(graphdef, p)(*x) ** 2)))(params, *arrays)
    return program, program(placed, *rows), alone


def test_the_numbers_are_those_of_one_device(compiled):
    _, got, want = compiled
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)


def test_weights_are_gathered_and_activations_are_not_summed(compiled):
    text = compiled[0].as_text()
    shapes = lambda kind: [  # noqa: E731
        tuple(map(int, dims.split(",")))
        for found in re.findall(rf"= (.*?) {kind}(?:-start)?\(", text)
        for dims in re.findall(r"\w\d+\[([\d,]+)\]", found)
    ]
    assert any(96 in shape and 32 in shape for shape in shapes("all-gather"))
    rows = {P + G * T, C * (P + G * T)}
    for shape in shapes("all-reduce") + shapes("all-to-all"):
        assert not (rows & set(shape) and {32, 96} & set(shape)), f"activations {shape} cross devices"
