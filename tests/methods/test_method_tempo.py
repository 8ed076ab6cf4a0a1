"""TEMPO as a method: per-token advantages, loss and gradient against loops in float64; the worked example."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import losses, methods
from grpo_jax.types import Decisions

TOKENS = [[5, 7, 1, 0], [5, 7, 2, 9], [5, 8, 1, 0], [6, 7, 1, 0]]


def test_worked_example(make):
    method = methods.resolve("tempo", options={}, settings=make.settings)
    mask = np.arange(4) < np.array([3, 4, 3, 3])[:, None]
    batch = make.batch([1, 0, 0, 0], groups=[0, 0, 0, 0], mask=mask, old=np.zeros((4, 4)))
    batch = batch.replace(completions=jnp.array(TOKENS))
    batch, _ = jax.jit(lambda batch: method.advantage(batch, {}, None))(batch)
    expected = [[1.666667, 1.833333, 2.5, 0], [-0.333333, -0.166667, -1.5, -0.5]]
    expected += [[-0.333333, -1.166667, -0.5, 0], [-1, -0.5, -0.5, 0]]
    np.testing.assert_allclose(batch.advantages, expected, atol=1e-6)
    branches = [[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]]
    np.testing.assert_array_equal(batch.columns["branches"], branches)
    _, reported = method.objective(Decisions(logps=jnp.zeros((4, 4))), batch, {})
    np.testing.assert_array_equal(reported["branches"], branches)


def value(data, tokens, i, t):
    rows = [j for j in range(len(data.total)) if data.groups[j] == data.groups[i] and not np.isnan(data.total[j])]
    below = [j for j in rows if data.lengths[j] >= t and list(tokens[j][:t]) == list(tokens[i][:t])]
    return np.mean(data.total[below])


def advantages_of(data, tokens):
    result = np.zeros(data.mask.shape)
    for i in range(len(data.total)):
        group = data.total[(data.groups == data.groups[i]) & ~np.isnan(data.total)]
        if data.groups[i] < 0 or np.isnan(data.total[i]) or len(group) < 2 or np.ptp(group) == 0:
            continue
        for t in np.flatnonzero(data.mask[i]):
            gain = value(data, tokens, i, t + 1) - value(data, tokens, i, t)
            result[i, t] = (data.total[i] - group.mean() + gain) / group.std(ddof=1)
    return result


def loss_of(data, advantages, new, low=0.1, high=0.3, beta=0.2):
    total, size = 0.0, 0.0
    for i, t in np.argwhere(data.mask & (data.weights > 0)[:, None]):
        ratio, a, d = np.exp(new[i, t] - data.old[i, t]), advantages[i, t], new[i, t] - data.ref[i, t]
        clipped = max(-a * ratio, -a * np.clip(ratio, 1 - low, 1 + high))
        total += data.weights[i] * (clipped + beta * (np.exp(-d) - 1 + d))
        size += data.weights[i]
    return total / size


@pytest.mark.parametrize("seed", [0, 1])
def test_against_float64(make, seed):
    data = make.ragged(seed)
    tokens = np.random.default_rng(seed).integers(0, 2, data.mask.shape)
    options = {"clip_low": 0.1, "clip_high": 0.3, "kl": 0.2}
    method = methods.resolve("tempo", options=options, settings=make.settings)
    batch = data.batch().replace(completions=jnp.asarray(tokens), lengths=jnp.asarray(data.lengths))
    batch, _ = jax.jit(lambda batch: method.advantage(batch, {}, None))(batch)
    expected = advantages_of(data, tokens)
    np.testing.assert_allclose(batch.advantages, expected, rtol=1e-5, atol=1e-5)
    assert any(np.ptp(row[m]) > 0.1 for row, m in zip(expected, data.mask) if m.any())  # it differs within rows

    @jax.jit
    @jax.value_and_grad
    def loss(logps):
        each, _ = method.objective(Decisions(logps=logps), batch, {})
        return losses.weighted_sum(each, method.aggregate(batch))

    got, gradient = loss(jnp.asarray(data.new, jnp.float32))
    assert float(got) == pytest.approx(loss_of(data, expected, data.new), rel=2e-5)
    for place in np.ndindex(data.new.shape):
        up, down = data.new.copy(), data.new.copy()
        up[place], down[place] = up[place] + 1e-6, down[place] - 1e-6
        slope = (loss_of(data, expected, up) - loss_of(data, expected, down)) / 2e-6
        np.testing.assert_allclose(gradient[place], slope, atol=2e-5)
