"""Reg-GRPO's squared error: the worked example, float64 loops with differences, laws, groups over devices."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from grpo_jax import segments
from grpo_jax.losses.regression import group_regression, sequence_log_ratio
from tests import laws

RHO, TARGETS = np.array([0.3, -0.2, 0.1, 0.05]), np.array([1.305310, -0.783186, 0.261062, -0.783186])
ONE = np.zeros(4, int)
REGRESSION = jax.jit(jax.value_and_grad(group_regression), static_argnames=("ddof", "inside_root"))


class Groups:
    """Groups of 6, 4, 3, equal advantages, two rows, one row, none; a NaN advantage; weights of 0, 2 and 1.5."""

    def __init__(self, seed: int):
        draw = np.random.default_rng(seed)
        self.ids = draw.permutation(np.repeat([3, 7, 0, 5, 2, 9, -1], [6, 4, 3, 4, 2, 1, 2]))
        n = len(self.ids)
        self.advantages = draw.normal(size=n)
        self.advantages[self.ids == 5] = 0.0
        self.advantages[np.flatnonzero(self.ids == 3)[2]] = np.nan
        self.weights = np.ones(n)
        self.weights[np.flatnonzero(self.ids == 3)[:2]] = [0.0, 2.0]
        self.weights[np.flatnonzero(self.ids == 7)[0]] = 1.5
        self.rho = draw.normal(0, 0.3, n)


def by_loops(data, rho, *, ddof=1, epsilon=0.1, inside_root=True):
    each = []
    for group in set(data.ids) - {-1}:
        rows = [
            i
            for i in range(len(rho))
            if data.ids[i] == group and data.weights[i] > 0 and not math.isnan(data.advantages[i])
        ]
        size = sum(data.weights[i] for i in rows)
        if size < 3 or len({data.advantages[i] for i in rows}) == 1:
            continue
        mean = sum(data.weights[i] * rho[i] for i in rows) / size
        variance = sum(data.weights[i] * (rho[i] - mean) ** 2 for i in rows) / (size - ddof)
        scale = math.sqrt(variance + epsilon**2) if inside_root else math.sqrt(variance) + epsilon
        errors = [data.weights[i] * (data.advantages[i] - (rho[i] - mean) / scale) ** 2 for i in rows]
        each.append(sum(errors) / size)
    return sum(each) / len(each)


def test_worked_example():
    value, gradient = REGRESSION(RHO, TARGETS, ONE, epsilon=1e-4, inside_root=False)
    assert float(value) == pytest.approx(0.198402, abs=2e-6)
    np.testing.assert_allclose(gradient, [-0.737369, -0.787752, -0.249988, 1.775109], atol=5e-6)


def test_worked_example_on_policy():
    """All log-ratios 0: the direction of GRPO, -2 A / (G epsilon), where the naive standard deviation gives NaN."""
    for options in ({}, {"inside_root": False}):
        value, gradient = REGRESSION(np.zeros(4), TARGETS, ONE, **options)
        assert float(value) == pytest.approx(0.749687, abs=1e-6)
        np.testing.assert_allclose(gradient, [-6.526549, 3.915929, -1.305310, 3.915929], atol=2e-5)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("options", [{}, {"ddof": 0, "epsilon": 0.02}, {"inside_root": False, "epsilon": 0.3}], ids=str)
def test_against_loops(seed, options, slope):
    data = Groups(seed)
    value, gradient = REGRESSION(data.rho, data.advantages, data.ids, weights=data.weights, **options)
    assert float(value) == pytest.approx(by_loops(data, data.rho, **options), rel=2e-6)
    expected = slope(lambda rho: by_loops(data, rho, **options), data.rho)
    np.testing.assert_allclose(gradient, expected, atol=3e-6 * max(1, np.abs(expected).max()))
    silent = np.isin(data.ids, [-1, 5, 2, 9]) | np.isnan(data.advantages) | (data.weights == 0)
    assert not np.asarray(gradient)[silent].any() and np.abs(gradient).max() > 0.01
    for fill in (np.nan, np.inf):
        rho, advantages = (
            np.where(silent, fill, data.rho),
            np.where((data.ids < 0) | (data.weights == 0), fill, data.advantages),
        )
        again = REGRESSION(rho, advantages, data.ids, weights=data.weights, **options)
        np.testing.assert_array_equal(again[0], value)
        np.testing.assert_array_equal(again[1], gradient)


def test_laws_of_rows():
    data = Groups(7)
    loss = jax.jit(
        lambda rho, advantages, weights, group_ids: group_regression(rho, advantages, group_ids, weights=weights)
    )
    arrays = {"rho": data.rho, "advantages": data.advantages, "weights": data.weights, "group_ids": data.ids}
    assert laws.rows(loss, arrays) > 0.1


def test_a_row_of_weight_c_is_c_rows():
    data = Groups(1)
    data.weights = np.where(np.arange(len(data.ids)) % 3 == 0, 2.0, 1.0)
    copies = np.repeat(np.arange(len(data.ids)), data.weights.astype(int))
    got, _ = REGRESSION(data.rho, data.advantages, data.ids, weights=data.weights)
    expected, _ = REGRESSION(data.rho[copies], data.advantages[copies], data.ids[copies])
    assert float(got) == pytest.approx(float(expected), rel=1e-5)


@given(st.floats(-3, 3), st.floats(1, 50), st.integers(0, 20))
@settings(max_examples=25, deadline=None)
def test_blind_to_shift_and_scale_of_the_log_ratios(shift, scale, seed):
    """Up to epsilon: the unknown normaliser and temperature drop out. So the gradient has no component along either."""
    rho = np.random.default_rng(seed).normal(size=4)
    value, gradient = REGRESSION(rho, TARGETS, ONE, epsilon=1e-5)
    moved, _ = REGRESSION(rho * scale + shift, TARGETS, ONE, epsilon=1e-5)
    assert float(moved) == pytest.approx(float(value), abs=1e-4)
    size = np.abs(gradient).max() * 1e-3
    assert abs(float(gradient.sum())) <= size and abs(float(gradient @ rho.astype(np.float32))) <= size + 1e-4


def test_standardised_advantages_are_where_it_ends():
    """Log-ratios in proportion to the rewards, plus a constant, have no error and no gradient but epsilon's."""
    rewards = np.array([1, 0, 0.5, 0])
    value, gradient = REGRESSION(
        0.7 * rewards - 0.2, (rewards - rewards.mean()) / rewards.std(ddof=1), ONE, epsilon=1e-4
    )
    assert float(value) < 1e-6 and np.abs(gradient).max() < 1e-2


