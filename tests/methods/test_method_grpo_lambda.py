"""GRPO-lambda: which groups are paid for brevity, and what a right completion earns there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_method_transcriptions import clip, computed, slopes

from grpo_jax import methods


def resolve(make, **options):
    return methods.resolve("grpo_lambda", options=options, settings=make.settings)


def shaped(method, batch):
    @jax.jit
    def run(batch):
        batch = batch.replace(rewards=method.reward(batch, {}, None))
        return method.advantage(batch, {}, None)[0]

    return run(batch)


def test_worked_example(make):
    right = [1, 1, 1, 0, 1, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1]
    lengths = [100, 200, 300, 50, 400, 400, 500, 90, 120, 80, 60, 60, 10, 20, 30, 40, 200, 100, 400, 300]
    batch = make.batch(right, groups=np.repeat(np.arange(5), 4)).replace(lengths=jnp.array(lengths))
    batch = shaped(resolve(make, fraction=0.4, alpha=0.2), batch)
    np.testing.assert_allclose(batch.rewards[:4, 0], [0.954579, 0.9, 0.845421, 0], atol=1e-6)
    np.testing.assert_allclose(batch.rewards[16:, 0], [0.921995, 0.958552, 0.841448, 0.878005], atol=1e-6)
    expected = [0.618262, 0.497565, 0.376868, -1.492695, 1.499997, -0.499999, -0.499999, -0.499999]
    expected += [0.866024, 0.866024, -0.866024, -0.866024] + [0] * 4 + [0.430686, 1.146495, -1.146495, -0.430686]
    np.testing.assert_allclose(batch.advantages[:, 0], expected, atol=3e-6)


def transcribed(right, lengths, groups, fraction, alpha):
    names = list(dict.fromkeys(g for g, r in zip(groups, right) if g >= 0 and not np.isnan(r)))
    accuracy = {g: np.nanmean(right[groups == g]) for g in names}
    top = sorted(names, key=lambda g: -accuracy[g])[: int(np.ceil(round(fraction * len(names), 6)))]
    reward = right.copy()
    for i in np.flatnonzero((right == 1) & np.isin(groups, top)):
        among = lengths[(groups == groups[i]) & (right == 1)]
        spread = among.std() if np.ptp(among) else 1e-4
        reward[i] = 1 - alpha / (1 + np.exp(-(lengths[i] - among.mean()) / spread))
    return reward


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_against_loops(make, seed, fraction):
    """A second channel is added; truncated completions are wrong; rows without a verdict take no part."""
    data, draw = make.ragged(seed, binary=True), np.random.default_rng(seed)
    n = len(data.groups)
    finished, style = draw.random(n) < 0.8, draw.normal(size=n)
    right = np.where(np.isnan(data.rewards[:, 0]), np.nan, data.rewards[:, 0] * finished)
    style[np.isnan(right)] = np.nan
    reward = transcribed(right, data.lengths.astype(float), data.groups, fraction, 0.6) + 0.5 * style
    expected = np.zeros(n)
    for i in np.flatnonzero(~np.isnan(reward)):
        same = [r for r, g in zip(reward, data.groups) if g == data.groups[i] >= 0 and not np.isnan(r)]
        if len(same) > 1:
            expected[i] = (reward[i] - np.mean(same)) / (np.std(same, ddof=1) + 1e-6)
    batch = data.batch().replace(
        scores=jnp.float32(np.stack([data.rewards[:, 0], style], axis=1)),
        channels=("answer", "style"),
        channel_weights=(1.0, 0.5),
        finished=jnp.asarray(finished),
        lengths=data.lengths,
    )
    method = resolve(make, fraction=fraction)
    batch = shaped(method, batch)
    np.testing.assert_allclose(batch.advantages, np.where(data.mask, expected[:, None], 0), rtol=1e-4, atol=1e-5)
    assert np.abs(expected).max() > 0.3

    def loss(new):
        ratio, weight = np.exp(new - data.old), data.weights[:, None] * data.mask
        each = np.array([[clip(r, a, 0.2, 0.2) for r in row] for row, a in zip(ratio, expected)])
        return (weight * each).sum() / weight.sum()

    value, gradient = computed(method, batch, data.new)
    differences = slopes(loss, data.new)
    assert float(value) == pytest.approx(loss(data.new), rel=2e-5, abs=1e-6)
    np.testing.assert_allclose(gradient, differences, atol=3e-5 * np.abs(differences).max())


def test_no_fraction_is_plain_grpo(make):
    data = make.ragged(0, binary=True)
    plain = methods.resolve("grpo", options={}, settings=make.settings)
    ours, theirs = (shaped(m, data.batch()).advantages for m in (resolve(make, fraction=0.0), plain))
    np.testing.assert_array_equal(ours, theirs)
    everywhere = shaped(resolve(make, fraction=1.0), data.batch()).advantages
    assert not np.allclose(everywhere, theirs)


@pytest.mark.parametrize(("options", "said"), [({"fraction": 1.2}, "got 1.2"), ({"alpha": -0.1}, "got -0.1")])
def test_what_is_refused(make, options, said):
    with pytest.raises(ValueError, match=said):
        resolve(make, **options).reward(make.batch([1, 0]), {}, None)
