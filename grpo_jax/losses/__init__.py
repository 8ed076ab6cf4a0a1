"""Log-probs and advantages in, losses out: pure functions over plain arrays, for any trainer.

    ratio = losses.token_ratio(logps, old_logps)                              # [N, T]
    loss = losses.ppo_clip(ratio, advantages) + beta * losses.kl.k3(logps, ref_logps)
    losses.weighted_sum(loss, losses.token_mean(weights, mask))               # the scalar to differentiate

A mask is data, and it acts where the loss is summed: NaN under it reaches neither the loss nor its gradient.
"""

from grpo_jax.losses import kl
from grpo_jax.losses.aggregation import (
    fixed_length,
    sequence_mean,
    sequence_sum,
    token_mean,
    weighted_sum,
    without_truncated,
)
from grpo_jax.losses.logprobs import chunk_length, chunked_logps
from grpo_jax.losses.mismatch import sampler_gap, truncated_importance
from grpo_jax.losses.ratios import sequence_product, sequence_ratio, token_ratio, unit_ratio
from grpo_jax.losses.surrogates import clip_events, ppo_clip, reinforce

__all__ = [
    "chunk_length",
    "chunked_logps",
    "clip_events",
    "fixed_length",
    "kl",
    "ppo_clip",
    "reinforce",
    "sampler_gap",
    "sequence_mean",
    "sequence_product",
    "sequence_ratio",
    "sequence_sum",
    "token_mean",
    "token_ratio",
    "truncated_importance",
    "unit_ratio",
    "weighted_sum",
    "without_truncated",
]
