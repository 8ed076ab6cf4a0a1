"""The training iteration: collect, shape, update. One screen, and no method is named in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from grpo_jax.processes import agree
from grpo_jax.training.agreement import described, returned
from grpo_jax.training.batches import put, put_scores
from grpo_jax.training.deal import Layout, deal
from grpo_jax.training.inspection import check_rollout, check_update
from grpo_jax.training.instruments import Clock
from grpo_jax.training.keys import fold
from grpo_jax.training.programs import Compiled
from grpo_jax.training.step import Policy
from grpo_jax.training.verification import scored
from grpo_jax.types import Batch, Domain, Key, Method, Prompt, Rollout, State

Verify = Callable[[Sequence[Prompt], Rollout, list[str], int], Rollout]


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
    passes: int = 1
    clock: Clock = field(default_factory=Clock)
    log: Callable[[Batch, list[dict[str, Any]]], None] = lambda batch, updates: None
    whole: bool = True  # no policy has been updated in a step that is not finished

    def __post_init__(self) -> None:
        self.compiled = Compiled(self)

    @property
    def params(self) -> dict[str, Any]:
        return {role: policy.params for role, policy in self.policies.items()}


def iterate(run: Run) -> None:
    """One step: rounds of sampling and scoring, reference and old log-probs, rewards, advantages, updates."""
    m, key = run.method, fold(run.seed, run.state.step)
    host, rollouts = collect(run, key)
    _check_roles(run, rollouts)
    arrays, shaped = run.state.arrays, []
    for rows in rollouts:  # one per trained policy; there may be none
        with run.clock("shape"):
            batch = put(rows, run.layout, run.mesh, updates=run.updates)
            batch = run.compiled.evaluate(batch, partial(with_scores, run, rows))  # the host scores meanwhile
            batch, arrays = run.compiled.shape(batch, arrays, fold(key, "shape", batch.role))
            shaped.append(batch)
    run.whole = False
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
    run.state, run.whole = State(run.state.step + 1, arrays, host), True


def collect(run: Run, key: Key) -> tuple[Any, list[Rollout]]:
    """Drive the method's plan: requests become rows, a rollout becomes a scored one, until it says what is trained."""
    select = lambda state, n: run.method.select(state, run.pool, n, fold(key, "select"))  # noqa: E731
    numbers: Counter = Counter()
    plan, rows = run.method.plan(run.state, select, fold(key, "plan")), None
    while True:
        try:
            ask = plan.send(rows)
        except StopIteration as end:
            agree(f"what step {run.state.step} trains on", partial(returned, end.value))
            return end.value
        agree(f"what is sampled and scored in step {run.state.step}", partial(described, ask))
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

    def score(rows: Rollout, _: np.ndarray) -> Rollout:
        prompts = [run.pool[int(i)] for i in rows.prompt_ids]
        return run.verify(prompts, rows, run.domain.text(rows), run.state.step)

    with run.clock("reward"):
        return scored(rows, score)


def with_scores(run: Run, rows: Rollout, batch: Batch) -> Batch:
    """The batch of these rows with their scores; reward functions are asked unless the plan did."""
    return batch if rows.channels else put_scores(verified(run, rows), batch, run.mesh)


def dealt(run: Run, batch: Batch, key: Key) -> list[np.ndarray]:
    """The rows of each update, one pass over the batch after the other."""
    weights, groups, update_ids = jax.device_get((batch.weights, batch.group_ids, batch.update_ids))
    words = np.asarray(jax.random.key_data(fold(key, "deal"))).tolist()
    named = {"weights": weights, "group_ids": groups, "update_ids": update_ids, "updates": run.updates}
    seeds = np.random.SeedSequence(words).spawn(run.passes)
    return [rows for seed in seeds for rows in deal(**named, seed=seed)]


def follow(policies: dict[str, Policy], roles: Mapping[str, Any], step: int) -> None:
    """Roles that follow the policy move towards it when their turn comes."""
    for name, role in roles.items():
        if role.follow is None:
            continue
        rate, every = role.follow
        if (step + 1) % every == 0:
            moved = toward(policies[name].params, policies["policy"].params, rate)
            policies[name] = policies[name]._replace(params=moved)


@partial(jax.jit, donate_argnums=0)
def toward(params: Any, target: Any, rate: float) -> Any:
    """params, moved towards target by a share."""
    return jax.tree.map(lambda a, b: (1 - rate) * a + rate * b, params, target)  # rate 1 is a copy, to the bit


def _check_roles(run: Run, rollouts: Sequence[Rollout]) -> None:
    roles = [rows.role for rows in rollouts]
    trained = [name for name, policy in run.policies.items() if policy.optimizer is not None]
    if len(set(roles)) < len(roles) or not set(roles) <= set(trained):
        raise ValueError(
            f"a plan returns one rollout for each policy that it trains, out of {trained}; got rollouts of {roles}. "
            "Join those of one role with grpo_jax.types.concat"
        )
