"""Weights divided over devices come together for one layer at a time, whole but for `tensor`."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from grpo_jax.models import TransformerConfig
from grpo_jax.models.evaluate import LOGITS, in_fast_memory
from grpo_jax.models.layers import gathered, product
from grpo_jax.models.sharding import shardings
from grpo_jax.models.transformer import create, logical_axes
from grpo_jax.planning.chips import open_slice
from grpo_jax.training.mesh import make_mesh

CONFIG = TransformerConfig(
    vocab_size=64, hidden_size=16, intermediate_size=32, num_layers=2, num_heads=4, num_kv_heads=1, head_dim=8
)
WHOLE = {
    "query": PartitionSpec(None, "tensor", None),
    "key": PartitionSpec(None, None, None),  # one head for two devices
    "output": PartitionSpec("tensor", None, None),
    "gate": PartitionSpec(None, "tensor"),
    "down": PartitionSpec("tensor", None),
}


def test_matrices_of_a_layer_are_whole_but_for_tensor_and_the_same_numbers():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    params = create(CONFIG, jax.random.key(0))[1]
    placed = jax.device_put(params, shardings(logical_axes(CONFIG), mesh))["layers"]
    assert placed["mlp"]["gate"].sharding.spec == PartitionSpec(None, "fsdp", "tensor")
    with jax.set_mesh(mesh):
        layer = jax.jit(lambda weights: gathered(jax.tree.map(lambda x: x[1], weights)))(placed)
    for name, spec in WHOLE.items():
        part = "mlp" if name in layer["mlp"] else "attention"
        there = layer[part][name]
        assert there.sharding.is_equivalent_to(NamedSharding(mesh, spec), there.ndim), name
        assert (there == params["layers"][part][name][1]).all()


def asked(decisions, features, dtype=jnp.bfloat16, *, rows=16):
    """How hidden states of so many decisions, of so many rows a context, are said."""
    return in_fast_memory(jax.ShapeDtypeStruct((1, rows, decisions // rows, features), dtype))


def test_a_chunk_of_logits_fills_its_part_of_fast_memory_on_each_device():
    assert asked(4096, 1536) == (1, LOGITS // (4 * 4096)) == (1, 896)
    assert asked(2**20, 8) == (1, 512)
    with jax.set_mesh(make_mesh(data=2, fsdp=2, tensor=2)):
        assert asked(4 * 4096, 1536) == (1, 1792)
        assert asked(8 * 4096, 1536) == (2, 1792)  # all hidden states on each of two


def test_hidden_states_too_many_for_fast_memory_take_two_turns_or_larger_chunks():
    assert asked(8192, 1536) == (2, 896)
    assert asked(8192, 1024) == (1, 512)
    assert asked(8192, 1024, jnp.float32) == (2, 896)  # eight bytes each, not six
    assert asked(15 * 546, 1536, rows=15) == (1, 896)  # twice the bytes
    assert asked(4096, 8192) == (1, 1792)


def test_compiled_for_tpu_no_product_is_a_sum_of_parts():
    pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install 'jax[tpu]'")
    mesh = make_mesh(data=1, fsdp=4, devices=open_slice("v5e:2x2").devices)

    def array(*shape: int, spec: tuple) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    up, down = array(3, 1024, 4096, spec=(None, "fsdp")), array(3, 4096, 1024, spec=(None, None, "fsdp"))
    weights, rows = {"mlp": {"up": up, "down": down}}, array(32768, 1024, spec=("fsdp",))

    def permutes(bring) -> int:
        def layer(x, one):
            one = bring(one)["mlp"]
            return x + product(jax.nn.silu(product(x, one["up"])), one["down"]), None

        forward = jax.jit(lambda weights, x: jax.lax.scan(layer, x, weights)[0])
        with jax.set_mesh(mesh):
            return forward.lower(weights, rows).compile().as_text().count("collective-permute-start(")

    assert permutes(gathered) == 0 < permutes(lambda one: one)
