"""Stratified GRPO: worked example, float64 loops, where the strata come from."""

import jax
import numpy as np
import pytest

from grpo_jax import methods

SETTINGS = {"prompts": 3, "group_size": 4, "max_new": 9}


def resolve(name="stratified_grpo", **options):
    return methods.resolve(name, options=options, settings=SETTINGS)


def shaped(method, batch, **columns):
    batch = batch.replace(columns={k: np.asarray(v) for k, v in columns.items()})
    return np.asarray(jax.jit(lambda batch: method.advantage(batch, {}, None)[0].advantages)(batch))


def test_worked_example(make):
    batch, strata = make.batch([1, 0, 0.8, 0.2, 0.4, 0]), [1, 1, 2, 2, 2, 0]
    expected = [1.113337, -1.008891, 1.277933, -0.959679, -0.213808, -0.208893]
    np.testing.assert_allclose(shaped(resolve(), batch, stratum=strata)[:, 0], expected, atol=1.5e-6)
    got = shaped(resolve(stratum="searches"), batch, searches=np.array(strata, np.float32))
    np.testing.assert_allclose(got[:, 0], expected, atol=1.5e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_against_float64(make, alpha):
    """A completion without label (NaN, below 0) has no stratum; a stratum of one is compared with nobody."""
    data, draw = make.ragged(0), np.random.default_rng(0)
    strata = draw.choice([0, 1, 7, np.nan, -3], 17, p=[0.4, 0.3, 0.1, 0.1, 0.1])

    def score(i, rows):
        inside = data.total[rows]
        return (data.total[i] - inside.mean()) / (inside.std() + 0.01) if i in rows and np.ptp(inside) > 0 else 0.0

    expected = np.zeros(17)
    for i in range(17):
        rows = [j for j in range(17) if data.groups[j] == data.groups[i] >= 0 and not np.isnan(data.total[j])]
        like = [j for j in rows if strata[j] == strata[i] >= 0]
        if i in rows:
            expected[i] = alpha * score(i, like) + (1 - alpha) * score(i, rows)
    got = shaped(resolve(alpha=alpha, epsilon=0.01), data.batch(), stratum=strata)
    np.testing.assert_allclose(got, np.where(data.mask, expected[:, None], 0), rtol=1e-4, atol=1e-5)
    assert np.abs(expected).max() > 0.3


def test_refusals(make):
    with pytest.raises(ValueError, match=r"alpha in \[0, 1\], got -0.1"):
        resolve(alpha=-0.1)
    with pytest.raises(ValueError, match=r"by the column 'stratum'.* has \['answer'\]"):
        shaped(resolve(), make.batch([1, 0]), answer=[1, 2])
    with pytest.raises(ValueError, match=r"by the column 'stratum', one number per completion"):
        shaped(resolve(), make.batch([1, 0]), stratum=np.ones((2, 2)))
