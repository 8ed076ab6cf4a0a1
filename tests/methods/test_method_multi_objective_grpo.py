"""Multi-objective GRPO: both orders of adding up and normalising, the gate, the loss; examples and float64 loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import losses, methods
from grpo_jax.types import Decisions

# politeness, meaningfulness, actionability, safety
SCORES = np.array([[0.9, 0.8, 0.2, 0.9], [0.7, 0.6, 0.9, 0.1], [0.8, 0.7, 0.5, 0.6], [0.4, 0.9, 0.3, 0.8]])


def resolve(make, **options):
    return methods.resolve("multi_objective_grpo", options=options, settings=make.settings)


def shaped(method, batch):
    batch = batch.replace(rewards=method.reward(batch, {}, None))
    return method.advantage(batch, {}, None)[0]


@pytest.mark.parametrize(
    ("mode", "weights", "expected"),
    [
        ("sum_then_normalize", [0.25] * 4, [1.237983, -1.012895, 0.337632, -0.562719]),
        ("sum_then_normalize", [0.1, 0.1, 0.2, 0.6], [0.915711, -1.404091, 0.061047, 0.427332]),
        ("normalize_then_sum", [0.25] * 4, [1.244678, -1.171995, 0.153668, -0.226350]),
    ],
)
def test_worked_example(make, mode, weights, expected):
    batch = make.batch(SCORES, groups=np.zeros(4), channel_weights=weights)
    np.testing.assert_allclose(shaped(resolve(make, mode=mode), batch).advantages[:, 0], expected, atol=3e-6)


def test_the_gate(make):
    """The second is unsafe: its other objectives count nothing, its safety what it is."""
    batch = make.batch(SCORES, groups=np.zeros(4), channel_weights=[0.25] * 4)
    gated = resolve(make, gated_by="channel 3", floor=0.6).reward(batch, {}, None)
    np.testing.assert_allclose(gated, np.where(np.arange(4)[:, None] == 1, [0, 0, 0, 0.1], SCORES), atol=1e-7)
    for floor, alike in ((0.05, True), (0.95, False)):
        other = resolve(make, gated_by="channel 3", floor=floor).reward(batch, {}, None)
        assert np.allclose(other, SCORES) == alike
    with pytest.raises(ValueError, match=r"no 'safety' in \['channel 0', 'channel 1', 'channel 2', 'channel 3'\]"):
        resolve(make, gated_by="safety").reward(batch, {}, None)


def z(values, i, members, epsilon=1e-4):
    members = [j for j in members if not np.isnan(values[j])]
    if i not in members or len(members) < 2 or np.ptp(values[members]) == 0:
        return 0.0
    return (values[i] - values[members].mean()) / (values[members].std(ddof=1) + epsilon)


def by_hand(data, mode):
    n, groups = len(data.groups), data.groups
    of = [[j for j in range(n) if groups[j] == groups[i] >= 0] for i in range(n)]
    if mode == "sum_then_normalize":
        return np.array([z(data.total, i, of[i]) for i in range(n)])
    sums = np.array([sum(w * z(data.rewards[:, k], i, of[i]) for k, w in enumerate((1.0, 0.5))) for i in range(n)])
    everyone = [i for i in range(n) if groups[i] >= 0 and not np.isnan(data.rewards[i]).all()]
    return np.array([z(sums, i, everyone) for i in range(n)])


def loss_by_hand(data, advantage, new):
    rows = [i for i in range(len(new)) if data.mask[i].any()]
    each = {}
    for i in rows:
        logs, old, ref = (x[i][data.mask[i]] for x in (new, data.old, data.ref))
        ratio, a = np.exp(logs - old), advantage[i]
        surrogate = np.maximum(-a * ratio, -a * np.clip(ratio, 0.8, 1.2))
        each[i] = np.mean(surrogate + 0.04 * (np.exp(ref - logs) - 1 - (ref - logs)))
    return sum(data.weights[i] * each[i] for i in rows) / sum(data.weights[i] for i in rows)


@pytest.mark.parametrize("mode", ["sum_then_normalize", "normalize_then_sum"])
@pytest.mark.parametrize("seed", [0, 1])
def test_advantages_loss_and_gradient(make, seed, mode):
    data, method = make.ragged(seed), resolve(make, mode=mode)
    batch, advantage = jax.jit(lambda batch: shaped(method, batch))(data.batch()), by_hand(data, mode)
    np.testing.assert_allclose(batch.advantages, np.where(data.mask, advantage[:, None], 0), rtol=1e-4, atol=1e-5)
    assert np.abs(advantage).max() > 0.5

    @jax.jit
    @jax.value_and_grad
    def loss(logps):
        each, _ = method.objective(Decisions(logps=logps), batch, {})
        return losses.weighted_sum(each, method.aggregate(batch))

    value, gradient = loss(jnp.asarray(data.new, jnp.float32))
    assert float(value) == pytest.approx(loss_by_hand(data, advantage, data.new), rel=2e-5)
    for place in np.ndindex(data.new.shape):
        up, down = data.new.copy(), data.new.copy()
        up[place] += 1e-6
        down[place] -= 1e-6
        slope = (loss_by_hand(data, advantage, up) - loss_by_hand(data, advantage, down)) / 2e-6
        np.testing.assert_allclose(gradient[place], slope, atol=1e-5)


def test_spread_leads_in_a_sum_and_not_between_normalised_objectives(make):
    """Objectives that contradict each other and weigh alike: the one with the wider spread decides the sum."""
    scores = np.array([[1.0, 0.0], [0.0, 0.1], [0.6, 0.05]])
    signs = {}
    for mode in ("sum_then_normalize", "normalize_then_sum"):
        batch = make.batch(scores, groups=np.zeros(3), channel_weights=[0.5, 0.5])
        signs[mode] = np.asarray(shaped(resolve(make, mode=mode), batch).advantages[:, 0])
    np.testing.assert_array_equal(np.sign(signs["sum_then_normalize"]), [1, -1, 1])
    assert np.abs(signs["normalize_then_sum"][0]) < 0.7 < signs["sum_then_normalize"][0]


def test_weights_in_one_proportion_are_one_weighting(make):
    batch = make.batch(SCORES, groups=np.zeros(4), channel_weights=[0.1, 0.1, 0.2, 0.6])
    tenfold = batch.replace(channel_weights=(1.0, 1.0, 2.0, 6.0))
    for mode in ("sum_then_normalize", "normalize_then_sum"):
        method = resolve(make, mode=mode)
        np.testing.assert_allclose(
            shaped(method, batch).advantages, shaped(method, tenfold).advantages, rtol=2e-3, atol=1e-4
        )


def test_options(make):
    with pytest.raises(ValueError, match="mode is one of .* got 'sum'"):
        resolve(make, mode="sum")
    assert "reference" in resolve(make).roles and "reference" not in resolve(make, kl=0.0).roles
    batch = make.batch(SCORES, groups=np.zeros(4), channel_weights=[0.25] * 4)
    loose = shaped(resolve(make, epsilon=0.5), batch).advantages
    assert np.abs(loose).max() < 0.2  # the spread is 0.056: epsilon in the denominator
