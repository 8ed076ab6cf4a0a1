"""FGRPO as a method: the worked example over two steps, loops in float64, channels by name, error messages."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import losses, methods
from grpo_jax.types import Decisions

REWARDS = np.array([[1, 1, 0.8], [0, 1, 0.4], [1, 0, 0.6], [0, 0, 0.2]])


def resolve(make, **options):
    return methods.resolve("fgrpo", options=options, settings=make.settings)


def named(batch, *channels):
    return dataclasses.replace(batch, channels=channels)


def test_worked_example(make):
    """The multipliers of a step act in the next one; here those of the example are put in by hand."""
    method = resolve(make, targets={"consistent": 0.95, "grounded": 0.8})
    batch = named(make.batch(REWARDS, groups=[0] * 4), "task", "consistent", "grounded")
    arrays = method.init(None).arrays
    np.testing.assert_array_equal(arrays["duals"], [0, 0])
    shape = jax.jit(lambda batch, arrays: method.advantage(batch, arrays, None))
    first, arrays = shape(batch, arrays)
    np.testing.assert_allclose(first.advantages[:, 0], [0.865875, -0.865875, 0.865875, -0.865875], atol=2e-6)
    np.testing.assert_allclose(arrays["duals"], [0.0225, 0.015], atol=1e-7)
    after, arrays = shape(batch, {"duals": jnp.array([0.2, 0.1])})
    np.testing.assert_allclose(after.advantages[:, 1], [1.155195, -0.731415, 0.731415, -1.155195], atol=2e-6)
    np.testing.assert_allclose(arrays["duals"], [0.2225, 0.115], atol=1e-6)
    ratio = after.replace(old=Decisions(logps=jnp.zeros((4, 2))))
    _, reported = method.objective(Decisions(logps=jnp.zeros((4, 2))), ratio, arrays)
    np.testing.assert_allclose(reported["next_dual_consistent"], np.full((4, 2), 0.2225), rtol=1e-6)
    assert reported["next_dual_grounded"].shape == (4, 2)


def test_channels_go_by_name_and_the_rest_is_the_task(make):
    """Three task channels with weights around one quality, wherever it stands."""
    draw = np.random.default_rng(0)
    task, quality = draw.normal(size=(12, 2)), draw.random((12, 1))
    groups, duals = np.repeat([0, 1, 2], 4), {"duals": jnp.array([0.5])}
    method = resolve(make, targets={"quality": 0.5}, rescale=True)
    one = make.batch(np.concatenate([task, quality], 1), groups=groups, channel_weights=(1.0, 0.3, 0.7))
    other = make.batch(np.concatenate([quality, task], 1), groups=groups, channel_weights=(9.0, 1.0, 0.3))
    one, moved = method.advantage(named(one, "a", "b", "quality"), duals, None)
    other, same = method.advantage(named(other, "quality", "a", "b"), duals, None)
    np.testing.assert_allclose(one.advantages, other.advantages, atol=1e-6)
    summed = make.batch(np.concatenate([task @ [[1.0], [0.3]], quality], 1), groups=groups)
    summed, _ = method.advantage(named(summed, "task", "quality"), duals, None)
    np.testing.assert_allclose(one.advantages, summed.advantages, atol=1e-5)
    assert moved["duals"] == same["duals"] == pytest.approx(0.5 + 0.05 * (0.5 - quality.mean()), rel=1e-5)


def z_scores(values, groups):
    result = np.zeros(len(values))
    for i in range(len(values)):
        mates = values[(groups == groups[i]) & ~np.isnan(values)]
        if groups[i] >= 0 and not np.isnan(values[i]) and len(mates) > 1 and np.ptp(mates) > 0:
            result[i] = (values[i] - mates.mean()) / (mates.std(ddof=1) + 1e-4)
    return result


@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize("seed", [0, 1])
def test_against_float64(make, seed, norm):
    data = make.ragged(seed)
    method = resolve(make, targets={"channel 1": 0.4}, eta=0.3, cap=0.9, constraint_norm=norm)
    arrays = {"duals": jnp.array([0.7])}
    batch, after = jax.jit(lambda batch: method.advantage(batch, arrays, None))(data.batch())
    quality = data.rewards[:, 1]
    within = data.groups if norm == "group" else np.where(data.groups < 0, -1, 0)
    values = z_scores(data.rewards[:, 0], data.groups) + 0.7 * z_scores(quality, within)
    np.testing.assert_allclose(batch.advantages, np.where(data.mask, values[:, None], 0), rtol=1e-4, atol=1e-5)
    here = quality[(data.groups >= 0) & ~np.isnan(quality)]
    expected = np.clip(0.7 + 0.3 * (0.4 - here.mean()), 0, 0.9)
    assert float(after["duals"][0]) == pytest.approx(expected, rel=1e-5) and abs(expected - 0.7) > 1e-3

    def loss_of(new):
        total = size = 0.0
        for i, t in np.argwhere(data.mask & (data.weights > 0)[:, None]):
            ratio = np.exp(new[i, t] - data.old[i, t])
            total += data.weights[i] * max(-values[i] * ratio, -values[i] * np.clip(ratio, 0.8, 1.2))
            size += data.weights[i]
        return total / size

    @jax.jit
    @jax.value_and_grad
    def loss(logps):
        each, _ = method.objective(Decisions(logps=logps), batch, after)
        return losses.weighted_sum(each, method.aggregate(batch))

    got, gradient = loss(jnp.asarray(data.new, jnp.float32))
    assert float(got) == pytest.approx(loss_of(data.new), rel=2e-5)
    for place in np.ndindex(data.new.shape):
        up, down = data.new.copy(), data.new.copy()
        up[place], down[place] = up[place] + 1e-6, down[place] - 1e-6
        np.testing.assert_allclose(gradient[place], (loss_of(up) - loss_of(down)) / 2e-6, atol=2e-5)


@pytest.mark.parametrize("targets", [None, {"beauty": 0.5}, {"task": 1, "consistent": 1, "grounded": 1}])
def test_targets_that_cannot_be(make, targets):
    method = resolve(make, targets=targets)
    batch = named(make.batch(REWARDS, groups=[0] * 4), "task", "consistent", "grounded")
    with pytest.raises(ValueError, match=r"some of the reward channels \['task', 'consistent', 'grounded'\]"):
        method.advantage(batch, method.init(None).arrays, None)


def test_a_group_of_one_is_refused(make):
    with pytest.raises(ValueError, match="group_size must be at least 2, got 1"):
        methods.resolve("fgrpo", options={"targets": {"a": 1}}, settings={**make.settings, "group_size": 1})
