"""The least that a machine must do: floating-point operations and bytes of the algorithm, each prompt computed once.

Only matrix products are counted (projections, feed-forward, attention scores and values, the head), causal attention at
half its square. Norms, softmax, rotary embedding, random numbers and the optimizer are free.
"""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.peers.workload import Shape, Sizes


class Machine(NamedTuple):
    """flops: operations per second of a large matrix product. bandwidth: bytes per second of a long read."""

    flops: float
    bandwidth: float


def prefill_flops(model: Sizes, shape: Shape) -> float:
    """Every prompt through all layers once."""
    return shape.prompts * shape.prompt * (2 * model.body + _attention(model, shape.prompt / 2))


def completion_flops(model: Sizes, shape: Shape) -> float:
    """Every completion token through all layers and the head, seeing its prompt and half of its own completion."""
    seen = shape.prompt + shape.new / 2
    return shape.rows * shape.new * (2 * (model.body + model.head) + _attention(model, seen))


def forward_flops(model: Sizes, shape: Shape) -> float:
    return prefill_flops(model, shape) + completion_flops(model, shape)


def decode_bytes(model: Sizes, shape: Shape, *, size: int = 4) -> float:
    """Bytes of all steps: in each, the weights, every prompt's keys and values, and the filled part of every row's."""
    kept = 2 * model.layers * model.kv_width
    own = shape.rows * (shape.new - 1) / 2
    return shape.new * size * (model.body + model.head + kept * (shape.prompts * shape.prompt + own))


def sample_seconds(model: Sizes, shape: Shape, machine: Machine, *, size: int = 4) -> float:
    return prefill_flops(model, shape) / machine.flops + decode_seconds(model, shape, machine, size=size)


def decode_seconds(model: Sizes, shape: Shape, machine: Machine, *, size: int = 4) -> float:
    """Whichever takes longer, computing or reading."""
    operations = completion_flops(model, shape)
    return max(operations / machine.flops, decode_bytes(model, shape, size=size) / machine.bandwidth)


def update_flops(model: Sizes, shape: Shape, *, passes: int) -> float:
    """passes: forward and backward are 3, a reference 1, old log-probs of their own 1."""
    return passes * forward_flops(model, shape)


def floor_tokens_per_s(line: dict, model: Sizes, shape: Shape, machine: Machine) -> float | None:
    """The fastest that the task of a result could be; None where no floor is counted."""
    if line["task"].startswith("sample"):
        return shape.rows * shape.new / sample_seconds(model, shape, machine)
    if line["task"] == "update":
        tokens = shape.rows * (shape.prompt + shape.new)
        return tokens * machine.flops / update_flops(model, shape, passes=line["passes"])
    return None


def _attention(model: Sizes, seen: float) -> float:
    """Scores and values of one token that sees so many positions, over all layers."""
    return 4 * model.layers * model.hidden * seen
