"""Rewards from comparisons: who wins against how many of its group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Judge = Callable[[list[Any], list[Any], list[Any]], Sequence[float | None]]


def win_rates(
    verdicts: Float[Array, "N N"], group_ids: Int[Array, "N"], *, decimals: int | None = None
) -> Float[Array, "N"]:
    """Share of its comparisons that a row wins, a tie being half a win; NaN for a row that was compared with nobody.

    w_i = (sum_j o_ij + sum_j (1 - o_ji)) / n_i over the n_i verdicts with rows j != i of the same group

    verdicts: o_ij in [0, 1], 1 where i, shown first, beats j, 0.5 for a tie; NaN where (i, j) was not asked. Each pair
    may be judged in one order, in both (their mean counts) or, with sampled pairs, not at all. If all pairs of a group
    were judged alike often, its win rates add up to G/2: they are relative and do not show progress.
    decimals: round to so many (the published code: 3; the paper and default: not).
    Raises: ValueError if verdicts are not [N, N] with one id per row. Source: Pref-GRPO, arXiv:2508.20751.
    """
    verdicts, group_ids = jnp.asarray(verdicts).astype(jnp.float32), jnp.asarray(group_ids)
    n = len(group_ids)
    if group_ids.ndim != 1 or verdicts.shape != (n, n):
        raise ValueError(
            f"win_rates needs a verdict for each ordered pair [N, N] and N group_ids, got {list(verdicts.shape)} and "
            f"{list(group_ids.shape)}; NaN stands for pairs that were not judged"
        )
    together = (group_ids[:, None] == group_ids) & (group_ids >= 0) & ~jnp.eye(n, dtype=bool)
    judged = together & ~jnp.isnan(verdicts)
    won = jnp.where(judged, verdicts, 0).sum(axis=1) + jnp.where(judged, 1 - verdicts, 0).sum(axis=0)
    number = judged.sum(axis=1) + judged.sum(axis=0)
    rates = jnp.where(number > 0, won / jnp.maximum(number, 1), jnp.nan)
    return rates if decimals is None else jnp.round(rates, decimals)


def tournament(
    judge: Judge,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    group_ids: Sequence[int] | np.ndarray,
    *,
    both_orders: bool = False,
) -> np.ndarray:
    """Ask a judge about every pair of completions of a group: the verdicts [N, N] that `win_rates` reads. Host only.

    The judge is called once, with three lists of M (prompts, what is shown first, what is shown second), and returns M
    verdicts: 1 the first is better, 0 the second, 0.5 or None neither. A group of G makes G (G - 1) / 2 pairs, the
    earlier row shown first; with `both_orders`, which takes out a judge's leaning to one side, twice as many.
    Raises: ValueError for lists of different lengths, another number of verdicts, or one outside [0, 1].
    Source: Pref-GRPO, arXiv:2508.20751, whose code judges one order and counts what it cannot read as a tie.
    """
    ids = np.asarray(group_ids)
    if not len(prompts) == len(completions) == len(ids):
        raise ValueError(
            f"a tournament is between completions of prompts in groups, one each: got {len(prompts)} prompts, "
            f"{len(completions)} completions, {len(ids)} group_ids"
        )
    first, second = np.nonzero(np.triu((ids[:, None] == ids) & (ids >= 0), k=1))
    if both_orders:
        first, second = np.concatenate([first, second]), np.concatenate([second, first])
    verdicts = np.full((len(ids), len(ids)), np.nan, np.float32)
    if not len(first):
        return verdicts
    shown = list(zip(first.tolist(), second.tolist()))
    said = judge([prompts[i] for i, _ in shown], [completions[i] for i, _ in shown], [completions[j] for _, j in shown])
    if len(said) != len(first):
        raise ValueError(f"the judge was asked about {len(first)} pairs and returned {len(said)} verdicts")
    values = np.array([0.5 if verdict is None else verdict for verdict in said], np.float32)
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError(
            "a verdict is 1 (the first is better), 0 (the second), or 0.5 or None (neither), got "
            f"{values[~((values >= 0) & (values <= 1))][0]:g}"
        )
    verdicts[first, second] = values
    return verdicts
