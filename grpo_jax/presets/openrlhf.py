"""OpenRLHF's policy loss and group advantages (OpenRLHF/OpenRLHF, 3c3be62).

Known of it: std over n - 1 and 1e-9. Not compared with its source: the names and defaults of the loss's options.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grpo_jax import losses
from grpo_jax.advantages import group
from grpo_jax.losses import kl
from grpo_jax.presets.choices import chosen, reference, spread


def advantages(
    rewards: Float[Array, "N"], group_ids: Int[Array, "N"], *, advantage_estimator: str = "group_norm"
) -> Float[Array, "N"]:
    """advantage_estimator: "group_norm" (r - mean) / (std + 1e-9), "dr_grpo" r - mean, "rloo"."""
    estimators = {
        "group_norm": functools.partial(group.group_z_score, epsilon=1e-9),
        "dr_grpo": group.group_centered,
        "rloo": group.leave_one_out,
    }
    return chosen("advantage_estimator", advantage_estimator, estimators)(rewards, group_ids)


def loss(
    logps: Float[Array, "N T"],
    old_logps: Float[Array, "N T"],
    advantages: Float[Array, "N"] | Float[Array, "N T"],
    mask: Bool[Array, "N T"],
    *,
    policy_loss_type: str = "ppo",
    eps_clip_low_high: tuple[float, float] = (0.2, 0.2),
    dual_clip: float | None = None,
    token_level_loss: bool = True,
    init_kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    ref_logps: Float[Array, "N T"] | None = None,
) -> Float[Array, ""]:
    """The clipped surrogate plus init_kl_coef times the KL term (as a loss; 0 for none).

    policy_loss_type: "ppo", or "gspo", whose ratio is the sequence's and which is averaged over sequences.
    Raises: ValueError for other names, a coefficient without ref_logps.
    """
    mask, ref_logps = jnp.asarray(mask).astype(bool), reference(init_kl_coef, ref_logps, "init_kl_coef")
    ratios = {
        "ppo": lambda: losses.token_ratio(logps, old_logps),
        "gspo": lambda: losses.sequence_ratio(logps, old_logps, mask),
    }
    ratio = chosen("policy_loss_type", policy_loss_type, ratios)()
    low, high = eps_clip_low_high
    each = losses.ppo_clip(ratio, spread(advantages, mask), low=low, high=high, dual=dual_clip)
    if ref_logps is not None:
        each = each + init_kl_coef * chosen("kl_estimator", kl_estimator, KL)(logps, ref_logps)
    by_token = token_level_loss and policy_loss_type == "ppo"
    scheme = losses.token_mean if by_token else losses.sequence_mean
    return losses.weighted_sum(each, scheme(jnp.ones(len(mask)), mask))


KL = {"k1": kl.k1, "k2": kl.k2, "k3": kl.k3}
