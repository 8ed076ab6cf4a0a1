"""MicroCoder-GRPO: whose advantage is set to 0, the objective, and how the temperature is found."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_method_transcriptions import clip, computed, slopes

from grpo_jax import losses, methods
from grpo_jax.types import Decisions, Prompt, Rollout, State

REWARDS, TRUNCATED = [1, 0, 1, 0, 0, 0], np.array([0, 1, 1, 1, 0, 1], bool)
PLAUSIBLE, REPEATED = np.array([1, 1, 1, 0, 0, 1]), np.array([0, 0, 0, 0, 0, 1], bool)
DRAWS = np.array([0.5, 0.05, 0.15, 0.02, 0.01, 0.03])
LENGTHS = np.array([5, 8, 8, 8, 3, 8])
LOG_RATIOS = np.array([0.1, 0.3, -0.3, 0.05, -0.25, 0])


def resolve(make, **options):
    return methods.resolve("microcoder_grpo", options=options, settings=make.settings)


def worked(make, monkeypatch):
    """The batch of the worked example, repetitions of four tokens, with its draws."""
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape: jnp.float32(DRAWS))
    tokens = np.tile(np.arange(8), (6, 1)) + np.where(REPEATED, 0, np.arange(6))[:, None]
    tokens[REPEATED, 4:] = tokens[REPEATED, :4]
    mask = np.arange(8) < LENGTHS[:, None]
    batch = make.batch(REWARDS, mask=mask, old=np.zeros((6, 8)))
    return batch.replace(
        completions=jnp.asarray(tokens),
        finished=jnp.asarray(~TRUNCATED),
        columns={"plausible": jnp.asarray(PLAUSIBLE)},
    )


def test_worked_example(make, monkeypatch):
    batch = worked(make, monkeypatch)
    method = resolve(make, window=4, plausible="plausible", ratio="sequence")
    shaped, _ = method.advantage(batch, {}, None)
    expected = [1.290992, 0, 1.290992, -0.645496, -0.645496, -0.645496]
    np.testing.assert_allclose(shaped.advantages[:, 0], expected, atol=2e-6)
    new = np.where(batch.completion_mask, LOG_RATIOS[:, None] / LENGTHS[:, None], 0)
    each, _ = method.objective(Decisions(logps=jnp.float32(new)), shaped, {})
    terms = [1.426767, 0, 0.956390, -0.678591, -0.516397, -0.645496]
    np.testing.assert_allclose(-each[:, 0], terms, atol=3e-6)
    assert float(losses.weighted_sum(each, method.aggregate(shaped))) == pytest.approx(-0.090446, abs=1e-6)


def test_each_condition_by_itself(make, monkeypatch):
    """All would be spared: shown by what each condition takes away. The spared ones still weigh in denominators."""
    batch = worked(make, monkeypatch)

    def spared(batch, **options):
        options = {"window": 4, "plausible": "plausible", "probability": 1.0, **options}
        shaped, _ = resolve(make, **options).advantage(batch, {}, None)
        np.testing.assert_array_equal(shaped.completion_mask, batch.completion_mask)
        np.testing.assert_array_equal(shaped.weights, batch.weights)
        return np.flatnonzero(np.asarray(shaped.advantages)[:, 0] == 0).tolist()

    assert spared(batch) == [1, 2]
    assert spared(batch, probability=0.0) == []
    assert spared(batch, probability=0.1) == [1]
    assert spared(batch, window=128) == [1, 2, 5]  # nothing is long enough to repeat
    assert spared(batch, plausible=None) == [2]  # only what was rewarded
    assert spared(batch.replace(finished=jnp.ones(6, bool))) == []
    with pytest.raises(ValueError, match=r"from the column 'whole', but there are \['plausible'\]"):
        spared(batch, plausible="whole")


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_against_loops(make, ratio, seed):
    data, draw, key = make.ragged(seed), np.random.default_rng(seed), jax.random.key(seed)
    n = len(data.groups)
    finished, plausible = draw.random(n) < 0.4, draw.random(n) < 0.8
    uniforms = np.asarray(jax.random.uniform(key, (n,)))
    expected = np.zeros(n)
    for i in np.flatnonzero(~np.isnan(data.total)):
        same = [r for r, g in zip(data.total, data.groups) if g == data.groups[i] >= 0 and not np.isnan(r)]
        if len(same) > 1 and np.ptp(same) and not (not finished[i] and plausible[i] and uniforms[i] < 0.5):
            expected[i] = (data.total[i] - np.mean(same)) / (np.std(same, ddof=1) + 1e-6)
    batch = data.batch().replace(finished=jnp.asarray(finished), columns={"plausible": jnp.asarray(plausible)})
    method = resolve(make, probability=0.5, plausible="plausible", ratio=ratio)
    batch, _ = jax.jit(lambda batch, key: method.advantage(batch, {}, key))(batch, key)
    np.testing.assert_allclose(batch.advantages, np.where(data.mask, expected[:, None], 0), rtol=1e-4, atol=1e-5)
    assert 0 < np.sum(expected == 0) < n

    def loss(new):
        value = total = 0.0
        for i in np.flatnonzero(data.mask.any(1)):
            gain = (new[i] - data.old[i])[data.mask[i]]
            rho = np.exp(gain) if ratio == "token" else [np.exp(gain.sum())]
            value += data.weights[i] * sum(clip(r, expected[i], 0.2, 0.28) for r in rho)
            total += data.weights[i] * len(rho)
        return value / total

    value, gradient = computed(method, batch, data.new)
    differences = slopes(loss, data.new)
    assert float(value) == pytest.approx(loss(data.new), rel=2e-5, abs=1e-6)
    np.testing.assert_allclose(gradient, differences, atol=3e-5 * np.abs(differences).max())


# ---- the temperature ----------------------------------------------------------------------------------------------


def driven(make, method, different, state):
    """Answers with completions of which, at a temperature, that many of four are different. Nothing is scored."""
    asked = []
    draw = lambda state, n: [Prompt(i, f"prompt {i}") for i in range(n)]  # noqa: E731
    plan, answer = method.plan(state, draw, None), None
    while True:
        try:
            ask = plan.send(answer)
        except StopIteration as end:
            return asked, *end.value
        assert not isinstance(ask, Rollout)
        asked.append(ask)
        rows = make.rollout([r.prompt.id for r in ask for _ in range(4)], group_ids=np.repeat(range(len(ask)), 4))
        kinds = np.tile(np.minimum(np.arange(4), different[ask[0].temperature] - 1), len(ask))
        answer = rows.replace(completions=np.repeat(kinds[:, None], 4, axis=1).astype(np.int32))


def test_the_lowest_temperature_that_is_diverse_enough(make):
    """Four of a kind: 0; three and one: half of the pairs differ; all: 1. Measured once, in the first step."""
    method = resolve(make, temperatures=[1.2, 0.6, 0.9, 1.5], diversity=0.7)
    state = method.init(None)
    asked, host, rollouts = driven(make, method, {0.6: 1, 0.9: 2, 1.2: 4, 1.5: 4}, state)
    assert [a[0].temperature for a in asked] == [0.6, 0.9, 1.2, 1.2] and host == {"temperature": 1.2}
    assert [r.prompt.id for r in asked[0]] == [r.prompt.id for r in asked[-1]] and len(rollouts) == 1
    asked, host, _ = driven(make, method, {1.2: 1}, State(1, {}, host))
    assert [a[0].temperature for a in asked] == [1.2] and host == {"temperature": 1.2}
    lowest = resolve(make, temperatures=[0.6, 0.9], diversity=0.5)
    assert driven(make, lowest, {0.6: 2, 0.9: 4}, state)[1] == {"temperature": 0.6}
    highest = resolve(make, temperatures=[0.6, 0.9], diversity=0.9)
    assert driven(make, highest, {0.6: 1, 0.9: 2}, state)[1] == {"temperature": 0.9}


def test_without_candidates_the_configured_temperature(make):
    method = resolve(make)
    asked, host, _ = driven(make, method, {None: 1}, method.init(None))
    assert [a[0].temperature for a in asked] == [None] and host == {"temperature": None}
    assert {r.count for r in asked[0]} == {4} and method.group_size == 4


def test_another_ratio_is_refused(make):
    with pytest.raises(ValueError, match=r"ratio is one of \('token', 'sequence'\), got 'turn'"):
        resolve(make, ratio="turn")
