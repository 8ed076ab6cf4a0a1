"""Plain GRPO: all other methods are this one with some answers replaced."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Array, Float

from grpo_jax import advantages, losses
from grpo_jax.types import Batch, Decisions, Message, Method, Request, Role, Rollout, State

RATIOS = ("token", "sequence")  # see `importance_ratio`


def grpo(
    *,
    prompts: int,
    group_size: int,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl: float = 0.0,
    epsilon: float = 1e-6,
    aggregate: Callable[[Batch], Float[Array, "N T"]] | None = None,
) -> Method:
    """Group-relative policy optimisation.

    A = (r - mean) / (std + epsilon) within the prompt; loss = max(-rho A, -clip(rho, 1 - low, 1 + high) A) per token
    plus kl * k3 against the frozen reference; mean over the tokens of the mini-batch. With kl = 0 no reference exists.

    prompts, group_size: B prompts a step, G completions each. kl: coefficient beta.
    Source: Shao et al. 2024 (arXiv:2402.03300), eq. 3; token mean as in Yu et al. 2025 (arXiv:2503.14476), eq. 8.
    """

    def plan(state, draw, key):
        rows = yield [Request(p, count=group_size) for p in draw(state, prompts)]
        return state.host, [rows]

    def advantage(batch, arrays, key):
        scores = advantages.group_z_score(total_reward(batch), batch.group_ids, epsilon=epsilon)
        return batch.replace(advantages=advantages.per_decision(scores, batch.completion_mask)), arrays

    def objective(new, batch, arrays):
        ratio = losses.token_ratio(new.logps, batch.old.logps)
        return clipped(ratio, new, batch, clip_low=clip_low, clip_high=clip_high, kl=kl)

    return Method(
        init=lambda pool: State(0, {}, {}),
        select=lambda state, pool, n, key: pool.take(n),
        plan=plan,
        reward=lambda batch, arrays, key: batch.scores,
        advantage=advantage,
        objective=objective,
        aggregate=aggregate or token_mean,
        roles={"reference": Role()} if kl else {},
        wants=("entropy",),
        group_size=group_size,
    )


def reworded(text: str | Sequence[Message], rewrite: Callable[[str], str]) -> str | list[Message]:
    """A prompt with its text, or that of a chat's last message, rewritten."""
    if isinstance(text, str):
        return rewrite(text)
    *before, last = text
    return [*before, {**last, "content": rewrite(last["content"])}]


def importance_ratio(over: str, new: Decisions, batch: Batch) -> Float[Array, "N T"]:
    """The ratio of each "token", or the product over the "sequence" on each of its tokens (for `sequence_mean`)."""
    if over == "token":
        return losses.token_ratio(new.logps, batch.old.logps)
    return losses.sequence_product(new.logps, batch.old.logps, batch.completion_mask)


def at_least(smallest: float, **options: float) -> None:
    """Raises: ValueError for the first option that is smaller."""
    for name, value in options.items():
        if not value >= smallest:
            raise ValueError(f"{name} must be at least {smallest}, got {value}")


def judged(rows: Rollout) -> np.ndarray:
    """The scores of those rows that have one, for `plan`."""
    scores = rows.score()
    return scores[~np.isnan(scores)]


def mixed(group: Rollout) -> bool:
    """Whether the group's scores differ, for `plan`."""
    scores = judged(group)
    return len(scores) > 0 and bool(np.ptp(scores) > 0)


def weights_of(batch: Batch) -> tuple[float, ...]:
    """The weight of each reward channel, 1 where none are configured."""
    return batch.channel_weights or (1.0,) * batch.rewards.shape[1]


def total_reward(batch: Batch) -> Float[Array, "N"]:
    """The weighted sum of a row's reward channels that apply; NaN where none does."""
    return advantages.combine(batch.rewards, weights_of(batch))


def token_mean(batch: Batch) -> Float[Array, "N T"]:
    """Every trained decision of the mini-batch counts alike."""
    return losses.token_mean(batch.weights, batch.completion_mask)


def sequence_mean(batch: Batch) -> Float[Array, "N T"]:
    """Every completion counts alike, and within it every trained decision."""
    return losses.sequence_mean(batch.weights, batch.completion_mask)


def clipped(
    ratio: Float[Array, "N T"], new: Decisions, batch: Batch, *, clip_low: float, clip_high: float, kl: float = 0.0
) -> tuple[Float[Array, "N T"], dict[str, Array]]:
    """The clipped surrogate with its KL term, and what to report of it."""
    loss = losses.ppo_clip(ratio, batch.advantages, low=clip_low, high=clip_high)
    low, high = losses.clip_events(ratio, batch.advantages, low=clip_low, high=clip_high)
    reported = {"ratio": ratio, "clip_low": low, "clip_high": high}
    if kl:
        loss = loss + kl * losses.kl.k3(new.logps, batch.ref.logps)
        reported["kl"] = losses.kl.k1(new.logps, batch.ref.logps)  # the same mean, without k3's rare huge values
    return loss, reported
