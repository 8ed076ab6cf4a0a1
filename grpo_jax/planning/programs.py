"""The programs of a run, compiled ahead of time: what `train` would compile, for the devices of its mesh."""

from __future__ import annotations

import copy
import math
import re
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from grpo_jax.models.folding import FOLDS
from grpo_jax.models.sharding import sharding
from grpo_jax.planning.rehearsal import Rehearsal, everywhere, placed
from grpo_jax.sampling.decoding import Cells, columns_of, draw, grids_of, read_at_once
from grpo_jax.sampling.language_model import Launch
from grpo_jax.sampling.requests import Rows
from grpo_jax.sampling.traced import key_of
from grpo_jax.sampling.weights import prepared
from grpo_jax.training.batches import padded
from grpo_jax.training.keys import fold
from grpo_jax.training.loop import Run
from grpo_jax.training.step import Policy
from grpo_jax.types import Batch, PyTree


class Memory(NamedTuple):
    """What a program takes of the memory of one device, in bytes, as XLA says it.

    temporaries: all that exists only while it runs. refused: it does not fit, and the compiler gave up on it.
    """

    arguments: float
    outputs: float  # that take the place of no argument
    temporaries: float
    code: float = 0.0
    refused: bool = False

    @property
    def total(self) -> float:
        return self.arguments + self.outputs + self.temporaries + self.code


class Built(NamedTuple):
    """A compiled program: how often a step runs it, the bytes of its arguments by kind, its memory and its text.

    text: None if it was refused. turns: of the loops that the compiler cannot count: tokens, or micro-batches.
    """

    name: str
    runs: int
    arguments: dict[str, float]
    memory: Memory
    text: str | None
    turns: tuple[int, ...]
    seconds: float

    @property
    def samples(self) -> bool:
        return self.name.startswith("sample")


def build(rehearsal: Rehearsal, *, done: Callable[[Built], None] = lambda built: None) -> list[Built]:
    """Every program of a step, in the order of their use. done: called after each (not in that order).

    Sampling and training are compiled side by side.
    """
    run, requests = rehearsal.run, rehearsal.requests
    rows, _ = run.domain.prepare(requests, Counter())
    batch = padded(run.verify.unscored(rows), run.layout, updates=run.updates)
    batch = batch.replace(weights=np.pad(rows.weights, (0, len(batch) - len(rows))))  # though nothing is drawn
    sampling: list[Built] = []
    training: list[Built] = []

    def add(to: list[Built], one: Built) -> None:
        to.append(one)
        done(one)

    with ThreadPoolExecutor(2) as threads:
        work = [threads.submit(_trainer, run, batch, len(rows), partial(add, training))]
        if any(request.max_new != 0 for request in requests):
            asked = rehearsal.language.rows_of(requests, Counter())
            work.append(threads.submit(_sampler, rehearsal, requests[0].role, asked, partial(add, sampling)))
        for each in work:
            each.result()
    return [*sampling, *training]


