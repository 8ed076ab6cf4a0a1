"""A policy that is a table of logits, and rollouts of it made with numpy."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.types import Batch, Contexts, Decisions, Domain, Rollout

VOCABULARY, PROMPTS = 5, 16


def parameters(seed: int = 0) -> dict[str, jax.Array]:
    """Logits by the context's only token, and by the token before."""
    draw = np.random.default_rng(seed)
    shapes = {"context": (PROMPTS, VOCABULARY), "before": (VOCABULARY, VOCABULARY)}
    return {name: jnp.asarray(draw.normal(0, 1, shape), jnp.float32) for name, shape in shapes.items()}


def evaluate(params, rows, role="policy", wants=()) -> Decisions:
    """Rows lie in equal runs under their contexts."""
    n, c = rows.completions.shape[0], rows.contexts.tokens.shape[0]
    context = jnp.repeat(rows.contexts.tokens[:, 0], n // c)
    before = jnp.concatenate([jnp.zeros((n, 1), jnp.int32), rows.completions[:, :-1]], axis=1)
    logits = (params["context"][context][:, None] + params["before"][before]) / rows.temperature[:, None, None]
    every = jax.nn.log_softmax(logits)
    logps = jnp.take_along_axis(every, rows.completions[..., None], axis=-1)[..., 0]
    return Decisions(logps=logps, stats={"entropy": -jnp.sum(jnp.exp(every) * every, -1)} if "entropy" in wants else {})


def table_logps(params, context, tokens, temperature=1.0) -> np.ndarray:
    """The same in float64 for one completion."""
    table, before = (np.asarray(params[name], np.float64) for name in ("context", "before"))
    logits = (table[context] + before[np.concatenate([[0], tokens[:-1]]).astype(int)]) / temperature
    return (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[np.arange(len(tokens)), tokens]


def rollout(seed: int = 0, *, sizes=(4, 3, 4, 2, 4, 4), decisions: int = 6, hinted=()) -> Rollout:
    """Groups of these sizes, one context each, ragged lengths. Groups in `hinted` were sampled under another context.

    Behaviour is NaN on the first decision of every fifth row: it was given and is not trained.
    """
    draw = np.random.default_rng(seed)
    n, groups = sum(sizes), len(sizes)
    owner = np.repeat(np.arange(groups), sizes)
    lengths = draw.integers(1, decisions + 1, n).astype(np.int32)
    exists = np.arange(decisions) < lengths[:, None]
    drawn = exists & ~((np.arange(n) % 5 == 4)[:, None] & (np.arange(decisions) == 0))
    behavior = np.where(drawn, -draw.exponential(1.0, (n, decisions)), np.nan)
    return Rollout(
        contexts=Contexts(
            tokens=np.concatenate([np.arange(groups), PROMPTS - 1 - np.arange(groups)])[:, None].astype(np.int32),
            lengths=np.ones(2 * groups, np.int32),
        ),
        sampled_under=np.where(np.isin(owner, hinted), owner + groups, owner).astype(np.int32),
        trained_under=owner.astype(np.int32),
        completions=np.where(exists, draw.integers(0, VOCABULARY, (n, decisions)), 0).astype(np.int32),
        lengths=lengths,
        completion_mask=drawn,
        behavior_logps=behavior.astype(np.float32),
        sampler_logps=np.where(exists, -1.0, 0.0).astype(np.float32),
        finished=lengths < decisions,
        temperature=draw.choice([0.7, 1.0], n).astype(np.float32),
        prompt_ids=(100 + owner).astype(np.int32),
        index=np.concatenate([np.arange(s) for s in sizes]).astype(np.int32),
        group_ids=owner.astype(np.int32),
        weights=drawn.any(1).astype(np.float32),
        update_ids=np.full(n, -1, np.int32),
        scores=draw.integers(0, 2, (n, 1)).astype(np.float32),
        columns={"level": draw.normal(size=n).astype(np.float32)},
        channels=("exact",),
        channel_weights=(1.0,),
    )


def batch_of(rows: Rollout, seed: int = 0) -> Batch:
    """With rewards, advantages, and an `old` and a `ref` that are not those of `parameters`."""
    draw = np.random.default_rng(seed + 77)
    shape = rows.completions.shape
    noise = lambda: jnp.asarray(-draw.exponential(1.0, shape), jnp.float32)  # noqa: E731
    values = np.where(rows.completion_mask, draw.normal(size=(len(rows), 1)), 0).astype(np.float32)
    fields = {name: getattr(rows, name) for name in rows.__dataclass_fields__}
    return jax.tree.map(
        jnp.asarray,
        Batch(
            **fields,
            rewards=rows.scores,
            advantages=values,
            old=Decisions(logps=noise(), stats={"entropy": -noise()}),
            ref=Decisions(logps=noise()),
        ),
    )


@pytest.fixture
def toy():
    return SimpleNamespace(
        parameters=parameters,
        evaluate=evaluate,
        table_logps=table_logps,
        rollout=rollout,
        batch=batch_of,
        vocabulary=VOCABULARY,
        prompts=PROMPTS,
        domain=lambda sample: Domain(sample=sample, evaluate=evaluate, text=lambda rows: [""] * len(rows)),
    )
