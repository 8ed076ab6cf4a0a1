"""What crosses the network in the compiled programs of a run: weights, sums and little else."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from collectives import collectives

from grpo_jax.models import TransformerConfig, abstract, evaluate, logical_axes, shardings
from grpo_jax.models.sharding import sharding, ways
from grpo_jax.sampling.decoding import Cells, draw
from grpo_jax.sampling.weights import arrange
from grpo_jax.training.mesh import make_mesh
from grpo_jax.types import Contexts

# 1664 tokens are no multiple of 2 * 128, and few numbers of this model are products of others
E, F, V, L, HEADS, KV, D = 72, 160, 1664, 3, 4, 2, 16
CONFIG = TransformerConfig(
    vocab_size=V, hidden_size=E, intermediate_size=F, num_layers=L, num_heads=HEADS, num_kv_heads=KV, head_dim=D
)
P, G, T = 30, 2, 24
N = P + G * T


@pytest.fixture(autouse=True)
def compiled_anew():
    """What the compiler says is then said to this test."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", before)


def placed(shapes, places):
    return jax.tree.map(lambda x, p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=p), shapes, places)


def sampling(mesh, wanted):
    """The sampler with weights as arranged, on four rows of a context for each device."""
    graphdef, params = abstract(CONFIG)
    c, g = ways("cells", mesh), 4
    array = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding("cells", mesh))  # noqa: E731
    whole = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding("", mesh))  # noqa: E731
    shapes = dict.fromkeys(Cells._fields, array(jnp.int32, c, g)) | {
        "contexts": array(jnp.int32, c, P),
        "context_lengths": array(jnp.int32, c),
        "given": array(jnp.int32, c, g, T),
        "stops": whole(jnp.int32, 1, 1),
        "stops_apply": array(bool, c, g, 1),
    }
    shapes |= dict.fromkeys(("temperature", "top_p", "min_p"), array(jnp.float32, c, g))
    key = jax.eval_shape(lambda: jax.random.key(0))
    weights = placed(params, arrange(CONFIG, mesh, jnp.float32, wanted=wanted).to)
    options = {"restricts": ("top_p",), "has_given": False, "shards": c}
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return draw.lower(graphdef, weights, Cells(**shapes), whole(key.dtype), **options).compile().as_text()


def learning(mesh):
    """The gradient of log-probs with respect to the weights, one group for each part of the rows."""
    graphdef, params = abstract(CONFIG)
    c, places = ways("contexts", mesh), shardings(logical_axes(CONFIG), mesh)
    rows = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding("contexts", mesh))  # noqa: E731
    arrays = rows(jnp.int32, c, P), rows(jnp.int32, c), rows(jnp.int32, c * G, T), rows(jnp.float32, c * G)

    def loss(params, tokens, lengths, completions, temperature):
        batch = SimpleNamespace(
            contexts=Contexts(tokens=tokens, lengths=lengths), completions=completions, temperature=temperature
        )
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return evaluate(graphdef, params, batch).logps.sum()

    step = jax.jit(jax.grad(loss), out_shardings=places)
    return step.lower(placed(params, places), *arrays).compile().as_text()


def test_gathered_weights_stay_while_tokens_are_drawn_and_logits_stay_divided(capfd):
    seen = collectives(sampling(make_mesh(fsdp=4, tensor=2), "gathered"))
    looped = [c for c in seen if c.looped and c.floating]
    sums = [c for c in looped if c.kind == "all-reduce" and c.shapes[0][-1] == E]
    assert {c.shapes[0] for c in sums} == {(1, P, E), (1, 4, 1, E)}  # of prefill and of a decode step, twice a layer
    for c in looped:
        assert c in sums or c.size < V // 2, f"weights, logits or keys and values in {c}"
    kept = L * 4 * G * KV * D * T
    assert all(c.size < kept // 4 for c in seen)
    assert "rematerialization" not in capfd.readouterr().err


def test_divided_weights_are_gathered_in_every_step_and_nothing_else_is():
    looped = [c for c in collectives(sampling(make_mesh(data=1, fsdp=8), "divided")) if c.looped and c.floating]
    gathered = {s for c in looped if c.kind == "all-gather" for s in c.shapes}
    assert {(E, F), (F, E)} <= gathered
    assert all(E in s for s in gathered)


@pytest.mark.parametrize("sizes", [{"data": 1, "fsdp": 8}, {"data": 1, "dcn_data": 2, "fsdp": 4}])
def test_fsdp_gathers_weights_and_sums_their_gradients(capfd, sizes):
    looped = [c for c in collectives(learning(make_mesh(**sizes))) if c.looped and c.floating]
    gathered = {s for c in looped if c.kind == "all-gather" for s in c.shapes if len(s) > 1}
    assert {(1, E, F), (1, F, E), (1, E, HEADS, D), (1, E, KV, D), (1, HEADS, D, E)} <= gathered
    summed = {s for c in looped if c.kind in ("all-reduce", "reduce-scatter") for s in c.shapes}
    assert {(E, F), (F, E), (E, HEADS * D), (E, KV * D)} <= summed  # by this backend whole, then cut
    for c in looped:
        assert not any(N in s and {E, F} & set(s) for s in c.shapes), f"activations in {c}"
        assert c.size <= V * E // 2, f"logits in {c}"
    assert "rematerialization" not in capfd.readouterr().err


def test_tokens_divided_over_sequence_meet_in_keys_and_values_alone(capfd):
    looped = [c for c in collectives(learning(make_mesh(fsdp=2, sequence=2, tensor=2))) if c.looped and c.floating]
    whole = {s for c in looped if "while/body/closed_call" in c.operation for s in c.shapes if N in s}
    assert whole == {(1, N, KV // 2, D)}
    sums = [s for c in looped if c.kind == "all-reduce" for s in c.shapes if s[-2:] == (N // 2, E)]
    assert sums and all(s == (1, N // 2, E) for s in sums)  # of tensor: each device's tokens
    scattered = [s for c in looped if c.kind == "reduce-scatter" for s in c.shapes]
    assert (1, N // 2, KV // 2, D) in scattered  # gradients of keys and values
    for c in looped:
        assert not any(N in s and {E, F, F // 2} & set(s) for s in c.shapes), f"activations in {c}"
    assert "rematerialization" not in capfd.readouterr().err
