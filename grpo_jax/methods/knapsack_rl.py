"""Knapsack RL: the step's completions go to the prompts from which they are likely to teach most."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from grpo_jax import losses
from grpo_jax.advantages.allocation import knapsack_allocation
from grpo_jax.advantages.group import group_z_score
from grpo_jax.advantages.shaping import per_decision
from grpo_jax.advantages.success import SuccessWindow, success_rates, success_window
from grpo_jax.methods.grpo import at_least, grpo, total_reward
from grpo_jax.types import Method, Request, State


def knapsack_rl(
    *,
    prompts: int,
    group_size: int,
    smallest: int = 2,
    largest: int = 128,
    fallback: float | None = 0.9,
    window: int = 16,
    fewest: int = 8,
    clamp: float = 5.0,
    dual: float = 10.0,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    epsilon: float = 1e-6,
) -> Method:
    """prompts * group_size completions, N_i for prompt i: `knapsack_allocation` of the prompts' success rates so far.

    A prompt counts as known from `fewest` rewards on; its rate is the mean over the last `window` (`success_window`).
    Until then it gets group_size, so the first epoch is plain GRPO. A completion succeeds if its total reward is above
    0. Group z-scores within +-clamp, the clipped surrogate with a `dual` bound for A < 0, mean over tokens, no KL.

    fallback: confidence of a mixed group up to which prompts with signal are served first; None to leave it out.
    Raises: ValueError as `knapsack_allocation` and `success_window`.
    Source: arXiv:2509.25849, and its code.
    """
    at_least(1, fewest=fewest)
    if not clamp > 0:
        raise ValueError(f"knapsack_rl cuts advantages at +-clamp, which must be above 0, got {clamp}")
    start, update = success_window(window=window)
    budget = {"budget": group_size, "smallest": smallest, "largest": largest, "fallback": fallback}
    knapsack_allocation(np.zeros(prompts), **budget)  # its options are checked before anything is drawn

    def plan(state, draw, key):
        known = SuccessWindow(**state.host)
        asked = draw(state, prompts)
        rates = np.asarray(success_rates(known, fewest=fewest))[[p.id for p in asked]]
        counts = knapsack_allocation(rates, **budget)
        rows = yield [Request(p, count=int(n)) for p, n in zip(asked, counts)]
        rows = yield rows
        scored = np.where(np.isnan(rows.score()), np.nan, rows.score() > 0)
        known = update(known, scored, rows.prompt_ids)
        return {name: np.asarray(x) for name, x in known._asdict().items()}, [rows]

    def advantage(batch, arrays, key):
        scores = group_z_score(total_reward(batch), batch.group_ids, epsilon=epsilon)
        values = per_decision(jnp.clip(scores, -clamp, clamp), batch.completion_mask)
        return batch.replace(advantages=values), arrays

    def objective(new, batch, arrays):
        ratio, bounds = losses.token_ratio(new.logps, batch.old.logps), {"low": clip_low, "high": clip_high}
        loss = losses.ppo_clip(ratio, batch.advantages, dual=dual, **bounds)
        low, high = losses.clip_events(ratio, batch.advantages, **bounds)
        return loss, {"ratio": ratio, "clip_low": low, "clip_high": high}

    def init(pool):
        return State(0, {}, {name: np.asarray(x) for name, x in start(pool.rows)._asdict().items()})

    method = grpo(prompts=prompts, group_size=group_size)
    return method.replace(init=init, plan=plan, advantage=advantage, objective=objective)
