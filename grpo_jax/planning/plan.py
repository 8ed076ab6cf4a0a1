"""A plan: what the run of a configuration takes of a named slice of TPUs, found by compiling it."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from grpo_jax.planning.advice import Advice, advise
from grpo_jax.planning.chips import Slice
from grpo_jax.planning.collectives import Collective, Wires
from grpo_jax.planning.memory import Split, split
from grpo_jax.planning.programs import Built, build, held
from grpo_jax.planning.rehearsal import Rehearsal, rehearse
from grpo_jax.planning.roofline import Part, Work, price, together
from grpo_jax.sampling import bucket
from grpo_jax.training.assemble import describe_layout
from grpo_jax.training.configuration import Config
from grpo_jax.training.mesh import make_mesh

GIB = 2**30
FORMAT = 1  # of the JSON


class Program(NamedTuple):
    """One program of a step: how often it runs, its memory, what it sends. refused: the compiler found no room."""

    name: str
    runs: int
    turns: int
    memory: Split
    refused: bool
    sends: list[Collective]
    seconds: float  # that it took to compile


class Plan(NamedTuple):
    """What a run takes of a slice, per chip and step."""

    config: Config
    place: Slice
    mesh: dict[str, int]
    parameters: int
    layout: str
    sampling: str
    work: Work
    programs: list[Program]
    parts: list[Part]
    advice: list[Advice]
    seconds: float

    @property
    def peak(self) -> Program:
        """The program in which a chip holds most."""
        return max(self.programs, key=lambda program: program.memory.total)

    @property
    def sweeps(self) -> int:
        """Micro-batches of an update."""
        return next((p.turns for p in self.programs if p.name == "update"), 1)

    @property
    def free(self) -> float:
        """Bytes that are left then; negative: it does not fit."""
        return self.place.chip.hbm - self.peak.memory.total

    @property
    def fits(self) -> bool:
        return self.free >= 0 and not any(program.refused for program in self.programs)

    @property
    def least(self) -> float:
        """Seconds of a step with every message behind computation."""
        return sum(part.least for part in self.parts)

    @property
    def most(self) -> float:
        return sum(part.most for part in self.parts)

    def mfu(self, part: Part | None = None) -> tuple[float, float]:
        """Model FLOPs of a part (default: the step) over what the chips could do in its time, least and most."""
        parts = self.parts if part is None else [part]
        peak, useful = self.place.chip.peak * len(self.place.devices), sum(p.useful for p in parts)
        return tuple(useful / (peak * max(sum(times), 1e-12)) for times in zip(*((p.most, p.least) for p in parts)))  # type: ignore[return-value]


def make_plan(config: Config, place: Slice, *, done: Callable[[Built], None] = lambda built: None) -> Plan:
    """Compile what `train` would run of the configuration on these chips, and read what it costs.

    Raises: ValueError for a mesh that does not multiply to the chips, sizes that do not divide over it, and all that
    `train` refuses.
    """
    begun = time.perf_counter()
    check(config, place)
    mesh = make_mesh(**config.mesh.model_dump(), devices=place.devices)
    rehearsal = rehearse(config, mesh, memory=place.chip.hbm // GIB * GIB)
    shape, work = rehearsal.model.config, _work(rehearsal, config)
    parameters, optimizer = _held(rehearsal)
    wires = Wires(mesh, place.chip, place.shape)
    programs, parts = [], []
    for built in build(rehearsal, done=done):
        priced = price(built, wires, shape, work)
        memory = split(built, parameters=parameters, optimizer=optimizer, layers=shape.num_layers)
        sends = priced.sends if priced else []
        refused = built.memory.refused
        programs.append(Program(built.name, built.runs, sum(built.turns), memory, refused, sends, built.seconds))
        parts += priced.parts if priced else []
    plan = Plan(
        config=config,
        place=place,
        mesh={axis: size for axis, size in mesh.shape.items() if size > 1},
        parameters=rehearsal.parameters,
        layout=describe_layout(rehearsal.run.layout, config, mesh, group_size=rehearsal.run.method.group_size),
        sampling=rehearsal.language.arrangement.said,
        work=work,
        programs=programs,
        parts=together(parts),
        advice=[],
        seconds=time.perf_counter() - begun,
    )
    return plan if plan.fits else plan._replace(advice=advise(config, place, shape, plan.peak.memory, mesh.shape))


def check(config: Config, place: Slice) -> None:
    """Raises: ValueError if the mesh of a configuration is not as large as the slice."""
    sizes = {axis: place.slices if size is None else size for axis, size in config.mesh.model_dump().items()}
    product, free = math.prod(max(size, 1) for size in sizes.values()), -1 in sizes.values()
    chips = len(place.devices)
    if chips % product if free else product != chips:
        given = ", ".join(f"mesh.{axis}={size}" for axis, size in sizes.items() if size != 1)
        raise ValueError(
            f"{place.name} has {chips} chips, and {given or 'a mesh of one'} takes {'a multiple of ' * free}{product}: "
            "the sizes multiply to the number of chips, and one of them may be -1 for the rest"
        )


def _work(rehearsal: Rehearsal, config: Config) -> Work:
    requests = rehearsal.requests
    rows = sum(request.count for request in requests)
    return Work(
        contexts=len(requests),
        rows=max(1, rows // max(1, len(requests))),
        prompt=bucket(config.data.max_prompt),
        new=config.sampling.max_new,
        updates=config.training.updates,
    )


def _held(rehearsal: Rehearsal) -> tuple[float, float]:
    """Bytes per chip of all roles' parameters, and of what their optimizers keep."""
    policies = rehearsal.run.policies.values()
    return sum(held(p.params) for p in policies), sum(held(p.optimizer) for p in policies)


def to_json(plan: Plan) -> dict[str, Any]:
    """The plan as JSON values: bytes, seconds and FLOPs as plain numbers, of one chip and one step."""
    chip = plan.place.chip
    least, most = plan.mfu()
    return _finite(
        {
            "format": FORMAT,
            "name": plan.config.name,
            "model": plan.config.model.path,
            "parameters": plan.parameters,
            "topology": f"{chip.name}:{'x'.join(map(str, plan.place.shape))}",
            "slices": plan.place.slices,
            "chips": len(plan.place.devices),
            "chip": {k: v for k, v in chip._asdict().items() if k != "shapes"},
            "mesh": plan.mesh,
            "layout": plan.layout,
            "sampling": plan.sampling,
            "work": plan.work._asdict(),
            "fits": plan.fits,
            "free": plan.free,
            "programs": [
                {
                    "name": p.name,
                    "runs": p.runs,
                    "turns": p.turns,
                    "refused": p.refused,
                    "memory": {**p.memory._asdict(), "total": p.memory.total},
                    "collectives": [c._asdict() for c in p.sends],
                    "compile_seconds": round(p.seconds, 1),
                }
                for p in plan.programs
            ],
            "parts": [{**p._asdict(), "least": p.least, "most": p.most, "bound": p.bound} for p in plan.parts],
            "step_seconds": {"overlapped": plan.least, "one_after_the_other": plan.most},
            "mfu": {"one_after_the_other": least, "overlapped": most},
            "advice": [a._asdict() for a in plan.advice],
            "seconds": round(plan.seconds, 1),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        }
    )


def _finite(value: Any) -> Any:
    """JSON has no infinity, which stands for what a compiler did not say."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
