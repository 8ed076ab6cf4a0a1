"""BNPO: worked example, float64 loops, one channel and several, the loss it comes with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import beta as beta_distribution

from grpo_jax import losses, methods
from grpo_jax.types import Decisions

SETTINGS = {"prompts": 3, "group_size": 4, "max_new": 9}


def resolve(**options):
    return methods.resolve("bnpo", options=options, settings=SETTINGS)


def shaped(method, batch):
    return jax.jit(lambda batch: method.advantage(batch, {}, None)[0])(batch)


def oracle(rewards, groups):
    """Groups of two and more; the parameters by moments over their success rates."""
    result, rates = np.zeros(len(rewards)), {}
    for group in set(groups[groups >= 0]):
        rows = [i for i in range(len(rewards)) if groups[i] == group and not np.isnan(rewards[i])]
        if len(rows) > 1:
            rates[group] = rows, rewards[rows].mean()
    p = np.array([p for _, p in rates.values()])
    m, v = p.mean(), p.var(ddof=1)
    c = m * (1 - m) / v - 1 if v > 0 else 0
    alpha, beta = max(1 + c * m / 3, 1), max(1 + c * (1 - m) / 3, 1)
    for rows, p in rates.values():
        if 0 < p < 1:
            result[rows] = (rewards[rows] - p) / beta_distribution.pdf(p, alpha, beta)
    return result


def summed(data, advantage, new):
    """Tokens added up, completions averaged by their weights; the surrogate clipped to [0.8, 1.28]."""
    total = count = 0.0
    for i in range(len(advantage)):
        if data.weights[i] > 0 and data.mask[i].any():
            ratio, a = np.exp(new[i] - data.old[i])[data.mask[i]], advantage[i]
            total += data.weights[i] * np.maximum(-a * ratio, -a * np.clip(ratio, 0.8, 1.28)).sum()
            count += data.weights[i]
    return total / count


def test_worked_example(make):
    rewards, groups = [1, 0, 0, 0, 1, 1, 0, 0, 1, 1, 1, 0], np.repeat([0, 1, 2], 4)
    expected = [0.680175] + [-0.226725] * 3 + [0.392699] * 2 + [-0.392699] * 2 + [0.226725] * 3 + [-0.680175]
    batch = shaped(resolve(), make.batch(rewards, groups=groups))
    np.testing.assert_allclose(np.asarray(batch.advantages)[:, 0], expected, atol=1e-6)
    twice = make.batch(3 * np.array(rewards) - 1, groups=groups)
    batch = shaped(resolve(low=-1, high=2), twice)
    np.testing.assert_allclose(np.asarray(batch.advantages)[:, 0], expected, atol=1e-6)
    assert np.isnan(np.asarray(shaped(resolve(), twice).advantages)).all()  # a wrong range is not passed over


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_against_float64(make, seed):
    data = make.ragged(seed, binary=True)
    batch = shaped(resolve(), data.batch())
    advantage = oracle(data.total, data.groups)
    np.testing.assert_allclose(batch.advantages, np.where(data.mask, advantage[:, None], 0), rtol=1e-4, atol=1e-5)
    assert np.abs(advantage).max() > 0.2

    @jax.jit
    @jax.value_and_grad
    def loss(logps):
        each, _ = resolve().objective(Decisions(logps=logps), batch, {})
        return losses.weighted_sum(each, resolve().aggregate(batch))

    value, gradient = loss(jnp.float32(data.new))
    assert float(value) == pytest.approx(summed(data, advantage, data.new), rel=2e-5, abs=1e-6)
    for place in np.ndindex(data.new.shape):
        up, down = data.new.copy(), data.new.copy()
        up[place] += 1e-6
        down[place] -= 1e-6
        slope = (summed(data, advantage, up) - summed(data, advantage, down)) / 2e-6
        assert float(gradient[place]) == pytest.approx(slope, rel=1e-4, abs=1e-5)


def test_channels_by_themselves(make):
    """Each channel has its own fit; a channel that does not apply adds nothing; the weights are shares."""
    data = make.ragged(3, binary=True)
    draw = np.random.default_rng(0)
    rewards = np.stack([data.rewards[:, 0], draw.integers(0, 2, 17)], axis=1).astype(float)
    rewards[draw.random(17) < 0.2, 1] = np.nan
    batch = make.batch(rewards, groups=data.groups, channel_weights=(3.0, 1.0))
    each = [oracle(rewards[:, k], data.groups) for k in range(2)]
    got = np.asarray(shaped(resolve(decompose=True), batch).advantages)[:, 0]
    np.testing.assert_allclose(got, 0.75 * each[0] + 0.25 * each[1], rtol=1e-4, atol=1e-5)
    got = np.asarray(shaped(resolve(decompose=True), batch.replace(channel_weights=())).advantages)[:, 0]
    np.testing.assert_allclose(got, (each[0] + each[1]) / 2, rtol=1e-4, atol=1e-5)
    single = make.batch(data.rewards, groups=data.groups)
    np.testing.assert_allclose(
        shaped(resolve(decompose=True), single).advantages, shaped(resolve(), single).advantages, atol=1e-6
    )


def test_options():
    assert resolve(kl=0.1).roles.keys() == {"reference"} and resolve().roles == {} and resolve().group_size == 4
    with pytest.raises(ValueError, match="no option 'epsilon'"):
        resolve(epsilon=1e-4)
