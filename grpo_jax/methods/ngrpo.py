"""NGRPO: an imagined best completion in every group, so that a group of failures still teaches."""

from __future__ import annotations

from grpo_jax.advantages.shaping import per_decision
from grpo_jax.advantages.virtual import with_virtual_best
from grpo_jax.methods.grpo import at_least, grpo, judged, total_reward
from grpo_jax.types import Method, Request, State, concat


def ngrpo(
    *,
    prompts: int,
    group_size: int,
    r_max: float = 1.0,
    n_v: int = 1,
    max_rounds: int = 10,
    clip_low: float = 0.16,
    clip_high: float = 0.24,
    epsilon: float = 1e-6,
    **options,
) -> Method:
    """A = (r - mu') / (sigma' + epsilon), mu' and sigma' over the group and n_v completions of reward r_max.

    Groups in which all is right are replaced by further prompts until `prompts` groups are there, or for `max_rounds`
    rounds; surplus groups open the next step. Groups in which all is wrong are kept. clip_low binds for A < 0 only and
    clip_high for A > 0 only: failures are held tighter.

    r_max: the highest total reward there is.
    Source: arXiv:2509.18851.
    """
    at_least(1, max_rounds=max_rounds)
    best = r_max - 1e-6 * abs(r_max)

    def plan(state, draw, key):
        kept = list(state.host["surplus"])
        for _ in range(max_rounds):
            if len(kept) >= prompts:
                break
            rows = yield [Request(p, count=group_size) for p in draw(state, prompts)]
            rows = yield rows
            kept += [g for g in rows.groups() if (judged(g) < best).any()]
        return {"surplus": kept[prompts:]}, [concat(*kept[:prompts])] if kept else []

    def advantage(batch, arrays, key):
        values = with_virtual_best(total_reward(batch), batch.group_ids, r_max=r_max, n_v=n_v, epsilon=epsilon)
        return batch.replace(advantages=per_decision(values, batch.completion_mask)), arrays

    method = grpo(prompts=prompts, group_size=group_size, clip_low=clip_low, clip_high=clip_high, **options)
    return method.replace(init=lambda pool: State(0, {}, {"surplus": []}), plan=plan, advantage=advantage)
