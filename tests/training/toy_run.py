"""A run whose policy is a table and whose sampler is numpy, for tests of the iteration."""

import zlib

import jax
import numpy as np
import optax

from grpo_jax.methods.grpo import grpo
from grpo_jax.training.deal import Layout
from grpo_jax.training.loop import Run
from grpo_jax.training.mesh import make_mesh, replicate
from grpo_jax.training.step import Policy, begin
from grpo_jax.types import Contexts, Prompt, Rollout

T, VOCABULARY = 4, 5
MESH = make_mesh(data=1, devices=jax.devices()[:1])


class Pool:
    """Prompt i is the text str(i); `take` goes round."""

    def __init__(self, size=16):
        self.position, self.size = 0, size

    def take(self, n):
        ids = [(self.position + i) % self.size for i in range(n)]
        self.position += n
        return [self[i] for i in ids]

    def __getitem__(self, i):
        return Prompt(i, str(i), {"double": 2 * i})

    def __len__(self):
        return self.size


class Sampler:
    """Draws from the table with a key per (key, role, prompt, index); remembers what it was asked. 0 stops."""

    def __init__(self):
        self.asked = []

    def __call__(self, params, requests, key, numbers=None):
        self.asked.append(requests)
        (role,) = {r.role for r in requests}
        table, before = (np.asarray(params[role][name], np.float64) for name in ("context", "before"))
        words = jax.random.key_data(key).tolist()
        asked = [r for r in requests for _ in range(r.count)]
        tokens, logps = np.zeros((len(asked), T), np.int32), np.full((len(asked), T), np.nan, np.float32)
        lengths, index = np.zeros(len(asked), np.int32), np.zeros(len(asked), np.int32)
        for i, request in enumerate(asked):
            index[i] = numbers[role, request.prompt.id]
            numbers[role, request.prompt.id] += 1
            draw = np.random.default_rng([*words, zlib.crc32(role.encode()), request.prompt.id, index[i]])
            last = 0
            for t in range(T if request.max_new is None else request.max_new):
                logits = table[int(request.context or request.prompt.text)] + before[last]
                weights = np.exp(logits) / np.exp(logits).sum()
                last = tokens[i, t] = draw.choice(VOCABULARY, p=weights)
                logps[i, t], lengths[i] = np.log(weights[last]), t + 1
                if last == 0:
                    break
        under = [(int(r.context or r.prompt.text), int(r.train_context or r.context or r.prompt.text)) for r in asked]
        names = sorted({c for pair in under for c in pair})
        n, exists = len(asked), np.arange(T) < lengths[:, None]
        return Rollout(
            contexts=Contexts(tokens=np.array(names, np.int32)[:, None], lengths=np.ones(len(names), np.int32)),
            sampled_under=np.array([names.index(a) for a, _ in under], np.int32),
            trained_under=np.array([names.index(b) for _, b in under], np.int32),
            completions=tokens,
            lengths=lengths,
            completion_mask=exists,
            behavior_logps=logps,
            sampler_logps=np.where(exists, logps, 0),
            finished=lengths < T,
            temperature=np.ones(n, np.float32),
            prompt_ids=np.array([r.prompt.id for r in asked], np.int32),
            index=index,
            group_ids=np.repeat(np.arange(len(requests)), [r.count for r in requests]).astype(np.int32),
            weights=np.ones(n, np.float32),
            update_ids=np.full(n, -1, np.int32),
            scores=np.zeros((n, 0), np.float32),
            role=role,
        )


class Verifier:
    """The share of the token 1; remembers the rows that it saw, and under which prompts and step."""

    def __init__(self):
        self.seen = []

    def __call__(self, prompts, rows, texts, step):
        assert [p.id for p in prompts] == rows.prompt_ids.tolist() and len(texts) == len(rows)
        self.seen.append((step, rows))
        share = (rows.completions == 1).sum(1) / rows.lengths
        return rows.replace(scores=share[:, None].astype(np.float32), channels=("ones",), channel_weights=(1.0,))


def make(toy, method, *, prompts=4, group_size=3, updates=1, seed=0, optimizer=None, sweeps=1, roles=None):
    optimizer = optimizer or optax.sgd(0.5, momentum=0.9)
    policies = {"policy": begin(replicate(toy.parameters(), MESH), optimizer, MESH)}
    for name, role in method.roles.items():
        params = replicate(toy.parameters(5), MESH)
        policies[name] = begin(params, optimizer, MESH) if role.train else Policy(params)
    sampler, verifier, logged = Sampler(), Verifier(), []
    run = Run(
        method=method,
        domain=toy.domain(sampler),
        pool=Pool(),
        verify=verifier,
        optimizer=optimizer,
        mesh=MESH,
        layout=Layout(prompts, group_size, 1, T, sweeps),
        policies=policies,
        state=method.init(None),
        seed=seed,
        updates=updates,
        log=lambda batch, reports: logged.append((batch, reports)),
    )
    return run, sampler, verifier, logged


def plain(**options):
    return grpo(prompts=4, group_size=3, **options)


def host(tree):
    return jax.tree.map(np.asarray, tree)


def identical(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


# ---- keys, state -----------------------------------------------------------------------------------------


def completions(rows):
    return {(int(p), int(i)): rows.completions[n].tolist() for n, (p, i) in enumerate(zip(rows.prompt_ids, rows.index))}
