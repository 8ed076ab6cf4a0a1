"""Format-Length: no labels; a readable answer and a completion of about half the budget are the whole reward."""

from __future__ import annotations

import jax.numpy as jnp

from grpo_jax.advantages.lengths import format_length as surrogate
from grpo_jax.methods.grpo import grpo
from grpo_jax.types import Method


def format_length(
    *,
    prompts: int,
    group_size: int,
    max_new: int,
    formed: str = "form",
    thinking: str | None = None,
    peak: float = 0.5,
    kl: float = 0.001,
    **options,
) -> Method:
    """R = 0.5 (thinking + formed) + y where an answer can be read, else min(0, y); y rises to 1 at a length of
    peak * max_new and falls to -1 at max_new. Further channels, such as the correctness, are measured and not rewarded.

    formed, thinking: names of reward channels of 1 or 0: an answer can be read; its thinking is marked as such (None:
    prompts do not ask for that). It can be won by any text of that length that ends in some answer: it helps a policy
    that can solve its tasks already.
    Source: arXiv:2505.19439; group statistics, token mean and k3 as in its code, whose entropy bonus is left out.
    """

    def reward(batch, arrays, key):
        place = _place(batch.channels, formed)
        marked = batch.scores[:, _place(batch.channels, thinking)] if thinking else jnp.zeros(len(batch))
        scores = surrogate(batch.lengths, batch.scores[:, place], marked, maximum=max_new, peak=peak)
        unpaid = jnp.where(jnp.isnan(scores), jnp.nan, 0)  # a row without a verdict stays without a reward
        return jnp.where(jnp.arange(len(batch.channels)) == place, scores[:, None], unpaid[:, None])

    return grpo(prompts=prompts, group_size=group_size, kl=kl, **options).replace(reward=reward)


def _place(channels: tuple[str, ...], name: str) -> int:
    if name not in channels:
        raise ValueError(f"format_length reads the reward channel {name!r}, but the rewards have {list(channels)}")
    return channels.index(name)
