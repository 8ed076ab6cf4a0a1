"""Length rewards and budgets: numbers worked by hand, float64 loops on ragged batches, gradients, invariances."""

import math

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax import segments
from grpo_jax.advantages.group import group_z_score
from grpo_jax.advantages.lengths import (
    band_length,
    brevity,
    budget_at,
    exponential_budgets,
    format_length,
    peaked_length,
    spaced_budgets,
    triangular_length,
)

LENGTHS = np.array([50, 100, 150, 250, 0, 80])


@pytest.fixture(params=[0, 1])
def ragged(request):
    """Groups of several sizes in any order, rows in none, a group of equal lengths, one with nothing right, verdicts
    that are missing."""
    draw = np.random.default_rng(request.param)
    groups = draw.integers(-1, 7, 40)
    lengths = draw.integers(0, 60, 40)
    lengths[groups == 2] = 17
    correct = (draw.random(40) < 0.6).astype(float)
    correct[groups == 3] = 0
    correct[groups == 4] = 1
    correct[draw.random(40) < 0.1] = np.nan
    return {"correct": correct, "lengths": lengths, "group_ids": groups}


# ---- format and length ---------------------------------------------------------------------------------------------


def test_format_length_worked_example():
    lengths, formed = np.array([0, 250, 500, 750, 1000, 1000]), np.array([1, 1, 1, 1, 1, 0.0])
    y = peaked_length(lengths, maximum=1000)
    np.testing.assert_allclose(y, [0, 0.75, 1, 0.5, -1, -1], atol=1e-6)
    reward = format_length(lengths, formed, jnp.zeros(6), maximum=1000)
    np.testing.assert_allclose(reward, [0.5, 1.25, 1.5, 1, -0.5, -1], atol=1e-6)
    expected = [0.041451, 0.787575, 1.036282, 0.538867, -0.953380, -1.450795]
    np.testing.assert_allclose(group_z_score(reward, jnp.zeros(6, jnp.int32)), expected, atol=2e-6)
    np.testing.assert_allclose(format_length(jnp.array([250]), jnp.zeros(1), jnp.ones(1), maximum=1000), [0])
    at = peaked_length(jnp.array([384, 768, 1536, 2304, 3072, 4000]), maximum=3072)
    np.testing.assert_allclose(at, [0.4375, 0.75, 1, 0.5, -1, -1], atol=1e-6)


def peaked_oracle(length, maximum, p):
    x = min(length / maximum, 1.0)
    return 1 - (1 - x / p) ** 2 if x <= p else 1 - 2 * ((x - p) / (1 - p)) ** 2


def format_oracle(length, formed, thinking, maximum, p):
    y = peaked_oracle(length, maximum, p)
    return 0.5 * (thinking + formed) + y if formed == 1 else min(0.0, y)


@pytest.mark.parametrize("peak", [0.3, 0.9])
def test_format_length_against_float64(peak):
    draw = np.random.default_rng(0)
    lengths = draw.integers(0, 120, 60)  # some beyond the maximum
    formed, thinking = draw.integers(0, 2, 60).astype(float), draw.integers(0, 2, 60).astype(float)
    expected = [peaked_oracle(n, 100, peak) for n in lengths]
    np.testing.assert_allclose(peaked_length(lengths, maximum=100, peak=peak), expected, rtol=1e-5, atol=2e-6)
    got = laws.rows(
        jax.jit(lambda **arrays: format_length(**arrays, maximum=100, peak=peak)),
        {"lengths": lengths, "formed": formed, "thinking": thinking},
        ids=(),
    )
    expected = [format_oracle(*row, 100, peak) for row in zip(lengths, formed, thinking)]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=2e-6)


def test_format_length_without_a_verdict():
    nan = jnp.nan
    got = format_length(jnp.full(3, 50), jnp.array([nan, 1, 0]), jnp.array([0, nan, 0]), maximum=100)
    np.testing.assert_array_equal(got, [nan, nan, 0])


