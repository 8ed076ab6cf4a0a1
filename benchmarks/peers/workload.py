"""What every project is measured on: models, prompts, shapes. Seeded, and nothing but numpy is needed to read it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

MODELS_DIRECTORY = Path(os.environ.get("BENCH_MODELS", "~/.cache/grpo_bench/workload")).expanduser()
PAD_ID, EOS_ID = 0, 1
SPECIALS = ("<pad>", "<eos>", "<unk>")  # no BOS: a stack that puts one before a prompt would compute another shape
LEARNING_RATE, CLIP, BETA, CLIP_NORM = 1e-6, 0.2, 0.04, 1.0
STEPS = 4  # iterations of an end-to-end run


class Sizes(NamedTuple):
    """A Qwen2 with tied embeddings."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    vocabulary: int

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def kv_width(self) -> int:
        return self.head_dim * self.kv_heads

    @property
    def body(self) -> int:
        """Weights of the matrices of all layers."""
        return self.layers * (2 * self.hidden * (self.hidden + self.kv_width) + 3 * self.hidden * self.mlp)

    @property
    def head(self) -> int:
        return self.hidden * self.vocabulary

    @property
    def parameters(self) -> int:
        biases_and_norms = self.layers * (3 * self.hidden + 2 * self.kv_width) + self.hidden
        return self.body + self.head + biases_and_norms


class Shape(NamedTuple):
    """A batch: prompts of so many tokens, completions per prompt, new tokens of each."""

    prompts: int
    prompt: int
    group: int
    new: int

    @property
    def rows(self) -> int:
        return self.prompts * self.group

    def changed(self, options: Mapping[str, str]) -> Shape:
        """The same with the fields that `options` names."""
        return self._replace(**{name: int(options[name]) for name in self._fields if name in options})


MODELS = {
    "small": Sizes(256, 8, 8, 2, 1024, 4096),
    "smallv32k": Sizes(256, 8, 8, 2, 1024, 32768),  # minus `small`: what the vocabulary costs
    "large": Sizes(512, 12, 8, 2, 2048, 32768),
    "qwen1.5b": Sizes(1536, 28, 12, 2, 8960, 151936),  # the shapes of Qwen2.5-1.5B
}
SHAPES = {
    "sampleA": Shape(8, 128, 8, 128),
    "sampleB": Shape(8, 512, 16, 64),
    "update": Shape(8, 128, 8, 128),
    "e2e": Shape(8, 128, 8, 128),
    "recompile": Shape(8, 128, 8, 128),
    "gap": Shape(8, 128, 8, 128),
    "ragged": Shape(8, 128, 16, 512),
    "decode": Shape(16, 512, 16, 512),
    "mfu": Shape(16, 512, 16, 512),
}
PROMPTS = {128: 64, 512: 64}  # length in tokens → how many are stored


def path(model: str) -> Path:
    return MODELS_DIRECTORY / model


def prompts(model: str, shape: Shape, *, count: int | None = None) -> list[dict]:
    """{"text", "ids"} of each prompt. Text and ids are the same tokens, one for every word, `shape.prompt` of them."""
    stored = json.loads((path(model) / "prompts.json").read_text())
    length = min(k for k in PROMPTS if k >= shape.prompt)
    chosen = stored[str(length)][: shape.prompts if count is None else count]
    return [{"text": cut(p["text"], shape.prompt), "ids": p["ids"][: shape.prompt]} for p in chosen]


def cut(text: str, words: int) -> str:
    """The first words of a prompt."""
    return "".join(" " + word for word in text.split()[:words])


def update_batch(model: str, shape: Shape) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Prompt ids [N, P] (rows of one prompt side by side), completion ids [N, T] and advantages [N]."""
    rng = np.random.default_rng(0)
    ids = np.array([p["ids"] for p in prompts(model, shape)], np.int32).repeat(shape.group, axis=0)
    completions = rng.integers(len(SPECIALS), MODELS[model].vocabulary, (shape.rows, shape.new), dtype=np.int32)
    return ids, completions, rng.standard_normal(shape.rows).astype(np.float32)


def ragged_lengths(rows: int, most: int, *, seed: int = 0) -> np.ndarray:
    """Log-normal lengths [rows] in [1, most], log-deviation 1, with a mean of `most` / 4 after the cut at `most`."""
    drawn = np.exp(np.random.default_rng(seed).standard_normal(rows))
    low, high = 0.0, float(most)
    for _ in range(60):
        scale = (low + high) / 2
        low, high = (scale, high) if np.clip(scale * drawn, 1, most).mean() < most / 4 else (low, scale)
    return np.clip(np.rint(high * drawn), 1, most).astype(int)


def even_lengths(lengths: np.ndarray) -> np.ndarray:
    """As many tokens in as many rows, all of them of the mean length to within one token."""
    whole, more = divmod(int(lengths.sum()), len(lengths))
    return whole + (np.arange(len(lengths)) < more).astype(int)


def vowel_share(text: str) -> float:
    """The reward: dense, cheap, and different within a group."""
    return sum(letter in "aeiou" for letter in text) / max(1, len(text))


def shape_of(task: str, options: Mapping[str, str]) -> Shape:
    """The shape of a task, with what the options change of it."""
    shape = SHAPES[task].changed(options)
    if min(shape) < 1 or shape.prompt > max(PROMPTS) or shape.prompts > PROMPTS[max(PROMPTS)]:
        raise ValueError(
            f"{task} has prompts of 1 to {max(PROMPTS)} tokens, at most {PROMPTS[max(PROMPTS)]} of them, and at least "
            f"one completion of one token; got {shape}"
        )
    return shape
