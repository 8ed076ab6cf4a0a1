"""Where weights lie while completions are drawn: the choice, what it costs, and the program that brings them there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collectives import collectives
from jax.sharding import PartitionSpec

from grpo_jax.models import TransformerConfig, create, logical_axes, shardings
from grpo_jax.sampling.weights import Arrangement, arrange, cast, prepared
from grpo_jax.training.mesh import make_mesh

CONFIG = TransformerConfig(
    vocab_size=512, hidden_size=128, intermediate_size=384, num_layers=4, num_heads=8, num_kv_heads=2, head_dim=16
)


@pytest.fixture(scope="module")
def params():
    return create(CONFIG, jax.random.key(0))[1]


HEADS = (8 + 2 + 2) * 16
MATRICES = 512 * 128 + 4 * 128 * (HEADS + 8 * 16 + 3 * 384)
BIASES, NORMS = 4 * HEADS, (2 * 4 + 1) * 128


def test_a_copy_is_gathered_where_it_takes_half_of_what_training_leaves(params):
    """On 4 x 2 devices; biases are divided over tensor alone, norms lie everywhere."""
    mesh = make_mesh(fsdp=4, tensor=2)
    assert sum(x.size for x in jax.tree.leaves(params)) == MATRICES + BIASES + NORMS
    here, copy = MATRICES / 8 + BIASES / 2 + NORMS, 2 * (MATRICES / 2 + BIASES / 2 + NORMS)
    least = 16 * here + 2 * copy
    enough, short = (arrange(CONFIG, mesh, jnp.bfloat16, memory=least + more) for more in (16, -16))
    assert enough.to["layers"]["mlp"]["gate"].spec == PartitionSpec(None, None, "tensor")
    assert short.to == short.from_ == enough.from_ == shardings(logical_axes(CONFIG), mesh)
    assert f"gathered weights: {copy / 1e6:.3g} MB of bfloat16 per device" in enough.said
    assert f"{(copy - 2 * here) / 1e6:.3g} MB cross the network once a rollout" in enough.said
    assert "cross the network in every step; a whole copy" in short.said and "larger mesh.tensor" in short.said


def test_the_configuration_has_the_last_word():
    mesh = make_mesh(data=1, fsdp=8)
    assert arrange(CONFIG, mesh, jnp.float32, wanted="gathered", memory=0).to["embedding"].spec == PartitionSpec()
    divided = arrange(CONFIG, mesh, jnp.float32, wanted="divided", memory=1e12)
    assert divided.to["embedding"].spec == PartitionSpec(None, "fsdp") and "in every step" in divided.said


def test_weights_that_are_not_divided_stay_where_they_are(params):
    for sizes in ({"data": 8}, {"data": 4, "tensor": 2}):
        assert arrange(CONFIG, make_mesh(**sizes), jnp.bfloat16) == Arrangement()
    assert prepared(Arrangement(), None)(params) is params


@pytest.mark.parametrize("sizes", [{"fsdp": 4, "tensor": 2}, {"dcn_data": 2, "fsdp": 2, "sequence": 2}])
def test_one_program_casts_and_gathers(sizes, params):
    mesh = make_mesh(**sizes)
    arrangement = arrange(CONFIG, mesh, jnp.bfloat16, wanted="gathered")
    lying = jax.device_put(params, arrangement.from_)
    program = prepared(arrangement, jnp.bfloat16)
    assert program is prepared(arrange(CONFIG, mesh, jnp.bfloat16, wanted="gathered"), "bfloat16")
    got, want = program(lying), cast(params, jnp.bfloat16)
    for x, y, place in zip(*map(jax.tree.leaves, (got, want, arrangement.to)), strict=True):
        assert x.sharding == place and x.dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))
    text = program.lower(lying).compile().as_text()
    assert text.startswith("HloModule jit_gather_weights")
    seen = collectives(text)
    assert {c.kind for c in seen} == {"all-gather"}
    assert sum(c.size for c in seen) == MATRICES / mesh.shape["tensor"]  # each once
