"""What a language model says of every decision of a batch: log-probs without logits, the prompt once per group."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from grpo_jax.losses import chunked_logps
from grpo_jax.models.config import TransformerConfig
from grpo_jax.models.kernels import on_tpu
from grpo_jax.models.sharding import parts
from grpo_jax.models.transformer import merge
from grpo_jax.types import Batch, Decisions, PyTree

TO_SPARE = 2**26  # bytes
LOGITS = 7 * 2**22  # bytes at a time, on one TPU core: fast memory (128 MiB on v5e, v6e) then holds hidden states too


def evaluate(
    graphdef, params: PyTree, rows: Batch, *, wants: Sequence[str] = (), remat: bool | None = None
) -> Decisions:
    """log pi(decision | context, earlier decisions) at every row's temperature.

    Rows lie in C equal runs, one run per context: row n stands under `rows.contexts[n // (N / C)]`. A context goes
    through the network once, forward and backward, whatever the number of its rows.

    rows: N rows of T decisions. wants: "entropy" (nats, of the distribution at the row's temperature). remat: whether
    layers keep only their input for the backward pass; by default where keeping more would outweigh the parameters.
    Returns logps [N, T] and the wanted statistics, float32; values beyond a row's length are finite and mean nothing.
    Raises: ValueError for a statistic that a language model does not know, or rows that are not in equal runs.
    """
    unknown = set(wants) - {"entropy"}
    if unknown:
        raise ValueError(f'a language model offers the statistics ["entropy"], but {sorted(unknown)} are wanted')
    n, t = rows.completions.shape
    c = rows.contexts.tokens.shape[0]
    if n % c:
        raise ValueError(f"rows must lie in equal runs under their contexts, got {n} rows under {c} contexts")
    g = n // c
    model = merge(graphdef, params)
    before = jnp.maximum(rows.contexts.lengths - 1, 0)
    last = jnp.take_along_axis(rows.contexts.tokens, before[:, None], axis=1)
    targets = rows.completions.reshape(c, g, t)
    inputs = jnp.concatenate([jnp.broadcast_to(last[:, :, None], (c, g, 1)), targets[..., :-1]], axis=-1)
    tokens = c * (rows.contexts.tokens.shape[1] + g * t)
    remat = outweighs(model.config, tokens, params) if remat is None else remat
    hidden = model(rows.contexts.tokens, before, inputs, remat=remat)
    logps, stats = chunked_logps(
        hidden,
        model.head(),
        targets,
        temperature=rows.temperature.reshape(c, g),
        softcap=model.config.final_softcap,
        entropy="entropy" in wants,
        chunk=in_fast_memory(n * t) if on_tpu() else None,
    )
    flat = jax.tree.map(lambda x: x.reshape(n, t), (logps, stats))
    return Decisions(logps=flat[0], stats=flat[1])


def outweighs(config: TransformerConfig, tokens: int, params: PyTree) -> bool:
    """Whether what layers keep of so many tokens takes more memory than training holds of the parameters anyway, and
    more than any device has to spare.

    Kept: input, queries, keys, values, what they read, its sum with the input, gate and up. Held: float32 weights,
    gradient and two moments.
    """
    heads = 2 * config.head_dim * (config.num_heads + config.num_kv_heads)
    kept = config.num_layers * (2 * config.hidden_size + heads + 2 * config.intermediate_size)
    leaves = jax.tree.leaves(params)
    return tokens * kept * leaves[0].dtype.itemsize > max(16 * sum(x.size for x in leaves), TO_SPARE)


def in_fast_memory(decisions: int) -> int:
    """Tokens of the vocabulary whose float32 logits, of each device's part of so many decisions, take `LOGITS` bytes:
    whole tiles of them, and no fewer than keep the matrix unit busy.
    """
    here = decisions // math.prod(parts(name) for name in ("contexts", "tokens", "vocab"))
    return max(512, LOGITS // (4 * max(here, 1)) // 128 * 128)
