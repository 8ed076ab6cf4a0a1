"""Decoder-only transformers: a group shares its context; weights from and to Hugging Face; sharding."""

from grpo_jax.models.attention import softcap
from grpo_jax.models.cached import KeysValues
from grpo_jax.models.config import Rope, TransformerConfig, read_config
from grpo_jax.models.evaluate import evaluate
from grpo_jax.models.sharding import RULES, shardings
from grpo_jax.models.transformer import (
    Transformer,
    abstract,
    create,
    logical_axes,
    merge,
    split,
)
from grpo_jax.models.weights import export, load

__all__ = [
    "RULES",
    "KeysValues",
    "Rope",
    "Transformer",
    "TransformerConfig",
    "abstract",
    "create",
    "evaluate",
    "export",
    "load",
    "logical_axes",
    "merge",
    "read_config",
    "shardings",
    "softcap",
    "split",
]
