"""NeMo RL's advantages and clipped loss, compared with NVIDIA-NeMo/RL 7ea279ab (main of 2026-08-22).

Log-ratios are bounded here, at 20 (10 for a sequence's mean), and not there. A row without a decision counts as no
sequence. force_on_policy_ratio there is `old_logps=stop_gradient(logps)` here. Left out: the estimators "gdpo"
(`advantages.decoupled` has its idea), raw rewards, GAE and distillation; KL in the reward; the extra likelihood of
correct samples.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grpo_jax import losses, segments
from grpo_jax.advantages import group
from grpo_jax.losses import kl, mismatch
from grpo_jax.presets.choices import chosen, corrections, reference, spread, whitened, whole_sequence


def advantages(
    rewards: Float[Array, "N"],
    group_ids: Int[Array, "N"],
    *,
    use_leave_one_out_baseline: bool = True,
    normalize_rewards: bool = True,
) -> Float[Array, "N"]:
    """The estimator "grpo": (r - baseline) / (std + 1e-6), not divided where the std is 0; a group of one gets 0.

    Baseline and std are those of the group's other rows, or with use_leave_one_out_baseline off of all its rows; std
    over one less than the number of rows that enter it, 0 for fewer than two.
    """
    rewards, group_ids = jnp.asarray(rewards).astype(jnp.float32), jnp.asarray(group_ids)
    if not use_leave_one_out_baseline:
        values, variance = group.group_centered(rewards, group_ids), _variance(rewards, group_ids)
    else:
        values, variance = group.leave_one_out(rewards, group_ids), _variance_of_others(rewards, group_ids)
    if not normalize_rewards:
        return values
    return jnp.where(variance > 0, values / (jnp.sqrt(jnp.where(variance > 0, variance, 1)) + 1e-6), values)


def reinforce_plus_plus(
    rewards: Float[Array, "N"], group_ids: Int[Array, "N"], mask: Bool[Array, "N T"], *, minus_baseline: bool = True
) -> Float[Array, "N T"]:
    """The estimator "reinforce_plus_plus": r - mean of its group, whitened over all decisions of the batch.

    Variance over n and at least 1e-8. minus_baseline off: r itself; a group of one has 0 with it, r without.
    """
    mask, rewards = jnp.asarray(mask).astype(bool), jnp.asarray(rewards).astype(jnp.float32)
    compared = ~jnp.isnan(rewards) & (jnp.asarray(group_ids) >= 0)
    values = group.group_centered(rewards, group_ids) if minus_baseline else jnp.where(compared, rewards, 0)
    return whitened(spread(values, mask), mask & compared[:, None])


def loss(
    logps: Float[Array, "N T"],
    old_logps: Float[Array, "N T"],
    advantages: Float[Array, "N"] | Float[Array, "N T"],
    mask: Bool[Array, "N T"],
    *,
    ratio_clip_min: float = 0.2,
    ratio_clip_max: float = 0.2,
    ratio_clip_c: float | None = None,
    sequence_level_importance_ratios: bool = False,
    use_cispo: bool = False,
    disable_ppo_ratio: bool = False,
    token_level_loss: bool = True,
    reference_policy_kl_penalty: float = 0.01,
    reference_policy_kl_type: str = "k3",
    ref_logps: Float[Array, "N T"] | None = None,
    generation_logps: Float[Array, "N T"] | None = None,
    importance_weights: Float[Array, "N T"] | float = 1.0,
) -> Float[Array, ""]:
    """The clipped surrogate, times importance_weights (`sampler_weights`), plus the KL term times its penalty.

    ratio_clip_c: dual clip. sequence_level_importance_ratios: GSPO, which needs token_level_loss off (the mean over
    sequences). use_cispo: the weight is clipped on both sides. disable_ppo_ratio: REINFORCE, -A logps.
    The KL term (reference_policy_kl_type "k1", "k2", "k3", within [-10, 10]) is multiplied by exp(logps -
    sg[logps]): k3 has k2's gradient then. generation_logps: by exp(logps - generation_logps) instead, which is
    use_on_policy_kl_approximation.
    Raises: ValueError for a penalty without ref_logps, another type, or switches that NeMo RL refuses together.
    """
    _check_switches(use_cispo, disable_ppo_ratio, sequence_level_importance_ratios, token_level_loss, ratio_clip_c)
    mask, a = jnp.asarray(mask).astype(bool), spread(advantages, mask)
    ref_logps = reference(reference_policy_kl_penalty, ref_logps, "reference_policy_kl_penalty")
    if sequence_level_importance_ratios:
        ratio = whole_sequence(logps, old_logps, mask)
    else:
        ratio = losses.token_ratio(logps, old_logps)
    if use_cispo:
        each = losses.cispo(logps, ratio, a, low=ratio_clip_min, high=ratio_clip_max)
    elif disable_ppo_ratio:
        each = losses.reinforce(logps, a)
    else:
        each = losses.ppo_clip(ratio, a, low=ratio_clip_min, high=ratio_clip_max, dual=ratio_clip_c)
    each = each * jnp.where(mask, importance_weights, 0)
    if ref_logps is not None:
        draws = logps if generation_logps is None else generation_logps
        term = _kl(*(jnp.where(mask, x, 0) for x in (logps, ref_logps, draws)), reference_policy_kl_type)
        each = each + reference_policy_kl_penalty * term
    scheme = losses.token_mean if token_level_loss else losses.sequence_mean
    return losses.weighted_sum(each, scheme(jnp.ones(len(mask)), mask))


def sampler_weights(
    prev_logps: Float[Array, "N T"],
    generation_logps: Float[Array, "N T"],
    mask: Bool[Array, "N T"],
    *,
    truncated_importance_sampling_type: str | None = None,
    truncated_importance_sampling_ratio: float | None = None,
    truncated_importance_sampling_ratio_min: float | None = None,
    sequence_level_importance_ratios: bool = False,
) -> Float[Array, "N T"]:
    """Weights for what another program sampled (`use_importance_sampling_correction`, off by default there).

    truncated_importance_sampling_type: None the weights as they are; "tis" clipped to [ratio_min or 0, ratio], "icepop"
    0 outside [ratio_min, ratio], "seq-mask-tis" 0 for a sequence whose geometric mean is outside.
    sequence_level_importance_ratios: the whole sequence's product, not truncated here.
    Raises: ValueError for another type, or one without its bounds.
    """
    mask, kind = jnp.asarray(mask).astype(bool), truncated_importance_sampling_type
    low, high = truncated_importance_sampling_ratio_min, truncated_importance_sampling_ratio
    if sequence_level_importance_ratios:
        return mismatch.sequence_importance(prev_logps, generation_logps, mask)
    if kind is None:
        return mismatch.token_importance(prev_logps, generation_logps)
    if high is None or (low is None and kind != "tis"):
        raise ValueError(
            f"{kind!r} needs truncated_importance_sampling_ratio and, unless it is 'tis', "
            f"truncated_importance_sampling_ratio_min, got {high} and {low}"
        )
    return corrections(kind, prev_logps, generation_logps, mask, low or 0.0, high)


def _kl(logps: Array, ref_logps: Array, draws: Array, kind: str) -> Float[Array, "N T"]:
    """weight * estimate within [-10, 10]; weight without gradient where the log-ratio passes 20."""
    estimate = chosen("reference_policy_kl_type", kind, {"k1": kl.k1, "k2": kl.k2, "k3": kl.k3})
    gap = logps - jax.lax.stop_gradient(ref_logps)
    held = jnp.clip(gap, -20, 20)
    weight = losses.token_ratio(logps, draws)
    weight = jnp.where(gap == held, weight, jax.lax.stop_gradient(weight))
    return jnp.clip(weight * estimate(held, jnp.zeros_like(held)), -10, 10)


def _check_switches(cispo: bool, reinforce: bool, sequence: bool, token_level: bool, dual: float | None) -> None:
    if sequence and token_level:
        raise ValueError("sequence_level_importance_ratios is averaged over sequences: set token_level_loss=False")
    if cispo and (reinforce or sequence or not token_level or dual is not None):
        raise ValueError(
            "use_cispo weighs tokens by their ratio and averages over tokens: leave disable_ppo_ratio, "
            "sequence_level_importance_ratios and ratio_clip_c out, and token_level_loss on"
        )


def _variance(rewards: Array, group_ids: Array) -> Float[Array, "N"]:
    applies = ~jnp.isnan(rewards)
    return segments.variance(jnp.where(applies, rewards, 0), group_ids, applies, ddof=1)


def _variance_of_others(rewards: Array, group_ids: Array) -> Float[Array, "N"]:
    """Variance, over n - 2, of the group's other n - 1 rows; exactly 0 if they are equal. Memory N^2."""
    applies = ~jnp.isnan(rewards)
    ids = jnp.where(applies, group_ids, -1)
    rows = jnp.where((ids[:, None] == ids) & (ids >= 0) & ~jnp.eye(len(ids), dtype=bool), 1.0, 0.0)
    others = rows.sum(1)
    safe = jnp.where(applies, rewards, 0)
    mean = rows @ safe / jnp.maximum(others, 1)
    squares = (rows * (safe - mean[:, None]) ** 2).sum(1)
    highest, lowest = (jnp.where(rows > 0, s * safe, -jnp.inf).max(1) for s in (1, -1))
    return jnp.where(highest > -lowest, squares / jnp.maximum(others - 1, 1), 0)
