"""Curriculum GRPO: a length that is asked for and rewarded, and that shrinks in steps during training."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from grpo_jax import advantages, segments
from grpo_jax.advantages.lengths import band_length, budget_at, exponential_budgets, triangular_length
from grpo_jax.methods.grpo import (
    RATIOS,
    at_least,
    clipped,
    grpo,
    importance_ratio,
    reworded,
    sequence_mean,
    total_reward,
)
from grpo_jax.types import Method, Request

SHAPES = {"triangle": triangular_length, "band": band_length}


def curriculum_grpo(
    *,
    prompts: int,
    group_size: int,
    first: int = 256,
    factor: float = 0.7,
    interval: float = 150,
    budgets: list[int] | None = None,
    length_weight: float = 0.6,
    shape: str = "triangle",
    length_column: str | None = None,
    template: str = "{prompt}\n\nThink within {budget} tokens.\n",
    ratio: str = "token",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl: float = 0.0,
    epsilon: float = 1e-8,
) -> Method:
    """r = the configured rewards (correctness, form) + length_weight * R_len(length, B(t)), B(t) = first *
    factor^floor(t / interval) or the next of `budgets`; A = (r - mean) / sqrt(variance + epsilon), variance over n.

    The length reward is a channel of its own, "budgeted_length". `template` makes the context from prompt and budget
    (of a chat: its last message); "{prompt}" alone says nothing of the budget. Held-out prompts are asked as they are.

    length_weight: 0.6 with correctness at 0.3 and form at 0.1, or 0.3 with 0.6 and 0.1. shape: "triangle" or "band".
    length_column: what counts as the length, for instance that of the thinking; None: the whole completion.
    ratio: "token" as usually done, "sequence" the product over the completion, as the paper writes it.
    Raises: ValueError for another shape or ratio. Source: arXiv:2508.08940.
    """
    if shape not in SHAPES or ratio not in RATIOS:
        raise ValueError(
            f"curriculum_grpo's shape is one of {tuple(SHAPES)} and its ratio one of {RATIOS}, "
            f"got {shape!r} and {ratio!r}"
        )
    at_least(1, **{f"budgets[{k}]": budget for k, budget in enumerate(budgets or ())})
    at_least(0, length_weight=length_weight)
    course = tuple(budgets) if budgets else exponential_budgets(first=first, factor=factor)

    def plan(state, draw, key):
        budget = int(budget_at(state.step, course, interval=interval))
        named = lambda text: template.format(prompt=text, budget=budget)  # noqa: E731
        rows = yield [Request(p, count=group_size, context=reworded(p.text, named)) for p in draw(state, prompts)]
        rows = yield rows.with_columns(budget=float(budget))
        if length_column is not None and length_column not in rows.columns:
            raise ValueError(
                f"curriculum_grpo reads lengths from the column {length_column!r}, but there are {sorted(rows.columns)}"
            )
        lengths = rows.lengths if length_column is None else rows.columns[length_column]
        scores = SHAPES[shape](lengths, np.full(len(rows), budget))
        return state.host, [
            rows.replace(
                scores=np.concatenate([rows.scores, np.asarray(scores)[:, None]], axis=1),
                channels=(*rows.channels, "budgeted_length"),
                channel_weights=(*(rows.channel_weights or (1.0,) * len(rows.channels)), length_weight),
            )
        ]

    def advantage(batch, arrays, key):
        rewards = total_reward(batch)
        scores = segments.z_score(
            rewards, batch.group_ids, ~jnp.isnan(rewards), ddof=0, epsilon=epsilon, inside_root=True
        )
        return batch.replace(advantages=advantages.per_decision(scores, batch.completion_mask)), arrays

    def objective(new, batch, arrays):
        rho = importance_ratio(ratio, new, batch)
        return clipped(rho, new, batch, clip_low=clip_low, clip_high=clip_high, kl=kl)

    method = grpo(prompts=prompts, group_size=group_size, kl=kl, aggregate=sequence_mean)
    return method.replace(plan=plan, advantage=advantage, objective=objective)
