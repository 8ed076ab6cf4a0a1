"""Prompts and tokens: datasets as streams of prompts, tokenizers and chat templates, and a task made from a seed."""

from grpo_jax.data.arithmetic import addition, demonstrations
from grpo_jax.data.prompts import Pool
from grpo_jax.data.tokenizers import ByteTokenizer, HuggingFaceTokenizer, Tokenizer, load_tokenizer

__all__ = [
    "ByteTokenizer",
    "HuggingFaceTokenizer",
    "Pool",
    "Tokenizer",
    "addition",
    "demonstrations",
    "load_tokenizer",
]
