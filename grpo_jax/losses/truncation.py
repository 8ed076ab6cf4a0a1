"""Completions that ran out of budget: which of them the update leaves out.

Never: use the mask as it is. Always: `without_truncated`. Some: `conditionally_masked`.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def conditionally_masked(
    truncated: Bool[Array, "N"],
    plausible: Bool[Array, "N"],
    repeated: Bool[Array, "N"],
    uniforms: Float[Array, "N"],
    *,
    probability: float = 0.1,
) -> Bool[Array, "N"]:
    """MicroCoder-GRPO's M_i: truncated, not judged wrong, not repeating itself, and drawn with `probability`.

    M_i = truncated_i and plausible_i and not repeated_i and u_i < probability. The ADVANTAGE of these rows is set to 0,
    after group statistics over all rows; the denominators of the loss still count them.

    uniforms: one draw in [0, 1) per completion, kept for all updates on it. probability: the paper tries 0.1 to 0.3;
    0 masks nothing, and 1 with all rows plausible and none repeated is `without_truncated`.
    Raises: ValueError for shapes that differ or a probability outside [0, 1].
    Source: arXiv:2603.07777.
    """
    shapes = {jnp.shape(x) for x in (truncated, plausible, repeated, uniforms)}
    if len(shapes) > 1 or len(next(iter(shapes))) != 1:
        raise ValueError(
            f"truncated, plausible, repeated and uniforms have one entry per row [N], got {sorted(shapes)}"
        )
    if isinstance(probability, (int, float)) and not 0 <= probability <= 1:
        raise ValueError(f"probability lies in [0, 1], got {probability}")
    truncated, plausible, repeated = (jnp.asarray(x).astype(bool) for x in (truncated, plausible, repeated))
    return truncated & plausible & ~repeated & (jnp.asarray(uniforms) < probability)


def repeats(tokens: Int[Array, "N T"], lengths: Int[Array, "N"], *, window: int = 128) -> Bool[Array, "N"]:
    """Whether a completion's last `window` tokens are the `window` tokens before them.

    An exact match, token by token; False for fewer than 2 window tokens. Details reconstructed from the description.

    lengths: real tokens of each row, which come first.
    Raises: ValueError for a window below 1 or lengths that do not fit the tokens.
    Source: arXiv:2603.07777.
    """
    tokens, lengths = jnp.asarray(tokens), jnp.asarray(lengths)
    if tokens.ndim != 2 or lengths.shape != tokens.shape[:1]:
        raise ValueError(
            f"repeats needs tokens [N, T] and one length per row, got {list(tokens.shape)} and {list(lengths.shape)}"
        )
    if not window >= 1:
        raise ValueError(f"window is a number of tokens, at least 1, got {window}")
    if tokens.shape[1] < 2 * window:
        return jnp.zeros(lengths.shape, bool)
    places = jnp.arange(tokens.shape[1])
    same = jnp.concatenate([jnp.zeros((len(tokens), window), bool), tokens[:, window:] == tokens[:, :-window]], axis=1)
    last = (places >= lengths[:, None] - window) & (places < lengths[:, None])
    return (lengths >= 2 * window) & jnp.all(same | ~last, axis=1)
