"""The training iteration: collect, shape, update. One screen, and no method is named in it."""

from __future__ import annotations

import dataclasses
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from grpo_jax.training.deal import Layout, deal, lay_out
from grpo_jax.training.inspection import check_rollout, check_update
from grpo_jax.training.instruments import Clock
from grpo_jax.training.mesh import replicate
from grpo_jax.training.step import Policy, evaluate_all, train_step
from grpo_jax.types import Batch, Contexts, Decisions, Domain, Key, Method, Prompt, Rollout, State

Verify = Callable[[Sequence[Prompt], Rollout, list[str], int], Rollout]


def fold(key: int | Key, *names: int | str) -> Key:
    """A key for a purpose: the seed or a key, folded with a step, a role, a word. There is no other random state."""
    key = jax.random.key(key, impl="threefry2x32") if isinstance(key, int) else key
    for name in names:
        key = jax.random.fold_in(key, zlib.crc32(name.encode()) if isinstance(name, str) else name)
    return key


@dataclass
class Run:
    """Everything that an iteration touches. What changes is `policies`, `state` and the pool's position."""

    method: Method
    domain: Domain
    pool: Any
    verify: Verify  # (prompts, rollout, texts, step) -> the rollout with scores
    optimizer: optax.GradientTransformation
    mesh: Mesh
    layout: Layout
    policies: dict[str, Policy]
    state: State
    seed: int = 0
    updates: int = 1
    clock: Clock = field(default_factory=Clock)
    log: Callable[[Batch, list[dict[str, Any]]], None] = lambda batch, updates: None

    def __post_init__(self) -> None:
        self.compiled = Compiled(self)

    @property
    def params(self) -> dict[str, Any]:
        return {role: policy.params for role, policy in self.policies.items()}


def iterate(run: Run) -> None:
    """One step: rounds of sampling and scoring, old and reference log-probs, rewards, advantages, updates."""
    m, key = run.method, fold(run.seed, run.state.step)
    host, rollouts = collect(run, key)
    _check_roles(run, rollouts)
    arrays, shaped = run.state.arrays, []
    for rows in rollouts:  # one per trained policy; there may be none
        with run.clock("shape"):
            batch = put(run, rows if rows.channels else verified(run, rows))
            batch = run.compiled.evaluate(batch)
            batch, arrays = run.compiled.shape(batch, arrays, fold(key, "shape", batch.role))
            shaped.append(batch)
    for batch in shaped:
        with run.clock("update"):
            parts, reports = dealt(run, batch, key), []
            if len(parts) > 1:
                batch = run.compiled.with_old(batch)
            for rows in parts:
                policy, report = run.compiled.update(batch, arrays, rows, first=not reports)
                run.policies[batch.role] = policy
                reports.append(report)
            reports = jax.device_get(reports)
            for i, report in enumerate(reports):
                check_update(report, step=run.state.step, update=i)
        run.log(batch, reports)
    follow(run.policies, m.roles, run.state.step)
    run.state = State(run.state.step + 1, arrays, host)


def collect(run: Run, key: Key) -> tuple[Any, list[Rollout]]:
    """Drive the method's plan: requests become rows, a rollout becomes a scored one, until it says what is trained."""
    select = lambda state, n: run.method.select(state, run.pool, n, fold(key, "select"))  # noqa: E731
    numbers: Counter = Counter()
    plan, rows = run.method.plan(run.state, select, fold(key, "plan")), None
    while True:
        try:
            ask = plan.send(rows)
        except StopIteration as end:
            return end.value
        if isinstance(ask, Rollout):
            rows = verified(run, ask)
        elif not ask:
            rows = None
        else:
            with run.clock("sample"):
                rows = run.domain.sample(run.params, ask, fold(key, "sample"), numbers)
            check_rollout(rows, ask)


def verified(run: Run, rows: Rollout) -> Rollout:
    """The rollout with what the reward functions say of it."""
    with run.clock("reward"):
        prompts = [run.pool[int(i)] for i in rows.prompt_ids]
        return run.verify(prompts, rows, run.domain.text(rows), run.state.step)


