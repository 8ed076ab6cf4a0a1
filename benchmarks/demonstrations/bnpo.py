"""Prompts with known success rates: the noise of the gradient estimate, and how steady advantages stay in training."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from benchmarks.demonstrations import Row
from benchmarks.demonstrations.bandit import draw, learn, logps
from grpo_jax import losses
from grpo_jax.advantages.beta import beta_normalized
from grpo_jax.advantages.group import group_centered, group_z_score

CLAIM = "the fitted Beta gives a gradient estimate of less variance than REINFORCE and GRPO, and steadier advantages"

BATCHES, PROMPTS, GROUP, WAYS = 200, 32, 16, 16
RATES = {"U-shaped": (0.5, 0.5), "GRPO's own, Beta(3/2, 3/2)": (1.5, 1.5), "nearly solved": (6.0, 1.0)}
ESTIMATORS = {
    "reinforce": group_centered,
    "grpo": lambda r, g: group_z_score(r, g, ddof=0) * jnp.pi / 8,  # on the scale of Beta(3/2, 3/2)
    "bnpo": beta_normalized,
}
TRAINED, STEPS, RATE = 64, 200, 2.0


def noise(a, b, key):
    """Variance over batches of the gradient (its trace), and the same over the squared mean; per estimator.

    There are WAYS to be right and as many to be wrong, alike in probability, as in text: the size of a completion's
    score then hardly depends on the success rate. The gradient is by logits that all prompts share.
    """

    def gradients(key):
        prompts, rolls, ways = jax.random.split(key, 3)
        p = jnp.repeat(jax.random.beta(prompts, a, b, (PROMPTS,)), GROUP)
        right = jax.random.uniform(rolls, p.shape) < p
        actions = jax.random.randint(ways, p.shape, 0, WAYS) + jnp.where(right, 0, WAYS)
        policy = jnp.where(jnp.arange(2 * WAYS) < WAYS, p[:, None], 1 - p[:, None]) / WAYS
        groups = jnp.repeat(jnp.arange(PROMPTS), GROUP)
        values = jnp.stack([f(right.astype(jnp.float32), groups) for f in ESTIMATORS.values()])
        return values @ (jax.nn.one_hot(actions, 2 * WAYS) - policy) / len(p)

    g = jax.vmap(gradients)(jax.random.split(key, BATCHES))
    variance = g.var(axis=0).sum(axis=1)
    return variance, variance / jnp.sum(g.mean(axis=0) ** 2, axis=1)


def loss(estimator):
    def of(logits, state, key):
        groups, actions = draw(logits, GROUP, key)
        values = ESTIMATORS[estimator](actions.astype(jnp.float32), groups)  # action 1 is right
        lost = losses.reinforce(logps(logits, groups, actions), values)
        return jnp.sum(lost) / GROUP, jnp.sqrt(jnp.mean(values**2))

    return of


def trained(estimator, seeds):
    """Success in the end, and the spread over the steps of the advantages' root mean square, relative to its mean."""
    rate = jnp.linspace(-1, 1, TRAINED)
    start = jnp.stack([jnp.zeros(TRAINED), 4 * jnp.sign(rate) * jnp.abs(rate) ** 0.5], axis=1)
    settings = {"steps": STEPS, "rate": RATE, "seeds": seeds, "state": jnp.float32(0)}
    logits, _, size = learn(loss(estimator), start, observe=lambda logits, rms: rms, **settings)
    size = size[:, 1:]
    return jax.nn.softmax(logits)[..., 1].mean(axis=1), size.std(axis=1) / size.mean(axis=1)


def demonstrate(seeds: int) -> list[Row]:
    rows, keys = [], jax.random.split(jax.random.key(0), seeds)
    for name, (a, b) in RATES.items():
        raw, relative = jax.jit(jax.vmap(noise, in_axes=(None, None, 0)))(a, b, keys)
        for k, other in enumerate(("reinforce", "grpo")):
            rows.append(Row(f"variance of the gradient, rates {name}", raw[:, k], raw[:, 2], "<", other))
            rows.append(Row(f"  over its squared mean, rates {name}", relative[:, k], relative[:, 2], "<", other))
    ours, spread = trained("bnpo", seeds)
    for other in ("reinforce", "grpo"):
        success, theirs = trained(other, seeds)
        rows.append(Row("spread of the size of advantages over training", theirs, spread, "<", other))
        rows.append(Row(f"success after {STEPS} updates", success, ours, "", other))
    return rows
