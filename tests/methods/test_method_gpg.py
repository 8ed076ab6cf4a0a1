"""GPG: numbers worked by hand, float64 loops on ragged batches, and its plain policy gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import losses, methods
from grpo_jax.types import Decisions


def resolve():
    return methods.resolve("gpg", options={}, settings={"prompts": 3, "group_size": 4, "max_new": 9})


def shaped(batch):
    return jax.jit(lambda batch: resolve().advantage(batch, {}, None)[0])(batch)


def test_fewer_successes_weigh_more(make):
    """4 of 8 succeed: twice the difference from the mean; 1 of 8: eight times."""
    for rewards, expected in (
        ([1, 1, 0, 0, 1, 1, 0, 0], [1, 1, -1, -1, 1, 1, -1, -1]),
        ([1, 0, 0, 0, 0, 0, 0, 0], [6, -2, -2, -2, 0, 0, 0, 0]),
    ):
        batch = shaped(make.batch(rewards, groups=[0] * 4 + [1] * 4))
        np.testing.assert_allclose(np.asarray(batch.advantages)[:, 0], expected, atol=1e-6)


@pytest.mark.parametrize("seed", [0, 1])
def test_against_loops(make, seed):
    data = make.ragged(seed)
    n = len(data.total)
    data.rewards[:, 0] = np.where(np.arange(n) % 3 == 0, 0, data.rewards[:, 0])
    data.rewards[np.arange(n) % 3 == 0, 1] = np.nan
    data.total = np.where(np.isnan(data.rewards).all(1), np.nan, np.nansum(data.rewards * [1.0, 0.5], axis=1))
    there = [i for i in range(n) if data.groups[i] >= 0 and not np.isnan(data.total[i])]
    advantage = np.zeros(n)
    for i in there:
        members = [j for j in there if data.groups[j] == data.groups[i]]
        advantage[i] = data.total[i] - np.mean(data.total[members])
    some = sum(data.total[i] != 0 for i in there)
    assert 0 < some < len(there)
    advantage *= len(there) / some
    batch = shaped(data.batch())
    np.testing.assert_allclose(batch.advantages, np.where(data.mask, advantage[:, None], 0), rtol=1e-4, atol=1e-5)

    @jax.jit
    @jax.value_and_grad
    def loss(logps):
        each, _ = resolve().objective(Decisions(logps=logps), batch, {})
        return losses.weighted_sum(each, resolve().aggregate(batch))

    value, gradient = loss(jnp.asarray(data.new, jnp.float32))
    tokens = data.weights[:, None] * data.mask
    slopes = -tokens / tokens.sum() * advantage[:, None]
    np.testing.assert_allclose(gradient, slopes, atol=1e-6)
    assert float(value) == pytest.approx((slopes * data.new).sum(), rel=1e-5) and np.abs(slopes).max() > 0.01
