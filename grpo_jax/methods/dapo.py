"""DAPO: clip-higher, token mean, dynamic sampling, and a soft punishment of overlong completions."""

from __future__ import annotations

import jax.numpy as jnp

from grpo_jax import advantages
from grpo_jax.methods.grpo import at_least, grpo, mixed
from grpo_jax.types import Method, Request, concat


def dapo(
    *,
    prompts: int,
    group_size: int,
    max_new: int,
    buffer: int = 0,
    max_rounds: int = 10,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    **options,
) -> Method:
    """Prompts whose completions all score alike are replaced by further ones, until `prompts` groups carry signal.

    The reward of the first channel is lowered by soft_overlong(length) within `buffer` tokens of the budget.
    After `max_rounds` rounds the step trains on the groups that it has.

    max_new: the generation budget in tokens (taken from `sampling.max_new`); buffer: 0 = no punishment.
    Raises: ValueError for a buffer that is longer than the budget.
    Source: Yu et al. 2025 (arXiv:2503.14476), eq. 8, 11 and 13.
    """
    at_least(1, max_rounds=max_rounds)
    if not 0 <= buffer <= max_new:
        raise ValueError(f"dapo punishes the last `buffer` tokens of max_new {max_new}, got buffer {buffer}")

    def plan(state, draw, key):
        kept = []
        for _ in range(max_rounds):
            rows = yield [Request(p, count=group_size) for p in draw(state, prompts)]
            rows = yield rows
            kept += [g for g in rows.groups() if mixed(g)]
            if len(kept) >= prompts:
                break
        return state.host, [concat(*kept[:prompts])] if kept else []

    def reward(batch, arrays, key):
        if not buffer:
            return batch.scores
        punishment = advantages.soft_overlong(batch.lengths, maximum=max_new, buffer=buffer)
        return batch.scores + jnp.where(jnp.arange(batch.scores.shape[1]) == 0, punishment[:, None], 0)

    method = grpo(prompts=prompts, group_size=group_size, clip_low=clip_low, clip_high=clip_high, **options)
    return method.replace(plan=plan, reward=reward)
