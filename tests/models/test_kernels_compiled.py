"""The kernels compiled for TPU chips that nobody needs to have. Needs libtpu, the TPU compiler."""

import os

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from grpo_jax.models import kernels
from grpo_jax.training.mesh import make_mesh

pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install 'jax[tpu]'")
L, C, G, H, HKV, D, P, T = 2, 4, 4, 12, 2, 128, 256, 256


@pytest.fixture(scope="module", params=["v5e", "v6e"])
def mesh(request):
    from jax.experimental import topologies

    quiet = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "true", "TPU_WORKER_HOSTNAMES": "localhost"}
    os.environ.update(quiet | {"TPU_ACCELERATOR_TYPE": "v5litepod-4"})
    devices = topologies.get_topology_desc(platform="tpu", topology_name=f"{request.param}:2x2").devices
    return make_mesh(data=1, fsdp=2, tensor=2, devices=list(devices))


def compiled(mesh, function, *shapes):
    everywhere = NamedSharding(mesh, PartitionSpec())
    arrays = [jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere) for shape, dtype in shapes]
    with jax.set_mesh(mesh):
        assert kernels.on_tpu()
        return jax.jit(function).lower(*arrays).compile()


def test_decoding_reads_the_cache_of_all_layers_where_it_lies(mesh):
    def step(queries, far, lengths, near, filled, layer):
        return kernels.attend_newest(queries, (far, far), lengths, (near, near), filled, layer, scale=0.1, window=100)

    half = jnp.bfloat16
    far, near = ((L, C, HKV, P, D), half), ((L, C, G, HKV, T, D), half)
    program = compiled(
        mesh, step, ((C, G, H, D), half), far, ((C,), jnp.int32), near, ((C, G), jnp.int32), ((), jnp.int32)
    )
    cache = L * (C // 2) * G * (HKV // 2) * T * D * 2
    assert 'custom_call_target="tpu_custom_call"' in program.as_text()
    # what each device takes of a replicated cache, and nothing of that size besides
    assert program.memory_analysis().temp_size_in_bytes < 1.5 * (cache + cache // G)


def test_sequences_never_have_scores_in_memory_forward_or_backward(mesh):
    def loss(queries, keys, values, lengths, windowed):
        options = {"P": P, "T": T, "scale": 0.1, "softcap": 30.0, "window": 64, "windowed": windowed}
        return kernels.attend_sequence(queries, keys, values, lengths, **options).astype(jnp.float32).sum()

    N, half = P + G * T, jnp.bfloat16
    heads = [((C, N, h, D), half) for h in (H, HKV, HKV)]
    program = compiled(mesh, jax.grad(loss, (0, 1, 2)), *heads, ((C,), jnp.int32), ((), jnp.bool_))
    assert "splash" in program.as_text()
    assert program.memory_analysis().temp_size_in_bytes < 4 * C // 2 * H // 2 * N * N / 4
