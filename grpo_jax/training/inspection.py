"""Nothing fails silently: what a rollout and a shaped batch are checked for, and the numbers they give. Host only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from grpo_jax.types import Batch, Request, Rollout

IMPROBABLE = -60.0  # two draws that agree with a log-probability below this (1e-26) were not independent


class RolloutError(RuntimeError):
    """A rollout that can only be the result of a mistake."""


class UpdateError(RuntimeError):
    """An update that would have destroyed the policy."""


def check_rollout(rows: Rollout, requests: Sequence[Request]) -> None:
    """Raise if the rows are not those asked for, if log-probs are not numbers, or if independent draws agree where that
    cannot be chance."""
    asked = [r for r in requests for _ in range(r.count)]
    if [r.prompt.id for r in asked] != rows.prompt_ids.tolist():
        raise RolloutError(
            f"sampling returns the rows of its requests in their order: {len(asked)} rows of the prompts "
            f"{_some([r.prompt.id for r in requests])} were asked for, got {len(rows)} of "
            f"{_some(rows.prompt_ids.tolist())}"
        )
    column = np.arange(rows.completions.shape[1])
    draws = np.array([r.max_new != 0 for r in asked])
    there = np.array([0 if r.prefix is None or isinstance(r.prefix, str) else len(r.prefix[1]) for r in asked])
    exists = (column < rows.lengths[:, None]) & draws[:, None]
    bad = (exists & ~np.isfinite(rows.sampler_logps)).any(axis=1)
    if bad.any():
        prompts = sorted({int(p) for p in rows.prompt_ids[bad]})
        raise RolloutError(
            f"the sampler's log-probs are not finite for {int(bad.sum())} rows, prompt ids {_some(prompts)}: "
            "the policy's weights or its activations have overflowed. Lower the learning rate, or set "
            "optimizer.clip_norm"
        )
    drawn = exists & (column >= there[:, None]) & ~np.isnan(rows.behavior_logps)
    logps = np.where(drawn, rows.behavior_logps, 0).sum(axis=1)
    seen: dict[tuple, int] = {}
    for row in np.flatnonzero(logps < IMPROBABLE):
        length, prompt = int(rows.lengths[row]), int(rows.prompt_ids[row])
        tokens = rows.completions[row, :length].tobytes()
        twin = seen.setdefault((prompt, int(rows.sampled_under[row]), int(drawn[row].sum()), tokens), row)
        if twin != row:
            raise RolloutError(
                f"two completions of prompt {prompt} (rows {twin} and {row}) are the same {length} tokens, although "
                f"one such draw has log-probability {logps[row]:.0f}: their random keys are not independent"
            )


def check_update(report: Mapping[str, Any], *, step: int, update: int) -> None:
    """Raise if the loss or the gradient of an update is not a number; the train step has not applied it."""
    if not (np.isfinite(report["loss"]) and np.isfinite(report["grad_norm"])):
        raise UpdateError(
            f"update {update} of step {step} has loss {float(report['loss'])} and gradient norm "
            f"{float(report['grad_norm'])}, and was not applied. Look at the rewards of this step, and lower the "
            "learning rate"
        )


def duplicates(rows: Rollout) -> float:
    """Share of rows in groups whose completion another row of their group has too."""
    groups, lengths, tokens = jax.device_get((rows.group_ids, rows.lengths, rows.completions))
    tokens = np.where(np.arange(tokens.shape[1]) < lengths[:, None], tokens, 0)
    keyed = np.concatenate([groups[:, None], lengths[:, None], tokens], axis=1)[groups >= 0]
    if not len(keyed):
        return 0.0
    _, inverse, count = np.unique(keyed, axis=0, return_inverse=True, return_counts=True)
    return float((count[inverse.reshape(-1)] > 1).mean())


def describe_batch(batch: Batch) -> tuple[dict[str, float], dict[str, Any]]:
    """The step's numbers before the update, and the ids of the prompts that a warning would name."""
    names = ("scores", "rewards", "lengths", "finished", "group_ids", "weights", "prompt_ids", "completion_mask")
    host = dict(zip(names, jax.device_get(tuple(getattr(batch, name) for name in names))))
    real = host["prompt_ids"] >= 0
    groups, weights = host["group_ids"][real], np.asarray(batch.channel_weights or (1.0,) * host["rewards"].shape[1])
    rewards, lengths = host["rewards"][real], host["lengths"][real]
    applies = ~np.isnan(rewards).all(axis=1) if rewards.shape[1] else np.zeros(len(rewards), bool)
    total = np.where(applies, np.nansum(rewards * weights, axis=1), np.nan) if rewards.shape[1] else np.zeros(0)
    numbers: dict[str, float] = {}
    if applies.any():
        numbers |= {"reward": float(np.nanmean(total)), "reward_std": float(np.nanstd(total))}
    for k, channel in enumerate(batch.channels):
        column = host["scores"][real][:, k]
        if not np.isnan(column).all():
            numbers[f"reward/{channel}"] = float(np.nanmean(column))
            numbers[f"reward_std/{channel}"] = float(np.nanstd(column))
    silent: list[int] = []
    if rewards.shape[1] and (groups >= 0).any():
        names, first = np.unique(groups[groups >= 0], return_index=True)
        ids = host["prompt_ids"][real][groups >= 0][first]
        for group, prompt in zip(names, ids):
            members = total[(groups == group) & applies]
            if not len(members) or members.max() == members.min():
                silent.append(int(prompt))
        numbers["no_signal"] = len(silent) / max(len(names), 1)
    numbers |= {
        "length_mean": float(lengths.mean()),
        "length_max": float(lengths.max()),
        "truncated": float(1 - host["finished"][real].mean()),
        "empty": float((~host["completion_mask"][real].any(axis=1)).mean()),
        "duplicates": duplicates(batch),
        "rows": float(real.sum()),
    }
    return numbers, {"no_signal": silent}


def _some(ids: list[int], most: int = 8) -> str:
    return ", ".join(map(str, ids[:most])) + (f" and {len(ids) - most} more" if len(ids) > most else "")
