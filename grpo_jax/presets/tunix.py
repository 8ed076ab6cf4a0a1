"""Tunix's GRPO (google/tunix, 0.1.7).

Known of it: std over n - 1 and 1e-6 in "grpo", the estimators and losses named here, beta 0.04, KL as k1, k2 or k3.
Not compared with its source: that k3 and the mean over sequences are the defaults, and what the others are called.
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
    """advantage_estimator: "grpo" (r - mean) / (std + 1e-6), "rloo", "drgrpo" r - mean.

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
    kl_loss_mode: str = "k3",
    loss_agg_mode: str = "sequence-mean-token-mean",
) -> Float[Array, ""]:
    """The clipped surrogate plus beta times the KL term, both aggregated alike.

    loss_algo: "grpo", or "gspo-token" with the sequence's ratio, straight-through. epsilon_c: dual clip, None for none.
    loss_agg_mode: "sequence-mean-token-mean", "token-mean", "sequence-mean-token-sum".
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
    if ref_logps is not None:
        each = each + beta * chosen("kl_loss_mode", kl_loss_mode, KL)(logps, ref_logps)
    return losses.weighted_sum(each, chosen("loss_agg_mode", loss_agg_mode, AGGREGATIONS)(jnp.ones(len(mask)), mask))


KL = {"k1": kl.k1, "k2": kl.k2, "k3": kl.k3}
AGGREGATIONS = {
    "sequence-mean-token-mean": losses.sequence_mean,
    "token-mean": losses.token_mean,
    "sequence-mean-token-sum": losses.sequence_sum,
}
