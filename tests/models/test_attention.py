"""attend, rotary embedding and soft-capping against float64 transcriptions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.models import Part, Rope, attend, softcap
from grpo_jax.models.attention import NOWHERE, rotary_frequencies, rotate

C, G, S, H, HKV, D, P, T = 3, 2, 4, 6, 2, 8, 5, 7
LENGTHS = np.array([5, 2, 0])


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    make = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    queries = 2 * make(C, G, S, H, D)
    shared = Part(
        make(C, P, HKV, D), make(C, P, HKV, D), np.where(np.arange(P) < LENGTHS[:, None], np.arange(P), NOWHERE)
    )
    own = Part(make(C, G, T, HKV, D), make(C, G, T, HKV, D), LENGTHS[:, None] + np.arange(T))
    return queries, LENGTHS[:, None] + 2 + np.arange(S), shared, own


def plain(queries, positions, shared, own, scale, cap, window):
    """One query at a time, its keys laid side by side, in float64."""
    out = np.zeros(queries.shape)
    for c, g, s, h in np.ndindex(C, G, S, H):
        keys = np.concatenate([shared.keys[c], own.keys[c, g]])[:, h // (H // HKV)].astype(np.float64)
        values = np.concatenate([shared.values[c], own.values[c, g]])[:, h // (H // HKV)].astype(np.float64)
        there = np.concatenate([shared.positions[c], own.positions[c]]).astype(np.int64)
        scores = keys @ queries[c, g, s, h].astype(np.float64) * scale
        scores = scores if cap is None else cap * np.tanh(scores / cap)
        here = positions[c, s]
        seen = (there <= here) & (there > here - (10**9 if window is None else window))
        weights = np.exp(scores[seen] - scores[seen].max())
        out[c, g, s, h] = weights / weights.sum() @ values[seen]
    return out


@pytest.mark.parametrize("cap, window", [(None, None), (2.0, None), (None, 3), (1.5, 1)])
def test_attend_equals_one_softmax_over_all_keys(cap, window):
    queries, positions, shared, own = inputs()
    got = jax.jit(lambda *x: attend(*x[:2], x[2:], scale=0.4, softcap=cap, window=window))(
        queries, positions, shared, own
    )
    np.testing.assert_allclose(got, plain(queries, positions, shared, own, 0.4, cap, window), atol=2e-6)


def test_scores_far_apart_between_the_parts_stay_exact():
    queries, positions, shared, own = inputs()
    shared = shared._replace(keys=shared.keys * 100)
    got = attend(queries, positions, [shared, own], scale=1.0)
    np.testing.assert_allclose(got, plain(queries, positions, shared, own, 1.0, None, None), atol=1e-4)


def test_hidden_keys_have_no_gradient_and_spread_no_nan():
    queries, positions, shared, own = inputs()
    loss = lambda k, v: jnp.sum(attend(queries, positions, [Part(k, v, shared.positions), own], scale=1.0) ** 2)  # noqa: E731
    keys, values = jax.grad(loss, argnums=(0, 1))(shared.keys, shared.values)
    hidden = np.arange(P) >= LENGTHS[:, None]
    for gradient in (keys, values):
        assert np.isfinite(gradient).all()
        assert (gradient[hidden] == 0).all()
        assert (gradient[~hidden] != 0).all()


def test_gradient_against_finite_differences():
    queries, positions, shared, own = inputs()
    direction = np.random.default_rng(1).normal(size=shared.keys.shape)
    probe = np.random.default_rng(2).normal(size=queries.shape)
    loss = lambda k: jnp.sum(attend(queries, positions, [shared._replace(keys=k), own], scale=0.4, softcap=3.0) * probe)  # noqa: E731
    exact = np.sum(np.asarray(jax.grad(loss)(shared.keys)) * direction)
    at = lambda e: np.sum(  # noqa: E731
        plain(queries, positions, shared._replace(keys=shared.keys + e * direction), own, 0.4, 3.0, None) * probe
    )
    np.testing.assert_allclose(exact, (at(1e-5) - at(-1e-5)) / 2e-5, rtol=1e-4)


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
