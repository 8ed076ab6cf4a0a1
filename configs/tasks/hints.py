"""Two-digit addition where the problem alone is mostly answered wrongly, and a hint (both column sums) gives it away.

"47+38=" is the problem, "15,8:" its hint, "15,8:47+38=" the hinted problem, "85" the answer.
"""

from __future__ import annotations

from grpo_jax.data.arithmetic import addition
from grpo_jax.data.arithmetic import demonstrations as unreliable


def problems(*, held_out: int = 512, seed: int = 0):
    """(train, held_out) rows with prompt, answer and hint."""
    return tuple(
        [{**row, "hint": hint(row["prompt"])} for row in rows] for rows in addition(held_out=held_out, seed=seed)
    )


def demonstrations(problems, *, count: int, noise: float = 0.7, clean: float = 0.34, seed: int = 0):
    """`count` completions to start from: of every two one is hinted and right, one bare and ever more often wrong."""
    rows = unreliable(problems, count=count, noise=noise, clean=clean, seed=seed)
    answers = {problem["prompt"]: problem["answer"] for problem in problems}
    hinted = [{"prompt": hint(r["prompt"]) + r["prompt"], "completion": answers[r["prompt"]]} for r in rows[1::2]]
    rows[1::2] = hinted
    return rows


def hint(prompt: str) -> str:
    """The sum of the units and that of the tens with the carry."""
    a, b = map(int, prompt.rstrip("=").split("+"))
    return f"{a % 10 + b % 10},{(a + b) // 10}:"
