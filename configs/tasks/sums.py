"""Two-digit addition with a reward that is a JAX function of tokens, so that whole training steps are one program."""

import jax.numpy as jnp

from grpo_jax.data import addition
from grpo_jax.rewards import in_graph


def problems(**options):
    """The built-in task, with the sum also as a number: in-graph rewards read columns of numbers, not text."""
    return tuple([{**row, "sum": int(row["answer"])} for row in rows] for rows in addition(**options))


@in_graph
def exact_sum(tokens, lengths, finished, sum):
    """1 if the completion is the sum in decimal digits and then stops; else 0. Tokens are bytes."""
    at, digits = jnp.arange(tokens.shape[1]), tokens - ord("0")
    written = at < (lengths - finished)[:, None]  # the stop token is no digit
    number = jnp.zeros(len(tokens), jnp.int32)
    for t in range(tokens.shape[1]):
        number = jnp.where(written[:, t], 10 * number + digits[:, t], number)
    legible = jnp.all(((digits >= 0) & (digits <= 9)) | ~written, axis=1) & written[:, 0] & (digits[:, 0] > 0)
    return (legible & finished & (number == sum)).astype(jnp.float32)
