"""The additions made from a seed: all of them, split without leaks, and demonstrations of a stated reliability."""

from __future__ import annotations

import numpy as np
import pytest

from grpo_jax.data import addition, demonstrations


def operands(row: dict) -> tuple[int, int]:
    a, b = row["prompt"].removesuffix("=").split("+")
    return int(a), int(b)


@pytest.mark.parametrize(("smallest", "largest"), [(10, 99), (0, 9), (3, 20)])
def test_every_problem_is_there_once_and_right(smallest, largest):
    train, held_out = addition(smallest=smallest, largest=largest, held_out=20, seed=3)
    rows = train + held_out
    assert len(held_out) in (19, 20)
    numbers = range(smallest, largest + 1)
    assert sorted(map(operands, rows)) == sorted((a, b) for a in numbers for b in numbers)
    assert all(int(row["answer"]) == sum(operands(row)) for row in rows)


def test_no_held_out_problem_is_a_training_problem_the_other_way_round():
    train, held_out = addition(seed=1)
    seen = {operands(row) for row in train}
    assert len(held_out) in (511, 512) and not any((b, a) in seen for a, b in map(operands, held_out))


def test_the_split_is_a_function_of_the_seed():
    assert addition(seed=5) == addition(seed=5)
    assert addition(seed=5)[1] != addition(seed=6)[1]


def test_demonstrations_grow_unreliable_as_stated():
    train, _ = addition(seed=0)
    answers = {row["prompt"]: row["answer"] for row in train}
    rows = demonstrations(train, count=40_000, noise=0.5, clean=0.25, seed=2)
    assert len(rows) == 40_000 and all(len(r["completion"]) == len(answers[r["prompt"]]) for r in rows)
    right = [np.mean([x == y for x, y in zip(r["completion"], answers[r["prompt"]])]) for r in rows]
    assert min(right[:10_000]) == 1
    for start in range(10_000, 40_000, 10_000):  # a replaced digit is right by chance once in ten
        middle = (start + 5_000 - 10_000) / 30_000
        assert np.mean(right[start : start + 10_000]) == pytest.approx(1 - 0.9 * 0.5 * middle, abs=0.01)


def test_demonstrations_pass_over_the_problems():
    train, _ = addition(largest=12, held_out=3)
    rows = demonstrations(train, count=2 * len(train), noise=0.3, seed=0)
    first, second = rows[: len(train)], rows[len(train) :]
    for part in (first, second):
        assert sorted(r["prompt"] for r in part) == sorted(r["prompt"] for r in train)
    assert [r["prompt"] for r in first] != [r["prompt"] for r in second]
    assert rows == demonstrations(train, count=2 * len(train), noise=0.3, seed=0)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="expected 0 to 8"):
        addition(smallest=10, largest=12, held_out=9)
    train, _ = addition(largest=12, held_out=3)
    for options in ({"noise": 1.5}, {"noise": 0.1, "clean": -1}):
        with pytest.raises(ValueError, match="expected 0 to 1"):
            demonstrations(train, count=4, **options)
    with pytest.raises(ValueError, match="count=0"):
        demonstrations(train, count=0, noise=0.1)