def test_sequence_log_ratio(ragged, slope):
    def loops(new):
        return np.array(
            [sum(new[i, t] - ragged.old_logps[i, t] for t in np.flatnonzero(m)) for i, m in enumerate(ragged.mask)]
        )

    expected = loops(ragged.logps)
    for new, old in ((ragged.logps, ragged.old_logps), (np.where(ragged.mask, ragged.logps, np.nan), ragged.old_logps)):
        np.testing.assert_allclose(sequence_log_ratio(new, old, ragged.mask), expected, atol=2e-6)
    mix = np.arange(len(expected)) - 2.0
    gradient = jax.grad(lambda new: mix @ sequence_log_ratio(new, ragged.old_logps, ragged.mask))(
        jnp.where(ragged.mask, ragged.logps, jnp.inf)
    )
    np.testing.assert_allclose(gradient, slope(lambda new: mix @ loops(new), ragged.logps), atol=1e-6)
    assert expected[0] == 0 and sequence_log_ratio(jnp.ones((1, 2), jnp.bfloat16), *[np.ones((1, 2))] * 2).dtype == (
        jnp.float32
    )


def test_groups_cut_over_devices_give_the_loss_and_gradient_of_one():
    """Statistics of a differentiable quantity, gathered with their gradients."""
    draw = np.random.default_rng(0)
    n, t = 16, 5
    ids, advantages = draw.integers(-1, 3, n), draw.normal(size=n).astype(np.float32)
    old = -draw.exponential(1.0, (n, t)).astype(np.float32)
    new, mask = old + draw.normal(0, 0.3, old.shape).astype(np.float32), np.arange(t) < draw.integers(0, 6, n)[:, None]
    new[ids < 0] = np.nan

    def whole(new, old, mask, advantages, ids, *, over=lambda function: function):
        return over(group_regression)(sequence_log_ratio(new, old, mask), advantages, ids)

    expected = jax.jit(jax.value_and_grad(whole))(new, old, mask, advantages, ids)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    divided = jax.shard_map(
        functools.partial(whole, over=functools.partial(segments.across, "data")),
        mesh=mesh,
        in_specs=PartitionSpec("data"),
        out_specs=PartitionSpec(),
    )
    got = jax.jit(jax.value_and_grad(divided))(new, old, mask, advantages, ids)
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-6)
    np.testing.assert_allclose(got[1], expected[1], atol=1e-6)
    assert np.abs(got[1]).max() > 0.01


def test_refusals():
    with pytest.raises(ValueError, match="epsilon keeps the standard deviation .* away from 0, got 0.0"):
        group_regression(RHO, TARGETS, ONE, epsilon=0.0)
    with pytest.raises(ValueError, match=r"got log_ratios \[4, 1\] and advantages \[4\] for group_ids \[4\]"):
        group_regression(RHO[:, None], TARGETS, ONE)
    with pytest.raises(ValueError, match="weights must have one entry for each of the 4 rows"):
        group_regression(RHO, TARGETS, ONE, weights=np.ones(3))
