"""Rotary embedding and soft-capping against float64 transcriptions."""

import numpy as np

from grpo_jax.models import Rope, softcap
from grpo_jax.models.attention import rotary_frequencies, rotate


def test_rotation_depends_on_distance_alone_and_position_zero_is_identity():
    x, y = np.random.default_rng(0).normal(size=(2, 1, 1, 16)).astype(np.float32)
    frequencies = rotary_frequencies(Rope(theta=100.0), 16)
    turn = lambda v, t: rotate(v, np.cos(t * frequencies), np.sin(t * frequencies))  # noqa: E731
    np.testing.assert_allclose(np.sum(turn(x, 9) * turn(y, 4)), np.sum(turn(x, 25) * turn(y, 20)), rtol=1e-4)
    np.testing.assert_array_equal(turn(x, 0), x)
    assert abs(np.sum(turn(x, 9) * turn(y, 4)) - np.sum(turn(x, 9) * turn(y, 5))) > 1e-3


def test_llama3_keeps_short_waves_and_divides_long_ones():
    plain_waves = rotary_frequencies(Rope(theta=5e5), 128)
    rope = Rope(theta=5e5, kind="llama3", factor=8.0, low_frequency=1.0, high_frequency=4.0, original_length=8192)
    stretched, waves = rotary_frequencies(rope, 128), 2 * np.pi / plain_waves
    np.testing.assert_array_equal(stretched[waves < 8192 / 4], plain_waves[waves < 8192 / 4])
    np.testing.assert_allclose(stretched[waves > 8192], plain_waves[waves > 8192] / 8, rtol=1e-6)
    middle = (waves > 8192 / 4) & (waves < 8192)
    assert middle.sum() >= 3
    assert (np.diff(stretched) < 0).all()
    smooth = (8192 / waves[middle] - 1) / 3
    np.testing.assert_allclose(
        stretched[middle], (1 - smooth) * plain_waves[middle] / 8 + smooth * plain_waves[middle], rtol=1e-5
    )


def test_softcap():
    x = np.array([-100.0, -1.0, 0.0, 0.5, 100.0])
    np.testing.assert_allclose(softcap(x, 2.0), 2 * np.tanh(x / 2), rtol=1e-6)
    assert softcap(x, None) is x
