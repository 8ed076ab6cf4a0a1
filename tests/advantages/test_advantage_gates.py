"""Gated rewards: numbers worked by hand, float64 loops on ragged batches, gradients, invariances."""

import math

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.advantages.gates import posterior_reward, serial_decay, top_groups
from grpo_jax.advantages.group import group_centered, group_z_score
from grpo_jax.advantages.lengths import brevity

ONE_GROUP = jnp.zeros(6, jnp.int32)


# ---- reasoning that is paid only where the outcome is right --------------------------------------------------------

FORM, OUTCOME = np.array([1, 1, 1, 0, 1, 0.0]), np.array([1, 1, 0, 0, 0, 0.0])
PROCESS = np.array([0.9, 0.4, 0.95, 0.8, 0.1, 0.3])


def test_posterior_worked_example():
    reward = posterior_reward(FORM, OUTCOME, PROCESS)
    np.testing.assert_allclose(reward, [2.9, 2.4, 1, 0, 1, 0], atol=1e-6)
    expected = [1.394250, 0.980116, -0.179458, -1.007725, -0.179458, -1.007725]
    np.testing.assert_allclose(group_z_score(reward, ONE_GROUP), expected, atol=2e-6)
    ungated = posterior_reward(FORM, OUTCOME, PROCESS, jnp.ones(6))
    np.testing.assert_allclose(ungated, [2.9, 2.4, 1.95, 0.8, 1.1, 0.3], atol=1e-6)
    expected = [1.321206, 0.822637, 0.373926, -0.772781, -0.473640, -1.271349]
    np.testing.assert_allclose(group_z_score(ungated, ONE_GROUP), expected, atol=2e-6)


def test_posterior_revives_groups_that_are_all_right():
    reward = posterior_reward(jnp.ones(4), jnp.ones(4), jnp.array([0.9, 0.4, 0.65, 0.65]))
    got = group_z_score(reward, jnp.zeros(4, jnp.int32))
    np.testing.assert_allclose(got, [1.224739, -1.224739, 0, 0], atol=2e-6)


def posterior_oracle(form, outcome, process, gate):
    return [f + o + (g * p if g != 0 else 0.0) for f, o, p, g in zip(form, outcome, process, gate)]


@pytest.mark.parametrize("soft", [False, True])
def test_posterior_against_float64(soft):
    draw = np.random.default_rng(0)
    arrays = {name: draw.integers(0, 2, 30).astype(float) for name in ("form", "outcome")}
    arrays["process"] = draw.random(30)
    if soft:
        arrays["gate"] = draw.integers(0, 4, 30) / 4
    got = laws.rows(jax.jit(posterior_reward), arrays, ids=())
    expected = posterior_oracle(**{"gate": arrays["outcome"], **arrays})
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_posterior_does_not_see_reasoning_behind_a_shut_gate():
    """Nobody needs to score it: NaN and infinities there change neither value nor gradient."""
    garbage = np.where(OUTCOME == 1, PROCESS, [np.nan, 0, np.nan, np.inf, -np.inf, np.nan])
    np.testing.assert_array_equal(posterior_reward(FORM, OUTCOME, garbage), posterior_reward(FORM, OUTCOME, PROCESS))
    pull = jnp.arange(1.0, 7.0)
    for place, expected in ((0, pull), (2, pull * OUTCOME)):
        arguments = [jnp.float32(x) for x in (FORM, OUTCOME, garbage)]
        gradient = jax.grad(lambda *a: jnp.sum(pull * posterior_reward(*a)), argnums=place)(*arguments)
        np.testing.assert_allclose(gradient, expected)
    soft = jnp.array([0.5, 0, 1, 0, 0.25, 0])
    safe = jnp.where(soft == 0, jnp.nan, PROCESS)
    gradient = jax.grad(lambda g: jnp.sum(pull * posterior_reward(FORM, OUTCOME, safe, g)))(soft)
    np.testing.assert_allclose(gradient, pull * np.where(soft == 0, 0, PROCESS), rtol=1e-6)


def test_posterior_without_a_score_where_one_is_needed():
    got = posterior_reward(jnp.ones(3), jnp.array([1, 0, jnp.nan]), jnp.full(3, jnp.nan))
    np.testing.assert_array_equal(got, [jnp.nan, 1, jnp.nan])


