"""Where the memory of a chip goes while a program runs: XLA's total, split by what the bytes are for."""

from __future__ import annotations

from typing import NamedTuple

from grpo_jax.planning.hlo import Instruction, Module, array_bytes, elements
from grpo_jax.planning.programs import Built


class Split(NamedTuple):
    """Bytes of one chip while a program runs. They add up to what XLA says that the program takes and what the run
    holds besides.

    parameters, optimizer: of all roles, used by this program or not. copy: weights as they lie for sampling.
    """

    parameters: float
    optimizer: float
    copy: float
    gradients: float
    cache: float
    activations: float
    batch: float
    temporaries: float
    outputs: float

    @property
    def total(self) -> float:
        return sum(self)


def split(built: Built, *, parameters: float, optimizer: float, layers: int) -> Split:
    """The memory of a chip during one program.

    parameters, optimizer: what the run holds of them, bytes per chip. layers: of the model, by which keys and values,
    and activations kept for the backward pass, are told from the other temporaries: they are what loops carry for all
    layers and what is no argument.
    """
    own, memory = built.arguments, built.memory
    known = own.get("parameters", 0.0) + own.get("optimizer", 0.0) + own.get("copy", 0.0)
    left = memory.temporaries - max(0.0, known - memory.arguments)
    gradients = min(left, own.get("parameters", 0.0)) if own.get("optimizer") else 0.0
    kept = 0.0 if built.text is None else min(left - gradients, stacked(Module(built.text), layers))
    made = memory.outputs if built.name == "weights for sampling" else 0.0
    return Split(
        parameters=parameters,
        optimizer=optimizer,
        copy=own.get("copy", 0.0) + made,
        gradients=gradients,
        cache=kept if built.samples else 0.0,
        activations=kept if not built.samples else 0.0,
        batch=max(0.0, memory.arguments - known),
        temporaries=left - gradients - kept,
        outputs=memory.outputs + memory.code - made,
    )


def stacked(module: Module, layers: int) -> float:
    """Bytes in main memory of the arrays [layers, ...] that a loop carries and that have the sizes of no argument: of
    the loop with most of them."""
    arguments = {
        sizes
        for i in module.computations[module.entry].values()
        if i.opcode == "parameter"
        for _, sizes, _ in elements(i.shape)
    }
    loops = [i for here in module.computations.values() for i in here.values() if i.opcode == "while"]
    return max((_carried(loop, layers, arguments) for loop in loops), default=0.0)


def _carried(loop: Instruction, layers: int, arguments: set[tuple[int, ...]]) -> float:
    total = 0.0
    for dtype, sizes, layout in elements(loop.shape):
        if len(sizes) >= 4 and sizes[0] == layers and sizes not in arguments:
            total += array_bytes(dtype, ",".join(map(str, sizes)), layout)
    return total
