"""TRL's GRPO, RLOO and GMPO trainers, compared with huggingface/trl f2cd5771 (2026-07-24, 26 commits after v1.9.0).

Its log-ratios are not bounded; here they are, at 20 (10 for a sequence's mean), far outside every clip range. The mean
over sequences counts all rows, those without a decision too (to which RLOO and GMPO give a constant loss there, and 0
here). Where `max_completion_length`, or for "dapo", "cispo" and "vespo" `num_items_in_batch`, spans several
micro-batches, give it and add the losses up. Left out: several rewards (`advantages.combine`; "normalize_then_sum" is
`advantages.decoupled_over_rows`), the entropy bonus.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grpo_jax import losses, segments
from grpo_jax.advantages import group, whitening
from grpo_jax.losses import kl, mismatch
from grpo_jax.presets.choices import chosen, reference, spread, whole_sequence


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
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
    importance_sampling_ratio: Float[Array, "N T"] | float = 1.0,
    keep: Bool[Array, "N T"] | Bool[Array, "N 1"] | None = None,
) -> Float[Array, ""]:
    """The GRPO trainer's loss.

    loss_type: "grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo".
    importance_sampling_level: "token", "sequence", or "sequence_token" (experimental: GSPO-token); for "luspo" always
    "sequence". epsilon_high: None as epsilon; for "cispo" the largest weight itself, and the only bound.
    importance_sampling_ratio: `sampler_weights`; on the surrogate, not the KL; for "vespo" inside its weight
    (token modes), for "luspo" only sequence modes are TRL's. keep: which surrogates to keep while all still count:
    off_policy_mask_threshold is `~mismatch.drifted(logps, sampler_logps, ...)[:, None]`, top_entropy_quantile likewise.
    Raises: ValueError for other names, "dr_grpo" without max_completion_length (there 512 unless set), beta without
    ref_logps, "luspo" with beta (whose KL term TRL averages over padding too).
    """
    mask = jnp.asarray(mask).astype(bool)
    weights = chosen("loss_type", loss_type, AGGREGATIONS)(mask, max_completion_length, num_items_in_batch)
    ref_logps = reference(beta, ref_logps, "beta")
    if loss_type == "luspo" and ref_logps is not None:
        raise ValueError(f"luspo has no KL term that counts decisions only, got beta {beta}; give beta 0")
    level = "sequence" if loss_type == "luspo" else importance_sampling_level
    ratio = chosen("importance_sampling_level", level, LEVELS)(logps, old_logps, mask)
    high, a = epsilon if epsilon_high is None else epsilon_high, spread(advantages, mask)
    sampled = jnp.where(mask, importance_sampling_ratio, 0)
    if loss_type == "cispo":
        each = losses.reinforce(logps, a * jnp.minimum(ratio, high)) * sampled
    elif loss_type == "sapo":
        each = losses.sapo(ratio, a, tau_positive=sapo_temperature_pos, tau_negative=sapo_temperature_neg) * sampled
    elif loss_type == "vespo":
        k, lam = jnp.where(a >= 0, vespo_k_pos, vespo_k_neg), jnp.where(a >= 0, vespo_lambda_pos, vespo_lambda_neg)
        each = losses.reinforce(logps, a * _gamma(logps, old_logps, sampled, mask, k, lam))
    else:
        each = _clipped(ratio, a, epsilon, high, delta) * sampled
    each = each if keep is None else jnp.where(keep, each, 0)
    if ref_logps is not None:
        term = kl.corrected(ratio, logps, ref_logps) if use_bias_correction_kl else kl.k3(logps, ref_logps)
        each = each + beta * term
    return losses.weighted_sum(each, weights)


def sampler_weights(
    old_logps: Float[Array, "N T"],
    sampler_logps: Float[Array, "N T"],
    mask: Bool[Array, "N T"],
    *,
    vllm_importance_sampling_mode: str = "sequence_mask",
    vllm_importance_sampling_clip_max: float | None = 3.0,
    vllm_importance_sampling_clip_min: float | None = None,
) -> Float[Array, "N T"]:
    """Weights for what another program sampled; on by default there, with vLLM.

    vllm_importance_sampling_mode: "token_truncate", "token_mask", "sequence_truncate", "sequence_mask": of each token
    or of the whole product, clipped to the bounds or 0 outside of them. None for a bound: none on that side.
    """
    low = 0.0 if vllm_importance_sampling_clip_min is None else vllm_importance_sampling_clip_min
    high = math.inf if vllm_importance_sampling_clip_max is None else vllm_importance_sampling_clip_max
    token = lambda: mismatch.token_importance(old_logps, sampler_logps)  # noqa: E731
    whole = lambda: mismatch.sequence_importance(old_logps, sampler_logps, mask)  # noqa: E731
    return chosen(
        "vllm_importance_sampling_mode",
        vllm_importance_sampling_mode,
        {
            "token_truncate": lambda: mismatch.capped(token(), cap=high, floor=low),
            "token_mask": lambda: mismatch.banded(token(), low=low, high=high),
            "sequence_truncate": lambda: mismatch.capped(whole(), cap=high, floor=low),
            "sequence_mask": lambda: mismatch.banded(whole(), low=low, high=high),
        },
    )()


def gmpo_loss(
    logps: Float[Array, "N T"],
    old_logps: Float[Array, "N T"],
    advantages: Float[Array, "N"],
    mask: Bool[Array, "N T"],
    *,
    epsilon: float = 0.4,
    epsilon_high: float | None = None,
    beta: float = 0.0,
    ref_logps: Float[Array, "N T"] | None = None,
) -> Float[Array, ""]:
    """The GMPO trainer's (experimental): geometric means of ratios clipped in log space, plus beta k3, over all rows.

    Raises: ValueError for beta without ref_logps.
    """
    mask, ref_logps = jnp.asarray(mask).astype(bool), reference(beta, ref_logps, "beta")
    high = epsilon if epsilon_high is None else epsilon_high
    each = losses.gmpo(logps, old_logps, spread(advantages, mask), mask, low=epsilon, high=high)
    return losses.weighted_sum(
        each if ref_logps is None else each + beta * kl.k3(logps, ref_logps), _mean_over_rows(mask)
    )


def rloo_advantages(
    rewards: Float[Array, "N"],
    group_ids: Int[Array, "N"],
    *,
    reward_clip_range: tuple[float, float] | None = None,
    beta: float = 0.05,
    old_logps: Float[Array, "N T"] | None = None,
    ref_logps: Float[Array, "N T"] | None = None,
    mask: Bool[Array, "N T"] | None = None,
    normalize_advantages: bool = False,
) -> Float[Array, "N"]:
    """The RLOO trainer's: r' = clip(r) - beta sum_t (old_logps_t - ref_logps_t), less the mean r' of the others.

    normalize_advantages: then (A - mean) / (std + 1e-4) over the batch, std over n - 1. A group of one gets 0 and is
    in no statistic. Raises: ValueError for beta without old_logps, ref_logps and mask.
    """
    rewards, group_ids = jnp.asarray(rewards).astype(jnp.float32), jnp.asarray(group_ids)
    ref_logps = reference(beta, ref_logps, "beta")
    if reward_clip_range is not None:
        rewards = jnp.clip(rewards, *reward_clip_range)
    if ref_logps is not None:
        if old_logps is None or mask is None:
            raise ValueError(f"beta is {beta} and needs old_logps and mask beside ref_logps; give 0 for no KL term")
        rewards = rewards - beta * jnp.where(mask, jnp.asarray(old_logps) - ref_logps, 0).sum(-1)
    values = group.leave_one_out(rewards, group_ids)
    if not normalize_advantages:
        return values
    compared = ~jnp.isnan(rewards)
    return whitening.whiten_rows(values, compared & (segments.count(group_ids, compared) > 1))


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


def _clipped(ratio: Array, a: Array, low: float, high: float, delta: float | None) -> Float[Array, "N T"]:
    """max(-a min(ratio, delta), -a clip(ratio)): delta bounds A < 0 above, and A > 0 too if it is under 1 + high."""
    if delta is None:
        return losses.ppo_clip(ratio, a, low=low, high=high)
    return losses.ppo_clip(ratio, a, low=low, high=min(high, delta - 1), dual=max(1 + high, delta))


def _gamma(
    logps: Array, old_logps: Array, sampled: Array, mask: Bool[Array, "N T"], k: Array, lam: Array
) -> Float[Array, "N T"]:
    """VESPO's weight, w^k exp(lam (1 - w)) of the whole sequence's ratio w, a constant; at most 20, in logs."""
    drift = jnp.clip(jnp.where(mask, jnp.asarray(logps) - old_logps, 0), -20, 20)
    drift = drift + jnp.clip(jnp.where(mask, jnp.log(sampled), 0), math.log(1e-8), 20)
    log_w = jax.lax.stop_gradient(jnp.clip(drift.sum(-1, keepdims=True), math.log(1e-8), 20))
    return jnp.exp(lam + k * log_w - lam * jnp.exp(log_w))


def _mean_over_rows(mask: Bool[Array, "N T"], *ignored: float | None) -> Float[Array, "N T"]:
    """The mean over all rows of token means, an empty row counting as 0."""
    return mask / (jnp.maximum(mask.sum(-1, keepdims=True), 1) * len(mask))


def _mean_over_tokens(mask: Bool[Array, "N T"], longest: float | None, items: float | None) -> Float[Array, "N T"]:
    return mask / jnp.maximum(mask.sum() if items is None else items, 1)


def _constant_length(mask: Bool[Array, "N T"], longest: float | None, items: float | None) -> Float[Array, "N T"]:
    if longest is None:
        raise ValueError("dr_grpo divides by max_completion_length, the budget in tokens (512 in TRL): give it")
    return mask / (len(mask) * longest)


AGGREGATIONS = {
    "grpo": _mean_over_rows,
    "sapo": _mean_over_rows,
    "bnpo": lambda mask, longest, items: _mean_over_tokens(mask, None, None),
    "dapo": _mean_over_tokens,
    "cispo": _mean_over_tokens,
    "vespo": _mean_over_tokens,
    "dr_grpo": _constant_length,
    "luspo": lambda mask, longest, items: mask / len(mask),
}
LEVELS = {
    "token": lambda logps, old_logps, mask: losses.token_ratio(logps, old_logps),
    "sequence": whole_sequence,
    "sequence_token": losses.sequence_ratio,
}
