"""Synthetic applications: a supervised policy, then GRPO (G = 8, no division by the std) on the four-part reward."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.demonstrations import Row, bandit
from grpo_jax import losses
from grpo_jax.advantages.group import group_centered
from grpo_jax.advantages.shaping import combine
from grpo_jax.methods.resume_reward import WEIGHTS

CLAIM = "mild penalties keep the supervised accuracy or better with stable classes, harsh ones drift to one label"
TASK = Path(__file__).parents[2] / "configs/tasks/resumes.py"
STATUS = ("REJECTED", "SELECTED")
STEPS, RATE, BATCH, GROUP_SIZE = 300, 0.3, 16, 8


def load():
    spec = importlib.util.spec_from_file_location("resumes", TASK)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def features(resumes, rows):
    """What the policy sees: the share of the wanted skills and the years, each in one-hot form."""
    share = [len(set(r["job_skills"]) & set(r["candidate_skills"])) for r in rows]
    years = [(0, 1, 3, 5, 10).index(resumes.years(r["note"])) for r in rows]
    return np.concatenate([np.eye(4)[share], np.eye(5)[years]], axis=1)


def said(params, x):
    """Log-probs of the 22 completions, a status and a score each: [B, 22], the status first."""
    status, score = jax.nn.log_softmax(x @ params["status"]), jax.nn.log_softmax(x @ params["score"])
    return (status[:, :, None] + score[:, None]).reshape(len(x), -1)


def supervised(x, rows):
    """Maximum likelihood of the recorded decision and score, by gradient descent."""
    y = jnp.array([11 * STATUS.index(r["status"]) + r["overall_score"] // 10 for r in rows])
    slope = jax.grad(lambda params: -said(params, x)[jnp.arange(len(x)), y].mean())
    params = {"status": jnp.zeros((9, 2)), "score": jnp.zeros((9, 11))}
    return jax.lax.fori_loop(0, 300, lambda _, p: jax.tree.map(lambda a, g: a - g, p, slope(p)), params)


def scored(table, rows):
    """The weighted reward of every completion for every record, [B, 22], by the reward function itself."""
    texts = [f'{{"status":"{status}","score":{10 * k}}}' for status in STATUS for k in range(11)]
    columns = {name: [r[name] for r in rows for _ in texts] for name in rows[0]}
    parts = table([None] * len(rows) * 22, texts * len(rows), **columns).channels
    return combine(np.stack([parts[name] for name in WEIGHTS], axis=1), list(WEIGHTS.values())).reshape(-1, 22)


def learn(start, x, rewards, kl, seeds: int):
    """W runs side by side, with rewards [W, records, 22] and kl [W]: their parameters, [S, W, ...]."""

    def one(params, rewards, kl, rows, key):
        logits = said(params, x[rows])
        groups, actions = bandit.draw(logits, GROUP_SIZE, key)
        logps = bandit.logps(logits, groups, actions)
        reference = bandit.logps(said(start, x[rows]), groups, actions)
        advantages = group_centered(rewards[rows][groups, actions], groups)
        return (losses.reinforce(logps, advantages) + kl * losses.kl.k3(logps, reference)).mean()

    def loss(params, state, key):
        own, *keys = jax.random.split(key, 1 + len(kl))
        rows = jax.random.choice(own, len(x), (BATCH,), replace=False)
        return jax.vmap(one, (0, 0, 0, None, 0))(params, rewards, kl, rows, jnp.stack(keys)).sum(), state

    params = jax.tree.map(lambda p: jnp.stack([p] * len(kl)), start)
    return bandit.learn(loss, params, steps=STEPS, rate=RATE, seeds=seeds)[0]


def measured(params, x, rows):
    """Accuracy, recall and precision of SELECTED, and its share beyond the records', of sampled decisions."""
    selects = np.asarray(jax.nn.softmax(x @ params["status"]))[..., 1]
    truth = np.array([r["status"] == "SELECTED" for r in rows])
    hits = (selects * truth).sum(-1)
    accuracy = np.where(truth, selects, 1 - selects).mean(-1)
    return accuracy, hits / truth.sum(), hits / selects.sum(-1), selects.mean(-1) - truth.mean()


def demonstrate(seeds: int) -> list[Row]:
    resumes = load()
    train, held_out = resumes.records(count=600, held_out=300)
    x, unseen = (jnp.float32(features(resumes, rows)) for rows in (train, held_out))
    start = supervised(x, train)
    before = [np.full(seeds, m) for m in measured(start, unseen, held_out)]

    gentle, harsh = scored(resumes.gentle, train), scored(resumes.aggressive, train)
    right = jnp.array([[float(r["status"] == s) for s in STATUS for _ in range(11)] for r in train])
    params = learn(start, x, jnp.stack([gentle, harsh, gentle, right]), jnp.array([0.1, 0.1, 0.0, 0.1]), seeds)
    mild, strict, free, plain = zip(*[m.T for m in measured(params, unseen, held_out)])
    return [
        Row("accuracy", before[0], mild[0], ">", "supervised"),
        Row("accuracy", plain[0], mild[0], "", "grpo on right/wrong"),
        Row("accuracy", strict[0], mild[0], "", "harsh table"),
        Row("accuracy", free[0], mild[0], "", "without KL"),
        Row("recall of SELECTED", before[1], mild[1], "", "supervised"),
        Row("precision of SELECTED", before[2], mild[2], "", "supervised"),
        Row("share SELECTED beyond the records'", before[3], mild[3], "=", "supervised"),
        Row("distance of that share from 0", np.abs(strict[3]), np.abs(mild[3]), "<", "harsh table"),
    ]
