"""The pieces of an iteration for people who write their own loop: load, sample groups, evaluate, step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from grpo_jax import models
from grpo_jax.sampling import LanguageModel, bucket
from grpo_jax.sampling.weights import arrange
from grpo_jax.training import assemble, step
from grpo_jax.training.step import Policy
from grpo_jax.types import Batch, Decisions, Key, Method, Prompt, PyTree, Request, Rollout

Model = assemble.Model


def load(path: str | Path, *, tokenizer: str | None = None, mesh: Any = None, exact: bool = False) -> Model:
    """A policy from a Hugging Face directory: config, graphdef, params (float32), tokenizer, mesh.

    exact: `sample_groups` and `evaluate` give the same log-probs to the bit, whatever the shapes, and take longer.
    Raises: ValueError or FileNotFoundError naming what is wrong with the directory.
    """
    model = assemble.load_model(path, tokenizer=tokenizer, mesh=mesh)
    return model.exact() if exact else model


def sample_groups(
    model: Model,
    prompts: Sequence[str | Sequence[Mapping[str, str]]],
    key: Key,
    *,
    group_size: int,
    max_new: int,
    temperature: float = 1.0,
    params: PyTree | None = None,
    **options: Any,
) -> tuple[Rollout, list[str]]:
    """`group_size` completions of each prompt, and their texts. Rows of one prompt lie side by side.

    params: instead of the model's own (after an update). options: top_k, top_p, min_p, min_new.
    """
    asked = [Prompt(i, text) for i, text in enumerate(prompts)]
    longest = max(len(model.tokenizer.encode_prompt(p.text)) for p in asked)
    width = bucket(longest) + group_size * max_new
    language = LanguageModel(
        graphdefs={"policy": model.graphdef},
        tokenizer=model.tokenizer,
        mesh=model.mesh,
        max_prompt=longest,
        max_new=max_new,
        tokens=len(asked) * width,
        temperature=temperature,
        options=options,
        arrangement=arrange(model.config, model.mesh, jax.tree.leaves(model.params)[0].dtype),
    )
    requests = [Request(p, count=group_size) for p in asked]
    rows = language.sample({"policy": model.params if params is None else params}, requests, key)
    return rows, language.text(rows)


def evaluate(model: Model, params: PyTree, rows: Rollout) -> Decisions:
    """Log-probs [N, T] and entropy [N, T] of a rollout's decisions under `params`; differentiable, in jit or not.

    The rows lie in equal runs under their contexts, as `sample_groups` returns them for prompts that differ.
    """
    return models.evaluate(model.graphdef, params, rows, wants=("entropy",))


def train_step(
    model: Model,
    method: Method,
    optimizer: optax.GradientTransformation,
    policy: Policy,
    rows: Rollout,
    advantages: Any,
) -> tuple[Policy, dict[str, Any]]:
    """One update with a method's objective on a rollout with its advantages [N, T], in one micro-batch. For `jax.jit`.

    policy: Policy(params, optimizer.init(params)). The first update after sampling: ratios are exactly 1.
    Returns the policy after the step and its numbers.
    """
    fields = {name: getattr(rows, name) for name in rows.__dataclass_fields__}
    batch = Batch(**fields, advantages=advantages, rewards=rows.scores)
    n, c = len(rows), rows.contexts.tokens.shape[0]
    order = np.arange(n, dtype=np.int32).reshape(1, c, n // c)

    def decisions(params: PyTree, rows: Batch) -> Decisions:
        return models.evaluate(model.graphdef, params, rows, wants=method.wants)

    return step.train_step(
        method, decisions, optimizer, model.mesh, policy, batch, None, order, np.int32(1), first=True
    )