def _sampler(rehearsal: Rehearsal, role: str, rows: Rows, add: Callable[[Built], None]) -> None:
    """The weights as they lie while completions are drawn; then prefill and decode of one launch, and of one that goes
    on with rows that found no room, as often as it could come to."""
    run, language, mesh = rehearsal.run, rehearsal.language, rehearsal.run.mesh
    params = (run.policies.get(role) or run.policies["policy"]).params
    arranged, weights = prepared(language.arrangement, language.compute_dtype), params
    kinds = {"parameters": params}
    if hasattr(arranged, "lower"):
        made = _compile(mesh, "weights for sampling", arranged, params)
        add(made.built(kinds=kinds))
        weights, kinds = made.out, {"copy": made.out}
    over, key = sharding("cells", mesh), key_of(role, fold(run.seed))
    left, T = len(rows), 0
    for launch in language.launches(rows):
        places = launch.places(rows)
        cells = launch.cells(rows, places[0])
        cells = Cells(*(placed(x, everywhere(mesh) if n == "stops" else over) for n, x in cells._asdict().items()))
        arguments = language.graphdef(role), weights, cells, key
        with language.on_mesh():
            made = _compile(mesh, "sample again" if T else "sample", draw, *arguments, **launch.options)
            turns = _turns(launch, rows.given_lengths, language.shards)
        runs, T = -(-left // (launch.slots * launch.width)), launch.decisions
        left -= runs * launch.slots * launch.width // launch.options["folds"]
        add(made.built(runs=runs, kinds=kinds, turns=turns))


def _turns(launch: Launch, given: np.ndarray, shards: int) -> tuple[int, ...]:
    """Of the loops of a launch whose rows are all drawn to the end, as far as there is room; or which goes on with rows
    that have something: what is given, or a quarter of the columns or a half."""
    T, P, options = launch.decisions, launch.context_width, launch.options
    if options["has_given"]:
        least, most = (given.min(), given.max()) if given.any() else (T // FOLDS, T // 2)
        return -(-int(most) // read_at_once(T, P)), T - int(least)
    grids = grids_of(launch.slots, launch.width, T, P, shards)
    ends = np.maximum.accumulate([0, *columns_of(grids, T, options["folds"])])
    return tuple(int(n) for n in np.diff(ends))


def _trainer(run: Run, batch: Batch, rows: int, add: Callable[[Built], None]) -> None:
    """Passes, advantages and updates, in the order and with the arguments that `loop.iterate` gives them."""
    compiled, parts = copy.copy(run.compiled), run.updates * run.passes
    pointers = {name: getattr(batch, name) for name in ("sampled_under", "trained_under", "prompt_ids")}

    def stand_in(name: str, program: Any, runs: int = 1) -> Any:
        def call(*arguments: PyTree, **static: Any) -> PyTree:
            counted = isinstance(arguments[-1], np.integer)  # rows of micro-batches, and their number: from the host
            placed_ones = _on_mesh(arguments[:-2] if counted else arguments, run.mesh)
            given = (*placed_ones, *arguments[len(placed_ones) :])
            made = _compile(run.mesh, name.format(**static), program, *given, **static)
            whose = arguments[0]
            policy = whose if isinstance(whose, Policy) else Policy(whose if "role" in static else None)
            kinds = {"parameters": policy.params, "optimizer": policy.optimizer}
            add(made.built(runs=runs, kinds=kinds, turns=(int(arguments[-1]) if counted else 1,)))
            return made.out

        return call

    compiled._evaluate = stand_in("log-probs of the {role}", compiled._evaluate)
    compiled._shape = stand_in("advantages", compiled._shape)
    for first, runs in ((True, 1), (False, parts - 1))[:parts]:
        name = "update" if first else "update after the first"
        compiled._update = {role: stand_in(name, program, runs) for role, program in run.compiled._update.items()}
        if first:
            batch = compiled.evaluate(batch)
            batch, arrays = compiled.shape(batch, run.state.arrays, fold(0))
            batch = batch.replace(**pointers)  # the host reads them
            if parts > 1:
                batch = compiled.with_old(batch)
        compiled.update(batch, arrays, np.array_split(np.arange(rows), run.updates)[0], first=first)


class _Made(NamedTuple):
    name: str
    memory: Memory
    text: str | None
    out: PyTree
    seconds: float

    def built(self, *, kinds: dict[str, PyTree], runs: int = 1, turns: tuple[int, ...] = (1,)) -> Built:
        held_of = {kind: held(tree) for kind, tree in kinds.items()}
        return Built(self.name, runs, held_of, self.memory, self.text, turns, self.seconds)


def held(tree: PyTree) -> float:
    """Bytes that one device holds of shapes with shardings."""
    size = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize  # noqa: E731
    return float(sum(size(x) for x in jax.tree.leaves(tree)))


def _on_mesh(tree: PyTree, mesh: Mesh) -> PyTree:
    """Shapes as they are; what the host would put on every device as the shape of that."""
    one = everywhere(mesh)
    return jax.tree.map(lambda x: x if isinstance(x, jax.ShapeDtypeStruct) else placed(x, one), tree)


def _compile(mesh: Mesh, name: str, program: Any, *arguments: Any, **static: Any) -> _Made:
    begun = time.perf_counter()
    lowered = program.lower(*arguments, **static)
    out = lowered.out_info
    try:
        done = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        lying = held([x for x in jax.tree.leaves(arguments) if hasattr(x, "sharding")])
        needed = refused(str(error), lying)
        if needed is None:
            raise
        out = placed(out, everywhere(mesh))  # somewhere: what comes after it is still worth knowing
        memory = Memory(lying, 0.0, needed, refused=True)
        return _Made(name, memory, None, out, time.perf_counter() - begun)
    analysis = done.memory_analysis()
    memory = Memory(
        arguments=analysis.argument_size_in_bytes,
        outputs=analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        temporaries=analysis.temp_size_in_bytes,
        code=analysis.generated_code_size_in_bytes,
    )
    out = placed(out, done.output_shardings)
    return _Made(name, memory, done.as_text(), out, time.perf_counter() - begun)


def refused(message: str, arguments: float) -> float | None:
    """Bytes of temporaries that a program with so many bytes of arguments would need, of which the compiler says that
    it does not fit; infinite if it does not say how much; None if it says something else."""
    if "RESOURCE_EXHAUSTED" not in message and "Ran out of memory" not in message:
        return None
    units = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    for pattern, besides in ((r"temporaries \(([\d.]+)([KMGT]?)", 0.0), (r"Used ([\d.]+)([KMGT]?)", arguments)):
        if found := re.search(pattern, message):
            return max(0.0, float(found[1]) * units[found[2]] - besides)
    return math.inf
