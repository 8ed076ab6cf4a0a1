"""FGRPO: reasoning qualities as constraints, each with a multiplier that rises while the batch is below its target."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from grpo_jax import advantages
from grpo_jax.advantages.constraints import constrained, dual_init, dual_update
from grpo_jax.methods.grpo import grpo, weights_of
from grpo_jax.types import Method, State


def fgrpo(
    *,
    prompts: int,
    group_size: int,
    targets: Mapping[str, float] | None = None,
    eta: float = 0.05,
    cap: float = 5.0,
    constraint_norm: str = "group",
    rescale: bool = False,
    epsilon: float = 1e-4,
    **options,
) -> Method:
    """A = z(task) + sum_k lambda_k z(quality k), each compared alone within the prompt; after each batch
    lambda_k <- clip(lambda_k + eta (target_k - mean of quality k), 0, cap), for the next one.

    targets: the reward channels that are qualities, with the mean that each must reach; the other channels, added up,
    are the task. A quality in [0, 1] of malformed output is to be 0, and missing (None) without a verdict.
    Reconstructed from the paper's abstract, and so are all numbers.
    Raises: ValueError for a group of one, or (with the batch) a target for no channel or for all of them.
    Source: arXiv:2604.08476.
    """
    if group_size < 2:
        raise ValueError(f"fgrpo compares completions of a prompt: group_size must be at least 2, got {group_size}")
    targets = dict(targets or {})

    def advantage(batch, arrays, key):
        rewards, signals = divided(batch, targets)
        form = {"constraint_norm": constraint_norm, "rescale": rescale, "epsilon": epsilon}
        values = constrained(rewards, signals, batch.group_ids, arrays["duals"], **form)
        step = {"targets": list(targets.values()), "eta": eta, "cap": cap}
        duals = dual_update(arrays["duals"], signals, batch.group_ids, **step)
        return batch.replace(advantages=advantages.per_decision(values, batch.completion_mask)), {"duals": duals}

    plain = grpo(prompts=prompts, group_size=group_size, **options)

    def objective(new, batch, arrays):
        loss, reported = plain.objective(new, batch, arrays)
        duals = {f"next_dual_{name}": jnp.broadcast_to(x, new.logps.shape) for name, x in zip(targets, arrays["duals"])}
        return loss, {**reported, **duals}

    def init(pool):
        return State(0, {"duals": dual_init(len(targets))}, {})

    return plain.replace(init=init, advantage=advantage, objective=objective)


def divided(batch, targets):
    """The task's reward [N] and the qualities [N, K], in the order of the targets."""
    task = [k for k, name in enumerate(batch.channels) if name not in targets]
    if not targets or not task or len(task) + len(targets) > len(batch.channels):
        raise ValueError(
            f"fgrpo's targets name some of the reward channels {list(batch.channels)}, like {{consistent: 0.9}}, and "
            f"leave at least one as the task; got targets for {list(targets)}"
        )
    weights = weights_of(batch)
    qualities = [batch.channels.index(name) for name in targets]
    rewards = advantages.combine(batch.rewards[:, np.array(task)], [weights[k] for k in task])
    return rewards, batch.rewards[:, np.array(qualities)]
