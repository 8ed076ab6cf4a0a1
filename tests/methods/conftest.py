"""Batches and rollouts that methods are tried on."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.types import Batch, Contexts, Decisions, Rollout

SETTINGS = {"prompts": 3, "group_size": 4, "max_new": 9}


def rollout(prompt_ids, *, group_ids=None, contexts=None, decisions: int = 4, scores=None, columns=None) -> Rollout:
    """Rows with nothing in them but who they belong to and how they score. contexts: (sampled, trained) of each row."""
    n = len(prompt_ids)
    floats, zeros = np.zeros((n, decisions), np.float32), np.zeros(n, np.int32)
    contexts = [(0, 0)] * n if contexts is None else contexts
    every = np.arange(1 + max(map(max, contexts)), dtype=np.int32)
    return Rollout(
        contexts=Contexts(tokens=every[:, None], lengths=np.ones_like(every)),
        sampled_under=np.array([a for a, _ in contexts], np.int32),
        trained_under=np.array([b for _, b in contexts], np.int32),
        completions=floats.astype(np.int32),
        lengths=zeros + decisions,
        completion_mask=floats == 0,
        behavior_logps=floats,
        sampler_logps=floats,
        finished=zeros == 0,
        temperature=np.ones(n, np.float32),
        prompt_ids=np.asarray(prompt_ids, np.int32),
        index=zeros,
        group_ids=np.asarray(zeros if group_ids is None else group_ids, np.int32),
        weights=np.ones(n, np.float32),
        update_ids=zeros - 1,
        scores=np.zeros((n, 0), np.float32) if scores is None else np.asarray(scores, np.float32),
        columns=columns or {},
        channels=() if scores is None else tuple(f"channel {k}" for k in range(np.shape(scores)[1])),
    )


def batch(
    rewards, *, groups=None, old=None, ref=None, mask=None, weights=None, channel_weights=(), plain=None
) -> Batch:
    """A batch of plain arrays. plain: rows that were sampled under the context that they are trained under."""
    rewards = np.asarray(rewards, np.float32)
    rewards = rewards[:, None] if rewards.ndim == 1 else rewards
    n = len(rewards)
    mask = np.ones((n, 2), bool) if mask is None else np.asarray(mask)
    plain = np.ones(n, bool) if plain is None else np.asarray(plain)
    rows = rollout(np.arange(n), group_ids=groups, contexts=[(int(not p), 0) for p in plain], decisions=mask.shape[1])
    fields = {name: getattr(rows, name) for name in rows.__dataclass_fields__}
    fields |= {
        "completion_mask": mask,
        "lengths": mask.sum(1),
        "weights": np.ones(n, np.float32) if weights is None else np.asarray(weights, np.float32),
        "scores": rewards,
        "channels": tuple(f"channel {k}" for k in range(rewards.shape[1])),
        "channel_weights": tuple(channel_weights),
    }
    said = {"old": old, "ref": ref}
    said = {k: Decisions(logps=np.asarray(v, np.float32)) for k, v in said.items() if v is not None}
    return jax.tree.map(jnp.asarray, Batch(**fields, rewards=rewards, **said))


class Ragged:
    """Groups of several sizes in a shuffled order, rows of several lengths (one empty), given decisions inside rows, a
    row in no group, weights of 0, 2 and 0.5, two reward channels of which one does not always apply."""

    def __init__(self, seed: int, *, binary: bool = False) -> None:
        draw = np.random.default_rng(seed)
        n, t = 17, 6
        self.groups = draw.permutation(np.repeat([0, 1, 2, 3, 4, -1], [5, 4, 3, 3, 1, 1]))
        self.lengths = np.concatenate([[0, t, 1], draw.integers(2, t + 1, n - 3)])
        self.mask = (np.arange(t) < self.lengths[:, None]) & (draw.random((n, t)) > 0.15)
        self.old = -draw.exponential(1.0, (n, t))
        self.new = self.old + draw.normal(0, 0.4, (n, t))
        self.ref = self.new + draw.normal(0, 0.6, (n, t))
        self.weights = np.concatenate([[1, 2, 0.5, 0], np.ones(n - 4)])
        self.weights = draw.permutation(self.weights)
        self.plain = draw.random(n) < 0.6
        self.rewards = draw.normal(size=(n, 2)).round(2)
        self.rewards[draw.random(n) < 0.3, 1] = np.nan
        self.rewards[self.groups == 2] = 0.85  # no spread
        self.channel_weights = (1.0, 0.5)
        if binary:
            self.rewards, self.channel_weights = draw.integers(0, 2, (n, 1)).astype(float), (1.0,)
        self.rewards[np.flatnonzero(self.groups == 1)[0]] = np.nan  # nothing applies
        self.total = np.nansum(self.rewards * np.array(self.channel_weights), axis=1)
        self.total[np.isnan(self.rewards).all(1)] = np.nan

    def batch(self) -> Batch:
        return batch(
            self.rewards,
            groups=self.groups,
            old=self.old,
            ref=self.ref,
            mask=self.mask,
            weights=self.weights,
            channel_weights=self.channel_weights,
            plain=self.plain,
        )


@pytest.fixture(autouse=True)
def quick_to_compile():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def make():
    return SimpleNamespace(rollout=rollout, batch=batch, ragged=Ragged, settings=SETTINGS)
