"""Format-Length: the surrogate reward in its channel, and what follows from it on ragged batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_method_transcriptions import clip, computed, k3, slopes

from grpo_jax import methods

MAX_NEW = 6


def resolve(make, **options):
    return methods.resolve("format_length", options=options, settings={**make.settings, "max_new": MAX_NEW})


def shaped(method, batch):
    """The batch with its rewards and advantages."""

    @jax.jit
    def run(batch):
        batch = batch.replace(rewards=method.reward(batch, {}, None))
        return method.advantage(batch, {}, None)[0]

    return run(batch)


def test_worked_example(make):
    """The last two channels, correctness and what else is measured, change nothing."""
    formed = [1, 1, 1, 1, 1, 0]
    scores = [[0, f, 1 - f, 7] for f in formed]
    batch = make.batch(scores, mask=np.ones((6, 1), bool))
    batch = batch.replace(
        channels=("tags", "form", "answer", "else"), lengths=jnp.array([0, 250, 500, 750, 1000, 1000])
    )
    method = methods.resolve("format_length", options={"thinking": "tags"}, settings={**make.settings, "max_new": 1000})
    batch = shaped(method, batch)
    expected = np.zeros((6, 4))
    expected[:, 1] = [0.5, 1.25, 1.5, 1, -0.5, -1]
    np.testing.assert_allclose(batch.rewards, expected, atol=1e-6)
    expected = [0.041451, 0.787575, 1.036282, 0.538867, -0.953380, -1.450795]
    np.testing.assert_allclose(batch.advantages[:, 0], expected, atol=2e-6)


def surrogate(length, formed, thinking, peak):
    x = min(length / MAX_NEW, 1)
    y = 1 - (1 - x / peak) ** 2 if x <= peak else 1 - 2 * ((x - peak) / (1 - peak)) ** 2
    return 0.5 * (thinking + formed) + y if formed else min(0, y)


@pytest.mark.parametrize("seed", [0, 1])
def test_against_loops(make, seed):
    data = make.ragged(seed, binary=True)
    formed = data.rewards[:, 0]
    thinking = np.random.default_rng(seed).integers(0, 2, len(formed)).astype(float)
    reward = np.array([surrogate(*row, 0.4) for row in zip(data.lengths, formed, thinking)])
    reward[np.isnan(formed)] = np.nan
    expected = np.zeros(len(formed))
    for i in range(len(formed)):
        same = [r for r, g in zip(reward, data.groups) if g == data.groups[i] >= 0 and not np.isnan(r)]
        if len(same) > 1 and not np.isnan(reward[i]):
            expected[i] = (reward[i] - np.mean(same)) / (np.std(same, ddof=1) + 1e-6) if np.ptp(same) else 0
    batch = data.batch()
    scores = np.stack([formed, thinking], axis=1)
    batch = batch.replace(
        scores=jnp.float32(scores), channels=("form", "tags"), channel_weights=(1.0, 1.0), lengths=data.lengths
    )
    method = resolve(make, thinking="tags", peak=0.4, kl=0.1)
    batch = shaped(method, batch)
    np.testing.assert_allclose(batch.advantages, np.where(data.mask, expected[:, None], 0), rtol=1e-4, atol=1e-5)
    assert np.abs(expected).max() > 0.3

    def loss(new):
        ratio, weight = np.exp(new - data.old), data.weights[:, None] * data.mask
        each = [[clip(r, a, 0.2, 0.2) for r in row] for row, a in zip(ratio, expected)]
        return (weight * (each + 0.1 * k3(new, data.ref))).sum() / weight.sum()

    value, gradient = computed(method, batch, data.new)
    differences = slopes(loss, data.new)
    assert float(value) == pytest.approx(loss(data.new), rel=2e-5, abs=1e-6)
    np.testing.assert_allclose(gradient, differences, atol=3e-5 * np.abs(differences).max())


def test_no_reference_and_the_paper_s_coefficient(make):
    assert resolve(make).roles.keys() == {"reference"} and resolve(make, kl=0.0).roles == {}


def test_a_channel_that_is_not_there(make):
    batch = make.batch([[1], [0]]).replace(channels=("exact",))
    with pytest.raises(ValueError, match=r"format_length reads the reward channel 'form', .* \['exact'\]"):
        resolve(make).reward(batch, {}, None)
    with pytest.raises(ValueError, match="reads the reward channel 'tags'"):
        resolve(make, formed="exact", thinking="tags").reward(batch, {}, None)