# ---- the best groups of a batch ------------------------------------------------------------------------------------

CORRECT = np.array([1, 1, 1, 0, 1, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1.0])
LENGTHS = np.array([100, 200, 300, 50, 400, 400, 500, 90, 120, 80, 60, 60, 10, 20, 30, 40, 200, 100, 400, 300])
FIVE = np.repeat(np.arange(5), 4)


def test_gate_worked_example():
    top = top_groups(CORRECT, FIVE, fraction=0.4)
    np.testing.assert_array_equal(top, np.isin(FIVE, [0, 4]))
    reward = jnp.where(top, brevity(CORRECT, LENGTHS, FIVE, alpha=0.2), CORRECT)
    got = group_z_score(reward, FIVE)
    expected = [0.618262, 0.497565, 0.376868, -1.492695, 1.499997, -0.499999, -0.499999, -0.499999]
    expected += [0.866024, 0.866024, -0.866024, -0.866024] + [0] * 4
    expected += [0.430686, 1.146495, -1.146495, -0.430686]
    np.testing.assert_allclose(got, expected, atol=3e-6)


def top_oracle(values, group_ids, fraction):
    groups = []  # in the order of their first row with a value
    for i in range(len(values)):
        if group_ids[i] >= 0 and not np.isnan(values[i]) and group_ids[i] not in groups:
            groups.append(group_ids[i])
    mean = {g: np.nanmean([values[i] for i in range(len(values)) if group_ids[i] == g]) for g in groups}
    count = math.ceil(round(fraction * len(groups), 9))
    chosen = sorted(groups, key=lambda g: -mean[g])[:count]
    return np.isin(group_ids, chosen)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("fraction", [0.0, 0.2, 0.5, 1.0])
def test_top_groups_against_loops(seed, fraction):
    """Ragged, with ties, missing verdicts, and a group that has none."""
    draw = np.random.default_rng(seed)
    groups = draw.integers(-1, 9, 45)
    values = draw.integers(0, 2, 45).astype(float)
    values[draw.random(45) < 0.2] = np.nan
    values[groups == 4] = np.nan
    got = top_groups(values, groups, fraction=fraction)
    np.testing.assert_array_equal(got, top_oracle(values, groups, fraction))
    assert bool(got.any()) == (fraction > 0) and not np.asarray(got)[groups < 0].any()


def test_top_groups_of_rows():
    draw = np.random.default_rng(0)
    groups = draw.integers(-1, 6, 45)
    distinct = {"values": draw.normal(size=45), "group_ids": groups}
    laws.rows(jax.jit(top_groups), distinct, half=None)
    tied = draw.integers(0, 2, 45).astype(float)  # ids are names: of equal groups the first in the batch is taken
    renamed = np.where(groups < 0, -1, 20 - groups)
    np.testing.assert_array_equal(top_groups(tied, groups), top_groups(tied, renamed))


@given(st.integers(1, 45), st.integers(0, 45), st.integers(0, 2**30))
@settings(deadline=None, max_examples=10)
def test_as_many_groups_as_asked_and_none_better_is_left_out(number, chosen, seed):
    chosen = min(chosen, number)
    draw = np.random.default_rng(seed)
    values = np.pad(draw.integers(0, 4, number).astype(float), (0, 45 - number))
    groups = np.pad(np.arange(number), (0, 45 - number), constant_values=-1)
    top = np.asarray(top_groups(values, groups, fraction=chosen / number))
    assert top.sum() == chosen  # whatever the rounding of chosen / number * number
    if 0 < chosen < number:
        assert values[:number][~top[:number]].max() <= values[:number][top[:number]].min()


def test_top_groups_counts_in_decimal():
    """28 per cent of 25 groups are 7, although 0.28 * 25 is a little more in floating point."""
    assert math.ceil(0.28 * 25) == 8
    groups = np.pad(np.arange(25), (0, 20), constant_values=-1)
    assert np.asarray(top_groups(np.arange(45.0), groups, fraction=0.28)).sum() == 7


# ---- answers at successive exits -----------------------------------------------------------------------------------


