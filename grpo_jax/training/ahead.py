"""Programs compiled while the first completions are being drawn, for arguments of the shapes that are to come."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import jax
import numpy as np

from grpo_jax.types import PyTree


class Ahead:
    """Stages of compilation on a thread of their own: each makes the arguments of the next, in shapes alone.

    Nothing is handed over: JAX finds a compiled program again when it is called with arguments of the same shapes. A
    guess that was wrong so costs the thread's time and no more. An error is dropped: the call itself will raise it,
    where it belongs. Leaving the context waits for what is being compiled and gives up the rest.
    """

    def __init__(self, start: PyTree, *stages: Callable[[PyTree], PyTree]) -> None:
        first: Future = Future()
        first.set_result(start)
        self._made = [first]
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="compile")
        for stage in stages:
            self._made.append(self._thread.submit(lambda before, stage: stage(before.result()), self._made[-1], stage))

    def wait(self, stage: int, arguments: PyTree) -> None:
        """Until this stage is done, if it is done for arguments like these; if not, nothing more is compiled ahead."""
        if stage + 1 >= len(self._made):
            return
        given, made = self._made[stage : stage + 2]
        wait([given])
        if given.exception() is None and _shapes(given.result()) == _shapes(arguments):
            wait([made])
        else:
            self._thread.shutdown(wait=False, cancel_futures=True)
            self._made = []

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *exception: object) -> None:
        self._thread.shutdown(cancel_futures=True)
        self._made = []


def compiled(program: Any, *arguments: Any, **static: Any) -> PyTree:
    """Compile a jitted function for such arguments; the shapes and places of what it would return."""
    lowered = program.lower(*arguments, **static)
    places = lowered.compile().output_shardings
    return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), lowered.out_info, places)


def _shapes(tree: PyTree) -> tuple[Any, list[Any]]:
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(np.shape(x), getattr(x, "dtype", type(x))) for x in leaves]