def put(run: Run, rows: Rollout) -> Batch:
    """Onto the mesh, padded to few sizes: padding rows weigh nothing and stand in no group. Every array is replicated:
    statistics over rows are then the same bits whatever the mesh. Empty completions get weight 0."""
    n, t = rows.completions.shape
    c, p = rows.contexts.tokens.shape
    layout = run.layout
    slots = layout.contexts * layout.sweeps * run.updates  # what a whole step fills: fewer rows do not change a shape
    size, contexts_size = _fit(n, slots * layout.rows), _fit(c, slots)
    decisions, context_width = _fit(t, layout.decisions), _fit(p, layout.context_width)
    fill = dict.fromkeys(("prompt_ids", "group_ids", "update_ids", "unit_ids"), -1)
    fill |= dict.fromkeys(("behavior_logps", "scores"), np.nan)
    wide = {"completions", "completion_mask", "behavior_logps", "sampler_logps", "unit_ids"}

    def padded(name: str, x: Any) -> np.ndarray:
        x = np.asarray(x)
        shape = [(0, size - n)] + [(0, 0)] * (x.ndim - 1)
        if name in wide or (x.ndim > 1 and x.shape[1] == t and name != "scores"):
            shape[1] = (0, decisions - t)
        value = fill.get(name, np.array(0, x.dtype).item())
        return np.pad(x, shape, constant_values=value)

    apart = {"contexts", "columns", "role", "channels", "channel_weights"}
    names = [field.name for field in dataclasses.fields(Rollout) if field.name not in apart]
    fields = {f: padded(f, getattr(rows, f)) for f in names if getattr(rows, f) is not None}
    fields["weights"] = np.where(fields["completion_mask"].any(axis=1), fields["weights"], 0).astype(np.float32)
    more = (0, contexts_size - c)
    contexts = Contexts(
        tokens=np.pad(rows.contexts.tokens, (more, (0, context_width - p))),
        lengths=np.pad(rows.contexts.lengths, more),
        extras={k: np.pad(v, [more] + [(0, 0)] * (v.ndim - 1)) for k, v in rows.contexts.extras.items()},
    )
    batch = Batch(
        contexts=contexts,
        columns={k: padded(k, v) for k, v in rows.columns.items()},
        role=rows.role,
        channels=rows.channels,
        channel_weights=rows.channel_weights,
        **fields,
    )
    return replicate(batch, run.mesh)


def dealt(run: Run, batch: Batch, key: Key) -> list[np.ndarray]:
    """The rows of each update."""
    weights, groups, update_ids = jax.device_get((batch.weights, batch.group_ids, batch.update_ids))
    words = np.asarray(jax.random.key_data(fold(key, "deal"))).tolist()
    return deal(
        weights=weights,
        group_ids=groups,
        update_ids=update_ids,
        updates=run.updates,
        seed=np.random.SeedSequence(words),
    )