def test_serial_worked_example():
    correct, group = jnp.array([0, 1, 1, 0, 1.0]), jnp.zeros(5, jnp.int32)
    reward = serial_decay(correct, jnp.arange(5.0), group)
    np.testing.assert_array_equal(reward, [0, 1, 0.5, 0, 0.25])
    advantage = group_centered(reward, group)
    np.testing.assert_allclose(advantage, [-0.35, 0.65, 0.15, -0.35, -0.1], atol=1e-6)
    ratio = [[1.1, 0.9], [1.3, 1.0, 0.7], [1.0], [0.75, 1.05], [1.0, 1.4]]
    means = [
        np.mean([min(r * a, np.clip(r, 0.8, 1.2) * a) for r in rho]) for a, rho in zip(np.asarray(advantage), ratio)
    ]
    np.testing.assert_allclose(means, [-0.35, 0.628333, 0.15, -0.32375, -0.12], atol=1e-6)
    assert np.mean(means) == pytest.approx(-0.003083, abs=1e-6)


def serial_oracle(correct, order, group_ids, base):
    result = np.zeros(len(correct))
    for i in range(len(correct)):
        if group_ids[i] < 0 or np.isnan(correct[i]):
            result[i] = np.nan if group_ids[i] >= 0 else 0
            continue
        earlier = [
            j
            for j in range(len(correct))
            if group_ids[j] == group_ids[i] and correct[j] == 1 and (order[j], j) < (order[i], i)
        ]
        result[i] = correct[i] * base ** -len(earlier)
    return result


@pytest.mark.parametrize("base", [1.0, 2.0, 3.5])
def test_serial_against_float64(base):
    """Chains of different numbers of exits, in any order of rows, some at the same place, some without a verdict."""
    draw = np.random.default_rng(0)
    arrays = {
        "correct": draw.integers(0, 2, 40).astype(float),
        "order": draw.integers(0, 12, 40),
        "group_ids": draw.integers(-1, 6, 40),
    }
    arrays["correct"][draw.random(40) < 0.1] = np.nan
    got = serial_decay(**arrays, base=base)
    np.testing.assert_allclose(got, serial_oracle(**arrays, base=base), rtol=1e-6)
    assert got.dtype == jnp.float32


def test_serial_of_rows():
    draw = np.random.default_rng(1)
    arrays = {"correct": draw.integers(0, 2, 21).astype(float), "group_ids": draw.integers(-1, 4, 21)}
    laws.rows(jax.jit(serial_decay), {**arrays, "order": draw.permutation(21)})
    garbage = {**arrays, "order": np.where(arrays["correct"] == 1, draw.permutation(21), np.nan)}
    clean = {**garbage, "order": np.nan_to_num(garbage["order"])}
    np.testing.assert_array_equal(serial_decay(**garbage), serial_decay(**clean))


@given(st.lists(st.booleans(), min_size=12, max_size=12))
@settings(deadline=None, max_examples=10)
def test_wrong_answers_cost_the_later_ones_nothing(verdicts):
    """The right answers of a chain earn 1, 1/2, 1/4, ... wherever the wrong ones stand between them."""
    reward = np.asarray(serial_decay(np.array(verdicts, float), np.arange(12), jnp.zeros(12, jnp.int32)))
    np.testing.assert_array_equal(reward[verdicts], 0.5 ** np.arange(sum(verdicts)))
    assert not reward[~np.array(verdicts)].any()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: top_groups(jnp.ones(2), jnp.zeros(2, int), fraction=1.1), r"in \[0, 1\]; got 1.1"),
        (lambda: serial_decay(jnp.ones(2), jnp.ones(2), jnp.zeros(2, int), base=0.5), "base >= 1; got 0.5"),
        (
            lambda: posterior_reward(jnp.ones(2), jnp.ones(3), jnp.ones(2)),
            r"needs .* 'outcome': \[3\]",
        ),
        (lambda: top_groups(jnp.ones((2, 1)), jnp.zeros(2, int)), r"top_groups needs .*'values': \[2, 1\]"),
    ],
)
def test_what_is_refused(call, said):
    with pytest.raises(ValueError, match=said):
        call()
