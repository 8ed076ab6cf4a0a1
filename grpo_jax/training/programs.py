"""The jitted programs of a run, and when each of them is needed."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from grpo_jax.training.ahead import Ahead
from grpo_jax.training.deal import Part, lay_out
from grpo_jax.training.keys import fold
from grpo_jax.training.step import Evaluate, Policy, evaluate_all, train_step
from grpo_jax.types import Batch, Decisions, Key

if TYPE_CHECKING:
    from grpo_jax.training.loop import Run


class Compiled:
    """The jitted programs of a run, and when they are needed."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._evaluate = jax.jit(self._evaluate_role, static_argnames=("role",))
        self._shape = jax.jit(self.shape_in_graph, out_shardings=NamedSharding(run.mesh, PartitionSpec()))
        # A policy comes back as it went in: the compiler may not move it to another layout, and so recompile.
        self._update = {
            role: jax.jit(
                partial(self.update_in_graph, role=role),
                static_argnames=("first",),
                donate_argnums=0,
                out_shardings=(jax.tree.map(lambda x: x.sharding, policy), None),
            )
            for role, policy in run.policies.items()
            if policy.optimizer is not None
        }
        self._asks_for_old: bool | None = None
        self._ahead: Ahead | None = None

    def ahead(self, batch: Batch) -> Ahead:
        """Compile on other threads, in the order of need, what batches of these shapes go through. Nothing runs."""
        run, rows, twin = self.run, np.flatnonzero(jax.device_get(batch.prompt_ids) >= 0), copy.copy(self)
        ahead = Ahead(unscored(batch), run.mesh)
        twin._evaluate, twin._shape = (partial(ahead.compiled, program) for program in (self._evaluate, self._shape))
        twin._update = {role: partial(ahead.compiled, program) for role, program in self._update.items()}

        def evaluate(bare: Batch) -> Batch:
            made = twin.evaluate(bare, lambda _: batch)
            self._asks_for_old = twin._asks_for_old  # two threads that trace one function at a time trace it twice
            return made

        def update(both: Any, first: bool) -> Any:
            twin.update(*both, rows, first=first)
            return both

        updates = [partial(update, first=True), partial(update, first=False)][: run.updates * run.passes]
        shape = lambda batch: twin.shape(batch, run.state.arrays, fold(0))  # noqa: E731
        self._ahead = ahead.then(evaluate, shape, *updates)
        return ahead

    def evaluate(self, batch: Batch, score: Callable[[Batch], Batch] = lambda batch: batch) -> Batch:
        """`ref` where the method has a reference; `old` where something will ask for it; and what `score` adds.

        The device is at work on the log-probs while the host scores.
        """
        run, bare = self.run, unscored(batch)
        self._wait(0, bare)
        if "reference" in run.policies and batch.role == "policy":
            bare = bare.replace(ref=self._pass(bare, "reference", "trained_under"))
        bare = self.with_old(bare) if self._needs_old(bare) else bare
        batch = score(batch).replace(ref=bare.ref)
        bare = self.with_old(bare) if self.asks_for_old(batch) else bare
        return batch.replace(old=bare.old)

    def with_old(self, batch: Batch) -> Batch:
        """`old` from a pass of its own, unless it is there."""
        return batch if batch.old is not None else batch.replace(old=self._pass(batch, batch.role, "sampled_under"))

    def shape(self, batch: Batch, arrays: Any, key: Key) -> tuple[Batch, Any]:
        """rewards, then advantages; jit, global."""
        self._wait(1, batch)
        edited, arrays = self._shape(batch, arrays, key)
        return batch.replace(**edited), arrays

    def update(self, batch: Batch, arrays: Any, rows: np.ndarray, *, first: bool) -> tuple[Policy, dict[str, Any]]:
        run = self.run
        self._wait(2 if first else 3, (batch, arrays))
        part = self.cells(batch, "trained_under", rows, run.layout.sweeps)
        step = self._update[batch.role]
        return step(run.policies[batch.role], batch, arrays, part.order, np.int32(part.count), first=first)

    def _wait(self, stage: int, arguments: Any) -> None:
        if self._ahead is not None:
            self._ahead.wait(stage, arguments)

    def _pass(self, batch: Batch, role: str, which: str) -> Decisions:
        rows = np.flatnonzero(np.asarray(jax.device_get(batch.prompt_ids)) >= 0)
        part = self.cells(batch, which, rows, self.run.layout.sweeps * self.run.updates)
        under, params = getattr(batch, which), self.run.policies[role].params
        return self._evaluate(params, batch, under, part.order, np.int32(part.count), role=role)

    def cells(self, batch: Batch, which: str, rows: np.ndarray, capacity: int) -> Part:
        """Micro-batches of these rows, each row beside the others of its context; room for at least `capacity`."""
        layout = self.run.layout
        under = np.asarray(jax.device_get(getattr(batch, which)))
        counts = np.unique(under[rows], return_counts=True)[1]
        lone = len(counts) > layout.contexts * capacity and counts.max() == 1
        if lone and layout.rows > 1:  # every row has a context of its own, and wide cells would be mostly empty
            layout, capacity = layout._replace(rows=1), capacity * layout.rows
        return lay_out(under, rows, layout, capacity=capacity)

    def _needs_old(self, batch: Batch) -> bool:
        """Whether `old` is needed as far as is known before there are scores."""
        pointers = jax.device_get((batch.sampled_under, batch.trained_under))
        return self.run.updates * self.run.passes > 1 or not np.array_equal(*pointers) or bool(self._asks_for_old)

    def asks_for_old(self, batch: Batch) -> bool:
        """Whether a seam reads the old policy's log-probs."""
        if self._asks_for_old is None:
            try:
                jax.eval_shape(self.shape_in_graph, batch.replace(old=None), self.run.state.arrays, fold(0))
                self._asks_for_old = False
            except (AttributeError, TypeError):  # None.logps: a seam reads the old policy
                self._asks_for_old = True
        return self._asks_for_old

    def pass_in_graph(self, params: Any, batch: Batch, order, count, *, role: str) -> Decisions:
        """What a role says of every row under the one context that it has, in jit."""
        return self._evaluate_role(params, batch, batch.trained_under, order, count, role=role)

    def _evaluate_role(self, params, batch: Batch, under, order, count, *, role: str) -> Decisions:
        return evaluate_all(self._evaluator(role), params, batch, under, order, count, self.run.mesh)

    def _evaluator(self, role: str) -> Evaluate:
        return partial(self.run.domain.evaluate, role=role, wants=self.run.method.wants)

    def shape_in_graph(self, batch: Batch, arrays: Any, key: Key) -> tuple[dict[str, Any], Any]:
        """`shape` in jit: the fields that the two seams fill or edit, and the method's arrays."""
        m = self.run.method
        rewards = m.reward(batch, arrays, jax.random.fold_in(key, 0))
        after, arrays = m.advantage(batch.replace(rewards=rewards), arrays, jax.random.fold_in(key, 1))
        names = [field.name for field in dataclasses.fields(batch)]
        return {n: getattr(after, n) for n in names if getattr(after, n) is not getattr(batch, n)}, arrays

    def update_in_graph(self, policy: Policy, batch: Batch, arrays, order, count, *, role: str, first: bool):
        """`update` in jit."""
        run = self.run
        return train_step(
            run.method, self._evaluator(role), run.optimizer, run.mesh, policy, batch, arrays, order, count, first=first
        )


def unscored(batch: Batch) -> Batch:
    """The batch as it is before its rows are scored, which is all that the passes see: they are compiled once."""
    return batch.replace(scores=np.zeros((len(batch), 0), np.float32), channels=(), channel_weights=())
