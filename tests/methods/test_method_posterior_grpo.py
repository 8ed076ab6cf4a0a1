"""P-GRPO: reasoning is paid behind the gate of the outcome."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_method_transcriptions import clip, computed, slopes

from grpo_jax import methods

CHANNELS = ("outcome", "process", "style", "form")


def resolve(make, **options):
    return methods.resolve("posterior_grpo", options=options, settings=make.settings)


def shaped(method, batch):
    @jax.jit
    def run(batch):
        batch = batch.replace(rewards=method.reward(batch, {}, None))
        return method.advantage(batch, {}, None)[0]

    return run(batch)


def test_worked_example(make):
    form, outcome, process = [1, 1, 1, 0, 1, 0], [1, 1, 0, 0, 0, 0], [0.9, 0.4, 0.95, np.nan, 0.1, 0.3]
    batch = make.batch(np.stack([form, outcome, process], axis=1)).replace(channels=("form", "outcome", "process"))
    batch = shaped(resolve(make), batch)
    np.testing.assert_allclose(batch.rewards.sum(1), [2.9, 2.4, 1, 0, 1, 0], atol=1e-6)
    expected = [1.394250, 0.980116, -0.179458, -1.007725, -0.179458, -1.007725]
    np.testing.assert_allclose(batch.advantages[:, 0], expected, atol=2e-6)


@pytest.mark.parametrize("seed", [0, 1])
def test_against_loops(make, seed):
    """Truncated rows, weighted channels, a further channel, missing verdicts, clip-higher."""
    data, draw = make.ragged(seed), np.random.default_rng(seed)
    n, weights = len(data.groups), (1.0, 0.5, 0.25, 2.0)
    scores = np.stack([draw.integers(0, 2, n), draw.random(n), draw.normal(size=n), draw.integers(0, 2, n)], axis=1)
    finished = draw.random(n) < 0.8
    missing = draw.random(n) < 0.15
    scores[missing] = np.nan
    total = np.full(n, np.nan)
    for i in np.flatnonzero(~missing):
        outcome, process, style, form = scores[i]
        outcome, form = outcome * finished[i], form * finished[i]
        total[i] = outcome + 0.5 * outcome * process + 0.25 * style + 2 * form
    scores[(scores[:, 0] * finished == 0) & ~missing, 1] = np.nan  # nobody asked the judge
    expected = np.zeros(n)
    for i in np.flatnonzero(~missing):
        same = [r for r, g in zip(total, data.groups) if g == data.groups[i] >= 0 and not np.isnan(r)]
        if len(same) > 1:
            expected[i] = (total[i] - np.mean(same)) / (np.std(same, ddof=1) + 1e-6)
    batch = data.batch().replace(
        scores=jnp.float32(scores), channels=CHANNELS, channel_weights=weights, finished=jnp.asarray(finished)
    )
    method = resolve(make)
    batch = shaped(method, batch)
    np.testing.assert_allclose(batch.advantages, np.where(data.mask, expected[:, None], 0), rtol=1e-4, atol=1e-5)
    assert np.abs(expected).max() > 0.3

    def loss(new):
        ratio, weight = np.exp(new - data.old), data.weights[:, None] * data.mask
        each = np.array([[clip(r, a, 0.2, 0.28) for r in row] for row, a in zip(ratio, expected)])
        return (weight * each).sum() / weight.sum()

    value, gradient = computed(method, batch, data.new)
    differences = slopes(loss, data.new)
    assert float(value) == pytest.approx(loss(data.new), rel=2e-5, abs=1e-6)
    np.testing.assert_allclose(gradient, differences, atol=3e-5 * np.abs(differences).max())


def test_channels_by_other_names(make):
    batch = make.batch([[1, 1, 0.5]]).replace(channels=("answer", "form", "working"))
    method = resolve(make, outcome="answer", process="working")
    np.testing.assert_allclose(method.reward(batch, {}, None), [[1, 1, 0.5]])
    with pytest.raises(ValueError, match=r"reward channel 'process', but the rewards have \['answer', 'form', 'wo"):
        resolve(make, outcome="answer").reward(batch, {}, None)
