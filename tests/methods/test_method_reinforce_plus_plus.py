"""REINFORCE++: the worked example, float64 loops on ragged batches, where its KL goes, and what it asks for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import losses, methods
from grpo_jax.types import Decisions

REWARDS, GROUPS = [1, 0, 0, 0, 1, 1, 0, 1], [0, 0, 0, 0, 1, 1, 1, 2]
MASK = np.arange(3) < np.array([3, 1, 2, 2, 1, 3, 2, 2])[:, None]


def resolve(**options):
    return methods.resolve(
        "reinforce_plus_plus", options=options, settings={"prompts": 3, "group_size": 4, "max_new": 9}
    )


def shaped(method, batch):
    return jax.jit(lambda batch: method.advantage(batch, {}, None)[0])(batch)


def test_worked_example(make):
    batch = shaped(resolve(), make.batch(REWARDS, groups=GROUPS, mask=MASK))
    expected = np.where(np.array(REWARDS)[:, None] == 1, 0.853913, -1.097888)
    np.testing.assert_allclose(batch.advantages, np.where(MASK, expected, 0), atol=1e-6)
    rows = shaped(resolve(group_baseline=True), make.batch(REWARDS, groups=GROUPS, mask=MASK)).advantages
    values = np.array([0.75, *[-0.25] * 3, 1 / 3, 1 / 3, -2 / 3, 0])
    tokens = np.repeat(values, MASK.sum(1))
    expected = (values - tokens.mean()) / tokens.std(ddof=1)
    np.testing.assert_allclose(rows, np.where(MASK, expected[:, None], 0), atol=1e-6)


def oracle(data, *, gamma, kl, group_baseline):
    """Token by token from the last; what is not trained is not there."""
    n, each = len(data.total), np.zeros(data.mask.shape)
    there = [i for i in range(n) if data.groups[i] >= 0 and not np.isnan(data.total[i])]
    for i in there:
        if group_baseline:
            members = [j for j in there if data.groups[j] == data.groups[i]]
            each[i] = data.total[i] - np.mean(data.total[members])
            continue
        running, last = 0.0, True
        for t in reversed(np.flatnonzero(data.mask[i])):
            reward = (data.total[i] if last else 0) - kl * (data.old[i, t] - data.ref[i, t])
            running, last = reward + gamma * running, False
            each[i, t] = running
    counted = data.mask & np.isin(np.arange(n), there)[:, None]
    some = each[counted]
    return np.where(counted, (each - some.mean()) / np.sqrt(some.var(ddof=1) + 1e-8), 0)


def summed(data, advantage, new, *, low, high, kl):
    total = count = 0.0
    for i in range(len(data.weights)):
        m = data.mask[i]
        ratio, a = np.exp(new[i] - data.old[i])[m], advantage[i][m]
        loss = np.maximum(-a * ratio, -a * np.clip(ratio, 1 - low, 1 + high)) + kl * (new[i] - data.ref[i])[m] ** 2 / 2
        total, count = total + data.weights[i] * loss.sum(), count + data.weights[i] * m.sum()
    return total / count


@pytest.mark.parametrize(
    "options",
    [{}, {"gamma": 0.8, "kl": 0.3}, {"group_baseline": True, "kl": 0.3}, {"clip_low": 0.1, "clip_high": 0.3}],
)
def test_against_loops(make, options):
    data = make.ragged(0)
    kl, grouped = options.get("kl", 0.0), options.get("group_baseline", False)
    method = resolve(**options)
    batch = shaped(method, data.batch())
    advantage = oracle(data, gamma=options.get("gamma", 1.0), kl=kl, group_baseline=grouped)
    np.testing.assert_allclose(batch.advantages, advantage, rtol=1e-4, atol=1e-5)
    bounds = {"low": options.get("clip_low", 0.2), "high": options.get("clip_high", 0.2), "kl": kl if grouped else 0.0}

    @jax.jit
    @jax.value_and_grad
    def loss(logps):
        each, _ = method.objective(Decisions(logps=logps), batch, {})
        return losses.weighted_sum(each, method.aggregate(batch))

    value, gradient = loss(jnp.asarray(data.new, jnp.float32))
    assert float(value) == pytest.approx(summed(data, advantage, data.new, **bounds), rel=2e-5)
    for place in [(i, t) for i in range(len(data.weights)) for t in (0, 2)]:
        sides = []
        for step in (1e-6, -1e-6):
            moved = data.new.copy()
            moved[place] += step
            sides.append(summed(data, advantage, moved, **bounds))
        np.testing.assert_allclose(gradient[place], (sides[0] - sides[1]) / 2e-6, rtol=1e-3, atol=1e-5)
    assert not np.asarray(gradient)[~data.mask | (data.weights == 0)[:, None]].any()


def test_the_score_reaches_past_given_tokens(make):
    """What is given in the middle neither takes the score nor ends the sum."""
    mask = [[True, False, True, False], [True, True, True, True]]
    got = np.asarray(shaped(resolve(gamma=0.5), make.batch([1, 0], groups=[0, 0], mask=mask)).advantages)
    assert got[0, 2] > got[0, 0] > got[1, 0] and got[0, 1] == got[0, 3] == 0


def test_one_completion_per_prompt_is_enough(make):
    batch = make.batch([1, 0, 0, 1], groups=[0, 1, 2, 3])
    assert np.abs(shaped(resolve(), batch).advantages).min() > 0.5
    assert not np.asarray(shaped(resolve(group_baseline=True), batch).advantages).any()


def test_reference_only_where_it_is_used():
    assert resolve().roles == {} and resolve(kl=0.1).roles.keys() == {"reference"}
    with pytest.raises(ValueError, match="no option 'gama'; did you mean 'gamma'"):
        resolve(gama=1.0)
