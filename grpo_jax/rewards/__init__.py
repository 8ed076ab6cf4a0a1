"""From completions to scores: reward functions, named, checked and kept within a time limit.

A reward function is `def reward(prompts, completions, **columns) -> list[float | None]`. It sees a whole batch, may be
asynchronous, takes those of the columns that its signature names, and may return `Scored` for several channels.
`@in_graph def reward(tokens, lengths, **columns) -> [N]` is one of JAX arrays, for iterations that are one program.
"""

from grpo_jax.rewards.exact import exact_match, numeric_match
from grpo_jax.rewards.format import regex_format, tag_format
from grpo_jax.rewards.length import length_penalty
from grpo_jax.rewards.mathematics import mathematical_equivalence
from grpo_jax.rewards.scoring import RewardError, ScoredBatch, score, score_in_graph
from grpo_jax.rewards.specification import BUILT_IN, STANDARD_COLUMNS, Reward, check, resolve
from grpo_jax.rewards.traced import in_graph, is_in_graph
from grpo_jax.types import Scored

__all__ = [
    "BUILT_IN",
    "STANDARD_COLUMNS",
    "Reward",
    "RewardError",
    "Scored",
    "ScoredBatch",
    "check",
    "exact_match",
    "in_graph",
    "is_in_graph",
    "length_penalty",
    "mathematical_equivalence",
    "numeric_match",
    "regex_format",
    "resolve",
    "score",
    "score_in_graph",
    "tag_format",
]