@pytest.mark.parametrize("function", ["peaked", "triangular", "band"])
def test_gradients_by_the_length(function):
    """Lengths may be relaxed to real numbers; away from the corners the slope is that of the formula."""
    lengths = np.array([3.0, 31.0, 49.0, 77.0, 99.0, 130.0, 180.0, 260.0])
    budgets = np.full(8, 80.0)
    ours, oracle = {
        "peaked": (lambda x: peaked_length(x, maximum=100), lambda x: peaked_oracle(x, 100, 0.5)),
        "triangular": (lambda x: triangular_length(x, budgets), lambda x: triangle_oracle(x, 80)),
        "band": (lambda x: band_length(x, budgets), lambda x: band_oracle(x, 80)),
    }[function]
    slope = [(oracle(x + 1e-6) - oracle(x - 1e-6)) / 2e-6 for x in lengths]
    got = jax.grad(lambda x: ours(x).sum())(jnp.float32(lengths))
    np.testing.assert_allclose(got, slope, rtol=1e-4, atol=1e-6)
    assert np.abs(slope).max() > 1e-3


@given(st.integers(1, 10_000), st.floats(0.05, 0.95), st.integers(0, 12_000))
@settings(deadline=None, max_examples=15)
def test_peaked_length_is_highest_at_its_peak(maximum, peak, length):
    y = float(peaked_length(jnp.array([length]), maximum=maximum, peak=peak)[0])
    assert -1 - 1e-5 <= y <= 1 + 1e-6
    assert (y > 1 - 1e-6) or abs(length / maximum - peak) > 1e-4


@pytest.mark.parametrize("options", [{"peak": 0.0}, {"peak": 1.0}, {"peak": 0.5, "maximum": 0}])
def test_peaked_length_refuses(options):
    with pytest.raises(ValueError, match="needs 0 < peak < 1 and maximum > 0, got peak"):
        peaked_length(jnp.ones(3), **{"maximum": 10, **options})


def test_rows_of_different_numbers_are_refused():
    with pytest.raises(ValueError, match=r"format_length needs one value per row .* 'formed': \[2\]"):
        format_length(jnp.ones(3), jnp.ones(2), jnp.ones(3), maximum=9)
    with pytest.raises(ValueError, match=r"a length reward needs one value per row .* 'budgets': \[2\]"):
        band_length(jnp.ones(3), jnp.ones(2))


# ---- against a budget ----------------------------------------------------------------------------------------------


def triangle_oracle(length, budget, most=1.0):
    if budget <= 0:
        return 0.0
    if length <= budget:
        return most * length / budget
    return most * (1 - (length - budget) / budget) if length <= 2 * budget else 0.0


def band_oracle(length, budget):
    return float(budget > 0) if length <= budget else triangle_oracle(length, budget)


def test_budgeted_lengths_worked_example():
    """The whole reward: 0.3 correct + 0.6 length + 0.1 form, normalised with epsilon inside the root."""
    triangle = triangular_length(LENGTHS, 100)
    np.testing.assert_allclose(triangle, [0.5, 1, 0.5, 0, 0, 0.8], atol=1e-6)
    np.testing.assert_allclose(band_length(LENGTHS, 100), [1, 1, 0.5, 0, 1, 1], atol=1e-6)
    correct, thinking, answered = np.array([[1, 1, 0, 1, 0, 0], [1, 1, 1, 0, 1, 1], [1, 1, 1, 0, 0, 1]])
    reward = 0.3 * correct + 0.6 * triangle + 0.1 * (0.5 * thinking + 0.5 * answered)
    np.testing.assert_allclose(reward, [0.7, 1, 0.4, 0.3, 0.05, 0.58], atol=1e-6)
    score = segments.z_score(reward, jnp.zeros(6, jnp.int32), ddof=0, epsilon=1e-8, inside_root=True)
    np.testing.assert_allclose(score, [0.644797, 1.636792, -0.347198, -0.677863, -1.504526, 0.247999], atol=2e-6)


