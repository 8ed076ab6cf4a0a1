"""What the programs of a run cost on TPU, compiled ahead of time: bytes of main memory and FLOPs against their floors.

    pip install 'grpo_jax[tpu]'        # brings libtpu, the TPU compiler; no TPU is needed
    python -m benchmarks.tpu [--chips v5e v6e] [--programs sample sample-int8 reference update] [--layers 28]
                             [--save FOLDER]

Qwen2.5-1.5B's shapes in bfloat16, and with matrices in int8 where a program's name says so; 16 prompts of 512 tokens,
16 completions of 512 each. One chip samples and takes the reference pass (a micro-batch of one context); the update is
one micro-batch per chip on four chips (fsdp), because float32 weights and AdamW's moments of 1.5B parameters do not fit
on one v5e. The floors: a decode step reads weights, each prompt's keys and values once and the filled half of the own
ones; elsewhere the operands and results of every matrix product pass through memory once, scores and logits never.
FLOPs: 2 per weight and token and the visible pairs of attention; the update three times that, or four (layers
recomputed) in brackets.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grpo_jax.methods.grpo import grpo
from grpo_jax.models import TransformerConfig, evaluate
from grpo_jax.models.quantised import quantised
from grpo_jax.models.sharding import shardings
from grpo_jax.models.transformer import UNROLLED, abstract, logical_axes
from grpo_jax.planning.chips import open_slice
from grpo_jax.planning.collectives import Wires, collectives
from grpo_jax.planning.costs import Cost, Program
from grpo_jax.planning.rehearsal import everywhere, placed
from grpo_jax.planning.roofline import Work, forward_flops, head_weights, layer_weights
from grpo_jax.sampling.decoding import Cells, draw
from grpo_jax.sampling.weights import cast
from grpo_jax.training.mesh import make_mesh
from grpo_jax.training.step import Policy, moments, train_step
from grpo_jax.types import Batch, Contexts, Decisions

QWEN = TransformerConfig(
    vocab_size=151_936,
    hidden_size=1536,
    intermediate_size=8960,
    num_layers=28,
    num_heads=12,
    num_kv_heads=2,
    head_dim=128,
)
CONTEXTS, ROWS, PROMPT, NEW = 16, 16, 512, 512


class Line(NamedTuple):
    program: str
    seen: Cost
    floor: Cost
    recomputed: float = 0.0  # FLOPs of the floor with every layer recomputed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", default=["v5e", "v6e"])
    parser.add_argument("--programs", nargs="+", default=list(PROGRAMS), choices=list(PROGRAMS))
    parser.add_argument("--layers", type=int, default=QWEN.num_layers)
    parser.add_argument("--save", type=Path, help="folder for the compiled programs' text")
    options = parser.parse_args()
    if options.layers <= UNROLLED:
        parser.error(f"--layers is at least {UNROLLED + 1}, got {options.layers}: fewer are no loop to be counted")
    if options.save:
        options.save.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_platforms", "cpu")
    config = dataclasses.replace(QWEN, num_layers=options.layers)
    print("| chip | program | GB moved | floor | ratio | TFLOP | floor | ratio | GB on the wire |\n" + "|---" * 9 + "|")
    for chip in options.chips:
        place = open_slice(f"{chip}:2x2")
        for name in options.programs:
            devices = place.devices[: 4 if name == "update" else 1]
            mesh = make_mesh(data=1, fsdp=len(devices), devices=devices)
            begun = time.perf_counter()
            with jax.set_mesh(mesh):
                text = PROGRAMS[name](config, mesh).compile().as_text()
            if options.save:
                (options.save / f"{name}_{chip}.txt").write_text(text)
            program = Program(text)
            wire = sum(c.wire for c in collectives(program, Wires(mesh, place.chip, place.shape), {"": 1.0}))
            for line in LINES[name](config, program):
                print(f"| {chip} x{len(devices)} {_row(line, wire)}", flush=True)
                wire = 0.0  # of the whole program, said once
            print(f"compiled {name} for {chip} in {time.perf_counter() - begun:.0f} s", file=sys.stderr)


def sample(config: TransformerConfig, mesh: Mesh, *, precision: Literal["int8"] | None = None) -> Any:
    graphdef, params = _params(config, mesh, jnp.bfloat16)
    if precision:
        params = placed(jax.eval_shape(partial(quantised, dtype=None), params), everywhere(mesh))
    C, G, P, T = CONTEXTS, ROWS, PROMPT, NEW
    integers = dict.fromkeys(
        ("given_lengths", "budget", "minimum", "top_k", "prompt_ids", "index"), ((C, G), jnp.int32)
    )
    numbers = dict.fromkeys(("temperature", "top_p", "min_p"), ((C, G), jnp.float32))
    others = {
        "contexts": ((C, P), jnp.int32),
        "context_lengths": ((C,), jnp.int32),
        "given": ((C, G, T), jnp.int32),
        "stops": ((1, 1), jnp.int32),
        "stops_apply": ((C, G, 1), jnp.bool_),
    }
    cells = Cells(**{k: _array(mesh, *x) for k, x in (integers | numbers | others).items()})
    key = jax.eval_shape(lambda: jax.random.key(0))
    return draw.lower(graphdef, params, cells, _array(mesh, key.shape, key.dtype), restricts=(), has_given=False)


def reference(config: TransformerConfig, mesh: Mesh) -> Any:
    graphdef, params = _params(config, mesh, jnp.bfloat16)
    score = jax.jit(lambda params, rows: evaluate(graphdef, params, rows))
    return score.lower(params, _batch(mesh, 1))


def update(config: TransformerConfig, mesh: Mesh) -> Any:
    graphdef, params = _params(config, mesh, jnp.float32)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-6))
    method = grpo(prompts=2 * mesh.size, group_size=ROWS, kl=0.04)
    score = lambda params, rows: evaluate(graphdef, cast(params, jnp.bfloat16), rows, remat=True)  # noqa: E731
    step = jax.jit(
        lambda policy, batch, order, count: train_step(
            method, score, optimizer, mesh, policy, batch, (), order, count, first=True
        ),
        donate_argnums=0,
    )
    order = _array(mesh, (2, mesh.size, ROWS), jnp.int32)
    return step.lower(
        Policy(params, moments(params, optimizer, mesh)),
        _batch(mesh, 2 * mesh.size),
        order,
        _array(mesh, (), jnp.int32),
    )


def sampled(config: TransformerConfig, program: Program, *, size: int = 2) -> Iterator[Line]:
    """size: bytes of a weight."""
    step = program.steps()[0]
    others = [i.called("body") for i in program.computations[program.entry].values() if i.opcode == "while"]
    layers = max((program.cost(body) for body in others if body not in program.steps()), key=lambda cost: cost.flops)
    tokens, rows = CONTEXTS * PROMPT, CONTEXTS * ROWS
    kept = 2 * 2 * config.num_layers * config.num_kv_heads * config.head_dim
    moved = (_weights(config) + _head(config)) / 2 * size + kept * (tokens + rows * (NEW + 1) / 2)
    streams = _streams(config, tokens) - _weights(config) * (1 - size / 2)
    yield Line("prefill", layers.times(config.num_layers), Cost(streams, _forward(config, CONTEXTS, 0)))
    seen = 4 * config.num_heads * config.head_dim * rows * (PROMPT + (NEW + 1) / 2) * config.num_layers
    yield Line("decode step", program.cost(step), Cost(moved, rows * (_weights(config) + _head(config)) + seen))


def referenced(config: TransformerConfig, program: Program) -> Iterator[Line]:
    moved = _streams(config, PROMPT + ROWS * NEW) + _head(config)
    flops = _forward(config, 1, ROWS) + ROWS * NEW * _head(config)
    yield Line("reference pass, 1 context", program.total(), Cost(moved, flops))


def updated(config: TransformerConfig, program: Program) -> Iterator[Line]:
    """Forward, again, and twice as much backward; the head as often. But of the feed-forward `down` is not computed
    again; and where gate and up, made for one product, are never in memory forward, the backward pass writes two slopes
    and active * up, and five products read them: two widths more than three times the forward pass.

    Besides, in bytes per parameter, on a chip of four: what is gathered, twice, is written (4); gradients are read to
    be summed over chips (2); and of a quarter, what is sent is read, twice (4), the sum is written (2), and added to
    the float32 gradient of the step (2 + 4 + 4): 10 in all.

    The optimizer: 7 reads and writes of float32; the gradient once more before them, because its norm decides what is
    applied; and the copy in bfloat16 that the micro-batches read, which is made before there is a gradient (1 and 1/2).
    """
    body = max((program.cost(step) for step in program.steps()), key=lambda cost: cost.flops)
    layers, head = _forward(config, 1, ROWS), ROWS * NEW * _head(config)
    streams = _streams(config, PROMPT + ROWS * NEW)
    parameters = (_weights(config) + _head(config)) / 2
    more = 2 * config.intermediate_size - config.hidden_size
    moved = 4 * (streams + _head(config)) + 2.0 * config.num_layers * (PROMPT + ROWS * NEW) * more + parameters * 10
    yield Line("update, 1 context per chip", body, Cost(moved, 3 * (layers + head)), 4 * (layers + head))
    optimizer = program.total(loops=0)
    yield Line("optimizer", optimizer, Cost(parameters / 4 * 4 * 9.5, 0.0))


def _weights(config: TransformerConfig) -> float:
    """Bytes of the layers' matrices in bfloat16, which is also their FLOPs per token."""
    return 2 * layer_weights(config)


