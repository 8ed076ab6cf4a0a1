"""Supervised fine-tuning on given completions, as a method: nothing is sampled, every given decision is trained."""

from __future__ import annotations

import jax.numpy as jnp

from grpo_jax.methods.grpo import grpo
from grpo_jax.types import Method, Request


def sft(*, prompts: int, group_size: int = 1, completion_column: str = "completion") -> Method:
    """loss = -log pi(completion | prompt), mean over the tokens of the mini-batch (stop token included).

    completion_column: the dataset column that holds the completion's text.
    """

    def given(prompt):
        if completion_column not in prompt.columns:
            raise ValueError(
                f"supervised training reads the completion from the column {completion_column!r}, "
                f"but prompt {prompt.id} has {sorted(prompt.columns)}"
            )
        text = str(prompt.columns[completion_column])
        return Request(prompt, prefix=text, max_new=0, train_given=True, options={"score": False})

    def plan(state, draw, key):
        rows = yield [given(p) for p in draw(state, prompts)]
        return state.host, [rows]

    def advantage(batch, arrays, key):
        return batch.replace(advantages=batch.completion_mask.astype(jnp.float32)), arrays

    def objective(new, batch, arrays):
        return -new.logps, {}

    return grpo(prompts=prompts, group_size=group_size).replace(plan=plan, advantage=advantage, objective=objective)
