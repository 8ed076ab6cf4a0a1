"""P-GRPO: the score of the reasoning is added only where the outcome is right."""

from __future__ import annotations

import jax.numpy as jnp

from grpo_jax.advantages.gates import posterior_process
from grpo_jax.methods.grpo import grpo
from grpo_jax.types import Method


def posterior_grpo(
    *,
    prompts: int,
    group_size: int,
    form: str = "form",
    outcome: str = "outcome",
    process: str = "process",
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    **options,
) -> Method:
    """R = form + outcome + outcome * process. A truncated completion has no form and no outcome.

    A group that is all right is compared by its reasoning alone, at full size whatever the spread of `process`: raise
    `epsilon` towards the noise of that score if it is small.

    form, outcome, process: names of reward channels, of 0 or 1, of 0 or 1, and in [0, 1] (None where the outcome is
    wrong saves the call of a judge). Their weights (1 each in the paper) are those of the configuration.
    Source: arXiv:2508.05170. Clip-higher, token mean and no KL are a third party's reading of it, and the mapping of
    the judge's score to [0, 1] is left to the reward function.
    """

    def reward(batch, arrays, key):
        said = {name: batch.scores[:, k] for k, name in enumerate(batch.channels)}
        if missing := [name for name in (form, outcome, process) if name not in said]:
            raise ValueError(
                f"posterior_grpo reads the reward channel {missing[0]!r}, but the rewards have {list(said)}"
            )
        kept = {name: jnp.where(batch.finished | jnp.isnan(said[name]), said[name], 0) for name in (form, outcome)}
        kept[process] = posterior_process(said[process], kept[outcome])
        return jnp.stack([kept.get(name, score) for name, score in said.items()], axis=1)

    method = grpo(prompts=prompts, group_size=group_size, clip_low=clip_low, clip_high=clip_high, **options)
    return method.replace(reward=reward)
