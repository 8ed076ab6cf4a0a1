"""Nothing fails silently: what a rollout and a shaped batch are checked for, and the numbers they give. Host only."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from grpo_jax.types import Batch, Rollout

IMPROBABLE = -60.0  # two draws that agree with a log-probability below this (1e-26) were not independent


class RolloutError(RuntimeError):
    """A rollout that can only be the result of a mistake."""


def check_rollout(rows: Rollout) -> None:
    """Raise if log-probs are not numbers, or if independent draws agree where that cannot be chance."""
    exists = np.arange(rows.completions.shape[1]) < rows.lengths[:, None]
    drawn = exists & ~np.isnan(rows.behavior_logps)
    bad = drawn & ~np.isfinite(rows.sampler_logps)
    if bad.any():
        prompts = sorted({int(p) for p in rows.prompt_ids[bad.any(axis=1)]})
        raise RolloutError(
            f"the sampler's log-probs are not finite for {int(bad.any(axis=1).sum())} rows, prompt ids {_some(prompts)}: "
            "the policy's weights or its activations have overflowed. Lower the learning rate or set optimizer.clip_norm"
        )
    logps = np.where(drawn, rows.behavior_logps, 0).sum(axis=1)
    for row in np.flatnonzero(logps < IMPROBABLE):
        twins = (rows.prompt_ids == rows.prompt_ids[row]) & (rows.sampled_under == rows.sampled_under[row])
        twins &= (rows.lengths == rows.lengths[row]) & (rows.completions == rows.completions[row]).all(axis=1)
        twins &= np.isnan(rows.behavior_logps).sum(axis=1) == np.isnan(rows.behavior_logps[row]).sum()
        if twins.sum() > 1:
            raise RolloutError(
                f"{int(twins.sum())} completions of prompt {int(rows.prompt_ids[row])} are the same {int(rows.lengths[row])} "
                f"tokens, although one such draw has log-probability {logps[row]:.0f}: their random keys are not independent"
            )


def duplicates(rows: Rollout) -> float:
    """Share of rows whose completion another row of their group has too."""
    keyed = np.concatenate([rows.group_ids[:, None], rows.lengths[:, None], rows.completions], axis=1)
    keyed = keyed[rows.group_ids >= 0]
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
    if applies.any():
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
        "rows": float(real.sum()),
    }
    return numbers, {"no_signal": silent}


def _some(ids: list[int], most: int = 8) -> str:
    return ", ".join(map(str, ids[:most])) + (f" and {len(ids) - most} more" if len(ids) > most else "")
