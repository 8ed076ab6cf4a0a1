"""Tunix's GRPO, compared with google/tunix c7d8950f (2026-08-21, 326 commits after v0.1.7).

Log-ratios are clamped at +-20, a sequence's mean log-ratio at 10, from above. Its configurations, in these options:

    GRPOConfig       the defaults here
    DAPOConfig       beta=0, epsilon_high=0.28, loss_agg_mode="token-mean"
    DrGRPOConfig     advantage_estimator="drgrpo", loss_agg_mode="sequence-mean-token-scale"

k3 is bounded here where its log-ratio passes 20, which Tunix leaves to `kl_clamp_value`. Left out: "gae" and the loss
"ppo", packed rows (each segment is a row here), DAPO's length reward, which counts characters.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grpo_jax import losses
from grpo_jax.advantages import group
from grpo_jax.losses import kl
from grpo_jax.presets.choices import chosen, reference, spread


def advantages(
    rewards: Float[Array, "N"], group_ids: Int[Array, "N"], *, advantage_estimator: str = "grpo"
) -> Float[Array, "N"]:
    """advantage_estimator: "grpo" (r - mean) / (std + 1e-6) with std over n - 1, "rloo", "drgrpo" r - mean.

    A group of one, which Tunix refuses (`num_generations` is at least 2), gets 0.
    """
    estimators = {"grpo": group.group_z_score, "rloo": group.leave_one_out, "drgrpo": group.group_centered}
    return chosen("advantage_estimator", advantage_estimator, estimators)(rewards, group_ids)


def loss(
    logps: Float[Array, "N T"],
    old_logps: Float[Array, "N T"],
    advantages: Float[Array, "N"] | Float[Array, "N T"],
    mask: Bool[Array, "N T"],
    *,
    loss_algo: str = "grpo",
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    epsilon_c: float | None = None,
    beta: float = 0.04,
    ref_logps: Float[Array, "N T"] | None = None,
    kl_loss_mode: str = "kl",
    kl_clamp_value: float | None = None,
    loss_agg_mode: str = "sequence-mean-token-mean",
    sampler_is_weights: Float[Array, "N T"] | float = 1.0,
) -> Float[Array, ""]:
    """The clipped surrogate plus beta times the KL term, both aggregated alike.

    loss_algo: "grpo", or "gspo-token" with the sequence's ratio, straight-through. epsilon_high: None as epsilon.
    epsilon_c: dual clip, None for none. kl_loss_mode: "kl" (the log-ratio itself, whose gradient is noise), "mse_kl",
    "low_var_kl". sampler_is_weights: on the surrogate, not the KL; `sampler_is="token"` there is
    `mismatch.truncated_importance(old_logps, sampler_logps, cap=2.0)`.
    loss_agg_mode: "token-mean", "sequence-mean-token-mean", "seq-mean-token-sum"; "sequence-mean-token-scale", whose
    sums are over T, the width of the mask; "sequence-mean-token-sum-norm", over N, empty rows too.
    Raises: ValueError for other names, beta without ref_logps.
    """
    mask, ref_logps = jnp.asarray(mask).astype(bool), reference(beta, ref_logps, "beta")
    ratios = {
        "grpo": lambda: losses.token_ratio(logps, old_logps),
        "gspo-token": lambda: losses.sequence_ratio(logps, old_logps, mask),
    }
    ratio = chosen("loss_algo", loss_algo, ratios)()
    high = epsilon if epsilon_high is None else epsilon_high
    each = losses.ppo_clip(ratio, spread(advantages, mask), low=epsilon, high=high, dual=epsilon_c)
    each = each * jnp.where(mask, sampler_is_weights, 0)
    if ref_logps is not None:
        term = chosen("kl_loss_mode", kl_loss_mode, KL)(logps, ref_logps)
        each = each + beta * (term if kl_clamp_value is None else jnp.clip(term, -kl_clamp_value, kl_clamp_value))
    return losses.weighted_sum(each, chosen("loss_agg_mode", loss_agg_mode, AGGREGATIONS)(jnp.ones(len(mask)), mask))


KL = {"kl": kl.k1, "mse_kl": kl.k2, "low_var_kl": kl.k3}
AGGREGATIONS = {
    "token-mean": losses.token_mean,
    "sequence-mean-token-mean": losses.sequence_mean,
    "sequence-mean-token-scale": lambda once, mask: losses.fixed_length(once, mask, length=mask.shape[1]),
    "seq-mean-token-sum": losses.sequence_sum,
    "sequence-mean-token-sum-norm": lambda once, mask: mask / len(mask),
}
