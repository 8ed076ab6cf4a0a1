"""Advantages within a group: the worked example, float64 loops, exact zeros, and invariances."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from grpo_jax import advantages

REWARDS = jnp.array([1, 0, 0, 0, 1, 1, 0, 1.0])
GROUPS = jnp.array([0, 0, 0, 0, 1, 1, 1, 2])


def test_worked_example():
    """Groups of 4, 3 and 1. The single row gets 0 (verl's first form gives it its own reward)."""
    z = advantages.group_z_score(REWARDS, GROUPS)
    expected = [1.499997, -0.499999, -0.499999, -0.499999, 0.577349, 0.577349, -1.154699, 0]
    np.testing.assert_allclose(z, expected, atol=2e-6)
    centered = advantages.group_centered(REWARDS, GROUPS)
    np.testing.assert_allclose(centered, [0.75, -0.25, -0.25, -0.25, 1 / 3, 1 / 3, -2 / 3, 0], atol=1e-6)
    others = advantages.leave_one_out(REWARDS, GROUPS)
    np.testing.assert_allclose(others, [1, -1 / 3, -1 / 3, -1 / 3, 0.5, 0.5, -1, 0], atol=1e-6)


def members_of(row, rewards, groups):
    return [j for j in range(len(groups)) if groups[j] == groups[row] >= 0 and not np.isnan(rewards[j])]


def oracle(name, rewards, groups, ddof=1, epsilon=1e-6):
    result = np.zeros(len(rewards))
    for i in range(len(rewards)):
        members = members_of(i, rewards, groups)
        if i not in members or len(members) == 1:
            continue
        inside = rewards[members]
        if name == "group_z_score":
            spread = inside.std(ddof=ddof)
            result[i] = 0 if spread == 0 else (rewards[i] - inside.mean()) / (spread + epsilon)
        elif name == "group_centered":
            result[i] = rewards[i] - inside.mean()
        else:
            result[i] = rewards[i] - rewards[[j for j in members if j != i]].mean()
    return result


ESTIMATORS = ["group_z_score", "group_centered", "leave_one_out"]


@pytest.fixture(params=[0, 1])
def ragged(request):
    """Groups of different sizes in any order, rows in none, missing rewards, one group of equal rewards."""
    draw = np.random.default_rng(request.param)
    groups = draw.integers(-1, 6, 30)
    rewards = np.where(draw.random(30) < 0.3, draw.integers(0, 2, 30), draw.normal(0, 2, 30))
    rewards[draw.random(30) < 0.15] = np.nan
    rewards[groups == 3] = 0.85
    return rewards, groups


@pytest.mark.parametrize("name", ESTIMATORS)
def test_against_float64(name, ragged):
    rewards, groups = ragged
    got = jax.jit(getattr(advantages, name))(rewards, groups)
    np.testing.assert_allclose(got, oracle(name, rewards, groups), rtol=1e-5, atol=1e-6)
    assert got.dtype == jnp.float32


@pytest.mark.parametrize(("ddof", "epsilon"), [(0, 1e-4), (1, 1e-4), (1, 0.5)])
def test_other_stacks_constants(ddof, epsilon, ragged):
    got = advantages.group_z_score(*ragged, ddof=ddof, epsilon=epsilon)
    expected = oracle("group_z_score", *ragged, ddof=ddof, epsilon=epsilon)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("value", [0.85, 1 / 3, -0.1, 1e-8, 1e6])
def test_equal_rewards_give_exactly_nothing(name, value):
    """0.85 seven times over has a float32 mean that is not 0.85 if one just sums and divides."""
    sizes = (1, 2, 7, 64)
    got = getattr(advantages, name)(jnp.full(sum(sizes), value), jnp.asarray(np.repeat(range(4), sizes)))
    assert not np.asarray(got).any()


@pytest.mark.parametrize("name", ESTIMATORS)
def test_rows_in_no_group_and_missing_rewards_take_no_part(name):
    got = getattr(advantages, name)(
        jnp.array([1.0, 5.0, 0.0, jnp.nan, jnp.nan, jnp.nan]), jnp.array([0, -1, 0, 0, 1, 1])
    )
    alone = getattr(advantages, name)(jnp.array([1.0, 0.0]), jnp.array([0, 0]))
    np.testing.assert_array_equal(got, [alone[0], 0, alone[1], 0, 0, 0])
    assert alone[0] > 0


@pytest.mark.parametrize("name", ESTIMATORS)
def test_invariances(name, ragged):
    rewards, groups = ragged
    function = getattr(advantages, name)
    base = np.asarray(function(rewards, groups))
    order = np.random.default_rng(5).permutation(len(rewards))
    np.testing.assert_allclose(function(rewards[order], groups[order]), base[order], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(function(rewards + 3, groups), base, rtol=1e-4, atol=2e-6)
    scaled = function(rewards * 4, groups)
    np.testing.assert_allclose(scaled, base if name == "group_z_score" else 4 * base, rtol=1e-4, atol=2e-6)
    padded = function(np.append(rewards, [np.nan, 7.0, 1.0]), np.append(groups, [-1, -1, -1]))
    np.testing.assert_allclose(padded, np.append(base, [0, 0, 0]), rtol=1e-6, atol=1e-6)
    renamed = np.where(groups < 0, -1, (groups * 7 + 2) % 30)  # ids are only names
    np.testing.assert_allclose(function(rewards, renamed), base, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_equal_groups_equal_the_dense_computation(name):
    rewards = np.random.default_rng(0).normal(size=(6, 8))
    centered = rewards - rewards.mean(1, keepdims=True)
    dense = {
        "group_z_score": centered / (rewards.std(1, ddof=1, keepdims=True) + 1e-6),
        "group_centered": centered,
        "leave_one_out": centered * 8 / 7,
    }[name]
    got = getattr(advantages, name)(rewards.reshape(-1), np.repeat(np.arange(6), 8))
    np.testing.assert_allclose(got, dense.reshape(-1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_gradients_are_finite_and_right(name, ragged):
    """Learned rewards may be differentiated; missing ones, equal ones and single rows must not spoil the others."""
    rewards, groups = ragged
    pull = np.random.default_rng(1).normal(size=30)
    gradient = jax.grad(lambda r: jnp.sum(pull * getattr(advantages, name)(r, groups)))(jnp.float32(rewards))
    step = 1e-5
    for i in np.flatnonzero(~np.isnan(rewards)):
        members = members_of(i, rewards, groups)
        if name == "group_z_score" and (len(members) < 2 or rewards[members].std() == 0):
            assert float(gradient[i]) == 0  # the jump from 0 has no derivative
            continue
        up, down = rewards.copy(), rewards.copy()
        up[i] += step
        down[i] -= step
        slope = pull @ (oracle(name, up, groups) - oracle(name, down, groups)) / (2 * step)
        np.testing.assert_allclose(gradient[i], slope, rtol=1e-3, atol=1e-3)
    assert not np.asarray(gradient)[np.isnan(rewards) | (groups < 0)].any()


@pytest.mark.parametrize("name", ESTIMATORS)
def test_vmap_and_shard_map(name):
    """Rewards gathered within shard_map give every device the numbers of the whole."""
    draw = np.random.default_rng(0)
    rewards, groups = jnp.float32(draw.normal(size=(3, 16))), jnp.asarray(draw.integers(-1, 4, (3, 16)), jnp.int32)
    function = getattr(advantages, name)
    together = jax.vmap(function)(rewards, groups)
    for got, r, g in zip(together, rewards, groups):
        np.testing.assert_allclose(got, function(r, g), rtol=1e-6, atol=1e-7)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def local(rewards, groups):
        whole = function(*(jax.lax.all_gather(x, "data", tiled=True) for x in (rewards, groups)))
        return jax.lax.dynamic_slice_in_dim(whole, 2 * jax.lax.axis_index("data"), 2)

    rows = PartitionSpec("data")
    mapped = jax.shard_map(local, mesh=mesh, in_specs=rows, out_specs=rows)
    np.testing.assert_allclose(jax.jit(mapped)(rewards[0], groups[0]), together[0], rtol=1e-6, atol=1e-7)


def test_channels_are_refused_where_one_reward_is_meant():
    with pytest.raises(ValueError, match=r"rewards \[8, 1\] and group_ids \[8\]; `combine`"):
        advantages.group_z_score(REWARDS[:, None], GROUPS)