class Compiled:
    """The jitted programs of a run, and when they are needed."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._evaluate = jax.jit(self._evaluate_role, static_argnames=("role",))
        self._shape = jax.jit(self._shape_batch)
        # A policy comes back as it went in: the compiler may not move it to another layout, and so recompile.
        self._update = {
            role: jax.jit(
                partial(self._train_step, role=role),
                static_argnames=("first",),
                donate_argnums=0,
                out_shardings=(jax.tree.map(lambda x: x.sharding, policy), None),
            )
            for role, policy in run.policies.items()
            if policy.optimizer is not None
        }
        self._asks_for_old: bool | None = None

    def evaluate(self, batch: Batch) -> Batch:
        """`ref` where the method has a reference; `old` where something will ask for it."""
        run = self.run
        if "reference" in run.policies and batch.role == "policy":
            batch = batch.replace(ref=self._pass(batch, "reference", "trained_under"))
        return self.with_old(batch) if self._needs_old(batch) else batch

    def with_old(self, batch: Batch) -> Batch:
        """`old` from a pass of its own, unless it is there."""
        return batch if batch.old is not None else batch.replace(old=self._pass(batch, batch.role, "sampled_under"))

    def shape(self, batch: Batch, arrays: Any, key: Key) -> tuple[Batch, Any]:
        """rewards, then advantages; jit, global."""
        edited, arrays = self._shape(batch, arrays, key)
        return batch.replace(**edited), arrays

    def update(self, batch: Batch, arrays: Any, rows: np.ndarray, *, first: bool) -> tuple[Policy, dict[str, Any]]:
        run = self.run
        part = self._cells(batch, "trained_under", rows, run.layout.sweeps)
        step = self._update[batch.role]
        return step(run.policies[batch.role], batch, arrays, part.order, np.int32(part.count), first=first)

    def _pass(self, batch: Batch, role: str, which: str) -> Decisions:
        rows = np.flatnonzero(np.asarray(jax.device_get(batch.prompt_ids)) >= 0)
        part = self._cells(batch, which, rows, self.run.layout.sweeps * self.run.updates)
        under, params = getattr(batch, which), self.run.policies[role].params
        return self._evaluate(params, batch, under, part.order, np.int32(part.count), role=role)

    def _cells(self, batch: Batch, which: str, rows: np.ndarray, capacity: int):
        layout = self.run.layout
        under = np.asarray(jax.device_get(getattr(batch, which)))
        counts = np.unique(under[rows], return_counts=True)[1]
        lone = len(counts) > layout.contexts * capacity and counts.max() == 1
        if lone and layout.rows > 1:  # every row has a context of its own, and wide cells would be mostly empty
            layout, capacity = layout._replace(rows=1), capacity * layout.rows
        return lay_out(under, rows, layout, capacity=capacity)

    def _needs_old(self, batch: Batch) -> bool:
        if self.run.updates > 1 or not np.array_equal(*jax.device_get((batch.sampled_under, batch.trained_under))):
            return True
        if self._asks_for_old is None:
            try:
                jax.eval_shape(self._shape_batch, batch.replace(old=None), self.run.state.arrays, fold(0))
                self._asks_for_old = False
            except (AttributeError, TypeError):  # None.logps: a seam reads the old policy
                self._asks_for_old = True
        return self._asks_for_old

    def _evaluate_role(self, params, batch: Batch, under, order, count, *, role: str) -> Decisions:
        run = self.run
        evaluate = partial(run.domain.evaluate, role=role, wants=run.method.wants)
        return evaluate_all(lambda p, b: evaluate(p, b), params, batch, under, order, count, run.mesh)

    def _shape_batch(self, batch: Batch, arrays: Any, key: Key) -> tuple[dict[str, Any], Any]:
        """The fields that the two seams fill or edit."""
        m = self.run.method
        rewards = m.reward(batch, arrays, jax.random.fold_in(key, 0))
        after, arrays = m.advantage(batch.replace(rewards=rewards), arrays, jax.random.fold_in(key, 1))
        names = [field.name for field in dataclasses.fields(batch)]
        return {n: getattr(after, n) for n in names if getattr(after, n) is not getattr(batch, n)}, arrays

    def _train_step(self, policy: Policy, batch: Batch, arrays, order, count, *, role: str, first: bool):
        run = self.run
        evaluate = lambda params, rows: run.domain.evaluate(params, rows, role=role, wants=run.method.wants)  # noqa: E731
        return train_step(
            run.method, evaluate, run.optimizer, run.mesh, policy, batch, arrays, order, count, first=first
        )


def follow(policies: dict[str, Policy], roles: Mapping[str, Any], step: int) -> None:
    """Roles that follow the policy move towards it when their turn comes."""
    for name, role in roles.items():
        if role.follow is None:
            continue
        rate, every = role.follow
        if (step + 1) % every == 0:
            moved = _toward(policies[name].params, policies["policy"].params, rate)
            policies[name] = policies[name]._replace(params=moved)


@partial(jax.jit, donate_argnums=0)
def _toward(params: Any, target: Any, rate: float) -> Any:
    return jax.tree.map(lambda a, b: (1 - rate) * a + rate * b, params, target)  # rate 1 is a copy, to the bit


def _check_roles(run: Run, rollouts: Sequence[Rollout]) -> None:
    roles = [rows.role for rows in rollouts]
    trained = [name for name, policy in run.policies.items() if policy.optimizer is not None]
    if len(set(roles)) < len(roles) or not set(roles) <= set(trained):
        raise ValueError(
            f"a plan returns one rollout for each policy that it trains, out of {trained}; got rollouts of {roles}. "
            "Join those of one role with grpo_jax.types.concat"
        )


def _fit(n: int, size: int) -> int:
    """n rounded up to `size` times a power of two."""
    while size < n:
        size *= 2
    return size
