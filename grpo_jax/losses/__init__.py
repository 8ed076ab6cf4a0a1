"""Log-probs and advantages in, losses out: pure functions over plain arrays, for any trainer.

    ratio = losses.token_ratio(logps, old_logps)                              # [N, T]
    loss = losses.ppo_clip(ratio, advantages) + beta * losses.kl.k3(logps, ref_logps)
    losses.weighted_sum(loss, losses.token_mean(weights, mask))               # the scalar to differentiate

A mask is data, and it acts where the loss is summed: NaN under it reaches neither the loss nor its gradient.
docs/library.md lists all of them.
"""

from grpo_jax.losses import kl
from grpo_jax.losses.aggregation import (
    fixed_length,
    sequence_mean,
    sequence_sum,
    token_mean,
    unit_mean,
    weighted_sum,
    without_truncated,
)
from grpo_jax.losses.alignment import alignment_coefficients, group_alignment
from grpo_jax.losses.discriminative import (
    discriminative_loss,
    forward_divergence,
    kl_constraint,
    mean_clipped_ratio,
    mean_logp,
    mean_ratio,
    preference_weights,
)
from grpo_jax.losses.gaussian import (
    flow_transition,
    gaussian_kl,
    gaussian_logp,
    gaussian_ratio,
    normalized_gaussian_ratio,
)
from grpo_jax.losses.logprobs import chunked_logps
from grpo_jax.losses.mismatch import (
    banded,
    capped,
    drifted,
    importance_statistics,
    rejection_mask,
    sampler_gap,
    sequence_importance,
    token_importance,
    truncated_importance,
)
from grpo_jax.losses.off_policy import (
    advantage_aware_ratio,
    explanation_likelihood,
    shaped_probability,
    shaped_ratio,
    think_tuning,
)
from grpo_jax.losses.ratios import (
    sequence_product,
    sequence_ratio,
    token_ratio,
    unit_arithmetic,
    unit_geometric,
    unit_product,
    unit_ratio,
)
from grpo_jax.losses.regression import group_regression, sequence_log_ratio
from grpo_jax.losses.surrogates import cispo, clip_events, gmpo, ppo_clip, reinforce, sapo
from grpo_jax.losses.truncation import conditionally_masked, repeats

__all__ = [
    "advantage_aware_ratio",
    "alignment_coefficients",
    "banded",
    "capped",
    "chunked_logps",
    "cispo",
    "clip_events",
    "conditionally_masked",
    "discriminative_loss",
    "drifted",
    "explanation_likelihood",
    "fixed_length",
    "flow_transition",
    "forward_divergence",
    "gaussian_kl",
    "gaussian_logp",
    "gaussian_ratio",
    "gmpo",
    "group_alignment",
    "group_regression",
    "importance_statistics",
    "kl",
    "kl_constraint",
    "mean_clipped_ratio",
    "mean_logp",
    "mean_ratio",
    "normalized_gaussian_ratio",
    "ppo_clip",
    "preference_weights",
    "reinforce",
    "rejection_mask",
    "repeats",
    "sampler_gap",
    "sapo",
    "sequence_importance",
    "sequence_log_ratio",
    "sequence_mean",
    "sequence_product",
    "sequence_ratio",
    "sequence_sum",
    "shaped_probability",
    "shaped_ratio",
    "think_tuning",
    "token_importance",
    "token_mean",
    "token_ratio",
    "truncated_importance",
    "unit_arithmetic",
    "unit_geometric",
    "unit_mean",
    "unit_product",
    "unit_ratio",
    "weighted_sum",
    "without_truncated",
]
