"""MC-GRPO: what its two published trainers do differently, on ragged groups; the rest is with all methods' tests."""

import jax
import numpy as np
import pytest

from grpo_jax import methods

SETTINGS = {"prompts": 3, "group_size": 4, "max_new": 9}


def shaped(batch, **options):
    method = methods.resolve("mc_grpo", options=options, settings=SETTINGS)
    return jax.jit(lambda batch: method.advantage(batch, {}, None)[0])(batch)


def test_worked_example(make):
    batch = shaped(make.batch([0.1, 0.9, 0.4]), compensate=True)
    np.testing.assert_allclose(np.asarray(batch.advantages)[:, 0], [-1.495017, 2.491694, 0], atol=2e-6)
    assert np.asarray(batch.weights).tolist() == [1, 1, 0]


@pytest.mark.parametrize("scale", ["mad", "std", "none"])
@pytest.mark.parametrize("compensate", [True, False])
def test_against_float64(make, scale, compensate):
    data = make.ragged(0)
    expected, weights = np.zeros(17), data.weights.copy()
    for group in set(data.groups[data.groups >= 0]):
        rows = [i for i in range(17) if data.groups[i] == group and not np.isnan(data.total[i])]
        if not rows:
            continue
        r = data.total[rows]
        away = r - np.sort(r)[(len(r) - 1) // 2]
        mad, std = np.sort(np.abs(away))[(len(r) - 1) // 2], r.std(ddof=1) if len(r) > 1 else 0
        a = away / {"mad": mad + 1e-3, "std": std + 1e-3, "none": 1}[scale]
        felt = np.abs(a) > 1e-6
        expected[rows] = a * len(r) / felt.sum() if compensate and felt.any() else a
        weights[rows[int(np.flatnonzero(away == 0)[0])]] = 0
    batch = shaped(data.batch(), scale=scale, compensate=compensate)
    np.testing.assert_allclose(batch.advantages, np.where(data.mask, expected[:, None], 0), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(batch.weights, weights)
