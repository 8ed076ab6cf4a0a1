"""Several processes as one run: joining, agreeing, arrays that lie on all of their devices, and stopping together.

A run of one process needs none of this, and every function here does nothing in it, or what it says for one.
"""

from grpo_jax.processes.arrays import fetch, gather, place
from grpo_jax.processes.group import Disagreement, agree, count, exchange, index, name, run_by_first, settle, together
from grpo_jax.processes.joining import join

__all__ = [
    "Disagreement",
    "agree",
    "count",
    "exchange",
    "fetch",
    "gather",
    "index",
    "join",
    "name",
    "place",
    "run_by_first",
    "settle",
    "together",
]
