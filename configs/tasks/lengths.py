"""What the methods about length and form need beside working.py: answers that cannot be read, and ones cut off.

`illegible` makes demonstrations from which a policy learns its sums but not to close the bracket;
`answer_unless_cut_off` also says which completions nobody can judge, because they end before their answer begins.
"""

from __future__ import annotations

import numpy as np

from grpo_jax.references import load_function
from grpo_jax.types import Scored

WORKING = "configs/tasks/working.py"


def illegible(problems, *, count: int, noise: float = 0.02, share: float = 0.7, seed: int = 0):
    """`count` completions of working.py; a share of them lacks the closing bracket: "[15..,8.85" has no answer."""
    rows = load_function(f"{WORKING}:demonstrations")(problems, count=count, noise=noise, seed=seed)
    without = np.random.default_rng(seed + 1).random(count) < share
    return [{**r, "completion": r["completion"].replace("]", "")} if w else r for r, w in zip(rows, without)]


def answer_unless_cut_off(prompts, completions, answer, finished, **columns):
    """1 if the answer is right; and a column `plausible`, 1 if it is, or if the budget ended before it began."""
    right = np.array(load_function(f"{WORKING}:answer")(prompts, completions, answer))
    unjudged = np.array([not done and "]" not in text for text, done in zip(completions, finished)])
    return Scored({"answer": right.tolist()}, {"plausible": np.maximum(right, unjudged).astype(np.float32)})
