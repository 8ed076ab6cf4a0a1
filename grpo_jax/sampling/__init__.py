"""Groups of completions, made in-graph."""

from grpo_jax.sampling.decoding import Cells, Drawn, draw
from grpo_jax.sampling.language_model import LanguageModel, cast
from grpo_jax.sampling.requests import bucket

__all__ = ["Cells", "Drawn", "LanguageModel", "bucket", "cast", "draw"]
