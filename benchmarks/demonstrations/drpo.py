"""DRPO where longer answers are right more often: how much accuracy a shorter answer costs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.demonstrations import Row, bandit
from grpo_jax import advantages, losses
from grpo_jax.losses.discriminative import discriminative_loss, preference_weights

CLAIM = (
    "a length term in GRPO's reward pushes long right answers down, DRPO's never: at equal length it is more accurate"
)
PROMPTS, ANSWERS, GROUP, STEPS = 32, 48, 8, 60
LENGTH = jnp.linspace(1 / ANSWERS, 1, ANSWERS)  # of an answer, as a share of the budget
RIGHT = jax.random.uniform(jax.random.key(5), (PROMPTS, ANSWERS)) < 0.05 + 0.75 * LENGTH
BANDS = jax.nn.one_hot((jnp.arange(ANSWERS) * 8) // ANSWERS, 8)  # lengths share a preference over all prompts
STRENGTHS = {"grpo": (0.0, 0.2, 0.4, 0.6, 0.8, 0.95), "drpo": (np.inf, 1.0, 0.5, 0.3, 0.2, 0.1, 0.05)}
RATES = (4.0, 8.0, 16.0)  # of both, each shown at its best
WANTED = (0.8, 0.7, 0.6)  # mean lengths that both reach


def grpo(logps, right, length, ids, strength):
    """The reward of a right answer is 1 - strength * length, above 0."""
    scores = advantages.group_z_score(right * (1 - strength * length), ids)
    return losses.reinforce(logps, scores).mean()


def drpo(logps, right, length, ids, strength):
    shares = preference_weights(1 - length, right == 1, ids, lam=strength)
    return discriminative_loss(logps, right, ids, tau=10.0, shares=shares)


def train(objective, seeds):
    """After the last step accuracy, mean length, and the share of right samples pushed down on the way:
    [rates, strengths, seeds] each."""

    def logits(params):
        return params["own"] + BANDS @ params["shared"]

    def loss(params, state, key):
        ids, actions = bandit.draw(logits(params), GROUP, key)
        right, length = RIGHT[ids, actions].astype(jnp.float32), LENGTH[actions]
        each = lambda logps: objective(logps, right, length, ids, state["strength"])  # noqa: E731
        logps = bandit.logps(logits(params), ids, actions)
        down = jnp.sum((jax.grad(each)(logps) > 1e-7) & (right == 1)) / jnp.maximum(right.sum(), 1)
        return state["rate"] * each(logps), {**state, "down": state["down"] + down / STEPS}

    def run(rate, strength):
        params = {"own": jnp.zeros((PROMPTS, ANSWERS)), "shared": jnp.zeros(8)}
        state = {"down": jnp.zeros(()), "rate": rate, "strength": strength}
        last, state, _ = bandit.learn(loss, params, steps=STEPS, rate=1.0, seeds=seeds, state=state)
        chances = jax.nn.softmax(jax.vmap(logits)(last))
        average = lambda values: (chances * values).sum(-1).mean(-1)  # noqa: E731
        return average(RIGHT), average(LENGTH), state["down"]

    over_both = jax.vmap(jax.vmap(run, (None, 0)), (0, None))
    return map(np.asarray, over_both(jnp.array(RATES), jnp.array(STRENGTHS[objective.__name__])))


def frontier(accuracy, length):
    """Accuracy at the wanted mean lengths, [wanted, seeds]: between strengths of one rate, the best rate on average."""
    rates, _, seeds = accuracy.shape
    found = np.full((len(WANTED), rates, seeds), np.nan)
    for rate, seed in np.ndindex(rates, seeds):
        order = np.argsort(length[rate, :, seed])
        known = length[rate, order, seed], accuracy[rate, order, seed]
        found[:, rate, seed] = np.interp(WANTED, *known, left=np.nan, right=np.nan)
    reached = np.where(np.isnan(found).any(-1), -np.inf, found.mean(-1))  # by every seed
    return found[np.arange(len(WANTED)), reached.argmax(1)]


def demonstrate(seeds: int) -> list[Row]:
    (accuracy, length, down), (ours, brief, up) = train(grpo, seeds), train(drpo, seeds)
    pairs = zip(WANTED, frontier(accuracy, length), frontier(ours, brief))
    return [
        Row(f"right samples pushed down, strength 0.8 | lam {STRENGTHS['drpo'][-2]}", down[1, 4], up[1, -2], "<"),
        Row("accuracy without a preference for length", accuracy[1, 0], ours[1, 0]),
        Row("mean length without one", length[1, 0], brief[1, 0]),
        *(Row(f"accuracy at mean length {wanted}", a, b, ">") for wanted, a, b in pairs),
    ]
