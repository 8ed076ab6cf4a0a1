"""Iterations as one program: sample, score, reward, advantage, update, and then the next step, without the host.

It applies where nothing on the host has to see a rollout before the update: every reward is in-graph, the method asks
once and trains what it gets, one policy is trained, once a step. The host prepares the prompts of the next steps and
writes down those that are done while the device computes.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Int

from grpo_jax.processes import agree, exchange
from grpo_jax.rewards import RewardError
from grpo_jax.training.agreement import described
from grpo_jax.training.batches import padded
from grpo_jax.training.inspection import check_rollout, check_update
from grpo_jax.training.keys import fold
from grpo_jax.training.loop import Run, toward
from grpo_jax.training.mesh import replicate
from grpo_jax.training.step import Policy
from grpo_jax.types import Batch, PyTree, Request, State

MOST_STEPS, MOST_BYTES = 16, 1 << 27  # of one dispatch
QUICK, SLOW = 0.5, 2.0  # seconds of a dispatch below which the next one may be longer, above which it is shorter


class Step(NamedTuple):
    """What the host gives to one step. Nothing in the batch is drawn yet."""

    batch: Batch
    launches: PyTree
    order: Int[Array, "M C G"]  # all rows under their contexts (`deal.lay_out`)
    count: Int[Array, ""]
    step: Int[Array, ""]


class Dispatched(NamedTuple):
    """Steps under way: where they start, what was asked for in each, and their results."""

    start: int
    requests: list[list[Request]]
    contexts: list[Any]
    results: tuple[Batch, dict[str, Array]]


class Unfit(Exception):
    """Why a run's iterations cannot be one program."""


def obstacle(run: Run) -> str | None:
    """Why the run's iterations cannot be one program; None if they can. Draws prompts, and puts them back."""
    host = getattr(run.verify, "on_the_host", None)
    trained = [name for name, policy in run.policies.items() if policy.optimizer is not None]
    if host is None or run.domain.prepare is None:
        return "the run's rewards, or its sampler, are on the host"
    if host or not run.verify.functions:
        return f"the reward {host[0]!r} is computed on the host" if host else "there is no reward"
    if run.updates * run.passes > 1:
        return f"a step has {run.updates * run.passes} updates"
    if trained != ["policy"]:
        return f"the trained policies are {', '.join(trained)}"
    position = run.pool.state()
    try:
        state = State(run.state.step, Unseen(), copy.deepcopy(run.state.host))
        step, _ = prepared(run, state)
        return _changes(run, step)
    except Unfit as error:
        return str(error)
    finally:
        run.pool.restore(position)


class Unseen:
    """Stands for what does not exist yet: it may be handed on, and not looked at."""

    def _look(self, *_: Any) -> Any:
        raise Unfit("the method's plan looks at what was sampled, or at its state")

    __getattr__ = __getitem__ = __iter__ = __len__ = __bool__ = __eq__ = __array__ = _look
    __hash__ = None  # type: ignore[assignment]


def asked(run: Run, state: State) -> list[Request]:
    """What the method's plan samples in a step, in one round and without having seen anything of it.

    Raises: Unfit if it does something else.
    """
    key, rows = fold(run.seed, state.step), Unseen()
    select = lambda state, n: run.method.select(state, run.pool, n, fold(key, "select"))  # noqa: E731
    plan = run.method.plan(state._replace(arrays=Unseen()), select, fold(key, "plan"))
    requests = next(plan)
    if not isinstance(requests, list) or not requests:
        raise Unfit("the method's plan does not start with requests")
    try:
        if plan.send(rows) is not rows or plan.send(rows) is not None:
            raise Unfit("the method's plan has several rounds")
    except StopIteration as end:
        host, rollouts = end.value
        if host is not state.host or len(rollouts) != 1 or rollouts[0] is not rows:
            raise Unfit("the method's plan keeps something, or does not train what it samples") from None
    for r in requests:
        if r.role != "policy" or r.prefix is not None or r.train_context is not None or r.max_new == 0:
            raise Unfit("the method's plan asks for more than completions of a prompt")
    return requests


def prepared(run: Run, state: State) -> tuple[Step, list[Request]]:
    """A step on the host: its prompts, as arrays of shapes that do not depend on them."""
    requests = asked(run, state)
    rows, launches = run.domain.prepare(requests, Counter())
    batch = padded(rows, run.layout, updates=1)
    batch = batch.replace(weights=np.pad(rows.weights, (0, len(batch) - len(rows))))  # though nothing is drawn yet
    part = run.compiled.cells(batch, "trained_under", np.arange(len(rows)), run.layout.sweeps)
    return Step(batch, launches, part.order, np.int32(part.count), np.uint32(state.step)), requests