def _head(config: TransformerConfig) -> float:
    return 2 * head_weights(config)


def _streams(config: TransformerConfig, tokens: int) -> float:
    """Bytes of all layers: weights once, and in and out of every product once: residual stream, heads, feed-forward."""
    heads = 2 * (config.num_heads + 2 * config.num_kv_heads) + 2 * config.num_heads
    values = 6 * config.hidden_size + heads * config.head_dim + 2 * config.intermediate_size
    return _weights(config) + 2.0 * config.num_layers * tokens * values


def _forward(config: TransformerConfig, contexts: int, rows: int) -> float:
    """FLOPs of the layers on contexts with so many rows each."""
    work = Work(contexts, rows, PROMPT, NEW)
    return forward_flops(config, work) - _head(config) * contexts * rows * NEW


def _array(mesh: Mesh, shape: tuple, dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))


def _params(config: TransformerConfig, mesh: Mesh, dtype: Any) -> tuple[Any, Any]:
    graphdef, params = abstract(config, dtype)
    return graphdef, placed(params, shardings(logical_axes(config), mesh))


def _batch(mesh: Mesh, contexts: int) -> Batch:
    n = contexts * ROWS
    make = lambda dtype, *shape: _array(mesh, shape, dtype)  # noqa: E731
    ids = dict.fromkeys(
        ("sampled_under", "trained_under", "lengths", "prompt_ids", "index", "group_ids", "update_ids"),
        make(jnp.int32, n),
    )
    numbers = dict.fromkeys(("behavior_logps", "sampler_logps", "advantages"), make(jnp.float32, n, NEW))
    return Batch(
        contexts=Contexts(tokens=make(jnp.int32, contexts, PROMPT), lengths=make(jnp.int32, contexts), extras={}),
        completions=make(jnp.int32, n, NEW),
        completion_mask=make(jnp.bool_, n, NEW),
        finished=make(jnp.bool_, n),
        temperature=make(jnp.float32, n),
        weights=make(jnp.float32, n),
        scores=make(jnp.float32, n, 1),
        columns={},
        role="policy",
        ref=Decisions(logps=make(jnp.float32, n, NEW), stats={}),
        **ids,
        **numbers,
    )


def _row(line: Line, wire: float) -> str:
    seen, floor = line.seen, line.floor
    flops = [f"{seen.flops / 1e12:.3g}", f"{floor.flops / 1e12:.3g}", f"{seen.flops / max(floor.flops, 1):.2f}"]
    if line.recomputed:
        flops[1:] = [f"{flops[1]} ({line.recomputed / 1e12:.3g})", f"{flops[2]} ({seen.flops / line.recomputed:.2f})"]
    moved = [f"{seen.bytes / 1e9:.2f}", f"{floor.bytes / 1e9:.2f}", f"{seen.bytes / floor.bytes:.2f}"]
    return (
        "| " + " | ".join([line.program, *moved, *(flops if floor.flops else ["", "", ""]), f"{wire / 1e9:.2f}"]) + " |"
    )


PROGRAMS = {
    "sample": sample,
    "sample-int8": partial(sample, precision="int8"),
    "reference": reference,
    "update": update,
}
LINES = {"sample": sampled, "sample-int8": partial(sampled, size=1), "reference": referenced, "update": updated}

if __name__ == "__main__":
    main()
