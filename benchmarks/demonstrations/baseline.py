"""What the estimators estimate, exactly: every outcome of a small problem is enumerated, so nothing is left to chance.

Two prompts of three answers in groups of three: all 729 batches. Numbers are rounded to five digits, which is what
float32 leaves of them.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.demonstrations import Row
from grpo_jax import advantages, losses
from grpo_jax.advantages.baselines import length_weighted, over_greedy, signal_scaled
from grpo_jax.advantages.group import batch_scaled
from grpo_jax.advantages.whitening import reinforce_plus_plus, reinforce_plus_plus_baseline, whiten_rows

CLAIM = (
    "RLOO is unbiased; GRPO's direction is right for rewards of 0 and 1; k2's gradient is the reverse KL's, k1's is 0"
)
BATCHES = np.array(list(itertools.product(range(3), repeat=6)))  # answers of three rows for either prompt
GROUPS = jnp.repeat(jnp.arange(2), 3)
MASK = jnp.ones((6, 1), bool)
# rewards [6], answers [6], the greedy answers' rewards [2] -> advantages [6]; and what is known of the expected update
ESTIMATORS = {
    "rloo": (lambda r, a, g: advantages.leave_one_out(r, GROUPS), "unbiased"),
    "remax": (lambda r, a, g: remax(r, g), "unbiased"),
    "dr_grpo": (lambda r, a, g: advantages.group_centered(r, GROUPS), "parallel"),
    "grpo": (lambda r, a, g: advantages.group_z_score(r, GROUPS), "parallel if binary"),
    "grpo, batch std": (lambda r, a, g: batch_scaled(r, GROUPS), ""),
    "opo": (lambda r, a, g: length_weighted(r, a + 1, GROUPS), ""),  # answers of one to three tokens
    "gpg": (lambda r, a, g: signal_scaled(r, GROUPS), ""),
    "reinforce++": (lambda r, a, g: reinforce_plus_plus(r[:, None], MASK)[:, 0], ""),
    "reinforce++ baseline": (lambda r, a, g: reinforce_plus_plus_baseline(r, GROUPS, MASK)[:, 0], ""),
    "rloo, whitened": (lambda r, a, g: whiten_rows(advantages.leave_one_out(r, GROUPS)), ""),
}


def demonstrate(seeds: int) -> list[Row]:
    return [*estimators(seeds), *divergences(seeds)]


def estimators(seeds: int) -> list[Row]:
    keys, rows = jax.random.split(jax.random.key(0), seeds), []
    measure, zero = jax.jit(jax.vmap(distances)), np.zeros(seeds)
    for kind in ("binary", "real"):
        logits, table = jax.vmap(lambda key, kind=kind: problem(key, kind))(keys)
        for name, (off, turned) in jax.tree.map(lambda x: np.round(x, 5), measure(logits, table)).items():
            known = ESTIMATORS[name][1]
            parallel = known in ("unbiased", "parallel") or (known == "parallel if binary" and kind == "binary")
            bias = f"{kind} rewards: |E[update] - gradient| / |gradient|, {name}"
            rows.append(Row(bias, zero, off, "=" if known == "unbiased" else "", "exact"))
            rows.append(Row(f"{kind} rewards: 1 - cosine, {name}", zero, turned, "=" if parallel else "", "exact"))
    return rows


def problem(key, kind: str):
    """Logits [2, 3], and rewards: 1 for one answer of three, or anything from 0 to 1."""
    logits_key, reward_key = jax.random.split(key)
    right = jax.nn.one_hot(jax.random.randint(reward_key, (2,), 0, 3), 3)
    return jax.random.normal(logits_key, (2, 3)), right if kind == "binary" else jax.random.uniform(reward_key, (2, 3))


def distances(logits, table):
    """For each estimator: relative distance of the expected update from the gradient, and the mean angle by prompt."""
    exact = jax.grad(lambda x: (jax.nn.softmax(x) * table).sum(1).mean())(logits)
    chance = jnp.exp(jax.nn.log_softmax(logits)[GROUPS, BATCHES].sum(1))
    greedy = table[jnp.arange(2), logits.argmax(1)]

    def measured(way):
        scores = jax.vmap(lambda actions: way(table[GROUPS, actions], actions, greedy))(BATCHES)
        loss = lambda x: (chance @ losses.reinforce(jax.nn.log_softmax(x)[GROUPS, BATCHES], scores)).mean()  # noqa: E731
        update = -jax.grad(loss)(logits)
        cosine = (update * exact).sum(1) / (jnp.linalg.norm(update, axis=1) * jnp.linalg.norm(exact, axis=1))
        return jnp.linalg.norm(update - exact) / jnp.linalg.norm(exact), 1 - cosine.mean()

    return {name: measured(way) for name, (way, _) in ESTIMATORS.items()}


def remax(rewards, greedy):
    ids = jnp.append(GROUPS, jnp.arange(2))
    return over_greedy(jnp.append(rewards, greedy), ids, jnp.arange(8) >= 6)[:6]


def divergences(seeds: int) -> list[Row]:
    """How far the expected gradient of each term is from that of a divergence, relative to that of the reverse KL."""
    kl = losses.kl
    terms = {"k1": kl.k1, "k2": kl.k2, "k3": kl.k3, "unbiased": kl.unbiased}

    def one(key):
        ours, theirs = jax.random.normal(key, (2, 5))
        slope = lambda f: jax.grad(lambda x: f(jax.nn.log_softmax(x), jax.nn.log_softmax(theirs)))(ours)  # noqa: E731
        found = {name: slope(lambda p, q, t=t: jax.nn.softmax(ours) @ t(p, q)) for name, t in terms.items()}
        targets = {"0": 0 * ours, "reverse": slope(kl.reverse), "forward": slope(kl.forward)}
        size = jnp.linalg.norm(targets["reverse"])
        return {(a, b): jnp.linalg.norm(found[a] - targets[b]) / size for a in found for b in targets}

    off = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(1), seeds))
    claims = [("k1", "0", "="), ("k2", "reverse", "="), ("k3", "reverse", ">"), ("k3", "forward", "=")]
    return [
        Row(
            f"E[gradient of {term}] away from that of {target}",
            np.zeros(seeds),
            np.round(off[term, target], 5),
            said,
            "0",
        )
        for term, target, said in (*claims, ("unbiased", "reverse", "="))
    ]
