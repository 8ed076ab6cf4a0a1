"""verl's core algorithms, compared with volcengine/verl b178a3cd (2026-01-29, 125 commits after v0.7.0).

Log-ratios are clamped at +-20, a sequence's mean log-ratio at 10, the reference's k3 at 10. Means over sequences leave
rows without a decision out ("geo_mean" does not, nor does verl where it is given `global_batch_size`). Left out: the
estimators "gae", "remax" (`advantages.over_greedy`) and the optimal token baselines; the losses "clip_cov", which draws
at random, "kl_cov" and "bypass_mode"; KL in the reward. The KL names that end in + raise NotImplementedError in this
version; what they are meant to be is `losses.kl.unbiased`.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grpo_jax import losses, segments
from grpo_jax.advantages import baselines, group, whitening
from grpo_jax.advantages.returns import at_last
from grpo_jax.losses import kl
from grpo_jax.presets.choices import chosen, spread


def advantages(
    name: str,
    rewards: Float[Array, "N"],
    group_ids: Int[Array, "N"],
    mask: Bool[Array, "N T"],
    *,
    norm_adv_by_std_in_grpo: bool = True,
    gamma: float = 1.0,
) -> Float[Array, "N T"]:
    """Advantages on the decisions, 0 where masked out. A row that is alone in its group keeps its reward.

    name: "grpo" ((r - mean) / (std + 1e-6), std over n - 1; without norm_adv_by_std_in_grpo Dr. GRPO's r - mean),
    "grpo_vectorized" (std at least 1e-3), "grpo_passk" (the best over the second best, the others and one that is alone
    0), "rloo", "rloo_vectorized" (alone: 0), "reinforce_plus_plus" (gamma; over the batch, whatever the groups),
    "reinforce_plus_plus_baseline", "opo", "gpg".
    """
    mask, rewards = jnp.asarray(mask).astype(bool), jnp.asarray(rewards).astype(jnp.float32)
    group_ids, by_std = jnp.asarray(group_ids), norm_adv_by_std_in_grpo

    def alone(values: Array) -> Array:
        return group.keep_singletons(values, rewards, group_ids)

    compared = jnp.isfinite(rewards) & (group_ids >= 0)
    successes = jnp.sum(compared & (rewards != 0))
    centered = alone(group.group_centered(rewards, group_ids))
    whole = {
        "grpo": lambda: alone(group.group_z_score(rewards, group_ids)) if by_std else centered,
        "grpo_vectorized": lambda: alone(_floored(centered, rewards, group_ids)) if by_std else centered,
        "grpo_passk": lambda: _best_over_second(rewards, group_ids, by_std),
        "rloo": lambda: alone(group.leave_one_out(rewards, group_ids)),
        "rloo_vectorized": lambda: group.leave_one_out(rewards, group_ids),
        "opo": lambda: alone(baselines.length_weighted(rewards, mask.sum(1), group_ids)),
        "gpg": lambda: centered * (compared.sum() / jnp.maximum(successes, 1)),
        "reinforce_plus_plus": lambda: whitening.reinforce_plus_plus(at_last(rewards, mask), mask, gamma=gamma),
        "reinforce_plus_plus_baseline": lambda: whitening.whiten_tokens(
            spread(centered, mask), mask & compared[:, None]
        ),
    }
    return spread(chosen("advantage estimator", name, whole)(), mask)


def loss(
    name: str,
    logps: Float[Array, "N T"],
    old_logps: Float[Array, "N T"],
    advantages: Float[Array, "N"] | Float[Array, "N T"],
    mask: Bool[Array, "N T"],
    *,
    loss_agg_mode: str = "token-mean",
    loss_scale_factor: float | None = None,
    clip_ratio: float = 0.2,
    clip_ratio_low: float | None = 0.2,
    clip_ratio_high: float | None = 0.2,
    clip_ratio_c: float = 3.0,
    tau_pos: float = 1.0,
    tau_neg: float = 1.05,
    rollout_is_weights: Float[Array, "N T"] | float = 1.0,
    kl_loss_coef: float = 0.001,
    kl_loss_type: str = "low_var_kl",
    ref_logps: Float[Array, "N T"] | None = None,
) -> Float[Array, ""]:
    """The policy loss, and with ref_logps (use_kl_loss) kl_loss_coef times the KL loss.

    name: "vanilla" (dual clip at clip_ratio_c), "gspo", "sapo", "gpg", "geo_mean" (GMPO; the bounds in log space),
    "cispo" (the bounds' distance from 1). "gspo" and "sapo" are always averaged as "seq-mean-token-mean", "geo_mean"
    over all rows; the KL loss as loss_agg_mode says. clip_ratio_low, clip_ratio_high: None as clip_ratio, which has no
    effect while they are 0.2. rollout_is_weights: `mismatch.capped` weights, on the policy loss; "geo_mean" takes their
    geometric mean over the row. Raises: ValueError for other names.
    """
    mask, a = jnp.asarray(mask).astype(bool), spread(advantages, mask)
    low = clip_ratio if clip_ratio_low is None else clip_ratio_low
    high = clip_ratio if clip_ratio_high is None else clip_ratio_high
    ratio = losses.token_ratio(logps, old_logps)
    each = chosen(
        "policy loss",
        name,
        {
            "vanilla": lambda: losses.ppo_clip(ratio, a, low=low, high=high, dual=clip_ratio_c),
            "gspo": lambda: losses.ppo_clip(losses.sequence_ratio(logps, old_logps, mask), a, low=low, high=high),
            "sapo": lambda: losses.sapo(ratio, a, tau_positive=tau_pos, tau_negative=tau_neg),
            "gpg": lambda: losses.reinforce(logps, a),
            "geo_mean": lambda: losses.gmpo(logps, old_logps, a, mask, low=low, high=high),
            "cispo": lambda: losses.cispo(logps, ratio, a, low=min(low, 1.0), high=high),
        },
    )()
    weights = _aggregation(loss_agg_mode, mask, loss_scale_factor)
    own = _aggregation("seq-mean-token-mean", mask, None) if name in ("gspo", "sapo", "geo_mean") else weights
    sampled = jnp.where(mask, rollout_is_weights, 0)
    if name == "geo_mean":
        own = own * jnp.mean(mask.any(1))
        sampled = jnp.exp(jnp.log(jnp.where(mask, sampled + 1e-10, 1)).sum(1) / jnp.maximum(mask.sum(1), 1))[:, None]
    total = losses.weighted_sum(each * sampled, own)
    if ref_logps is None:
        return total
    return total + kl_loss_coef * losses.weighted_sum(kl_penalty(logps, ref_logps, kl_loss_type), weights)


def kl_penalty(logps: Float[Array, "N T"], ref_logps: Float[Array, "N T"], name: str) -> Float[Array, "N T"]:
    """ "kl" or "k1", "abs", "mse" or "k2", "low_var_kl" or "k3" (within [-10, 10], without gradient beyond)."""
    low_variance = lambda: jnp.clip(kl.k3(logps, ref_logps), -10, 10)  # noqa: E731
    return chosen(
        "KL estimator",
        name,
        {
            "kl": lambda: kl.k1(logps, ref_logps),
            "k1": lambda: kl.k1(logps, ref_logps),
            "abs": lambda: kl.absolute(logps, ref_logps),
            "mse": lambda: kl.k2(logps, ref_logps),
            "k2": lambda: kl.k2(logps, ref_logps),
            "low_var_kl": low_variance,
            "k3": low_variance,
        },
    )()


def _floored(centered: Array, rewards: Array, group_ids: Array) -> Float[Array, "N"]:
    """The z-score with the variance, not the standard deviation, kept from 0."""
    return centered / (jnp.sqrt(jnp.maximum(_variance(rewards, group_ids), 1e-6)) + 1e-6)


def _best_over_second(rewards: Array, group_ids: Array, by_std: bool) -> Float[Array, "N"]:
    """Best less second best for the best row, over the group's std if asked for; 0 where two are best."""
    rewards, ids = jnp.where(jnp.isnan(rewards), 0, rewards), jnp.where(jnp.isnan(rewards), -1, group_ids)
    best = segments.first(rewards == segments.maximum(rewards, ids), ids)
    lead = jnp.where(best, rewards - segments.maximum(rewards, ids, ~best), 0)
    lead = jnp.where(segments.count(ids) > 1, lead, 0)
    return lead / (jnp.sqrt(_variance(rewards, ids)) + 1e-6) if by_std else lead


def _variance(rewards: Array, group_ids: Array) -> Float[Array, "N"]:
    applies = ~jnp.isnan(rewards)
    return segments.variance(jnp.where(applies, rewards, 0), group_ids, applies, ddof=1)


def _aggregation(name: str, mask: Bool[Array, "N T"], scale: float | None) -> Float[Array, "N T"]:
    once = jnp.ones(len(mask))
    return chosen(
        "loss_agg_mode",
        name,
        {
            "token-mean": lambda: losses.token_mean(once, mask),
            "seq-mean-token-mean": lambda: losses.sequence_mean(once, mask),
            "seq-mean-token-sum": lambda: losses.sequence_sum(once, mask),
            # no division by the number of rows; the width of the batch unless a scale is given
            "seq-mean-token-sum-norm": lambda: mask / (mask.shape[1] if scale is None else scale),
        },
    )()
