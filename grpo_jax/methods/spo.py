"""SPO: one completion per prompt, compared with a tracker of the prompt's success rate instead of a group."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax import advantages, losses
from grpo_jax.advantages import tracker as tracking
from grpo_jax.methods.grpo import at_least, grpo, total_reward
from grpo_jax.types import Method, Prompt, Request, State

ROUNDING = 1e-6  # a sum of channels that should be 1 may miss it by this much
FORGETTING, WHITENING = ("adaptive", "constant"), ("sequence", "token")


def spo(
    *,
    prompts: int,
    group_size: int,
    rho: str = "adaptive",
    offline: int = 8,
    gamma: float = 0.0,
    explore: float = 0.05,
    half_life: float = 0.06,
    rho_min: float = tracking.RHO_MIN,
    rho_max: float = tracking.RHO_MAX,
    whiten_weight: str = "sequence",
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual: float = 10.0,
) -> Method:
    """A = r - v(prompt), whitened over the batch; prompts drawn where v is near 1/2. Rewards lie in [0, 1].

    There are no groups: prompts * group_size prompts are drawn, as many completions as GRPO would have, out of the
    whole pool (the published run offers 14000 candidates a step).
    Step 0 starts the tracker with `offline` completions of every prompt (0: with nothing). Each later step takes in the
    rewards of the one before: rho (alpha, beta) + (r, 1 - r).
    rho: "adaptive", 2^(-drift / half_life) within [rho_min, rho_max], the drift being that of the completion of the
    prompt's visit before, scored again by the present policy (the state keeps one completion with its log-probs for
    every prompt visited); "constant", rho_min. gamma, explore: of
    `tracker.prompt_weights`. whiten_weight: count rows once ("sequence") or by their tokens ("token").
    Raises: ValueError for another rho or whiten_weight, or a reward outside [0, 1].
    Source: arXiv:2509.13232 and its published code.
    """
    for name, value, known in (("rho", rho, FORGETTING), ("whiten_weight", whiten_weight, WHITENING)):
        if value not in known:
            raise ValueError(f"spo's {name} is one of {known}, got {value!r}")
    at_least(0, offline=offline, explore=explore, gamma=gamma)
    if not 0 <= rho_min <= rho_max <= 1:
        raise ValueError(f"spo keeps between rho_min and rho_max of its memory, in [0, 1], got {rho_min} and {rho_max}")

    def init(pool):
        ids, half = np.array([p.id for p in pool]), np.full(len(pool), 0.5, np.float32)
        return State(0, {}, {"ids": ids, "alpha": half, "beta": half, "pending": None, "last": {}})

    def select(state, pool, n, key):
        ids, table = state.host["ids"], tracking.Tracker(state.host["alpha"], state.host["beta"])
        weights = tracking.prompt_weights(table, gamma=gamma, explore=explore)
        few = n > len(ids)
        return [pool[int(ids[i])] for i in jax.random.choice(key, len(ids), (n,), few, weights / weights.sum())]

    def plan(state, draw, key):
        host = state.host
        if state.step == 0 and offline:
            host = yield from measured(host, draw(state, len(host["ids"])))
        elif host["pending"] is not None:
            host = yield from taken_in(host)
        rows = yield [Request(p) for p in draw(state._replace(host=host), prompts * group_size)]
        rows = yield rows
        success(rows)  # complains before anything is trained on them
        rate = tracking.success_rate(tracking.Tracker(host["alpha"], host["beta"]))
        rows = rows.with_columns(baseline=np.asarray(rate)[places(host, rows)])
        return {**host, "pending": rows}, [rows]

    def measured(host, everyone):
        """The tracker after `offline` completions of each prompt."""
        successes, trials = np.zeros((2, len(everyone)), np.float32)
        for start in range(0, len(everyone), prompts):
            rows = yield [Request(p, count=offline) for p in everyone[start : start + prompts]]
            rows = yield rows
            np.add.at(successes, places(host, rows), success(rows) > 0)
            np.add.at(trials, places(host, rows), ~np.isnan(success(rows)))
        table = tracking.tracker_init(successes, trials, rho_min=rho_min)
        return {**host, "alpha": np.asarray(table.alpha), "beta": np.asarray(table.beta)}

    def taken_in(host):
        """The tracker after the rows of the last step, which the policy has been updated with since."""
        rows, last, kept = host["pending"], host["last"], np.full(len(host["pending"]), rho_min, np.float32)
        if rho == "adaptive":
            drift, last = yield from moved(rows, last)
            kept = tracking.forgetting(drift, half_life=half_life, rho_min=rho_min, rho_max=rho_max)
        table = tracking.Tracker(host["alpha"], host["beta"])
        table = tracking.tracker_update(table, places(host, rows), success(rows), kept)
        return {**host, "alpha": np.asarray(table.alpha), "beta": np.asarray(table.beta), "last": last}

    def advantage(batch, arrays, key):
        lengths = batch.completion_mask.sum(axis=1) if whiten_weight == "token" else None
        rewards, baselines = total_reward(batch), batch.columns["baseline"]
        values = tracking.single_stream(rewards, baselines, batch.group_ids, lengths)
        return batch.replace(advantages=advantages.per_decision(values, batch.completion_mask)), arrays

    def objective(new, batch, arrays):
        ratio, a = losses.token_ratio(new.logps, batch.old.logps), batch.advantages
        loss = losses.ppo_clip(ratio, a, low=clip_low, high=clip_high, dual=dual)
        low, high = losses.clip_events(ratio, a, low=clip_low, high=clip_high)
        rate = jnp.broadcast_to(batch.columns["baseline"][:, None], ratio.shape)
        return loss, {"ratio": ratio, "clip_low": low, "clip_high": high, "tracked_rate": rate}

    seams = {"init": init, "select": select, "plan": plan, "advantage": advantage, "objective": objective}
    return grpo(prompts=prompts, group_size=1).replace(**seams)


def places(host, rows):
    """Where the tables hold the prompts of the rows."""
    return np.searchsorted(host["ids"], rows.prompt_ids)


def success(rows):
    """Rewards in [0, 1]; NaN where none applies."""
    rewards = rows.score()
    if (rewards < -ROUNDING).any() or (rewards > 1 + ROUNDING).any():
        raise ValueError(
            f"spo tracks success rates: rewards must lie in [0, 1], got {np.nanmin(rewards)} to {np.nanmax(rewards)}"
        )
    return np.clip(rewards, 0, 1)


def moved(rows, last):
    """How far the policy has moved on each prompt's completion of the visit before (0 at the first), and what it says
    of the present completions, for the next visit."""

    def again(i, tokens):
        context = rows.contexts.tokens[rows.sampled_under[i], : rows.contexts.lengths[rows.sampled_under[i]]]
        given = tokens, np.full(len(tokens), np.nan, np.float32)
        prompt, temperature = Prompt(int(rows.prompt_ids[i]), ""), float(rows.temperature[i])
        return Request(prompt, context=context, prefix=given, max_new=0, temperature=temperature)

    n, names = len(rows), [str(i) for i in rows.prompt_ids]
    present = [rows.completions[i, : rows.lengths[i]] for i in range(n)]
    before = [i for i in range(n) if names[i] in last]
    scored = yield [again(i, x) for i, x in enumerate(present)] + [again(i, last[names[i]][0]) for i in before]
    stored, now = np.full((2, n, scored.completions.shape[1]), np.nan, np.float32)
    for i, row in zip(before, scored.sampler_logps[n:]):
        logps = last[names[i]][1]
        stored[i, : len(logps)], now[i] = logps, row
    drift = tracking.completion_drift(stored, now, ~np.isnan(stored))
    said = zip(names, present, scored.sampler_logps)
    return drift, {**last, **{name: [tokens, logps[: len(tokens)]] for name, tokens, logps in said}}
