"""Programs compiled while the first completions are being drawn, for arguments of the shapes that are to come."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grpo_jax.types import PyTree


class Ahead:
    """Stages of compilation on threads of their own: each makes the arguments of the next, in shapes alone.

    One thread traces, another compiles what was traced, in the order of need: what is needed first shares the cores
    with as little as possible. Nothing is handed over: JAX finds a compiled program again when it is called with
    arguments of the same shapes. A guess that was wrong so costs the threads' time and no more. An error is dropped:
    the call itself will raise it, where it belongs. Leaving the context waits for what is being compiled and gives up
    the rest.
    """

    def __init__(self, start: PyTree, mesh: Mesh) -> None:
        first: Future = Future()
        first.set_result(_Made(start, []))
        self._made, self._mesh = [first], mesh
        self._compiling: list[Future] = []  # of the stage that is being traced
        self._tracer = ThreadPoolExecutor(1, thread_name_prefix="trace")
        self._compilers = ThreadPoolExecutor(1, thread_name_prefix="compile")

    def then(self, *stages: Callable[[PyTree], PyTree]) -> Ahead:
        """The same with these stages after the others. They call `compiled`."""
        for stage in stages:
            self._made.append(self._tracer.submit(self._run, self._made[-1], stage))
        return self

    def compiled(self, program: Any, *arguments: Any, **static: Any) -> PyTree:
        """Have a jitted function compiled for such arguments; the shapes and places of what it would return."""
        lowered = program.lower(*arguments, **static)
        compiling = self._compilers.submit(lowered.compile)
        self._compiling.append(compiling)
        if self._mesh.size == 1:  # there is one place
            here = NamedSharding(self._mesh, PartitionSpec())
            return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), lowered.out_info)
        places = compiling.result().output_shardings
        return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), lowered.out_info, places)

    def wait(self, stage: int, arguments: PyTree) -> None:
        """Until this stage is done, if it is done for arguments like these; if not, nothing more is compiled ahead."""
        if stage + 1 >= len(self._made):
            return
        given, made = self._made[stage : stage + 2]
        wait([given])
        if given.exception() is None and _shapes(given.result().shapes) == _shapes(arguments):
            wait([made])
            wait([] if made.exception() else made.result().compiling)
        else:
            self._tracer.shutdown(wait=False, cancel_futures=True)
            self._compilers.shutdown(wait=False, cancel_futures=True)
            self._made = []

    def _run(self, before: Future, stage: Callable[[PyTree], PyTree]) -> _Made:
        self._compiling = []
        return _Made(stage(before.result().shapes), self._compiling)

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *exception: object) -> None:
        self._tracer.shutdown(cancel_futures=True)
        self._compilers.shutdown(cancel_futures=True)
        self._made = []


class _Made(NamedTuple):
    """What a stage makes, in shapes, and the programs that are being compiled for it."""

    shapes: PyTree
    compiling: list[Future]


def _shapes(tree: PyTree) -> tuple[Any, list[Any]]:
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(np.shape(x), getattr(x, "dtype", type(x))) for x in leaves]
