"""OPO: the worked example, float64 loops on ragged batches, and the variance that its baseline leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import losses, methods
from grpo_jax.advantages.baselines import length_weighted
from grpo_jax.types import Decisions


def resolve():
    return methods.resolve("opo", options={}, settings={"prompts": 3, "group_size": 4, "max_new": 9})


def shaped(batch):
    return jax.jit(lambda batch: resolve().advantage(batch, {}, None)[0])(batch)


def test_worked_example(make):
    mask = np.arange(3) < np.array([3, 1, 2, 2, 1, 3, 2, 2])[:, None]
    batch = shaped(make.batch([1, 0, 0, 0, 1, 1, 0, 1], groups=[0, 0, 0, 0, 1, 1, 1, 2], mask=mask))
    expected = np.array([0.625, *[-0.375] * 3, 1 / 3, 1 / 3, -2 / 3, 0])[:, None]
    np.testing.assert_allclose(batch.advantages, np.where(mask, expected, 0), atol=1e-6)


@pytest.mark.parametrize("seed", [0, 1])
def test_against_loops(make, seed):
    data = make.ragged(seed)
    n, length = len(data.total), data.mask.sum(1)
    there = [i for i in range(n) if data.groups[i] >= 0 and not np.isnan(data.total[i])]
    advantage = np.zeros(n)
    for i in there:
        members = [j for j in there if data.groups[j] == data.groups[i]]
        weight = sum(length[j] for j in members)
        advantage[i] = data.total[i] - sum(length[j] * data.total[j] for j in members) / weight if weight else 0
    batch = shaped(data.batch())
    np.testing.assert_allclose(batch.advantages, np.where(data.mask, advantage[:, None], 0), rtol=1e-4, atol=1e-5)

    @jax.jit
    @jax.value_and_grad
    def loss(logps):
        each, _ = resolve().objective(Decisions(logps=logps), batch, {})
        return losses.weighted_sum(each, resolve().aggregate(batch))

    value, gradient = loss(jnp.asarray(data.new, jnp.float32))
    weights = data.weights * (length > 0)
    share = weights / weights.sum()
    slopes = -np.where(data.mask, (share * advantage)[:, None], 0)
    np.testing.assert_allclose(gradient, slopes, atol=1e-6)
    assert float(value) == pytest.approx((slopes * data.new).sum(), rel=1e-5) and np.abs(slopes).max() > 0.01


def test_least_variance():
    """Where a row's gradient is as many independent terms as it is long, no other baseline leaves less."""
    draw = np.random.default_rng(0)
    lengths, rewards = draw.integers(1, 30, 4000), draw.random(4000)
    rewards += lengths / 20  # long ones are better, so the baselines differ
    squared = lambda baseline: np.mean(lengths * (rewards - baseline) ** 2)  # noqa: E731
    mine = rewards - np.asarray(length_weighted(rewards, lengths, np.zeros(4000, int)))
    assert np.ptp(mine) < 1e-4
    assert squared(mine.mean()) < min(squared(mine.mean() + d) for d in (-0.1, 0.1)) < squared(rewards.mean())