@pytest.mark.parametrize(("function", "oracle"), [(triangular_length, triangle_oracle), (band_length, band_oracle)])
def test_budgeted_lengths_against_float64(function, oracle):
    """Rows may have different budgets; 0 is none. A budget of NaN, as padding may have, does no harm."""
    draw = np.random.default_rng(1)
    arrays = {"lengths": draw.integers(0, 90, 50), "budgets": draw.integers(0, 50, 50).astype(float)}
    arrays["budgets"][:3] = [0, -2, 0]
    got = laws.rows(jax.jit(function), arrays, ids=(), half=None)
    np.testing.assert_allclose(got, [oracle(*row) for row in zip(*arrays.values())], rtol=1e-5, atol=1e-6)
    assert float(function(jnp.array([5]), jnp.array([jnp.nan]))[0]) == 0


# ---- budgets by step -----------------------------------------------------------------------------------------------


def test_budgets_worked_example():
    budgets = exponential_budgets(first=256, factor=0.7)
    assert budgets[:4] == (256, 179, 125, 87) and budgets[-1] == 1 and budgets[-2] > 1
    at = {0: 256, 149: 256, 150: 179, 299: 179, 300: 125, 450: 87, 5000: 1}
    assert {t: int(budget_at(t, budgets, interval=150)) for t in at} == at


def test_budgets_between_two_ends():
    assert spaced_budgets(first=256, last=87, drops=3) == (256, 178, 124, 87)
    assert spaced_budgets(first=256, last=88, drops=3, linear=True) == (256, 200, 144, 88)
    assert spaced_budgets(first=12, last=12, drops=1) == (12, 12)
    steps = [int(budget_at(t, (12, 8, 5), interval=10 / 3)) for t in range(8)]
    assert steps == [12, 12, 12, 12, 8, 8, 8, 5]


def test_budgets_are_rounded_down_but_not_for_the_rounding_of_floats():
    assert 100 * 0.29 < 29 and exponential_budgets(first=100, factor=0.29)[:2] == (100, 29)
    assert spaced_budgets(first=1000, last=1, drops=3)[1] == 100  # 1000 * 0.001^(1/3) is 99.99999999999999


