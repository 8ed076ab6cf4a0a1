"""DisCO on questions of very different difficulty, each with answers of its own."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.demonstrations import Row, bandit
from grpo_jax import advantages, losses
from grpo_jax.losses.discriminative import discriminative_loss, forward_divergence, kl_constraint, mean_logp

CLAIM = "GRPO weighs a question by sqrt(p (1 - p)), DisCO all alike: hard ones are learnt sooner, and entropy stays up"
QUESTIONS, ANSWERS, GROUP, PASSES = 16, 32, 8, 4
RATE, STEPS, LEVEL = 0.25, 80, 0.7  # both methods' rate; where on the way, by the mean success, they are compared
RIGHT = jnp.arange(ANSWERS) < 2  # the right answers of every question
CHANCES = jnp.geomspace(0.02, 0.7, QUESTIONS)  # of a right answer, at the start


def start():
    """Logits that give the right answers these chances together, and both sides spread alike."""
    shape = jax.random.normal(jax.random.key(7), (QUESTIONS, ANSWERS)) / 2
    side = lambda where, chance: jnp.log(chance)[:, None] + jax.nn.log_softmax(jnp.where(where, shape, -jnp.inf))  # noqa: E731
    return jnp.where(RIGHT, side(RIGHT, CHANCES), side(~RIGHT, 1 - CHANCES))


def grpo(new, old, rewards, ids):
    spread = advantages.group_z_score(rewards, ids)[:, None]
    return losses.ppo_clip(losses.token_ratio(new, old), spread).mean()


def disco(new, old, rewards, ids):
    mask = jnp.ones(new.shape, bool)
    loss = discriminative_loss(mean_logp(new, mask), rewards, ids, tau=10.0)
    return loss + kl_constraint(forward_divergence(new, old, mask))


def train(objective, seeds):
    """Success on all questions and on the hardest quarter, and entropy: [seeds, steps] each."""

    def loss(logits, state, key):
        ids, actions = bandit.draw(state["behavior"], GROUP, key)
        old = jax.lax.stop_gradient(bandit.logps(state["behavior"], ids, actions))
        new = bandit.logps(logits, ids, actions)
        return objective(new[:, None], old[:, None], RIGHT[actions].astype(jnp.float32), ids), state

    def observe(logits, state):
        chances = jax.nn.softmax(logits)
        solved = jnp.where(RIGHT, chances, 0).sum(-1)
        entropy = -(chances * jax.nn.log_softmax(logits)).sum(-1)
        return solved.mean(), solved[: QUESTIONS // 4].mean(), entropy.mean()

    settings = {"steps": STEPS, "rate": RATE * QUESTIONS, "seeds": seeds, "passes": PASSES}
    logits = start()
    return bandit.learn(loss, logits, state={"behavior": logits}, observe=observe, **settings)[2]


def at_level(seen):
    """The step at which each seed's mean success reaches the level, and the other numbers there."""
    solved, *others = map(np.asarray, seen)
    steps = np.where((solved >= LEVEL).any(1), (solved >= LEVEL).argmax(1), STEPS - 1)
    return [steps, *(values[np.arange(len(steps)), steps] for values in (solved, *others))]


def pull(objective, p, size=1000):
    """How hard the right answers of a question with this success rate are pushed up."""
    old = jnp.zeros((size, 1))
    rewards, ids = (jnp.arange(size) < round(p * size)).astype(jnp.float32), jnp.zeros(size, jnp.int32)
    slopes = jax.grad(lambda new: objective(new, old, rewards, ids))(old)[:, 0]
    return [float(-jnp.where(rewards == 1, slopes, 0).sum())]


def demonstrate(seeds: int) -> list[Row]:
    plain, ours = (at_level(train(objective, seeds)) for objective in (grpo, disco))
    return [
        Row("pull on right answers at p = 0.02", pull(grpo, 0.02), pull(disco, 0.02), ">"),
        Row("the same at p = 0.5", pull(grpo, 0.5), pull(disco, 0.5)),
        Row(f"batches until the mean success is {LEVEL}", plain[0], ours[0]),
        Row("mean success there", plain[1], ours[1]),
        Row("success on the hardest quarter there", plain[2], ours[2], ">"),
        Row("entropy there", plain[3], ours[3], ">"),
    ]
