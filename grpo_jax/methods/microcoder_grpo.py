"""MicroCoder-GRPO: some plausible truncated completions go unpunished, and the temperature is chosen by diversity."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from grpo_jax import advantages
from grpo_jax.advantages.diversity import ngram_diversity
from grpo_jax.losses.truncation import conditionally_masked, repeats
from grpo_jax.methods.grpo import RATIOS, clipped, grpo, importance_ratio, sequence_mean, token_mean, total_reward
from grpo_jax.types import Method, Request, State


def microcoder_grpo(
    *,
    prompts: int,
    group_size: int,
    probability: float = 0.1,
    window: int = 128,
    plausible: str | None = None,
    temperatures: list[float] | None = None,
    diversity: float = 0.7,
    ratio: str = "token",
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    epsilon: float = 1e-6,
) -> Method:
    """A = (r - mean) / (std + epsilon) over all completions, then 0 with `probability` for those that ran out of
    budget, are plausible, and do not end in a repetition of `window` tokens. Clip-higher, no KL.

    plausible: a column, 1 where an answer is not judged wrong (right, or cut off before it could be judged), which a
    reward function returns; None: where the reward is above 0.
    temperatures: tried once, on the prompts of the first step; the lowest whose completions have an `ngram_diversity`
    of at least `diversity` is kept, or else the highest. None: `sampling.temperature` (1.2 in the paper).
    ratio: "token", or "sequence" the product over the completion.
    Raises: ValueError for another ratio. Source: arXiv:2603.07777; clip bounds, the test for repetitions, the measure
    of diversity and the choice by it are reconstructed.
    """
    if ratio not in RATIOS:
        raise ValueError(f"microcoder_grpo's ratio is one of {RATIOS}, got {ratio!r}")

    if not 0 <= diversity <= 1 or min(temperatures or [1]) <= 0:
        raise ValueError(
            f"microcoder_grpo tries temperatures above 0 for a diversity in [0, 1], got {temperatures} and {diversity}"
        )

    def plan(state, draw, key):
        asked, kept = draw(state, prompts), state.host["temperature"]
        for candidate in sorted(temperatures or ()) if kept is None else ():
            rows = yield [Request(p, count=group_size, temperature=candidate) for p in asked]
            kept = candidate
            if ngram_diversity(rows.completions, rows.lengths, rows.group_ids) >= diversity:
                break
        rows = yield [Request(p, count=group_size, temperature=kept) for p in asked]
        return {"temperature": kept}, [rows]

    def advantage(batch, arrays, key):
        rewards = total_reward(batch)
        scores = advantages.group_z_score(rewards, batch.group_ids, epsilon=epsilon)
        spared = conditionally_masked(
            ~batch.finished,
            rewards > 0 if plausible is None else _column(batch, plausible) > 0,
            repeats(batch.completions, batch.lengths, window=window),
            jax.random.uniform(key, scores.shape),  # once per completion: every update on it sees the same
            probability=probability,
        )
        scores = jnp.where(spared, 0, scores)
        return batch.replace(advantages=advantages.per_decision(scores, batch.completion_mask)), arrays

    def objective(new, batch, arrays):
        rho = importance_ratio(ratio, new, batch)
        return clipped(rho, new, batch, clip_low=clip_low, clip_high=clip_high)

    aggregate = token_mean if ratio == "token" else sequence_mean
    return grpo(prompts=prompts, group_size=group_size, aggregate=aggregate).replace(
        init=lambda pool: State(0, {}, {"temperature": None}), plan=plan, advantage=advantage, objective=objective
    )


def _column(batch, name):
    if name not in batch.columns:
        raise ValueError(
            f"microcoder_grpo reads which completions are plausible from the column {name!r}, but there are "
            f"{sorted(batch.columns)}; a reward function can return it (types.Scored)"
        )
    return batch.columns[name]
