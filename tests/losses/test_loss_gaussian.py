"""Gaussian steps of flow policies: the worked example, float64 loops with differences, scipy, garbage, exactness."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax import losses
from grpo_jax.losses.gaussian import (
    flow_transition,
    gaussian_kl,
    gaussian_logp,
    gaussian_ratio,
    normalized_gaussian_ratio,
)

X, V, NEXT = np.array([[[0.5, -1.0]]]), np.array([[[0.2, 0.4]]]), np.array([[[0.3, -0.9]]])
V_NEW = np.array([[[0.25, 0.35]]])
STEP = {"times": np.full((1, 1), 0.8), "next_times": np.full((1, 1), 0.6)}
SIGMA = np.full((1, 1), 0.7 * math.sqrt(0.8 / 0.2))


def test_worked_example():
    mean, std = flow_transition(X, V, **STEP, noise=SIGMA)
    np.testing.assert_allclose(mean, [[[0.327700, -0.854600]]], atol=1e-6)
    assert float(std[0, 0]) == pytest.approx(0.626099, abs=1e-6)
    old = gaussian_logp(NEXT, mean, std)
    assert float(old[0, 0]) == pytest.approx(-0.452496, abs=1e-6)
    new_mean, _ = flow_transition(X, V_NEW, **STEP, noise=SIGMA)
    new = gaussian_logp(NEXT, new_mean, std)
    assert float(new[0, 0]) == pytest.approx(-0.452974, abs=1e-6)
    ratio = gaussian_ratio(NEXT, new_mean, mean, std)
    assert float(ratio[0, 0]) == pytest.approx(0.999521, abs=1e-6)
    assert float(jnp.exp(new - old)[0, 0]) == pytest.approx(float(ratio[0, 0]), abs=1e-6)
    assert float(gaussian_kl(new_mean, mean, std)[0, 0]) == pytest.approx(0.000197707, rel=1e-4)
    assert float(gaussian_kl(new_mean, mean, SIGMA)[0, 0]) == pytest.approx(0.0000395415, rel=1e-4)  # without |dt|
    dance, spread = flow_transition(X, V, **STEP, noise=np.full((1, 1), 0.3))
    np.testing.assert_allclose(dance, [[[0.453925, -1.069650]]], atol=1e-6)
    assert float(spread[0, 0]) == pytest.approx(0.134164, abs=1e-6)


def test_clipped_loss_of_the_worked_example():
    """Clip 1e-4 on ratios this close to 1 does bind."""
    ratio = jnp.array([[1.00005], [0.9998], [1.0003], [1.0]])
    advantages = jnp.array([[-1.549193], [2.323789], [-1.549193], [0.774596]])
    loss = losses.ppo_clip(ratio, advantages, low=1e-4, high=1e-4)
    assert float(loss.mean()) == pytest.approx(0.00025174, abs=5e-7)


class Steps:
    """Latents [N, T, 3, 2]; one step is deterministic."""

    def __init__(self, seed: int):
        draw = np.random.default_rng(seed)
        shape = (4, 5, 3, 2)
        self.old = draw.normal(size=shape)
        self.std = draw.uniform(0.1, 1.5, shape[:2])
        self.samples = self.old + self.std[..., None, None] * draw.normal(size=shape)
        self.means = self.old + draw.normal(0, 0.1, shape)
        self.weights = draw.uniform(0.5, 1.0, shape[:2])

    def loops(self, name, means):
        result = np.zeros(self.std.shape)
        for at in np.ndindex(self.std.shape):
            x, mean, old, s = self.samples[at].ravel(), means[at].ravel(), self.old[at].ravel(), self.std[at]
            new_logp, old_logp = (scipy.stats.norm.logpdf(x, m, s).mean() for m in (mean, old))
            b = ((mean - old) ** 2 / (2 * s * s)).mean()
            result[at] = {
                "logp": new_logp,
                "ratio": math.exp(new_logp - old_logp),
                "normalized": math.exp((new_logp - old_logp + b) * s),
                "kl": b,
            }[name]
        return result


FORMULAS = {
    "logp": lambda samples, means, old, std: gaussian_logp(samples, means, std),
    "ratio": gaussian_ratio,
    "normalized": normalized_gaussian_ratio,
    "kl": lambda samples, means, old, std: gaussian_kl(means, old, std),
}


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.value_and_grad, argnums=(1, 2, 3, 4), has_aux=True)
def weighed(name, samples, means, old, std, weights):
    each = FORMULAS[name](samples, means, old, std)
    return losses.weighted_sum(each, weights), each


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", FORMULAS)
def test_against_loops(name, seed, slope):
    data = Steps(seed)
    f32 = lambda *arrays: [jnp.asarray(x, jnp.float32) for x in arrays]  # noqa: E731
    (_, each), gradients = weighed(name, *f32(data.samples, data.means, data.old, data.std, data.weights))
    np.testing.assert_allclose(each, data.loops(name, data.means), rtol=1e-5, atol=1e-6)
    expected = slope(lambda means: (data.weights * data.loops(name, means)).sum(), data.means)
    np.testing.assert_allclose(gradients[1], expected, atol=2e-5 * np.abs(expected).max())
    assert not any(np.asarray(gradients[i]).any() for i in (0, 2, 3))  # samples, old means, std are constants


@pytest.mark.parametrize("name", FORMULAS)
def test_garbage_where_nothing_weighs(name):
    """A deterministic step, and latents that are not finite: NaN in what is left out, the same numbers elsewhere."""
    data = Steps(3)
    out = np.zeros(data.std.shape, bool)
    out[1, 2], out[2, :] = True, True
    data.weights[out] = 0
    arrays = [data.samples, data.means, data.old, data.std]
    clean = weighed(name, *(jnp.asarray(x, jnp.float32) for x in arrays), jnp.asarray(data.weights))
    for fill in (np.nan, np.inf):
        dirty = [np.where(out[..., None, None], fill, x) for x in arrays[:3]]
        dirty.append(np.where(out, 0.0, data.std))
        (value, each), gradients = weighed(
            name, *(jnp.asarray(x, jnp.float32) for x in dirty), jnp.asarray(data.weights)
        )
        np.testing.assert_array_equal(value, clean[0][0])
        np.testing.assert_array_equal(np.isnan(each), out)
        np.testing.assert_array_equal(gradients[1], np.where(out[..., None, None], 0, clean[1][1]))
    poisoned = np.array(data.means)
    poisoned[0, 0, 0, 0] = np.nan
    arrays[1] = poisoned
    assert np.isnan(weighed(name, *(jnp.asarray(x, jnp.float32) for x in arrays), jnp.asarray(data.weights))[0][0])


@pytest.mark.parametrize("name", FORMULAS)
def test_half_precision_is_read_and_float32_is_returned(name):
    data = Steps(1)
    halves = [jnp.asarray(x, jnp.bfloat16) for x in (data.samples, data.means, data.old, data.std)]
    got = FORMULAS[name](*halves)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, FORMULAS[name](*(x.astype(jnp.float32) for x in halves)))


def test_the_ratio_is_exact_near_one():
    """At latents of 16384 dimensions and steps of 1e-4, far below what a difference of log-probs resolves."""
    draw = np.random.default_rng(0)
    old = draw.normal(size=(2, 3, 16384)).astype(np.float32)
    samples = (old + 0.05 * draw.normal(size=old.shape)).astype(np.float32)
    means = (old + 1e-4 * draw.normal(size=old.shape)).astype(np.float32)
    exact = np.mean([(samples - old.astype(float)) ** 2 - (samples - means.astype(float)) ** 2], axis=(0, 3))
    exact = exact / (2 * 0.05**2)
    std = jnp.full((2, 3), 0.05)
    direct = np.log(np.asarray(gaussian_ratio(samples, means, old, std), float))
    assert np.abs(direct - exact).max() < 2e-7
    assert (np.asarray(gaussian_ratio(samples, old, old, std)) == 1).all()


def test_expected_ratio_is_one_in_one_dimension_and_below_it_in_many():
    """The bias that the normalised ratio removes: E log rho = -KL, E of its own exponent 0."""
    draw = np.random.default_rng(0)
    x = draw.normal(size=(200_000, 1, 1)).astype(np.float32)
    old, new, std = np.zeros_like(x), np.full_like(x, 0.2), np.ones((len(x), 1), np.float32)
    assert float(gaussian_ratio(x, new, old, std).mean()) == pytest.approx(1, abs=3e-3)
    kl = float(gaussian_kl(new, old, std)[0, 0])
    assert float(jnp.log(gaussian_ratio(x, new, old, std)).mean()) == pytest.approx(-kl, abs=2e-3)
    assert float(jnp.log(normalized_gaussian_ratio(x, new, old, std)).mean()) == pytest.approx(0, abs=2e-3)


@given(st.floats(0.05, 0.95), st.floats(0.02, 1.0), st.floats(0.0, 1.5), st.integers(0, 20))
@settings(max_examples=25, deadline=None)
def test_the_flow_s_kl_is_a_distance_of_velocities(t, share, noise, seed):
    """(|dt| / 2)(1 / s + s (1 - t) / 2t)^2 mean (v - v_ref)^2; and without noise the step is Euler's."""
    draw = np.random.default_rng(seed)
    x, v, ref = draw.normal(size=(3, 2, 1, 4))
    dt = -t * share
    times, after = np.full((2, 1), t), np.full((2, 1), t + dt)
    mean, std = flow_transition(x, v, times, after, np.full((2, 1), noise))
    if noise < 0.05:
        euler, nothing = flow_transition(x, v, times, after, np.zeros((2, 1)))
        np.testing.assert_allclose(euler, x + v * dt, atol=1e-5)
        assert not np.asarray(nothing).any()
        return
    other, _ = flow_transition(x, ref, times, after, np.full((2, 1), noise))
    expected = -dt / 2 * (1 / noise + noise * (1 - t) / (2 * t)) ** 2 * ((v - ref) ** 2).mean(-1)
    np.testing.assert_allclose(gaussian_kl(mean, other, std), expected, rtol=2e-3)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: gaussian_logp(np.ones((1, 2)), np.ones((1, 2)), np.ones((1, 2))), r"\[N, T, ...\].*samples \[1, 2\]"),
        (lambda: gaussian_kl(np.ones((1, 2, 3)), np.ones((1, 2, 4)), np.ones((1, 2))), "latents must have one shape"),
        (lambda: gaussian_kl(*[np.ones((1, 2, 3))] * 2, np.ones(2)), r"std .* per step \[1, 2\], got \[2\]"),
        (lambda: flow_transition(X, V, np.ones(1), np.ones((1, 1)), SIGMA), "times must have one value per step"),
    ],
)
def test_refusals(call, said):
    with pytest.raises(ValueError, match=said):
        call()
