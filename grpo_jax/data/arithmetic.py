"""Additions: a task made from a seed, whose answers can be checked, for first runs and tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np


def addition(
    *, smallest: int = 10, largest: int = 99, held_out: int = 512, seed: int = 0
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """All problems "a+b=" with smallest <= a, b <= largest, split into training and held-out ones.

    The split and both orders are functions of `seed`. a+b and b+a fall on the same side, so that no held-out problem
    is a training problem the other way round (and `held_out` may come out one short where only pairs are left).
    Returns: (train, held_out), rows with columns "prompt" ("23+45=") and "answer" ("68").
    Raises: ValueError if no training problem would be left.
    """
    pairs = [(a, b) for a in range(smallest, largest + 1) for b in range(a, largest + 1)]
    total = sum(1 + (a != b) for a, b in pairs)
    if not 0 <= held_out < total:
        raise ValueError(
            f"held_out={held_out} of {total} problems (smallest={smallest}, largest={largest}): "
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


def demonstrations(
    problems: Sequence[Mapping[str, str]], *, count: int, noise: float = 0.3, clean: float = 0.25, seed: int = 0
) -> list[dict[str, str]]:
    """A stream of `count` answers to learn from, in order, that grow unreliable: passes over the shuffled problems.

    The first `clean` share is right; from there on the probability that a digit is replaced by one of the ten at random
    rises linearly, to `noise` in the last row. For noise < 1 the right digit stays the likeliest, so the best answer of
    a model trained on them is right while most of its samples are not: p(all right) = (1 - 0.9 noise)^digits.
    Returns: rows with columns "prompt" and "completion".
    Raises: ValueError if `noise` or `clean` is not in [0, 1], or `count` is not positive.
    """
    for name, share in (("noise", noise), ("clean", clean)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name} expected 0 to 1, got {share}")
    if count < 1 or not problems:
        raise ValueError(f"expected at least one row and one problem, got count={count} of {len(problems)} problems")
    rng = np.random.default_rng(seed)
    passes = -(-count // len(problems))
    order = np.concatenate([rng.permutation(len(problems)) for _ in range(passes)])[:count]
    slips = noise * np.clip((np.arange(1, count + 1) / count - clean) / max(1 - clean, 1 / count), 0, 1)
    rows = []
    for place, slip in zip(order.tolist(), slips.tolist()):
        answer = problems[place]["answer"]
        wrong, digits = rng.random(len(answer)) < slip, rng.integers(10, size=len(answer))
        completion = "".join(str(digit) if w else right for right, w, digit in zip(answer, wrong, digits))
        rows.append({"prompt": problems[place]["prompt"], "completion": completion})
    return rows
