"""Allocations: worked examples, every division of small budgets, loops in float64, what stays constant."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from grpo_jax.advantages import allocation

QUICK = settings(max_examples=25, deadline=None)
RATES = st.lists(st.one_of(st.floats(0.01, 0.99), st.sampled_from([0.0, 1.0, np.nan, 0.5])), min_size=1, max_size=6)


def divisions(items, total, most):
    """Every way to give `total` units to the items, at most `most` each."""
    return (c for c in itertools.product(range(most + 1), repeat=items) if sum(c) == total)


def v(n, p):
    return (1 - p**n - (1 - p) ** n) * p * (1 - p) * (1 - p)


def u(b, p):
    return b * (1 - p) * (1 - (1 - p) ** (b - 1))


# ---- Knapsack RL -----------------------------------------------------------------------------------------------------


def test_knapsack_worked_example():
    p = np.array([0.1, 0.5, 0.9])
    counts = allocation.knapsack_allocation(p, budget=8, largest=32, fallback=None)
    np.testing.assert_array_equal(counts, [15, 7, 2])
    assert allocation.knapsack_value(counts, p).sum() == pytest.approx(0.188990, abs=5e-7)
    np.testing.assert_allclose(allocation.knapsack_value([8] * 3, p), [0.046132, 0.124023, 0.005126], atol=5e-7)
    p = np.array([0.125, 0.5, 0.9375, 0.25])
    counts = allocation.knapsack_allocation(p, budget=8, largest=32, fallback=None)
    np.testing.assert_array_equal(counts, [14, 6, 2, 10])
    assert allocation.knapsack_value(counts, p).sum() == pytest.approx(0.335173, abs=5e-7)
    cost = allocation.mixed_group_cost(np.array([0.01, 0.1, 0.5, 0.9]))
    np.testing.assert_allclose(cost, [229.105288, 21.854345, 3.321928, 21.854345], atol=5e-7)


@pytest.mark.parametrize("worthless", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_knapsack_against_all_divisions(seed, worthless):
    """Without a limit and with every rate strictly between, it is the best of all divisions of the budget."""
    p = np.random.default_rng(seed).uniform(0.02, 0.98, 4)
    counts = allocation.knapsack_allocation(p, budget=5, largest=12, fallback=None, worthless_minimum=worthless)

    def worth(extra):
        return sum(0 if worthless and not k else v(2 + k, q) for k, q in zip(extra, p))

    best = max(divisions(4, 12, 10), key=worth)
    assert worth(counts - 2) == pytest.approx(worth(best), rel=1e-12)
    assert counts.sum() == 20


def test_the_published_codes_worth_of_the_minimum_changes_the_optimum():
    p = np.array([0.1, 0.5, 0.9])
    counts = allocation.knapsack_allocation(p, budget=8, largest=32, fallback=None, worthless_minimum=True)
    np.testing.assert_array_equal(counts, [14, 7, 3])


def by_hand(rates, budget, smallest, largest, confidence):
    """The rules one prompt at a time, and every further completion where it adds most (v is concave)."""
    counts, effective, hopeless = [], [], []
    for i, p in enumerate(rates):
        counts.append(budget if np.isnan(p) else smallest)
        if 0 < p < 1:
            effective.append(i)
        if np.isnan(p) or p == 0:
            hopeless.append(i)
    rest = budget * len(rates) - sum(counts)

    def evenly(indices, amount):
        for place, i in enumerate(indices):
            counts[i] += amount // len(indices) + (place < amount % len(indices))

    if not effective:
        if not hopeless:
            return [budget] * len(rates)
        evenly(hopeless, rest)
        return counts
    others = hopeless or [i for i in range(len(rates)) if i not in effective]
    if confidence is not None and others:
        needed = sum(int(min(largest, np.log(1 - confidence) / np.log(max(rates[i], 1 - rates[i])))) for i in effective)
        if needed < rest:
            evenly(others, rest - needed)
            rest = needed
    added = dict.fromkeys(effective, 0)
    while rest and any(a < largest - smallest for a in added.values()):
        open_ = [i for i in effective if added[i] < largest - smallest]
        gain = {i: v(smallest + added[i] + 1, rates[i]) - v(smallest + added[i], rates[i]) for i in open_}
        added[max(open_, key=gain.get)] += 1
        rest -= 1
    for i in effective:
        counts[i] += added[i]
    evenly(effective, rest)
    return counts


@QUICK
@given(RATES, st.integers(2, 9), st.sampled_from([None, 0.5, 0.9]), st.sampled_from([10, 30]))
def test_knapsack_against_the_rules_by_hand(rates, budget, fallback, largest):
    got = allocation.knapsack_allocation(np.array(rates), budget=budget, largest=largest, fallback=fallback)
    expected = np.array(by_hand(rates, budget, 2, largest, fallback))
    assert got.sum() == expected.sum() == budget * len(rates)
    still = np.array([not 0 < p < 1 for p in rates])
    np.testing.assert_array_equal(got[still], expected[still])
    worth = [sum(v(int(n), p) for n, p in zip(c, rates) if 0 < p < 1) for c in (got, expected)]
    assert worth[0] == pytest.approx(worth[1], rel=1e-9, abs=1e-12)
    assert got.min() >= 2


def test_knapsack_surplus_goes_to_prompts_that_failed_then_to_the_solved():
    """0.5 needs 3 for a mixed group with confidence 0.9; the rest of the budget does not go there."""
    allocate = allocation.knapsack_allocation
    np.testing.assert_array_equal(allocate(np.array([0.5, 0.0, 1.0, np.nan]), budget=8), [5, 10, 2, 15])
    np.testing.assert_array_equal(allocate(np.array([0.5, 1.0, 1.0]), budget=8), [5, 10, 9])
    np.testing.assert_array_equal(allocate(np.array([0.5, 0.0, 1.0]), budget=8, fallback=None), [20, 2, 2])
    np.testing.assert_array_equal(allocate(np.array([0.5, 0.5]), budget=8), [8, 8])  # nobody to give it to


def test_knapsack_without_signal():
    allocate = allocation.knapsack_allocation
    np.testing.assert_array_equal(allocate(np.array([np.nan] * 3), budget=8), [8, 8, 8])
    np.testing.assert_array_equal(allocate(np.array([1.0, 1.0]), budget=8), [8, 8])
    np.testing.assert_array_equal(allocate(np.array([0.0, 1.0, 0.0]), budget=8), [11, 2, 11])
    np.testing.assert_array_equal(allocate(np.array([1.0, np.nan]), budget=8), [2, 14])


def test_knapsack_spreads_what_does_not_fit():
    """At most 9 each leaves 10 of 28 over: they are spread evenly, above the cap."""
    got = allocation.knapsack_allocation(np.array([0.5, 1.0, 1.0, 0.4]), budget=8, largest=9, fallback=None)
    np.testing.assert_array_equal(got, [14, 2, 2, 14])


@pytest.mark.parametrize("shape", [(2, 3, 5), (3, 8, 9)])
def test_dynamic_programme_on_values_of_any_form(shape):
    """Convex, bumpy, negative values, where taking the best unit at a time fails."""
    items, total, choices = shape
    for seed in range(10):
        values = np.random.default_rng(seed).normal(size=(items, choices)).cumsum(axis=1)
        got = allocation.dynamic_programme(values, total)
        best = max(divisions(items, total, choices - 1), key=lambda c: sum(values[i, k] for i, k in enumerate(c)))
        np.testing.assert_array_equal(got, best)
    assert allocation.dynamic_programme(np.zeros((2, 3)), 99).tolist() == [2, 2]


@QUICK
@given(st.lists(st.floats(0.01, 0.99), min_size=2, max_size=8), st.integers(2, 12))
def test_dynamic_programme_equals_greedy_on_concave_values(rates, budget):
    n = np.arange(2, 41)
    values = v(n, np.array(rates)[:, None])
    exact = allocation.dynamic_programme(values, budget * len(rates))
    quick = allocation.greedy(np.diff(values), budget * len(rates))
    worth = [values[np.arange(len(rates)), k].sum() for k in (exact, quick)]
    assert worth[0] == pytest.approx(worth[1], rel=1e-12)


def test_ties_go_to_the_lower_index():
    np.testing.assert_array_equal(
        allocation.knapsack_allocation(np.full(3, 0.3), budget=5, fallback=None).tolist(), [5, 5, 5]
    )
    values = np.tile([0.0, 1, 1.5, 1.75], (3, 1))
    np.testing.assert_array_equal(allocation.dynamic_programme(values, 4), [2, 1, 1])
    np.testing.assert_array_equal(allocation.greedy(np.diff(values), 4), [2, 1, 1])


def test_order_of_prompts_does_not_matter():
    draw = np.random.default_rng(3)
    p = np.where(draw.random(20) < 0.2, np.nan, draw.random(20))
    order = draw.permutation(20)
    counts = allocation.knapsack_allocation(p, budget=8)
    np.testing.assert_array_equal(allocation.knapsack_allocation(p[order], budget=8), counts[order])


# ---- V0 --------------------------------------------------------------------------------------------------------------


def test_contrast_worked_example():
    expected = [[0.095, 0.541975, 2.292637], [0.42, 1.8396, 5.138816], [0.18, 0.3996, 0.8]]
    got = allocation.contrast_value(np.array([2, 4, 8]), np.array([[0.05], [0.3], [0.9]]))
    np.testing.assert_allclose(got, expected, atol=5e-7)
    allocate = allocation.contrast_allocation
    np.testing.assert_array_equal(allocate(np.array([0.05, 0.3, 0.9]), total=24), [2, 20, 2])
    np.testing.assert_array_equal(allocate(np.array([0.02, 0.2, 0.5, 0.95]), total=32), [2, 22, 6, 2])


def one_at_a_time(rates, total, smallest, largest):
    counts = [smallest] * len(rates)
    for _ in range(total - sum(counts)):
        gain = [u(b + 1, p) - u(b, p) if b < largest and 0 < p < 1 else -np.inf for b, p in zip(counts, rates)]
        if max(gain) == -np.inf:
            break
        counts[int(np.argmax(gain))] += 1
    return counts


@QUICK
@given(st.lists(st.floats(0, 1), min_size=1, max_size=5), st.integers(0, 40), st.sampled_from([6, 30]))
def test_contrast_against_one_at_a_time(rates, more, largest):
    total = 2 * len(rates) + more
    got = allocation.contrast_allocation(np.array(rates), total=total, largest=largest)
    expected = one_at_a_time(rates, total, 2, largest)
    worth = [sum(u(int(n), p) for n, p in zip(c, rates)) for c in (got, expected)]
    assert worth[0] == pytest.approx(worth[1], rel=1e-9) and got.sum() == sum(expected)
    assert got.min() >= 2 and got.max() <= largest


@pytest.mark.parametrize("seed", range(4))
def test_contrast_exact_is_the_best_division(seed):
    p = np.array([0.02, *np.random.default_rng(seed).random(3)])
    got = allocation.contrast_allocation(p, total=28, largest=16, exact=True)
    best = max(divisions(4, 20, 14), key=lambda extra: sum(u(2 + k, q) for k, q in zip(extra, p)))
    np.testing.assert_array_equal(got, np.array(best) + 2)


def test_contrast_greedy_starves_the_hardest():
    """U is convex at first: a lump of budget on 0.02 is worth more than what greedy gives it, which is nothing."""
    p = np.array([0.02, 0.5])
    greedy, exact = (allocation.contrast_allocation(p, total=130, exact=e) for e in (False, True))
    assert greedy[0] == 2 and exact[0] > 100
    assert u(exact, p).sum() > u(greedy, p).sum() + 20


def test_contrast_leaves_what_nobody_can_use():
    for exact in (False, True):
        got = allocation.contrast_allocation(np.array([0.0, 0.5, 1.0]), total=60, largest=10, exact=exact)
        np.testing.assert_array_equal(got, [2, 10, 2])


# ---- XRPO ------------------------------------------------------------------------------------------------------------

REWARDS = np.array([[1, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0]])
SPREADS, FOUR = REWARDS.std(axis=1, ddof=1), np.full(4, 4)


def test_exploration_worked_example():
    four, five = (allocation.half_width(SPREADS, np.full(4, n)) for n in (4, 5))
    np.testing.assert_allclose(four, [0.918693, 0, 0.795612, 0], atol=5e-7)
    np.testing.assert_allclose(five, [0.716875, 0, 0.620832, 0], atol=5e-7)
    np.testing.assert_array_equal(allocation.exploration_allocation(SPREADS, FOUR, budget=8), [4, 0, 4, 0])
    order = [allocation.exploration_allocation(SPREADS, FOUR, budget=k) for k in range(9)]
    np.testing.assert_array_equal(np.diff(order, axis=0).argmax(axis=1), [0, 2] * 4)  # a c a c a c a c


def priorities(spreads, counts, n, alpha, bonus, root):
    def h(s, k):
        return stats.t.ppf(1 - alpha / 2, k - 1) * s / np.sqrt(k)

    rare = np.log(1 + sum(counts)) / n
    return h(spreads, n) - h(spreads, n + 1) + bonus * (np.sqrt(rare) if root else rare)


@pytest.mark.parametrize("root", [True, False])
@pytest.mark.parametrize("largest", [None, 12])
@pytest.mark.parametrize("seed", range(3))
def test_exploration_against_one_at_a_time(seed, largest, root):
    draw = np.random.default_rng(seed)
    counts, spreads = draw.integers(2, 10, 6), draw.exponential(0.4, 6)
    got = allocation.exploration_allocation(
        spreads, counts, budget=40, alpha=0.1, bonus=0.3, root=root, largest=largest
    )
    n = counts.copy()
    for _ in range(40):
        priority = priorities(spreads, counts, n, 0.1, 0.3, root)
        if largest is not None:
            priority = np.where(n < largest, priority, -np.inf)
        if priority.max() == -np.inf:
            break
        n[priority.argmax()] += 1
    np.testing.assert_array_equal(got, n - counts)
    assert got.sum() == (40 if largest is None else min(40, 72 - counts.sum()))


def test_exploration_bonus_reaches_decided_prompts():
    """With nothing but the bonus the least sampled prompt comes first."""
    got = allocation.exploration_allocation(np.zeros(3), np.array([2, 5, 3]), budget=4)
    np.testing.assert_array_equal(got, [3, 0, 1])


def test_exploration_weighs_shrinkage_against_rarity():
    """Of 5 drawn, the rarer prompt leads by 0.1 sqrt(log 6) (1/sqrt 2 - 1/sqrt 3) = 0.01737, the other by 0.893 s."""
    for spread, first in ((0.0192, 0), (0.0197, 1)):
        got = allocation.exploration_allocation(np.array([0, spread]), np.array([2, 3]), budget=1)
        assert got.argmax() == first


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.4])
def test_students_t(alpha):
    n = np.arange(2, 140)
    got = allocation.half_width(np.sqrt(n), n, alpha=alpha)
    np.testing.assert_allclose(got, stats.t.ppf(1 - alpha / 2, n - 1), rtol=1e-12)


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_what_is_refused():
    half = np.array([0.5, 0.5])
    with pytest.raises(ValueError, match="smallest 4, budget 2, largest 128"):
        allocation.knapsack_allocation(half, budget=2, smallest=4)
    with pytest.raises(ValueError, match=r"numbers in \[0, 1\] \(NaN: unknown\), got \[-1"):
        allocation.knapsack_allocation(np.array([-1.0, 0.5]), budget=8)
    with pytest.raises(ValueError, match="between 0 and 1, got 1.0"):
        allocation.knapsack_allocation(np.array([0.5, 0.0]), budget=8, fallback=1.0)
    with pytest.raises(ValueError, match="1 unknown rates"):
        allocation.contrast_allocation(np.array([0.5, np.nan]), total=8)
    with pytest.raises(ValueError, match="total 3 for 2 prompts"):
        allocation.contrast_allocation(half, total=3)
    with pytest.raises(ValueError, match="two rewards or more, got alpha 0.05 and counts from 1"):
        allocation.exploration_allocation(half, np.array([1, 4]), budget=2)
    with pytest.raises(ValueError, match="one spread and one count per prompt"):
        allocation.exploration_allocation(half, np.array([4]), budget=2)
