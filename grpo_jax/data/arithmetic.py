"""Additions: a task made from a seed, whose answers can be checked, for first runs and tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np


def addition(
    *, largest: int = 99, largest_sum: int = 99, held_out: int = 512, seed: int = 0
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """All problems "a+b=" with 0 <= a, b <= largest and a + b <= largest_sum, split into training and held-out ones.

    The split and both orders are functions of `seed`. a+b and b+a fall on the same side, so that no held-out problem
    is a training problem the other way round (and `held_out` may come out one short where only pairs are left).
    Returns: (train, held_out), rows with columns "prompt" ("23+45=") and "answer" ("68").
    Raises: ValueError if no training problem would be left.
    """
    pairs = [(a, b) for a in range(largest + 1) for b in range(a, largest + 1) if a + b <= largest_sum]
    total = sum(1 + (a != b) for a, b in pairs)
    if not 0 <= held_out < total:
        raise ValueError(
            f"held_out={held_out} of {total} problems (largest={largest}, largest_sum={largest_sum}): "
            f"expected 0 to {total - 1}"
        )
    rng = np.random.default_rng(seed)
    train: list[tuple[int, int]] = []
    test: list[tuple[int, int]] = []
    for i in rng.permutation(len(pairs)):
        a, b = pairs[i]
        both = [(a, b)] if a == b else [(a, b), (b, a)]
        (test if len(test) + len(both) <= held_out else train).extend(both)

    def rows(problems: list[tuple[int, int]]) -> list[dict[str, str]]:
        shuffled = (problems[i] for i in rng.permutation(len(problems)))
        return [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in shuffled]

    return rows(train), rows(test)


def demonstrations(problems: Sequence[Mapping[str, str]], *, noise: float, seed: int) -> list[dict[str, str]]:
    """Unreliable answers to learn from: each digit is replaced, with probability `noise`, by one of the ten at random.

    For noise < 1 the right digit stays the likeliest, so the best answer of a model trained on them is right while
    most of its samples are not: p(all right) = (1 - 0.9 noise)^digits.
    Returns: rows with columns "prompt" and "completion", one per problem.
    Raises: ValueError if `noise` is not in [0, 1].
    """
    if not 0 <= noise <= 1:
        raise ValueError(f"noise is a probability, expected 0 to 1, got {noise}")
    rng = np.random.default_rng(seed)
    rows = []
    for problem in problems:
        answer = problem["answer"]
        slip, digits = rng.random(len(answer)) < noise, rng.integers(10, size=len(answer))
        completion = "".join(str(digit) if s else right for right, s, digit in zip(answer, slip, digits))
        rows.append({"prompt": problem["prompt"], "completion": completion})
    return rows
