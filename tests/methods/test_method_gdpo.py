"""GDPO: worked example, both whitenings against float64 loops, conditions, the loss of plain GRPO."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import methods
from grpo_jax.types import Decisions

SETTINGS = {"prompts": 3, "group_size": 4, "max_new": 9}


def resolve(name="gdpo", **options):
    return methods.resolve(name, options=options, settings=SETTINGS)


def shaped(method, batch):
    return jax.jit(lambda batch: method.advantage(batch, {}, None)[0])(batch)


def oracle(rewards, groups, weights, mask, whitening):
    epsilon = {"rows": 1e-4, "decisions": 1e-6}[whitening]
    sums = np.zeros(len(rewards))
    for k, weight in enumerate(weights):
        for group in set(groups[groups >= 0]):
            rows = [i for i in range(len(rewards)) if groups[i] == group and not np.isnan(rewards[i, k])]
            if rows and np.ptp(rewards[rows, k]) > 0:
                inside = rewards[rows, k]
                sums[rows] += weight * (inside - inside.mean()) / (inside.std(ddof=1) + epsilon)
    inside = [i for i in range(len(rewards)) if groups[i] >= 0 and not np.isnan(rewards[i]).all()]
    result = np.zeros(mask.shape)
    if whitening == "rows":
        for i in inside:
            result[i] = (sums[i] - sums[inside].mean()) / (sums[inside].std(ddof=1) + 1e-4)
        return np.where(mask, result, 0)
    values = np.array([sums[i] for i in inside for t in range(mask.shape[1]) if mask[i, t]])
    for i in inside:
        result[i] = (sums[i] - values.mean()) / np.sqrt(values.var(ddof=1) + 1e-8)
    return np.where(mask, result, 0)


def test_worked_example(make):
    rewards = [(1, 1), (1, 0), (0, 1), (0, 0), (0, 0), (0, 1), (0, 1), (1, 1)]
    batch = make.batch(rewards, groups=np.repeat([0, 1], 4))
    expected = [1.224677, 0, 0, -1.224677, -1.414097, 0, 0, 1.414097]
    np.testing.assert_allclose(np.asarray(shaped(resolve(), batch).advantages)[:, 0], expected, atol=1e-6)
    plain = np.asarray(shaped(resolve("grpo", epsilon=1e-4), batch).advantages)[:, 0]
    np.testing.assert_allclose(plain, [1.224595, 0, 0, -1.224595, -1.224595, 0, 0, 1.224595], atol=1e-6)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("whitening", ["rows", "decisions"])
def test_against_float64(make, whitening, seed):
    data = make.ragged(seed)
    method = resolve(whitening=whitening)
    batch = shaped(method, data.batch())
    expected = oracle(data.rewards, data.groups, data.channel_weights, data.mask, whitening)
    np.testing.assert_allclose(batch.advantages, expected, rtol=1e-4, atol=1e-5)
    assert np.abs(expected).max() > 0.5
    unweighted = shaped(method, data.batch().replace(channel_weights=()))
    expected = oracle(data.rewards, data.groups, (1, 1), data.mask, whitening)
    np.testing.assert_allclose(unweighted.advantages, expected, rtol=1e-4, atol=1e-5)
    new, bounds = Decisions(logps=jnp.float32(data.new)), {"clip_low": 0.1, "clip_high": 0.3, "kl": 0.2}
    ours, plain = (resolve(name, **bounds) for name in ("gdpo", "grpo"))
    np.testing.assert_array_equal(ours.objective(new, batch, {})[0], plain.objective(new, batch, {})[0])
    np.testing.assert_array_equal(ours.aggregate(batch), plain.aggregate(batch))


def test_conditions(make):
    """Channel 0 counts only where channel 1 reaches 1/2, and takes no part where channel 1 does not apply."""
    batch = make.batch([(1, 1), (1, 0), (1, np.nan), (np.nan, 1), (0.3, 0.5)])
    rewards = resolve(conditions={"channel 0": ["channel 1", 0.5]}).reward(batch, {}, None)
    np.testing.assert_allclose(rewards, [(1, 1), (0, 0), (np.nan, np.nan), (np.nan, 1), (0.3, 0.5)])
    np.testing.assert_array_equal(resolve().reward(batch, {}, None), batch.scores)
    with pytest.raises(ValueError, match=r"got 'form' of \['channel 0', 'channel 1'\]"):
        resolve(conditions={"channel 0": ["form", 0.5]}).reward(batch, {}, None)


def test_another_whitening():
    with pytest.raises(ValueError, match=r"one of \('rows', 'decisions'\), got 'tokens'"):
        resolve(whitening="tokens")
