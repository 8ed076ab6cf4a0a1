"""A score of true quality with a tiny term that can be gamed: what happens once quality is as good as it gets?"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.demonstrations import Row
from benchmarks.demonstrations.bandit import draw, learn, logps
from grpo_jax import losses
from grpo_jax.advantages.group import group_centered, group_z_score
from grpo_jax.advantages.preferences import win_rates

CLAIM = "with z-scored scores a tiny flaw of the score is learnt once quality is equal; with win rates much less"
PROMPTS, LEVELS, GROUP_SIZE, STEPS, RATE = 8, 8, 8, 400, 0.5
FLAW, NOISE, TIE = 0.02, 0.01, 0.1
QUALITY, GAMED = (jnp.asarray(x.ravel() / (LEVELS - 1)) for x in np.indices((LEVELS, LEVELS)).astype(np.float32))


def z_scored(scores, groups):
    return group_z_score(scores, groups, epsilon=1e-8)


def won(scores, groups):
    """A judge that sees the same scores and calls it a tie below TIE."""
    gap = scores[:, None] - scores
    return z_scored(win_rates(jnp.where(jnp.abs(gap) < TIE, 0.5, gap > 0), groups), groups)


def loss_of(advantage):
    def loss(logits, state, key):
        sampling, noise = jax.random.split(key)
        groups, actions = draw(logits, GROUP_SIZE, sampling)
        scores = QUALITY[actions] + FLAW * GAMED[actions] + NOISE * jax.random.normal(noise, actions.shape)
        each = losses.reinforce(logps(logits, groups, actions), advantage(scores, groups))
        return each.sum() / GROUP_SIZE, state  # prompts share no parameters

    return loss


def demonstrate(seeds: int) -> list[Row]:
    def run(advantage):
        """Expected quality and gamed term after the last step."""
        start = jnp.zeros((PROMPTS, LEVELS * LEVELS))
        share = jax.nn.softmax(learn(loss_of(advantage), start, steps=STEPS, rate=RATE, seeds=seeds)[0])
        return (share @ QUALITY).mean(-1), (share @ GAMED).mean(-1)

    score, wins, centred = run(z_scored), run(won), run(group_centered)
    pairs = PROMPTS * GROUP_SIZE * (GROUP_SIZE - 1) // 2
    return [
        Row("true quality (1 is best)", score[0], wins[0], "="),
        Row("gamed term (0.5: untouched)", score[1], wins[1], "<"),
        Row("true quality", centred[0], wins[0], "", "score without division by std"),
        Row("gamed term", centred[1], wins[1], "", "score without division by std"),
        Row("judgements per step (64 completions)", [64.0], [float(pairs)], ""),
    ]
