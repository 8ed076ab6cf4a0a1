"""What a language model says of every decision of a batch: log-probs without logits, the prompt once per group."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grpo_jax.losses import chunked_logps
from grpo_jax.models.config import TransformerConfig
from grpo_jax.models.exact import in_tiles
from grpo_jax.models.kernels import on_tpu
from grpo_jax.models.sharding import parts
from grpo_jax.models.transformer import Transformer, merge
from grpo_jax.types import Batch, Decisions, PyTree

TO_SPARE = 2**26  # bytes
# Bytes at a time on one TPU core, whose fast memory (128 MiB on v5e, v6e) then holds the logits of a chunk beside the
# hidden states of the decisions and their float32 gradients.
LOGITS = 7 * 2**21
STATES = 3 * 2**24


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
    turns, chunk = in_fast_memory(hidden) if on_tpu() and not model.config.exact else (1, None)

    def say(x: tuple[Array, Array, Array]) -> tuple[Array, dict[str, Array]]:
        return logps_of(model, *x, entropy="entropy" in wants, chunk=chunk)

    asked = hidden, targets, rows.temperature.reshape(c, g)
    if turns == 1:
        said = say(asked)
    else:
        runs = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(c, turns, g // turns, *x.shape[2:]), 0, 1), asked)
        said = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), jax.lax.map(say, runs))
    logps, stats = jax.tree.map(lambda x: x.reshape(n, t), said)
    return Decisions(logps=logps, stats=stats)


def logps_of(
    model: Transformer,
    hidden: Float[Array, "C G *T E"],
    targets: Int[Array, "C G *T"],
    temperature: Float[Array, "C G"],
    *,
    entropy: bool = False,
    chunk: int | None = None,
    axis: str = "C",
) -> tuple[Float[Array, "C G *T"], dict[str, Float[Array, "C G *T"]]]:
    """`chunked_logps` by a model's head. axis: what C is, a letter of `kernels.placement.LETTERS`."""
    head, options = model.head(), {"softcap": model.config.final_softcap}
    if not model.config.exact:
        return chunked_logps(hidden, head, targets, temperature=temperature, chunk=chunk, entropy=entropy, **options)
    by_token = temperature.reshape(*temperature.shape, *[1] * (targets.ndim - temperature.ndim))
    say = lambda function: in_tiles(function, hidden, targets, by_token, weights=head, axis=axis)  # noqa: E731
    logps, _ = say(partial(_of_one, **options))
    # the entropy by itself: compiled together, it would change the log-probs' last bits
    return logps, say(partial(_of_one, entropy=True, **options))[1] if entropy else {}


def _of_one(head: Array, hidden: Array, targets: Array, temperature: Array, **options: Any) -> tuple[Array, dict]:
    """Each decision as a row of one."""
    said = chunked_logps(hidden[..., None, :], head, targets[..., None], temperature=temperature, **options)
    return jax.tree.map(lambda x: x[..., 0], said)


def outweighs(config: TransformerConfig, tokens: int, params: PyTree) -> bool:
    """Whether what layers keep of so many tokens takes more memory than training holds of the parameters anyway, and
    more than any device has to spare.

    Kept: input, queries, keys, values, what they read; its sum with the input, gate and up too where arithmetic is not
    exact. Held: float32 weights, gradient and two moments.
    """
    heads = 2 * config.head_dim * (config.num_heads + config.num_kv_heads)
    after = 0 if config.exact else config.hidden_size + 2 * config.intermediate_size
    kept, leaves = config.num_layers * (config.hidden_size + heads + after), jax.tree.leaves(params)
    return tokens * kept * leaves[0].dtype.itemsize > max(16 * sum(x.size for x in leaves), TO_SPARE)


def in_fast_memory(hidden: Float[Array, "C G T E"]) -> tuple[int, int]:
    """In how many turns decisions are said, and tokens of the vocabulary at a time, so that `LOGITS` and `STATES` hold
    on each device: whole tiles of logits, and no fewer than keep the matrix unit busy.

    Every turn reads the head once more, so there are two at most, of half the rows of each context. Where hidden states
    would still not fit, they go through slow memory once for every chunk, and chunks are twice as large.
    """
    C, G, T, E = hidden.shape
    here = max(1, C * G * T // (parts("contexts") * parts("tokens")))
    states = here * E * (hidden.dtype.itemsize + 4)
    turns, logits = 1 if states <= STATES else 2, LOGITS * parts("vocab")
    if states > turns * STATES or G % turns:
        turns, logits = 1, 2 * logits
    return turns, max(512, logits // (4 * max(here // turns, 1)) // 128 * 128)
