"""Resume scoring: plain GRPO on a reward of four named parts with fixed weights."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp

from grpo_jax.methods.grpo import grpo
from grpo_jax.types import Method

WEIGHTS = {"decision": 0.4, "score": 0.2, "skills": 0.2, "experience": 0.2}


def resume_reward(
    *,
    prompts: int,
    group_size: int,
    weights: Mapping[str, float] = WEIGHTS,
    kl: float = 0.1,
    epsilon: float = 1e-4,
    **options,
) -> Method:
    """r = sum_k w_k s_k / sum_k w_k over the named parts, which are reward channels (leave their configured weights
    at 1, which would multiply on top); further channels stay as they are.

    What is the paper's own is the reward: the parts, for which `configs/tasks/resumes.py` has its mild table of
    penalties and its harsher one, and these weights. The paper's group_size is 2, where only the order of the two
    rewards matters. kl: to the model at the start, after its supervised training.
    Raises: ValueError for weights that are negative or all 0, and at the first batch for a part that no channel is.
    Source: arXiv:2511.16073, and its notebook.
    """
    total = sum(weights.values())
    if min(weights.values(), default=0) < 0 or total <= 0:
        raise ValueError(f"the parts have weights that are not negative, and not all 0, got {dict(weights)}")

    def reward(batch, arrays, key):
        if missing := sorted(set(weights) - set(batch.channels)):
            raise ValueError(
                f"resume_reward weighs the parts {list(weights)}, and no reward function gives {missing[0]!r}; the "
                f"channels are {list(batch.channels)}"
            )
        share = [weights[name] / total if name in weights else 1.0 for name in batch.channels]
        return batch.scores * jnp.asarray(share, jnp.float32)

    return grpo(prompts=prompts, group_size=group_size, kl=kl, epsilon=epsilon, **options).replace(reward=reward)
