"""OpenRLHF's advantages and policy loss, compared with OpenRLHF/OpenRLHF v0.11.0 (3c3be623, 2026-08-13).

Its options are the last words of those of its command line: `estimator` is `--algo.advantage.estimator` in `advantages`
and `--algo.kl.estimator` in `loss`. By default the KL term is k1, with weight 0.01, in the reward; with
`--algo.kl.use_loss` it is in the loss instead: give ref_logps to the one or to the other. Left out: "gae", the default,
which needs a critic; a weight of the KL term that adapts; the entropy bonus.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grpo_jax import losses
from grpo_jax.advantages import at_last, discounted_returns, group
from grpo_jax.losses import kl
from grpo_jax.presets.choices import chosen, corrections, spread, whitened, whole_sequence


def advantages(
    estimator: str,
    rewards: Float[Array, "N"],
    group_ids: Int[Array, "N"],
    mask: Bool[Array, "N T"],
    *,
    clip_range: tuple[float, float] | None = (-10, 10),
    gamma: float = 1.0,
    no_std_norm: bool = False,
    init_coef: float = 0.01,
    old_logps: Float[Array, "N T"] | None = None,
    ref_logps: Float[Array, "N T"] | None = None,
    kl_estimator: str = "k1",
) -> Float[Array, "N T"]:
    """Advantages on the decisions: the compared reward, less the KL to come, and whitened where the estimator says so.

    estimator: "group_norm" (r - mean) / (std + 1e-9) with std over n - 1, "dr_grpo" r - mean, "rloo"; and
    whitened over all decisions (variance over n, at least 1e-8; no_std_norm: only less the mean) "reinforce_baseline"
    r - mean and "reinforce" r, which alone heeds gamma. A group of one, which OpenRLHF refuses, has 0 less the KL.
    clip_range: bounds, not on the reward as its name there says, but on what is left of it after the comparison.
    ref_logps: then init_coef times the KL estimate (`old_logps` against them) is taken off each decision's reward.
    Raises: ValueError for other names, ref_logps without old_logps.
    """
    mask, rewards = jnp.asarray(mask).astype(bool), jnp.asarray(rewards).astype(jnp.float32)
    compared = ~jnp.isnan(rewards) & (jnp.asarray(group_ids) >= 0)
    estimators = {
        "group_norm": lambda: group.group_z_score(rewards, group_ids, epsilon=1e-9),
        "dr_grpo": lambda: group.group_centered(rewards, group_ids),
        "reinforce_baseline": lambda: group.group_centered(rewards, group_ids),
        "rloo": lambda: group.leave_one_out(rewards, group_ids),
        "reinforce": lambda: jnp.where(compared, rewards, 0),
    }
    shaped = chosen("advantage estimator", estimator, estimators)()
    shaped = at_last(shaped if clip_range is None else jnp.clip(shaped, *clip_range), mask)
    if ref_logps is not None:
        if old_logps is None:
            raise ValueError("with ref_logps there is a KL term in the reward, which needs old_logps too: give both")
        shaped = shaped - init_coef * jnp.where(mask, _approx_kl(old_logps, ref_logps, kl_estimator), 0)
    counts = mask & compared[:, None]
    onwards = discounted_returns(
        jnp.where(counts, shaped, 0), jnp.ones_like(mask), gamma=gamma if estimator == "reinforce" else 1.0
    )
    if estimator not in ("reinforce", "reinforce_baseline"):
        return jnp.where(counts, onwards, 0)
    return whitened(onwards, counts, scale=not no_std_norm)


def loss(
    logps: Float[Array, "N T"],
    old_logps: Float[Array, "N T"],
    advantages: Float[Array, "N"] | Float[Array, "N T"],
    mask: Bool[Array, "N T"],
    *,
    policy_loss_type: str = "ppo",
    eps_clip: float = 0.2,
    eps_clip_low_high: tuple[float, float] | None = None,
    dual_clip: float | None = None,
    is_weights: Float[Array, "N T"] | float = 1.0,
    init_coef: float = 0.01,
    estimator: str = "k1",
    ref_logps: Float[Array, "N T"] | None = None,
) -> Float[Array, ""]:
    """The clipped surrogate times is_weights (`sampler_weights`), and with ref_logps init_coef times the KL term.

    policy_loss_type: "ppo", the mean over tokens; "gspo", with the sequence's ratio, over sequences (the KL term over
    tokens still), which under a correction takes the sampler's log-probs as old_logps and no is_weights.
    eps_clip_low_high: None for eps_clip on both sides. estimator: "k1", "k2", "k3", each within [-10, 10].
    Raises: ValueError for other names.
    """
    mask = jnp.asarray(mask).astype(bool)
    ratios = {
        "ppo": lambda: losses.token_ratio(logps, old_logps),
        "gspo": lambda: whole_sequence(logps, old_logps, mask),
    }
    ratio = chosen("policy_loss_type", policy_loss_type, ratios)()
    low, high = (eps_clip, eps_clip) if eps_clip_low_high is None else eps_clip_low_high
    each = losses.ppo_clip(ratio, spread(advantages, mask), low=low, high=high, dual=dual_clip)
    once = jnp.ones(len(mask))
    tokens = losses.token_mean(once, mask)
    weights = tokens if policy_loss_type == "ppo" else losses.sequence_mean(once, mask)
    total = losses.weighted_sum(each * jnp.where(mask, is_weights, 0), weights)
    if ref_logps is None:
        return total
    return total + init_coef * losses.weighted_sum(_approx_kl(logps, ref_logps, estimator), tokens)


def sampler_weights(
    old_logps: Float[Array, "N T"],
    rollout_logps: Float[Array, "N T"],
    mask: Bool[Array, "N T"],
    *,
    is_correction_type: str = "tis",
    is_correction_threshold: tuple[float, float] = (0.5, 5.0),
) -> Float[Array, "N T"]:
    """Weights for what another program sampled (`--algo.advantage.is_correction_enable`, off by default).

    is_correction_type: "tis" each token's weight clipped to the threshold's range, "icepop" 0 outside of it,
    "seq-mask-tis" unclipped, but 0 for a sequence whose geometric mean is outside.
    """
    mask = jnp.asarray(mask).astype(bool)
    return corrections(is_correction_type, old_logps, rollout_logps, mask, *is_correction_threshold)


def _approx_kl(logps: Array, ref_logps: Array, estimator: str) -> Float[Array, "N T"]:
    terms = {"k1": kl.k1, "k2": kl.k2, "k3": kl.k3}
    return jnp.clip(chosen("KL estimator", estimator, terms)(logps, ref_logps), -10, 10)
