"""How many completions each prompt gets: functions of what is known of the prompts, a fixed budget divided.

These run on the host, in numpy and float64, since what they return decides shapes. No randomness, and ties go to the
lower index: every process that has the same statistics computes the same allocation.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float, Int

Rates = Float[np.ndarray, "M"]
Counts = Int[np.ndarray, "M"]


def knapsack_value(counts: Counts, success_rates: Rates) -> Rates:
    """What `counts` completions of a prompt are worth: a chance of a mixed group times what such a group teaches.

    v(N, p) = (1 - p^N - (1 - p)^N) p (1 - p)^2, N >= 1; 0 for p = 0 and p = 1. Concave in N.

    Source: arXiv:2509.25849.
    """
    n, p = np.asarray(counts, np.float64), np.asarray(success_rates, np.float64)
    return (1 - p**n - (1 - p) ** n) * p * (1 - p) ** 2


def knapsack_allocation(
    success_rates: Rates,
    *,
    budget: int,
    smallest: int = 2,
    largest: int = 128,
    fallback: float | None = 0.9,
    worthless_minimum: bool = False,
) -> Counts:
    """Knapsack RL: the counts N_i, budget * M in all, that maximise sum_i v(N_i, p_i) over prompts with 0 < p < 1.

    A prompt of unknown rate (NaN) gets `budget`, one that always fails or always succeeds `smallest`; dynamic
    programming divides the rest, at most `largest` each. `fallback` = c: prompts with 0 < p < 1 get at most
    sum_i floor(min(largest, ln(1 - c) / ln(max(p, 1 - p)))) of it, enough for a mixed group with confidence c, and the
    surplus goes evenly to prompts that failed or are unknown, or else to the solved ones. None: no such limit.
    What cannot be placed below `largest` is spread evenly over those that carry signal, above it.

    success_rates: in [0, 1]. budget: completions per prompt on average. worthless_minimum: True as in the published
    code, where a prompt left at `smallest` is worth 0; the paper's sum (default) counts v(smallest, p).
    Raises: ValueError unless 1 <= smallest <= budget <= largest and rates and confidence are in range.
    Source: arXiv:2509.25849, and its code.
    """
    p = _rates(success_rates)
    if not 1 <= smallest <= budget <= largest:
        raise ValueError(
            f"each prompt gets `smallest` to `largest` completions, `budget` on average: needs 1 <= smallest <= budget "
            f"<= largest, got smallest {smallest}, budget {budget}, largest {largest}"
        )
    mixed, hopeless = (p > 0) & (p < 1), np.isnan(p) | (p == 0)
    counts = np.where(np.isnan(p), budget, smallest)
    rest = budget * len(p) - counts.sum()
    if not mixed.any():
        return _spread(counts, hopeless, rest) if hopeless.any() else np.full(len(p), budget)
    if fallback is not None and not mixed.all():
        surplus = max(rest - np.floor(np.minimum(mixed_group_cost(p[mixed], confidence=fallback), largest)).sum(), 0)
        counts = _spread(counts, hopeless if hopeless.any() else ~mixed, int(surplus))
        rest -= int(surplus)
    values = knapsack_value(smallest + np.arange(largest - smallest + 1), p[mixed, None])
    if worthless_minimum:
        values[:, 0] = 0
    extra = dynamic_programme(values, rest)
    counts[mixed] += extra
    return _spread(counts, mixed, rest - extra.sum())


def mixed_group_cost(success_rates: Rates, *, confidence: float = 0.9) -> Rates:
    """Completions after which a group holds both outcomes with this confidence: ln(1 - c) / ln(max(p, 1 - p)).

    The paper's other estimate is the mean number of draws, 1 / (p (1 - p)) - 1. Source: arXiv:2509.25849, its code.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"a confidence lies between 0 and 1, got {confidence}")
    p = np.asarray(success_rates, np.float64)
    certain = (p <= 0) | (p >= 1)  # such a prompt never has a mixed group
    likelier = np.where(certain, 0.5, np.maximum(p, 1 - p))
    return np.where(certain, np.inf, math.log(1 - confidence) / np.log(likelier))


def contrast_value(counts: Counts, success_rates: Rates) -> Rates:
    """The expected number of failures that share a group with a success: U(B, p) = B (1 - p) [1 - (1 - p)^(B - 1)].

    B >= 1; 0 for p = 0 and p = 1. Convex in B while B is small, then nearly linear with slope 1 - p.

    Source: arXiv:2602.03584.
    """
    b, p = np.asarray(counts, np.float64), np.asarray(success_rates, np.float64)
    return b * (1 - p) * (1 - (1 - p) ** (b - 1))


def contrast_allocation(
    success_rates: Rates, *, total: int, smallest: int = 2, largest: int = 128, exact: bool = False
) -> Counts:
    """V0: counts between `smallest` and `largest`, at most `total` in all, for the greatest sum_i U(B_i, p_i).

    One completion at a time goes where it gains most, as the paper does. U being convex at first, that starves very
    hard prompts; `exact` takes the optimum by dynamic programming instead. Prompts with p = 0 or 1 stay at `smallest`.

    success_rates: predicted, in [0, 1]; the paper's predictor stands outside.
    Raises: ValueError if `total` does not reach for `smallest` each, smallest > largest, or a rate is not in [0, 1].
    Source: arXiv:2602.03584.
    """
    p = _rates(success_rates)
    if np.isnan(p).any() or not 1 <= smallest <= largest or total < smallest * len(p):
        raise ValueError(
            f"needs a rate for every prompt, 1 <= smallest <= largest, and a total of at least smallest * prompts, got "
            f"{int(np.isnan(p).sum())} unknown rates, smallest {smallest}, largest {largest}, total {total} for "
            f"{len(p)} prompts"
        )
    counts, useful = np.full(len(p), smallest), (p > 0) & (p < 1)
    values = contrast_value(smallest + np.arange(largest - smallest + 1), p[useful, None])
    rest = total - counts.sum()
    counts[useful] += dynamic_programme(values, rest) if exact else greedy(np.diff(values), rest)
    return counts


