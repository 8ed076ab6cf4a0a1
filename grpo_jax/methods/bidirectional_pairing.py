"""Bidirectional pairing: train on one pair of prompts, of which one is rarely solved and the other rarely failed."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from grpo_jax.advantages.pairing import NORMS, pair_advantages, pair_z_score, success_bands
from grpo_jax.advantages.shaping import per_decision
from grpo_jax.methods.grpo import at_least, grpo, judged, mixed, sequence_mean, total_reward
from grpo_jax.types import Method, Request, State


def bidirectional_pairing(
    *,
    prompts: int,
    group_size: int,
    norm: str = "prompt_std",
    failure: float = 1.0,
    width: int = 2,
    candidates: int = 64,
    probe: int = 32,
    every: int = 0,
    max_rounds: int = 10,
    epsilon: float = 1e-6,
    **options,
) -> Method:
    """Once, `candidates` prompts a round are probed with `probe` completions each, until one succeeds at a rate within
    [1/G, width/G] and another fails at such a rate, G = group_size. From then on every step trains on these two alone,
    prompts / 2 groups of each; a step in which no group has both outcomes trains on nothing.

    Rewards are 0 or 1. failure: what a failure weighs beside a success. Under norm "prompt_std" it does nothing, see
    `pair_advantages`; under "role" the common outcome of each prompt weighs so much and both prompts share statistics,
    see `pair_z_score`. every: steps after which a new pair is looked for; 0: never, as in the paper. Without a pair in
    `max_rounds` rounds the old one stays; if there is none, the step trains on nothing.
    Raises: ValueError for an odd number of prompts, another norm, or a width that lets the bands meet.
    Source: arXiv:2602.03452; where weights enter (norm, failure) is reconstructed. One pool serves for both prompts.
    """
    if prompts % 2 or prompts < 2:
        raise ValueError(f"bidirectional_pairing fills a batch with copies of two prompts, got prompts {prompts}")
    if norm not in (*NORMS, "role"):
        raise ValueError(f"bidirectional_pairing's norm is one of {(*NORMS, 'role')}, got {norm!r}")
    success_bands(np.zeros(1), group_size=group_size, width=width)  # complains at once

    at_least(1, max_rounds=max_rounds, candidates=candidates, probe=probe)

    def select(state, pool, n, key):
        return [pool[i] for i in state.host["pair"]] if state.host["pair"] else pool.take(n)

    def plan(state, draw, key):
        pair, copies = state.host["pair"], prompts // 2
        if not pair or (every and state.step % every == 0):
            found: list = [None, None]
            for _ in range(max_rounds):
                asked = draw(state._replace(host={"pair": None}), candidates)
                rows = yield [Request(p, count=probe) for p in asked]
                rows = yield rows
                rates = np.array([judged(rows.of(p)).mean() if len(judged(rows.of(p))) else 0.0 for p in asked])
                for place, band in enumerate(success_bands(rates, group_size=group_size, width=width)):
                    found[place] = found[place] or next((p for p, inside in zip(asked, band) if inside), None)
                if all(found):
                    pair = [p.id for p in found]
                    break
        host = {"pair": pair}
        if not pair:
            return host, []
        both = draw(state._replace(host=host), 2)
        rows = yield [Request(p, count=group_size) for p in both for _ in range(copies)]
        rows = yield rows
        group = np.arange(len(rows)) // group_size
        rows = rows.with_columns(hard_prompt=group < copies, pair_copy=group % copies)
        return host, [rows] if any(map(mixed, rows.groups())) else []

    def advantage(batch, arrays, key):
        outcomes = total_reward(batch)
        if norm == "role":
            pairs = jnp.where(batch.group_ids < 0, -1, batch.columns["pair_copy"])
            scores = pair_z_score(outcomes, pairs, batch.columns["hard_prompt"], common=failure, epsilon=epsilon)
        else:
            scores = pair_advantages(outcomes, batch.group_ids, norm=norm, failure=failure, epsilon=epsilon)
        return batch.replace(advantages=per_decision(scores, batch.completion_mask)), arrays

    method = grpo(prompts=prompts, group_size=group_size, aggregate=sequence_mean, **options)
    return method.replace(init=lambda pool: State(0, {}, {"pair": None}), select=select, plan=plan, advantage=advantage)
