"""V_0.5: a value model's prediction and the mean of a few completions, joined into one baseline."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grpo_jax import segments
from grpo_jax.advantages.group import _compared


def shrunk_mean(
    rewards: Float[Array, "N"], priors: Float[Array, "N"], group_ids: Int[Array, "N"], *, half_range: float = 1.0
) -> Float[Array, "N"]:
    """Baseline of each row's group: its mean reward, drawn towards the prior unless the two clearly disagree.

    mu = w m + (1 - w) V, m the mean of the group's k rewards, w = D^2 / (D^2 + s^2 / k),
    D^2 = max(0, (m - V)^2 - s^2 / k), s = half_range: the prior is accepted (w = 0) within the sampling noise.

    priors: V on the scale of the rewards, the same for all rows of a group, made without looking at them; NaN = none,
    the plain mean. half_range: half of max - min reward: 1 for {-1, 1}, 0.5 for {0, 1}. 0 for rows outside.
    Source: arXiv:2603.10848; the test of the deviation as the paper's text has it.
    """
    rewards, priors, group_ids, known = _with_prior(rewards, priors, group_ids, half_range)
    mean, prior = segments.mean(rewards, group_ids), jnp.where(known, priors, 0)
    noise = half_range**2 / jnp.maximum(segments.count(group_ids), 1)
    weight = jnp.where(known, _excess(mean - prior, noise), noise)
    weight = weight / (weight + noise)
    return jnp.where(known, weight * mean + (1 - weight) * prior, mean)


def shrinkage(
    rewards: Float[Array, "N"], priors: Float[Array, "N"], group_ids: Int[Array, "N"], *, half_range: float = 1.0
) -> Float[Array, "N"]:
    """Advantage over the shrunk baseline: A = r - mu, mu from `shrunk_mean`; not divided by the group's std.

    A group of equal rewards keeps the signal r - mu, and so does a group of one. 0 for NaN rewards and ids of -1.
    """
    baseline = shrunk_mean(rewards, priors, group_ids, half_range=half_range)
    rewards, group_ids = _compared(rewards, group_ids)
    return jnp.where(group_ids < 0, 0, rewards - baseline)


def another_is_worth_it(
    rewards: Float[Array, "N"],
    priors: Float[Array, "N"],
    group_ids: Int[Array, "N"],
    *,
    cost: float = 1 / 256,
    most: int = 16,
    half_range: float = 1.0,
) -> Bool[Array, "N"]:
    """Whether each row's group should draw one more completion: the next one lowers the baseline's error by > cost.

    k < most and MSE(k) - MSE(k + 1) > cost, MSE(k) = x / (1 + k x), x = D^2 / s^2 as in `shrunk_mean`, held fixed.
    Ask again after each draw. Where the prior is accepted the answer is no; with a useless or no prior it is yes up to
    k = 15. Begin with 4 completions: the test fires at random on one or two. False for rows outside.

    cost: in units of half_range^2. most: the paper's k_max; 1 / most^2 is its cost.
    Source: arXiv:2603.10848; the inequality is reconstructed.
    """
    rewards, priors, group_ids, known = _with_prior(rewards, priors, group_ids, half_range)
    size = segments.count(group_ids)
    k = jnp.maximum(size, 1)
    gap = (segments.mean(rewards, group_ids) - jnp.where(known, priors, 0)) / half_range
    x = jnp.where(known, _excess(gap, 1 / k), 1)
    gain = jnp.where(known, x**2 / ((1 + k * x) * (1 + (k + 1) * x)), 1 / (k * (k + 1)))
    return (size > 0) & (size < most) & (gain > cost)


def _excess(gap: Float[Array, "N"], noise: Float[Array, "N"]) -> Float[Array, "N"]:
    return jnp.maximum(gap**2 - noise, 0)


def _with_prior(
    rewards: Array, priors: Array, group_ids: Array, half_range: float
) -> tuple[Array, Array, Array, Array]:
    """What is compared, and which rows have a prior."""
    if isinstance(half_range, (int, float)) and not half_range > 0:
        raise ValueError(f"half_range is half of the rewards' range and must be above 0, got {half_range}")
    rewards, group_ids = _compared(rewards, group_ids)
    priors = jnp.asarray(priors).astype(jnp.float32)
    if priors.shape != rewards.shape:
        raise ValueError(
            f"priors must have one value per row, got {list(priors.shape)} for {list(rewards.shape)} rewards"
        )
    return rewards, priors, group_ids, ~jnp.isnan(priors)