def _changes(run: Run, step: Step) -> str | None:
    """What a step does to its state that a loop in a program cannot do."""
    arrays = jax.tree.map(jnp.asarray, run.state.arrays)
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)  # noqa: E731
    _, after, _, _ = jax.eval_shape(partial(iteration, run), run.policies, arrays, step)
    return None if shapes(after) == shapes(arrays) else "the method's state changes its shapes"


def iteration(run: Run, policies: dict[str, Policy], arrays: PyTree, given: Step):
    """One step in jit: `loop.iterate` without the host."""
    compiled, key = run.compiled, fold(run.seed, given.step)
    params = {role: policy.params for role, policy in policies.items()}
    batch = run.domain.draw(params, given.batch, given.launches, fold(key, "sample"))
    batch = run.verify.trace(batch, given.step.astype(jnp.int32))
    if run.mesh.size > 1:  # statistics over rows are the same bits whatever the mesh
        batch = jax.lax.with_sharding_constraint(batch, NamedSharding(run.mesh, PartitionSpec()))
    passed = lambda role: compiled.pass_in_graph(params[role], batch, given.order, given.count, role=role)  # noqa: E731
    ref = passed("reference") if "reference" in policies else None
    old = passed("policy") if compiled.asks_for_old(batch.replace(ref=ref)) else None
    batch = batch.replace(ref=ref, old=old)
    edited, arrays = compiled.shape_in_graph(batch, arrays, fold(key, "shape", batch.role))
    if "update_ids" in edited:
        raise Unfit("the method says which update a row goes to")
    batch = batch.replace(**edited)
    order, count = laid_out(batch.trained_under, batch.weights != 0, given.order.shape)
    policy, report = compiled.update_in_graph(
        policies["policy"], batch, arrays, order, count, role="policy", first=True
    )
    policies = followed(run, {**policies, "policy": policy}, given.step)
    return policies, arrays, batch.replace(contexts=None, old=None, ref=None), report


def followed(run: Run, policies: dict[str, Policy], step: Int[Array, ""]) -> dict[str, Policy]:
    """`loop.follow` in jit."""
    for name, role in run.method.roles.items():
        if role.follow is not None:
            rate, every = role.follow
            params, target = policies[name].params, policies["policy"].params
            move = partial(toward, rate=rate)
            moved = jax.lax.cond((step + 1) % every == 0, move, lambda params, target: params, params, target)
            policies[name] = policies[name]._replace(params=moved)
    return policies


