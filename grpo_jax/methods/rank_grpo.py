"""Rank-GRPO: a completion is a ranked list, and every rank has its own reward, comparison and importance ratio."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from grpo_jax import losses
from grpo_jax.advantages.ranks import item_ids, per_rank, rank_rewards, rank_z_scores, with_length_terms
from grpo_jax.advantages.shaping import combine
from grpo_jax.losses.aggregation import unit_mean
from grpo_jax.losses.ratios import unit_geometric
from grpo_jax.methods.grpo import clipped, grpo, weights_of
from grpo_jax.types import Method

MEANS = ("tokens", "ranks")


def rank_grpo(
    *,
    prompts: int,
    group_size: int,
    newlines: Mapping[int, int] | None = None,
    decay: str | float = "exp_inf",
    length_bonus: float = 0.1,
    mean_over: str = "tokens",
    clip_low: float = 0.06,
    clip_high: float = 0.08,
    kl: float = 1e-3,
    epsilon: float = 1e-4,
) -> Method:
    """A token's advantage is its line's: rank k's reward compared with rank k of the group's other lists. All tokens of
    a line share the geometric mean of their ratios and carry the gradient of the whole mean, so the stop token, whose
    advantage is its own, moves its line as well.

    Rewards: hits [N, K], a channel of `Scored`; several such channels add up rank by rank.
    newlines: how many a token's text holds, by token id (default: bytes). decay: what a rank earns of later hits, see
    `rank_rewards`. length_bonus: advantage of tokens that decide the length, see `with_length_terms`; 0: the paper's
    formula. mean_over: "tokens" as in the published code, or "ranks" as in the paper, where every written rank counts
    alike (and what runs over as one more with a length_bonus, not at all without).
    Raises: ValueError for another mean, one completion per prompt, or, at the first step, rewards without ranks.
    Source: Zhu et al., Rank-GRPO (ICLR 2026).
    """
    if mean_over not in MEANS:
        raise ValueError(f"rank_grpo's mean_over is one of {MEANS}, got {mean_over!r}")
    if group_size < 2:
        raise ValueError(f"rank_grpo compares the lists of a prompt and needs at least 2 of them, got {group_size}")
    counts = {10: 1} if newlines is None else newlines

    def advantage(batch, arrays, key):
        rewards = rank_rewards(by_rank(batch), decay=decay)
        scores, ranks = rank_z_scores(rewards, batch.group_ids, epsilon=epsilon), rewards.shape[1]
        lines = item_ids(sum(n * (batch.completions == token) for token, n in counts.items()), batch.exists)
        values, over = per_rank(scores, lines), -1
        if length_bonus:
            ends = batch.finished[:, None] & (jnp.arange(lines.shape[1]) == batch.lengths[:, None] - 1)
            values, over = with_length_terms(values, lines, ends, ranks=ranks, size=length_bonus), ranks
        units = jnp.where(lines < ranks, lines, over)
        changes = jnp.diff(units, axis=1, prepend=units[:, :1]) != 0  # numbered anew: below T, whatever was skipped
        return batch.replace(
            advantages=jnp.where(batch.completion_mask, values, 0),
            unit_ids=jnp.where(units < 0, -1, jnp.cumsum(changes, axis=1)),
        ), arrays

    def objective(new, batch, arrays):
        ratio = unit_geometric(new.logps, batch.old.logps, batch.completion_mask, batch.unit_ids)
        return clipped(ratio, new, batch, clip_low=clip_low, clip_high=clip_high, kl=kl)

    def aggregate(batch):
        if mean_over == "ranks":
            return unit_mean(batch.weights, batch.completion_mask, batch.unit_ids)
        return losses.token_mean(batch.weights, batch.completion_mask)

    method = grpo(prompts=prompts, group_size=group_size, kl=kl)
    return method.replace(advantage=advantage, objective=objective, aggregate=aggregate)


def by_rank(batch):
    """[N, K]: the channels name/0 ... name/(K-1) of all names, added up rank by rank under their weights."""
    weights = weights_of(batch)
    places = [(name.rpartition("/")[2], k) for k, name in enumerate(batch.channels) if weights[k]]
    if not places or not all(place.isdigit() for place, _ in places):
        raise ValueError(
            "rank_grpo needs a reward per rank, a channel [N, K] of Scored, and weight 0 on any other channel; got "
            f"{list(batch.channels)} with weights {list(weights)}"
        )
    of = lambda rank: np.array([k for place, k in places if int(place) == rank])  # noqa: E731
    ranks = range(1 + max(int(place) for place, _ in places))
    return jnp.stack([combine(batch.rewards[:, of(r)], np.take(weights, of(r))) for r in ranks], axis=1)
