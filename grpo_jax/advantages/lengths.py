"""Rewards for the length of a completion, and the budgets that they are measured against.

Lengths are decisions (tokens, the stop token included), never characters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grpo_jax import segments

LAST_STEP = 2**31 - 1


def peaked_length(lengths: Int[Array, "N"], *, maximum: int, peak: float = 0.5) -> Float[Array, "N"]:
    """Rises from 0 at length 0 to 1 at `peak * maximum`, then falls to -1 at `maximum` and stays there.

    With x = min(length / maximum, 1):  1 - (1 - x/p)^2 for x <= p,  1 - 2 ((x - p)/(1 - p))^2 beyond.

    peak: p in (0, 1). Raises: ValueError for a peak outside, or maximum <= 0.
    Source: arXiv:2505.19439 (its third version of the length reward).
    """
    if not 0 < peak < 1 or not maximum > 0:
        raise ValueError(
            f"peaked_length has its peak inside the budget: it needs 0 < peak < 1 and maximum > 0, got peak {peak}, "
            f"maximum {maximum}"
        )
    x = jnp.clip(jnp.asarray(lengths).astype(jnp.float32) / maximum, 0, 1)
    return jnp.where(x <= peak, 1 - (1 - x / peak) ** 2, 1 - 2 * ((x - peak) / (1 - peak)) ** 2)


def format_length(
    lengths: Int[Array, "N"],
    formed: Float[Array, "N"],
    thinking: Float[Array, "N"],
    *,
    maximum: int,
    peak: float = 0.5,
) -> Float[Array, "N"]:
    """A reward without labels, from form and length alone.

    0.5 (thinking + formed) + y where an answer can be read, min(0, y) where none can, y = `peaked_length`.

    formed: 1 if an answer can be read, else 0. thinking: 1 if the thinking is marked as such, else 0 (0 for prompts
    that do not ask for it). A NaN in either stays NaN.
    Source: arXiv:2505.19439.
    """
    formed, thinking = (jnp.asarray(x).astype(jnp.float32) for x in (formed, thinking))
    _check_rows("format_length", lengths=lengths, formed=formed, thinking=thinking)
    y = peaked_length(lengths, maximum=maximum, peak=peak)
    reward = jnp.where(formed > 0.5, 0.5 * (thinking + formed) + y, jnp.minimum(y, 0))
    return jnp.where(jnp.isnan(formed) | jnp.isnan(thinking), jnp.nan, reward)


def triangular_length(lengths: Int[Array, "N"], budgets: Float[Array, "N"]) -> Float[Array, "N"]:
    """1 for a completion that uses exactly its budget B, falling linearly to 0 at length 0 and at 2 B.

    max(0, 1 - |length - B| / B); 0 where B <= 0. It pays for padding up to the budget.
    Source: arXiv:2508.08940, its length reward.
    """
    over, has_budget = _over(lengths, budgets)
    return jnp.where(has_budget, jnp.maximum(1 - jnp.abs(over), 0), 0)


def band_length(lengths: Int[Array, "N"], budgets: Float[Array, "N"]) -> Float[Array, "N"]:
    """1 up to the budget B, then falling linearly to 0 at 2 B: brevity is not paid for beyond what is asked.

    clip(1 - (length - B) / B, 0, 1); 0 where B <= 0.
    Source: arXiv:2508.08940, the alternative to its triangle.
    """
    over, has_budget = _over(lengths, budgets)
    return jnp.where(has_budget, jnp.clip(1 - over, 0, 1), 0)


def brevity(
    correct: Float[Array, "N"], lengths: Int[Array, "N"], group_ids: Int[Array, "N"], *, alpha: float = 0.6
) -> Float[Array, "N"]:
    """Right completions that are short among the right ones of their group earn more; wrong ones earn 0.

    1 - alpha sigmoid((length_i - m) / s), m and s the mean and standard deviation (ddof 0) of the lengths of the right
    completions of the group; 1 - alpha / 2 where these are all equal. With alpha < 1 right beats wrong.

    correct: 1 or 0; NaN stays NaN and is in no statistic. alpha in [0, 1]: 0.6 is a third party's choice, the paper's
    is not known. Rows with id -1 are compared with nobody and keep `correct`.
    Raises: ValueError for an alpha outside [0, 1].
    Source: arXiv:2505.18086, the reward of its selected groups.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"brevity takes a share alpha of a right answer's reward, in [0, 1]; got {alpha}")
    correct, lengths = jnp.asarray(correct).astype(jnp.float32), jnp.asarray(lengths).astype(jnp.float32)
    _check_rows("brevity", correct=correct, lengths=lengths, group_ids=group_ids)
    right = correct > 0.5
    spread = segments.std(lengths, group_ids, right)
    longer = lengths - segments.mean(lengths, group_ids, right)
    share = jax.nn.sigmoid(jnp.where(right & (spread > 0), longer, 0) / jnp.where(spread > 0, spread, 1))
    return jnp.where(right & (group_ids >= 0), 1 - alpha * share, correct)