def laid_out(
    under: Int[Array, " N"], live: Bool[Array, " N"], shape: tuple[int, int, int]
) -> tuple[Int[Array, "M C G"], Int[Array, ""]]:
    """`deal.lay_out` of the live rows, in jit: the rows of one context side by side, contexts as they first appear."""
    sweeps, contexts, width = shape
    at = jnp.arange(len(under), dtype=jnp.int32)
    first = jnp.full(len(under), len(under), jnp.int32).at[under].min(jnp.where(live, at, len(under)))
    owner = jnp.where(live, first[under], len(under))
    rows = jnp.argsort(owner, stable=True).astype(jnp.int32)
    starts = jnp.concatenate([jnp.ones(1, bool), owner[rows][1:] != owner[rows][:-1]])
    within = at - jax.lax.cummax(jnp.where(starts, at, 0))
    slots = jnp.cumsum((within % width == 0) & live[rows])
    place = jnp.where(live[rows], (slots - 1) * width + within % width, sweeps * contexts * width)
    order = jnp.full(sweeps * contexts * width, -1, jnp.int32).at[place].set(rows, mode="drop")
    return order.reshape(shape), -(-slots[-1] // contexts).astype(jnp.int32)


class Fused:
    """The compiled iterations of a run. One program serves any number of steps up to its capacity."""

    def __init__(self, run: Run) -> None:
        self.run, self.steps = run, 1
        self._iteration = jax.jit(partial(iteration, run))  # traced once, for its shapes and in the loop
        places = jax.tree.map(lambda x: x.sharding, run.policies)
        everywhere = NamedSharding(run.mesh, PartitionSpec())
        self._program = jax.jit(self._loop, donate_argnums=(0, 1), out_shardings=(places, everywhere, everywhere))

    def advance(self, until: int, *, stopped: Callable[[], bool], written: Callable[[int, dict[str, float]], None]):
        """Train up to step `until`, or until `stopped()`: several steps at a time, of which the whole are written.

        written: called after each step was logged, with its number and the seconds that a step took.
        """
        waiting = None
        while True:
            more = self.run.state.step < until and not stopped()
            launched = self._dispatch(until) if more else None
            if waiting:
                self._write(waiting, written)
            if launched is None:
                break
            waiting = launched
        self.run.whole = True

    def _dispatch(self, until: int) -> Dispatched:
        run, start = self.run, self.run.state.step
        with run.clock("prepare"):
            steps, requests = self._steps(min(self.steps, until - start))
            agree(f"what is sampled from step {start} on", partial(described, sum(requests, [])))
            contexts, count = [step.batch.contexts for step in steps], np.int32(len(steps))
            steps += [steps[-1]] * (self._capacity(steps[0]) - len(steps))
            given = replicate(jax.tree.map(lambda *x: np.stack(x), *steps), run.mesh)
            arrays = replicate(jax.tree.map(jnp.asarray, run.state.arrays), run.mesh)
        with run.clock("iterate"):
            policies, arrays, results = self._program(run.policies, arrays, given, count)
        run.whole = False
        run.policies.update(policies)
        run.state = State(start + len(requests), arrays, run.state.host)
        return Dispatched(start, requests, contexts, results)

    def _steps(self, most: int) -> tuple[list[Step], list[list[Request]]]:
        """The next steps, as many as have equal shapes."""
        run, steps, requests = self.run, [], []
        for number in range(run.state.step, run.state.step + most):
            position = run.pool.state()
            step, ask = prepared(run, run.state._replace(step=number))
            if steps and _shapes(step) != _shapes(steps[0]):
                run.pool.restore(position)
                break
            steps.append(step)
            requests.append(ask)
        return steps, requests

    def _capacity(self, step: Step) -> int:
        """Steps for which a dispatch has room."""
        size = sum(np.asarray(x).nbytes for x in jax.tree.leaves(step))
        return max(1, min(MOST_STEPS, MOST_BYTES // size))

    def _loop(self, policies: dict[str, Policy], arrays: PyTree, given: Step, count: Int[Array, ""]):
        """`count` iterations. The number is traced, so the program, and its every bit, is the same for all."""
        _, _, *shapes = jax.eval_shape(self._iteration, policies, arrays, _at(0, given))
        room = jax.tree.map(lambda x: jnp.zeros((len(given.step), *x.shape), x.dtype), shapes)

        def one(i, carry):
            policies, arrays, results = carry
            policies, arrays, *result = self._iteration(policies, arrays, _at(i, given))
            return policies, arrays, jax.tree.map(lambda all, x: all.at[i].set(x), results, result)

        return jax.lax.fori_loop(0, count, one, (policies, arrays, room))

    def _write(self, done: Dispatched, written: Callable[[int, dict[str, float]], None]) -> None:
        run, number = self.run, len(done.requests)
        with run.clock("iterate"):
            results = jax.device_get(done.results)
        times = run.clock.lap()
        self._pace(max(map(float, exchange(repr(times["seconds"]), "the end of a dispatch"))))
        for i, (requests, contexts) in enumerate(zip(done.requests, done.contexts)):
            batch, report = _at(i, results)
            check_rollout(_at(slice(sum(r.count for r in requests)), batch), requests)
            check_scores(batch)
            check_update(report, step=done.start + i, update=0)
            run.log(batch.replace(contexts=contexts), [report] if (batch.weights != 0).any() else [])
            written(done.start + i, {name: seconds / number for name, seconds in times.items()})

    def _pace(self, seconds: float) -> None:
        """As many steps at a time as keep the device busy and the user informed."""
        if seconds < QUICK:
            self.steps = min(2 * self.steps, MOST_STEPS)
        elif seconds > SLOW:
            self.steps = max(1, self.steps // 2)


def _at(place: Any, tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x[place], tree)


def check_scores(batch: Batch) -> None:
    """Raise if an in-graph reward is infinite."""
    if (wrong := np.isinf(batch.scores)).any():
        row, channel = np.argwhere(wrong)[0]
        raise RewardError(
            f"the in-graph reward {batch.channels[channel]!r} returned {batch.scores[row, channel]} for {wrong.sum()} "
            f"completions, first of prompt {batch.prompt_ids[row]}. Where the reward does not apply, return NaN"
        )


def _shapes(tree: PyTree) -> Any:
    return jax.tree.structure(tree), [(np.shape(x), np.asarray(x).dtype) for x in jax.tree.leaves(tree)]
