"""Addition with shown working: "47+38=" -> "[15..,8.]85". Form, steps, length and answer can each be wrong.

In brackets stand the sum of the units, then that of the tens with the carry, each followed by dots that mean nothing;
then the answer. Rewards: answer, form, working, consistent. Facts as columns: stratum (steps), shown (characters).
"""

from __future__ import annotations

import re

import numpy as np

from grpo_jax.types import Scored

FORM = re.compile(r"^\[([^\[\]]*)\](\d+)$")


def problems(*, smallest: int = 10, largest: int = 99, held_out: int = 256, seed: int = 0):
    """(train, held_out) rows "a+b=" with the answer and both steps, in an order that the seed decides."""
    pairs = [(a, b) for a in range(smallest, largest + 1) for b in range(smallest, largest + 1)]
    order = np.random.default_rng(seed).permutation(len(pairs))
    rows = [
        {"prompt": f"{a}+{b}=", "answer": str(a + b), "steps": f"{a % 10 + b % 10},{(a + b) // 10}"}
        for a, b in (pairs[i] for i in order)
    ]
    return rows[held_out:], rows[:held_out]


def demonstrations(problems, *, count: int, noise: float = 0.2, dots: int = 4, without: float = 0.2, seed: int = 0):
    """`count` completions to start from: up to `dots` dots after each step, digits replaced at random with probability
    `noise`, the working left out (`[]85`) in a share `without`."""
    rng, rows = np.random.default_rng(seed), []
    order = np.concatenate([rng.permutation(len(problems)) for _ in range(-(-count // len(problems)))])[:count]
    for place in order.tolist():
        problem = problems[place]
        steps = [f"{step}{'.' * rng.integers(dots + 1)}" for step in problem["steps"].split(",")]
        text = f"[{'' if rng.random() < without else ','.join(steps)}]{problem['answer']}"
        slip = rng.random(len(text)) < noise
        text = "".join(str(rng.integers(10)) if s and c.isdigit() else c for c, s in zip(text, slip))
        rows.append({"prompt": problem["prompt"], "completion": text})
    return rows


def answer(prompts, completions, answer, **columns):
    """1 if what follows the last bracket is the right sum."""
    return [float(c.rpartition("]")[2] == a) for c, a in zip(completions, answer)]


def form(prompts, completions, **columns):
    """1 for one bracketed working and then digits only."""
    return [float(FORM.match(c) is not None) for c in completions]


def working(prompts, completions, steps, **columns):
    """The share of the two steps that are shown and right."""
    return [sum(a == b for a, b in zip(shown(c), s.split(","))) / 2 for c, s in zip(completions, steps)]


def consistent(prompts, completions, **columns):
    """1 if the answer is what the shown working gives, right or wrong; 0 without working."""

    def follows(completion):
        steps = shown(completion)
        return len(steps) == 2 and completion.rpartition("]")[2] == f"{int(steps[1])}{int(steps[0]) % 10}"

    return [float(follows(c)) for c in completions]


def facts(prompts, completions, **columns):
    """No reward (0 for all), but what rows may be compared by: `stratum`, steps shown; `shown`, their characters."""
    count = [min(len(shown(c)), 2) for c in completions]
    characters = [len(c.partition("]")[0]) for c in completions]
    return Scored({"facts": [0.0] * len(completions)}, {"stratum": np.array(count), "shown": np.array(characters)})


def shown(completion: str) -> list[str]:
    """The numbers of the working, without dots."""
    match = FORM.match(completion)
    return [s for s in (part.strip(".") for part in match[1].split(",")) if s.isdigit()] if match else []
