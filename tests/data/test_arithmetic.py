"""The arithmetic task: complete, disjoint, a function of its seed, and as unreliable as it says."""

import numpy as np
import pytest

from grpo_jax.data import addition, demonstrations


def pairs(rows):
    return [tuple(map(int, row["prompt"].removesuffix("=").split("+"))) for row in rows]


@pytest.mark.parametrize(("options", "bound", "total"), [({}, 99, 5050), ({"largest_sum": 198}, 198, 10_000)])
def test_the_problems_are_all_additions_under_the_bound(options, bound, total):
    train, held_out = addition(**options)
    found = pairs(train + held_out)
    assert len(held_out) == 512 and len(found) == len(set(found)) == total
    assert set(found) == {(a, b) for a in range(100) for b in range(100) if a + b <= bound}
    assert all(row["answer"] == str(a + b) for row, (a, b) in zip(train + held_out, found))


def test_no_held_out_problem_is_a_training_problem_the_other_way_round():
    train, held_out = addition(seed=7)
    assert not {frozenset(pair) for pair in pairs(train)} & {frozenset(pair) for pair in pairs(held_out)}


def test_the_split_is_a_function_of_the_seed():
    assert addition(seed=1) == addition(seed=1)
    assert {row["prompt"] for row in addition(seed=1)[1]} != {row["prompt"] for row in addition(seed=2)[1]}


@pytest.mark.parametrize("held_out", [0, 1, 2, 3, 50, 80])
def test_small_tasks_and_exact_sizes(held_out):
    train, test = addition(largest=10, largest_sum=20, held_out=held_out)
    assert (len(train), len(test)) == (121 - held_out, held_out)


def test_sizes_that_leave_nothing_to_train_on():
    with pytest.raises(ValueError, match="held_out=121 of 121 problems .*expected 0 to 120"):
        addition(largest=10, largest_sum=20, held_out=121)


def test_noise_replaces_digits_at_its_rate_and_keeps_the_right_one_likeliest():
    problems = addition(largest_sum=198)[0]
    noisy = demonstrations(problems, noise=0.5, seed=0)
    assert [row["prompt"] for row in noisy] == [row["prompt"] for row in problems]
    given = np.array([int(d) for row in noisy for d in row["completion"]])
    right = np.array([int(d) for row in problems for d in row["answer"]])
    assert len(given) == len(right)  # digits are replaced, never added or lost
    wrong = given != right
    rate, n = 0.5 * 0.9, len(right)  # one of the ten random digits is the right one
    assert abs(wrong.mean() - rate) < 4 * np.sqrt(rate * (1 - rate) / n)
    offsets = np.bincount((given - right)[wrong] % 10, minlength=10)[1:]
    from scipy.stats import chisquare

    assert chisquare(offsets).pvalue > 1e-3


def test_noise_free_and_pure_noise():
    problems = addition()[0][:200]
    assert [r["completion"] for r in demonstrations(problems, noise=0, seed=0)] == [r["answer"] for r in problems]
    assert demonstrations(problems, noise=1, seed=0) == demonstrations(problems, noise=1, seed=0)
    assert demonstrations(problems, noise=1, seed=0) != demonstrations(problems, noise=1, seed=1)
    with pytest.raises(ValueError, match="expected 0 to 1, got 1.5"):
        demonstrations(problems, noise=1.5, seed=0)
