"""Tabular policies for demonstrations: a row of logits per prompt, an action per completion."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def learn(
    loss: Callable[[Any, Any, Array], tuple[Array, Any]],
    params: Any,
    *,
    steps: int,
    rate: float,
    seeds: int,
    state: Any = (),
    observe: Callable[[Any, Any], Any] = lambda params, state: (),
    passes: int = 1,
) -> tuple[Any, Any, Any]:
    """Gradient descent, `steps` batches for each of `seeds` seeds at once.

    loss(params, state, key) -> (scalar, state): draws its own batch with the key from stop_gradient(params). With
    `passes` > 1 these are not the policy of the batch any more: take it from `state["behavior"]` then, where this
    function puts the parameters at the start of each batch if `state` is a dict with that key.
    Returns: parameters and state after the last step, and observe(params, state) before every step, [seeds, ...] each.
    """

    def batch(carry, key):
        params, state = carry
        seen = observe(params, state)
        if isinstance(state, dict) and "behavior" in state:
            state = {**state, "behavior": params}
        after = state
        for _ in range(passes):
            gradient, after = jax.grad(loss, has_aux=True)(params, state, key)
            params = jax.tree.map(lambda p, g: p - rate * g, params, gradient)
        return (params, after), seen

    def run(key):
        (last, after), seen = jax.lax.scan(batch, (params, state), jax.random.split(key, steps))
        return last, after, seen

    return jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), seeds))


def draw(logits: Float[Array, "B A"], group_size: int, key: Array) -> tuple[Int[Array, "N"], Int[Array, "N"]]:
    """`group_size` actions for each prompt: (group_ids, actions), rows of a prompt side by side."""
    actions = jax.random.categorical(key, jax.lax.stop_gradient(logits)[:, None], shape=(len(logits), group_size))
    return jnp.repeat(jnp.arange(len(logits)), group_size), actions.reshape(-1)


def logps(logits: Float[Array, "B A"], group_ids: Int[Array, "N"], actions: Int[Array, "N"]) -> Float[Array, "N"]:
    """log pi(action | prompt) of each row."""
    return jax.nn.log_softmax(logits)[group_ids, actions]