def test_budget_of_a_traced_step():
    steps = jnp.arange(70)
    got = jax.jit(jax.vmap(lambda t: budget_at(t, exponential_budgets(first=20, factor=0.5), interval=10)))(steps)
    expected = [max(1, math.floor(20 * 0.5 ** (t // 10))) for t in range(70)]
    np.testing.assert_array_equal(got, expected)


@given(st.integers(1, 5000), st.floats(0.05, 0.99), st.integers(1, 300), st.integers(0, 10**6))
@settings(deadline=None, max_examples=8)
def test_budgets_never_grow(first, factor, interval, step):
    budgets = exponential_budgets(first=first, factor=factor)
    assert budgets[0] == first and budgets[-1] == 1 and list(budgets) == sorted(budgets, reverse=True)
    exact = max(1.0, first * factor ** (step // interval))
    assert exact - 1 - 1e-6 <= int(budget_at(step, budgets, interval=interval)) <= exact + 1e-6


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: exponential_budgets(first=10, factor=1.0), "by a factor between 0 and 1, got first 10, factor 1.0"),
        (lambda: exponential_budgets(first=0, factor=0.5), "from first >= 1"),
        (lambda: spaced_budgets(first=3, last=4, drops=1), "got first 3, last 4, drops 1"),
        (lambda: spaced_budgets(first=3, last=2, drops=0), "in one drop or more"),
        (lambda: budget_at(0, (3, 2), interval=0), r"an interval above 0, got \[3, 2\] and 0"),
        (lambda: budget_at(0, (), interval=5), r"a curriculum has budgets .* got \[\] and 5"),
        (lambda: brevity(jnp.ones(2), jnp.ones(2), jnp.zeros(2, int), alpha=1.5), r"in \[0, 1\]; got 1.5"),
    ],
)
def test_what_is_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


# ---- shorter among the right ---------------------------------------------------------------------------------------


def brevity_oracle(correct, lengths, group_ids, alpha):
    result = np.array(correct, float)
    for i in range(len(result)):
        if group_ids[i] < 0 or correct[i] != 1:
            continue
        right = [lengths[j] for j in range(len(result)) if group_ids[j] == group_ids[i] and correct[j] == 1]
        spread = np.std(right) if np.ptp(right) else 1e-4
        result[i] = 1 - alpha / (1 + np.exp(-(lengths[i] - np.mean(right)) / spread))
    return result


def test_brevity_worked_example():
    groups = jnp.repeat(jnp.arange(2), 4)
    correct = jnp.array([1, 1, 1, 0, 1, 1, 1, 1.0])
    got = brevity(correct, jnp.array([100, 200, 300, 50, 200, 100, 400, 300]), groups, alpha=0.2)
    expected = [0.954579, 0.9, 0.845421, 0, 0.921995, 0.958552, 0.841448, 0.878005]
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_brevity_of_rows():
    """In any order, padded, renumbered, divided over devices."""
    draw = np.random.default_rng(2)
    arrays = {"correct": draw.integers(0, 2, 21).astype(float), "lengths": draw.integers(0, 60, 21)}
    laws.rows(jax.jit(brevity), {**arrays, "group_ids": draw.integers(-1, 4, 21)})


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
def test_brevity_against_float64(ragged, alpha):
    got = np.asarray(brevity(**ragged, alpha=alpha))
    np.testing.assert_allclose(got, brevity_oracle(**ragged, alpha=alpha), rtol=2e-5, atol=2e-6)
    equal = (ragged["group_ids"] == 2) & (ragged["correct"] == 1)
    np.testing.assert_array_equal(got[equal], np.float32(1 - alpha / 2))


def test_brevity_of_lengths_in_other_units(ragged):
    """Neither a shift nor the scale of lengths matters, and lengths of wrong completions never do."""
    base = brevity(**ragged)
    moved = {**ragged, "lengths": 3 * ragged["lengths"] + 1000}
    np.testing.assert_allclose(brevity(**moved), base, atol=1e-5)
    garbage = np.where(ragged["correct"] == 1, ragged["lengths"], np.nan)
    np.testing.assert_array_equal(brevity(**{**ragged, "lengths": garbage}), base)
    right = ragged["correct"] == 1
    assert (np.asarray(base)[right] > 0).all() and not np.asarray(base)[ragged["correct"] == 0].any()


def test_brevity_gradient(ragged):
    pull = np.random.default_rng(2).normal(size=40)
    right = ragged["correct"] == 1
    garbage = np.where(right, ragged["lengths"], np.nan)
    inputs = {k: jnp.asarray(v) for k, v in ragged.items()}

    def ours(lengths):
        return jnp.sum(pull * jnp.nan_to_num(brevity(inputs["correct"], lengths, inputs["group_ids"])))

    def oracle(lengths):
        return np.nansum(pull * brevity_oracle(ragged["correct"], lengths, ragged["group_ids"], 0.6))

    gradient = np.asarray(jax.grad(ours)(jnp.float32(garbage)))
    for i in range(40):
        group = [
            j for j in range(40) if ragged["group_ids"][j] == ragged["group_ids"][i] >= 0 and ragged["correct"][j] == 1
        ]
        if i not in group or len(group) < 2 or np.ptp(ragged["lengths"][group]) == 0:
            assert gradient[i] == 0  # no derivative where the spread is 0
            continue
        up, down = (ragged["lengths"].astype(float) + step * (np.arange(40) == i) for step in (1e-5, -1e-5))
        np.testing.assert_allclose(gradient[i], (oracle(up) - oracle(down)) / 2e-5, rtol=2e-3, atol=1e-5)
