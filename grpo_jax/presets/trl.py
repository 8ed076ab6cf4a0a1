"""TRL's GRPO and RLOO trainers (huggingface/trl, f2cd577).

Its log-ratios are not bounded; here they are, at 20 (10 for a sequence's mean), far outside every clip range. The mean
over sequences counts all rows, those without a decision too. Where `max_completion_length`, or for "dapo" and "cispo"
`num_items_in_batch`, spans several micro-batches, give it and add the losses up.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grpo_jax import losses
from grpo_jax.advantages import group, whitening
from grpo_jax.losses import kl, mismatch, ratios, surrogates
from grpo_jax.presets.choices import chosen, reference, spread


def advantages(
    rewards: Float[Array, "N"], group_ids: Int[Array, "N"], *, scale_rewards: str = "group"
) -> Float[Array, "N"]:
    """(r - mean_g) / (std + 1e-4), std over n - 1; NaN rewards are left out and get 0, as does a group of one.

    scale_rewards: "group" the group's std; "batch" that of all rewards; "none" no division.
    """
    return chosen(
        "scale_rewards",
        scale_rewards,
        {
            "group": functools.partial(group.group_z_score, epsilon=1e-4),
            "batch": group.batch_scaled,
            "none": group.group_centered,
        },
    )(rewards, group_ids)


def loss(
    logps: Float[Array, "N T"],
    old_logps: Float[Array, "N T"],
    advantages: Float[Array, "N"] | Float[Array, "N T"],
    mask: Bool[Array, "N T"],
    *,
    loss_type: str = "dapo",
    importance_sampling_level: str = "token",
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    beta: float = 0.0,
    ref_logps: Float[Array, "N T"] | None = None,
    use_bias_correction_kl: bool = False,
    max_completion_length: float | None = None,
    num_items_in_batch: float | None = None,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    corrections: Float[Array, "N T"] | float = 1.0,
) -> Float[Array, ""]:
    """The GRPO trainer's loss.

    loss_type: "grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "gmpo" (the last is experimental there).
    importance_sampling_level: "token", "sequence", or "sequence_token" (experimental: GSPO-token); for "luspo" always
    "sequence". epsilon_high: None as epsilon; for "cispo" the largest weight itself; for "gmpo", like epsilon, in log
    space. corrections: `sampler_weights` and `~mismatch.drifted(...)[:, None]`; they act on the surrogate, not the KL.
    Raises: ValueError for other names, "dr_grpo" without max_completion_length, beta without ref_logps, "luspo" with
    beta (whose KL term TRL averages over padding too).
    """
    mask = jnp.asarray(mask).astype(bool)
    weights = chosen("loss_type", loss_type, AGGREGATIONS)(mask, max_completion_length, num_items_in_batch)
    ref_logps = reference(beta, ref_logps, "beta")
    if loss_type == "luspo" and ref_logps is not None:
        raise ValueError(f"luspo has no KL term that counts decisions only, got beta {beta}; give beta 0")
    level = "sequence" if loss_type == "luspo" else importance_sampling_level
    ratio = chosen("importance_sampling_level", level, LEVELS)(logps, old_logps, mask)
    high, a = epsilon if epsilon_high is None else epsilon_high, spread(advantages, mask)
    if loss_type == "cispo":
        each = surrogates.cispo(logps, ratio, a, low=1.0, high=high - 1)
    elif loss_type == "sapo":
        each = surrogates.sapo(ratio, a, tau_positive=sapo_temperature_pos, tau_negative=sapo_temperature_neg)
    elif loss_type == "gmpo":
        each = surrogates.gmpo(logps, old_logps, a, mask, low=epsilon, high=high)
    elif delta is None:
        each = losses.ppo_clip(ratio, a, low=epsilon, high=high)
    else:  # min(rho, delta) in the unclipped branch bounds it above for A < 0, and for A > 0 too if delta is that small
        each = losses.ppo_clip(ratio, a, low=epsilon, high=min(high, delta - 1), dual=max(1 + high, delta))
    each = each * jnp.where(mask, corrections, 0)
    if ref_logps is not None:
        term = kl.corrected(ratio, logps, ref_logps) if use_bias_correction_kl else kl.k3(logps, ref_logps)
        each = each + beta * term
    return losses.weighted_sum(each, weights)


def sampler_weights(
    old_logps: Float[Array, "N T"],
    sampler_logps: Float[Array, "N T"],
    mask: Bool[Array, "N T"],
    *,
    mode: str = "sequence_mask",
    maximum: float = 3.0,
    minimum: float = 0.0,
) -> Float[Array, "N T"]:
    """What the surrogate is multiplied by when another program sampled; on by default there.

    mode: "token_truncate", "token_mask", "sequence_truncate", "sequence_mask". minimum: 0 for no lower bound.
    """
    token, whole = mismatch.token_importance, mismatch.sequence_importance
    return chosen(
        "mode",
        mode,
        {
            "token_truncate": lambda: mismatch.capped(token(old_logps, sampler_logps), cap=maximum, floor=minimum),
            "token_mask": lambda: mismatch.banded(token(old_logps, sampler_logps), low=minimum, high=maximum),
            "sequence_truncate": lambda: mismatch.capped(
                whole(old_logps, sampler_logps, mask), cap=maximum, floor=minimum
            ),
            "sequence_mask": lambda: mismatch.banded(whole(old_logps, sampler_logps, mask), low=minimum, high=maximum),
        },
    )()


def rloo_advantages(
    rewards: Float[Array, "N"],
    group_ids: Int[Array, "N"],
    *,
    beta: float = 0.0,
    old_logps: Float[Array, "N T"] | None = None,
    ref_logps: Float[Array, "N T"] | None = None,
    mask: Bool[Array, "N T"] | None = None,
    normalize_advantages: bool = False,
) -> Float[Array, "N"]:
    """The RLOO trainer's: r' = r - beta sum_t (old_logps_t - ref_logps_t), less the mean r' of the others.

    normalize_advantages: then (A - mean) / (std + 1e-4) over the batch, std over n - 1.
    """
    rewards, group_ids = jnp.asarray(rewards).astype(jnp.float32), jnp.asarray(group_ids)
    ref_logps = reference(beta, ref_logps, "beta")
    if ref_logps is not None:
        rewards = rewards - beta * jnp.where(mask, jnp.asarray(old_logps) - ref_logps, 0).sum(-1)
    values = group.leave_one_out(rewards, group_ids)
    if not normalize_advantages:
        return values
    return whitening.whiten_rows(values, ~jnp.isnan(rewards) & (group_ids >= 0))


def rloo_loss(
    logps: Float[Array, "N T"],
    old_logps: Float[Array, "N T"],
    advantages: Float[Array, "N"],
    mask: Bool[Array, "N T"],
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
) -> Float[Array, ""]:
    """The RLOO trainer's: the clipped surrogate of whole completions' ratios, mean over all rows."""
    mask = jnp.asarray(mask).astype(bool)
    high = epsilon if epsilon_high is None else epsilon_high
    ratio = losses.sequence_product(logps, old_logps, mask)
    each = losses.ppo_clip(ratio, spread(advantages, mask), low=epsilon, high=high)
    return losses.weighted_sum(each, _mean_over_rows(mask))


def _mean_over_rows(mask: Bool[Array, "N T"], *ignored: float | None) -> Float[Array, "N T"]:
    """The mean over all rows of token means, an empty row counting as 0."""
    return mask / (jnp.maximum(mask.sum(-1, keepdims=True), 1) * len(mask))


def _mean_over_tokens(mask: Bool[Array, "N T"], longest: float | None, items: float | None) -> Float[Array, "N T"]:
    return mask / jnp.maximum(mask.sum() if items is None else items, 1)


def _constant_length(mask: Bool[Array, "N T"], longest: float | None, items: float | None) -> Float[Array, "N T"]:
    if longest is None:
        raise ValueError("dr_grpo divides by max_completion_length, the budget in tokens: give it")
    return mask / (len(mask) * longest)


AGGREGATIONS = {
    "grpo": _mean_over_rows,
    "sapo": _mean_over_rows,
    "gmpo": _mean_over_rows,
    "bnpo": lambda mask, longest, items: _mean_over_tokens(mask, None, None),
    "dapo": _mean_over_tokens,
    "cispo": _mean_over_tokens,
    "dr_grpo": _constant_length,
    "luspo": lambda mask, longest, items: mask / len(mask),
}
LEVELS = {
    "token": lambda logps, old_logps, mask: losses.token_ratio(logps, old_logps),
    "sequence": lambda logps, old_logps, mask: ratios.unit_geometric(
        logps, old_logps, mask, jnp.zeros(mask.shape, jnp.int32)
    ),
    "sequence_token": losses.sequence_ratio,
}