def exponential_budgets(*, first: int, factor: float) -> tuple[int, ...]:
    """Budgets that shrink by a factor until they are 1: floor(max(1, first factor^k)), k = 0, 1, ...

    Raises: ValueError unless first >= 1 and 0 < factor < 1.
    Source: arXiv:2508.08940; the rounding is reconstructed (floor gives the reported 256, 179, 125, 87).
    """
    if not 0 < factor < 1 or first < 1:
        raise ValueError(
            f"budgets shrink from first >= 1 by a factor between 0 and 1, got first {first}, factor {factor}"
        )
    budgets = [_whole(first)]
    while budgets[-1] > 1:
        budgets.append(_whole(first * factor ** len(budgets)))
    return tuple(budgets)


def spaced_budgets(*, first: int, last: int, drops: int, linear: bool = False) -> tuple[int, ...]:
    """Budgets from `first` to `last` in a number of drops, for an interval of steps / (drops + 1).

    floor(first (last / first)^(k / drops)), or with `linear` floor(first - k (first - last) / drops), k = 0 .. drops.

    Raises: ValueError unless first >= last >= 1 and drops >= 1.
    Source: arXiv:2508.08940, its schedules by their end points; the rounding is reconstructed.
    """
    if not first >= last >= 1 or drops < 1:
        raise ValueError(
            f"budgets go down from first to last >= 1 in one drop or more, got first {first}, last {last}, "
            f"drops {drops}"
        )
    if linear:
        return tuple(_whole(first - k * (first - last) / drops) for k in range(drops + 1))
    return tuple(_whole(first * (last / first) ** (k / drops)) for k in range(drops + 1))


def budget_at(step: Int[Array, ""], budgets: Sequence[int], *, interval: float) -> Int[Array, ""]:
    """The budget of a step: budgets[floor(step / interval)], the last one from its turn on.

    step: from 0. A function of the step alone: prompt and reward that read the same step agree, and so does a restart.
    Raises: ValueError for an interval <= 0 or without budgets.
    Source: arXiv:2508.08940.
    """
    if not interval > 0 or not len(budgets):
        raise ValueError(f"a curriculum has budgets and an interval above 0, got {list(budgets)} and {interval}")
    starts = jnp.asarray([min(math.ceil(round(k * interval, 9)), LAST_STEP) for k in range(1, len(budgets))], jnp.int32)
    return jnp.asarray(budgets, jnp.int32)[jnp.sum(jnp.asarray(step) >= starts)]


def _whole(budget: float) -> int:
    """Rounded down, at least 1; 28.999999999999996 is 29 (100 * 0.29)."""
    return max(1, math.floor(budget * (1 + 1e-12)))


def _over(lengths: Array, budgets: Array) -> tuple[Float[Array, "N"], Bool[Array, "N"]]:
    """By what share of its budget a completion is longer than it, and whether it has one."""
    lengths, budgets = (jnp.asarray(x).astype(jnp.float32) for x in (lengths, budgets))
    if budgets.ndim:
        _check_rows("a length reward", lengths=lengths, budgets=budgets)
    has_budget = budgets > 0
    return (lengths - budgets) / jnp.where(has_budget, budgets, 1), has_budget


def _check_rows(what: str, **arrays: Array) -> None:
    shapes = {name: list(jnp.shape(x)) for name, x in arrays.items()}
    if len({tuple(s) for s in shapes.values()}) > 1 or any(len(s) != 1 for s in shapes.values()):
        raise ValueError(f"{what} needs one value per row in each of its arrays [N], got {shapes}")
