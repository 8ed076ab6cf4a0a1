"""Guide-GRPO: prompts without a success are asked again with a hint, and the update is for the bare prompt."""

from __future__ import annotations

import jax.numpy as jnp

from grpo_jax import losses
from grpo_jax.losses.off_policy import shaped_ratio
from grpo_jax.methods.grpo import at_least, grpo, judged, reworded, sequence_mean
from grpo_jax.types import Method, Request, State, concat


def guide_grpo(
    *,
    prompts: int,
    group_size: int,
    hint_column: str = "hint",
    hint: str = "{prompt}\n\nHint: {hint}\n",
    solvable: float = 1e-3,
    quantile: float = 0.9,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    epsilon: float = 1e-6,
    max_rounds: int = 10,
) -> Method:
    """Groups with a mean score within [solvable, 1 - solvable] are kept; those below are drawn anew under the hinted
    prompt and kept by the same rule. Surplus groups open the next step.

    Rows of the bare prompt: the clipped surrogate. Rows drawn under the hint: -A rho / (rho + gamma) with
    rho = pi(o | prompt) / pi_old(o | prompt, hint) and gamma the row's `quantile` of rho, detached.

    hint_column: the dataset column with the guidance. hint: how it joins the prompt (of a chat: its last message).
    Source: arXiv:2506.13923, section 3.
    """

    at_least(1, max_rounds=max_rounds)

    def hinted(prompt):
        if prompt.columns.get(hint_column) is None:
            raise ValueError(
                f"guide_grpo reads its hints from the column {hint_column!r}, but prompt {prompt.id} has "
                f"{sorted(prompt.columns)}"
            )
        return reworded(prompt.text, lambda text: hint.format(prompt=text, hint=prompt.columns[hint_column]))

    def kept(rows):
        return [g for g in rows.groups() if len(judged(g)) and solvable <= judged(g).mean() <= 1 - solvable]

    def plan(state, draw, key):
        groups = list(state.host["surplus"])
        for _ in range(max_rounds):
            if len(groups) >= prompts:
                break
            asked = draw(state, prompts)
            rows = yield [Request(p, count=group_size) for p in asked]
            rows = yield rows
            groups += kept(rows)
            lost = [g for g in rows.groups() if len(judged(g)) and judged(g).mean() <= solvable]
            dead = {int(g.prompt_ids[0]) for g in lost}
            again = [p for p in asked if p.id in dead]
            if again:
                rows = yield [Request(p, count=group_size, context=hinted(p), train_context=p.text) for p in again]
                groups += kept((yield rows))
        return {"surplus": groups[prompts:]}, [concat(*groups[:prompts])] if groups else []

    def objective(new, batch, arrays):
        ratio, a = losses.token_ratio(new.logps, batch.old.logps), batch.advantages  # old: under the prompt really used
        plain = (batch.sampled_under == batch.trained_under)[:, None]
        shaped = losses.reinforce(shaped_ratio(ratio, batch.completion_mask, quantile=quantile), a)
        loss = jnp.where(plain, losses.ppo_clip(ratio, a, low=clip_low, high=clip_high), shaped)
        low, high = losses.clip_events(ratio, a, low=clip_low, high=clip_high)
        guided = jnp.broadcast_to(~plain, ratio.shape)
        return loss, {"ratio": ratio, "clip_low": low & plain, "clip_high": high & plain, "guided": guided}

    method = grpo(prompts=prompts, group_size=group_size, epsilon=epsilon, aggregate=sequence_mean)
    return method.replace(init=lambda pool: State(0, {}, {"surplus": []}), plan=plan, objective=objective)