def half_width(spreads: Rates, counts: Counts, *, alpha: float = 0.05) -> Rates:
    """Half of the confidence interval of a mean: h(n) = t_{1 - alpha/2, n - 1} s / sqrt(n), Student's t, n >= 2.

    spreads: sample standard deviations (ddof 1). Source: arXiv:2510.06672.
    """
    counts = np.asarray(counts)
    if not 0 < alpha < 1 or counts.min(initial=2) < 2:
        raise ValueError(
            f"an interval at level alpha in (0, 1) needs two rewards or more, got alpha {alpha} and counts from "
            f"{counts.min(initial=2)}"
        )
    from scipy.special import stdtrit  # here, so that importing the library stays light

    t = stdtrit(counts - 1, 1 - alpha / 2)
    return t * np.asarray(spreads, np.float64) / np.sqrt(counts)


def exploration_allocation(
    spreads: Rates,
    counts: Counts,
    *,
    budget: int,
    alpha: float = 0.05,
    bonus: float = 0.1,
    root: bool = True,
    largest: int | None = None,
) -> Counts:
    """XRPO: `budget` further completions, one at a time to the prompt of highest priority h(n) - h(n + 1) + phi.

    h is `half_width` with the spread s frozen; phi = bonus sqrt(log(1 + T) / n), or bonus log(1 + T) / n without
    `root`; T completions made so far in this step (sum of `counts`), frozen too; n grows as they are handed out.

    spreads: sample standard deviations (ddof 1) of each prompt's rewards. counts: completions so far, each >= 2.
    largest: cap on a prompt's count. Returns: further completions, `budget` in all unless the caps are reached.
    The loop, what T counts, alpha and bonus are reconstructed; sources disagree about the form of phi.
    Raises: ValueError for counts below 2 or shapes that differ.
    Source: arXiv:2510.06672.
    """
    spreads, counts = np.asarray(spreads, np.float64), np.asarray(counts)
    if spreads.ndim != 1 or spreads.shape != counts.shape:
        raise ValueError(f"needs one spread and one count per prompt, got {spreads.shape} and {counts.shape}")
    n = counts[:, None] + np.arange(budget + 1)
    width = half_width(spreads[:, None], n, alpha=alpha)
    rarity = np.log1p(counts.sum()) / n[:, :-1]
    gains = width[:, :-1] - width[:, 1:] + bonus * (np.sqrt(rarity) if root else rarity)
    if largest is not None:
        gains = np.where(n[:, :-1] < largest, gains, -np.inf)
    return greedy(gains, budget)


def dynamic_programme(values: Float[np.ndarray, "M K"], total: int) -> Counts:
    """The k_i in [0, K - 1], `total` in all (or as many as there is room for), of the greatest sum_i values[i, k_i].

    Exact for any values; O(M total K).
    """
    items, choices = values.shape
    total = min(int(total), items * (choices - 1))
    best = np.full(total + 1, -np.inf)
    best[0] = 0
    chosen = np.zeros((items, total + 1), np.int32)
    rows = np.arange(total + 1)
    for i in range(items):
        before = np.concatenate([np.full(choices - 1, -np.inf), best])
        # [w, k]: what the earlier items make of w - k, plus this item's value of k
        sums = np.lib.stride_tricks.sliding_window_view(before, choices)[:, ::-1] + values[i]
        chosen[i] = sums.argmax(axis=1)
        best = sums[rows, chosen[i]]
    counts, left = np.zeros(items, int), total
    for i in reversed(range(items)):
        counts[i] = chosen[i, left]
        left -= counts[i]
    return counts


def greedy(gains: Float[np.ndarray, "M K"], total: int) -> Counts:
    """`total` units one at a time, each where the next gains most: gains[i, k] for the one after k. -inf: no more.

    The optimum of the sum if every row falls.
    """
    gains = np.pad(gains, ((0, 0), (0, 1)), constant_values=-np.inf)
    counts, items = np.zeros(len(gains), int), np.arange(len(gains))
    for _ in range(int(total)):
        next_gains = gains[items, counts]
        if next_gains.max(initial=-np.inf) == -np.inf:
            break
        counts[next_gains.argmax()] += 1
    return counts


def _rates(success_rates: Rates) -> Rates:
    p = np.asarray(success_rates, np.float64)
    if p.ndim != 1 or not ((p >= 0) & (p <= 1) | np.isnan(p)).all():
        raise ValueError(f"success rates are a vector of numbers in [0, 1] (NaN: unknown), got {p}")
    return p


def _spread(counts: Counts, where: np.ndarray, amount: int) -> Counts:
    """`amount` more, evenly over the chosen prompts; what does not divide goes to the first of them."""
    chosen = np.flatnonzero(where)
    each, over = divmod(int(amount), len(chosen))
    counts = counts.copy()
    counts[chosen] += each + (np.arange(len(chosen)) < over)
    return counts
