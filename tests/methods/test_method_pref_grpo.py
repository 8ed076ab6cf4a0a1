"""Pref-GRPO: the worked example, and loops in float64 on ragged batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import losses, methods
from grpo_jax.types import Decisions

RATES = [0.5, 1 / 3, 1, 1 / 6]


def resolve(**options):
    return methods.resolve("pref_grpo", options=options, settings={"prompts": 1, "group_size": 4})


def shaped(make, rewards, groups, weights=(), **options):
    batch = make.batch(rewards, groups=groups, channel_weights=weights)
    return np.asarray(resolve(**options).advantage(batch, {}, None)[0].advantages)[:, 0]


def test_worked_example(make):
    alone = [0, -0.462910, 1.388730, -0.925820]
    np.testing.assert_allclose(shaped(make, RATES, [0] * 4), alone, atol=2e-6)
    both = np.stack([RATES, [0.31, 0.29, 0.30, 0.32]], axis=1)
    np.testing.assert_allclose(
        shaped(make, both, [0] * 4, (0.4, 0.6)), [0.232379, -0.882300, 0.323113, 0.326808], atol=3e-6
    )
    whitened = shaped(make, both, [0] * 4, (0.4, 0.6), whiten=True)
    np.testing.assert_allclose(whitened, [0.393983, -1.495883, 0.547817, 0.554082], atol=3e-6)
    watched = shaped(make, both, [0] * 4, (1.0, 0.0))  # a channel that is only looked at
    np.testing.assert_allclose(watched, alone, atol=2e-6)
    scores = shaped(make, [0.9100, 0.9101, 0.9103, 0.9099], [0] * 4)  # why not the score itself
    np.testing.assert_allclose(scores, [-0.439129, 0.146376, 1.317388, -1.024635], atol=1e-3)


def test_advantages_are_bounded(make):
    rewards = [1.0] + [0.0] * 63
    assert shaped(make, rewards, [0] * 64)[0] == 5
    assert shaped(make, rewards, [0] * 64, bound=7.9)[0] == pytest.approx(63 / 8, abs=1e-4)
    assert not shaped(make, [0.5] * 6, [0, 0, 0, 1, 1, 2]).any()  # all ties


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("whiten", [False, True])
def test_against_float64(make, seed, whiten):
    data = make.ragged(seed)
    n, a = len(data.groups), np.zeros(len(data.groups))
    for k, weight in enumerate(data.channel_weights):
        for i in range(n):
            peers = [j for j in range(n) if data.groups[j] == data.groups[i] >= 0 and not np.isnan(data.rewards[j, k])]
            inside = data.rewards[peers, k]
            if i in peers and len(peers) > 1 and np.ptp(inside) > 0:
                a[i] += weight * (data.rewards[i, k] - inside.mean()) / (inside.std(ddof=1) + 1e-8)
    if whiten:
        counted = (data.groups >= 0) & ~np.isnan(data.rewards).all(1)
        a = np.where(counted, (a - a[counted].mean()) / a[counted].std(ddof=1), 0)
    a = np.clip(a, -1, 1)
    method = resolve(whiten=whiten, bound=1.0)
    batch, _ = jax.jit(lambda batch: method.advantage(batch, {}, None))(data.batch())
    np.testing.assert_allclose(batch.advantages, np.where(data.mask, a[:, None], 0), rtol=1e-5, atol=2e-5)

    def expected(new):
        ratio = np.exp(new - data.old)
        each = np.maximum(-a[:, None] * ratio, -a[:, None] * np.clip(ratio, 0.8, 1.2))
        return (data.weights[:, None] * data.mask * each).sum() / (data.weights[:, None] * data.mask).sum()

    @jax.jit
    @jax.value_and_grad
    def loss(logps):
        each, _ = method.objective(Decisions(logps=logps), batch, {})
        return losses.weighted_sum(each, method.aggregate(batch))

    value, gradient = loss(jnp.float32(data.new))
    assert float(value) == pytest.approx(expected(data.new), rel=5e-5, abs=1e-6)
    for place in [(1, 0), (5, 1), (9, 0)]:
        up, down = data.new.copy(), data.new.copy()
        up[place] += 1e-6
        down[place] -= 1e-6
        assert float(gradient[place]) == pytest.approx((expected(up) - expected(down)) / 2e-6, abs=1e-5)


def test_messages():
    with pytest.raises(ValueError, match="must be above 0, got 0"):
        resolve(bound=0)
