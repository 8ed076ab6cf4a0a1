"""Staged rewards, task values and the batch that they remake: worked example, float64 loops, laws."""

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.advantages import group_z_score
from grpo_jax.advantages.values import staged_reward, task_values, value_counts, value_sampled

REWARDS = np.array([0] * 5 + [1] * 5 + [0.2, 0.2, 1, 0.2, 0.6] + [1, 1, 0.2, 1, 1], float)
GROUPS = np.repeat(range(4), 5)
UNIFORMS = np.repeat([0.3, 0.95, 0.5, 0.5], 5)


def test_worked_example():
    values = task_values(REWARDS, GROUPS)
    np.testing.assert_allclose(values[::5], [0, 0, 0.200352, 0.057243], atol=2e-6)
    got, counts = jax.jit(value_sampled)(REWARDS, GROUPS, UNIFORMS)
    np.testing.assert_array_equal(counts, np.repeat([0, 0, 2, 2], 5))
    np.testing.assert_allclose(got[10:15], [-0.474340, -0.474340, 1.106794, -0.474340, 0.316227], atol=2e-6)
    np.testing.assert_allclose(got[15:], [0.316227, 0.316227, -1.264908, 0.316227, 0.316227], atol=2e-6)
    staged = staged_reward(jnp.array([0, 1, 1, 1]), jnp.array([0, 0, 1, 1]), jnp.array([jnp.nan, jnp.nan, 0, 0.606531]))
    np.testing.assert_allclose(staged, [0, 0.1, 0.2, 0.685225], atol=1e-6)


@pytest.fixture(params=[0, 1])
def ragged(request):
    draw = np.random.default_rng(request.param)
    groups = draw.permutation(np.repeat([0, 1, 2, 3, 4, 5, 9, -1], [5, 4, 3, 6, 1, 4, 2, 3]))
    rewards = draw.random(28).round(2)
    rewards[groups == 3], rewards[groups == 5] = 0.85, 0.1
    rewards[draw.random(28) < 0.15] = np.nan
    rewards[groups == 9] = np.nan
    return rewards, groups, draw.random(28)


def value_of(group, rewards, groups, highest=1.0):
    inside = [r for r, g in zip(rewards, groups) if g == group and not np.isnan(r)]
    if len(inside) < 2 or max(inside) == min(inside):
        return 0.0
    return max((max(inside) if highest is None else highest) - np.mean(inside), 0) * np.std(inside, ddof=1)


def counts_by_hand(rewards, groups, uniforms):
    order = list(dict.fromkeys(g for g in groups if g >= 0))
    value = {g: value_of(g, rewards, groups) for g in order}
    alive, dead = [g for g in order if value[g] > 0], [g for g in order if value[g] == 0]
    if not alive:
        return np.ones(len(rewards))
    count = {g: float(g in alive) for g in order}
    edges = np.cumsum([value[g] for g in alive])
    for g in dead:
        mark = uniforms[list(groups).index(g)] * edges[-1]
        count[alive[min(sum(mark >= e for e in edges), len(alive) - 1)]] += 1
    return np.array([count[g] if g >= 0 else 1.0 for g in groups])


@pytest.mark.parametrize("highest", [1.0, None, 0.5])
def test_values_against_float64(ragged, highest):
    rewards, groups, _ = ragged
    got = task_values(rewards, groups, highest=highest)
    outside = (groups < 0) | np.isnan(rewards)
    expected = [0 if out else value_of(g, rewards, groups, highest) for g, out in zip(groups, outside)]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    assert max(expected) > 0.01 or highest == 0.5


def test_sampled_against_float64(ragged):
    rewards, groups, uniforms = ragged
    expected = counts_by_hand(*ragged)
    counts = value_counts(rewards, groups, uniforms)
    np.testing.assert_array_equal(counts, expected)
    assert set(expected) > {0, 1} and max(expected) > 1
    got, same = value_sampled(rewards, groups, uniforms, power=0.7, smallest=0.5)
    np.testing.assert_array_equal(same, counts)
    z = np.asarray(group_z_score(rewards, groups))
    damping = [max(0.5, max(c, 1) ** -0.7) for c in expected]
    np.testing.assert_allclose(got, z * damping, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ragged", [0], indirect=True)
def test_laws(ragged):
    rewards, groups, uniforms = ragged
    arrays = {"rewards": rewards, "group_ids": groups}
    laws.rows(jax.jit(task_values), arrays)
    # The draw goes over groups in the order of their rows, so their order matters; rounding moves its edges.
    drawn = {**arrays, "uniforms": uniforms}
    laws.rows(jax.jit(value_sampled), drawn, ordered=True, half=None)
    assert value_sampled(*(jnp.asarray(x, jnp.bfloat16) for x in (rewards,)), groups, uniforms)[0].dtype == jnp.float32


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.sampled_from([0.0, 0.3, 1.0]), min_size=3, max_size=3), min_size=6, max_size=6), st.data())
def test_the_batch_keeps_its_size_and_loses_what_is_dead(table, data):
    rewards, groups = np.array(table).reshape(-1), np.repeat(range(len(table)), 3)
    uniforms = np.array(data.draw(st.lists(st.floats(0, 0.999999), min_size=len(rewards), max_size=len(rewards))))
    counts = np.asarray(jax.jit(value_counts)(rewards, groups, uniforms)).reshape(-1, 3)
    assert counts.sum() == len(rewards)
    mixed = np.ptp(table, axis=1) > 0
    if mixed.any():
        assert not counts[~mixed].any() and (counts[mixed] >= 1).all()
    else:
        assert (counts == 1).all()


def test_draws_follow_the_values():
    """Three fifths of many dead groups copy the group of three fifths of the value."""
    rewards = np.concatenate([[0, 1, 1, 1], [0, 0, 0, 1], np.zeros(2000)])  # values in the ratio of 1 to 3
    groups = np.concatenate([[0] * 4, [1] * 4, 2 + np.arange(2000)])
    counts = np.asarray(jax.jit(value_counts)(rewards, groups, np.random.default_rng(0).random(2008)))
    assert (counts[4] - 1) / (counts[0] + counts[4] - 2) == pytest.approx(0.75, abs=0.03)
    assert not counts[8:].any()


@pytest.mark.parametrize(("uniform", "first", "last"), [(0.0, 3, 1), (1 - 1e-12, 1, 3)])
def test_the_edges_belong_to_the_first_and_the_last_group_that_live(uniform, first, last):
    rewards, groups = np.array([0.5, 0.5, 0, 1.0, 0, 1.0, 0.2, 0.2]), np.repeat(range(4), 2)
    counts = jax.jit(value_counts)(rewards, groups, np.full(8, uniform))
    np.testing.assert_array_equal(counts, [0, 0, first, first, last, last, 0, 0])


def test_damping():
    """Power 1 keeps the weight of a group however often it stands there; power 0 none of it."""
    for power, together in [(1.0, 1), (0.0, 2), (0.5, 2**0.5)]:
        got, counts = value_sampled(REWARDS, GROUPS, UNIFORMS, power=power)
        z = group_z_score(REWARDS, GROUPS)
        np.testing.assert_allclose(got * counts, together * np.where(GROUPS > 1, z, 0), atol=1e-5)


def test_stages_are_monotone_and_ignore_what_they_do_not_read():
    quality = jnp.linspace(0, 1, 5)
    top = staged_reward(jnp.ones(5, bool), jnp.ones(5, bool), quality, parsed=0.2, formed=0.3)
    assert top.min() >= 0.3 and (jnp.diff(top) > 0).all() and float(top[-1]) == 1
    # what is well formed but does not parse gets nothing: the gates are nested
    np.testing.assert_array_equal(staged_reward(jnp.zeros(2, bool), jnp.ones(2, bool), jnp.ones(2)), [0, 0])
    slope = jax.grad(lambda q: staged_reward(jnp.array([1, 1, 0]), jnp.array([1, 0, 1]), q).sum())
    np.testing.assert_allclose(slope(jnp.array([0.5, jnp.nan, jnp.inf])), [0.8, 0, 0], rtol=1e-6)
    assert np.isnan(staged_reward(jnp.array([1]), jnp.array([1]), jnp.array([jnp.nan]))).all()
    assert staged_reward(jnp.array([1]), jnp.array([1]), jnp.array([1], jnp.bfloat16)).dtype == jnp.float32


def test_what_is_refused():
    with pytest.raises(ValueError, match="parsed 0.5, formed 0.2"):
        staged_reward(jnp.ones(1), jnp.ones(1), jnp.ones(1), parsed=0.5)
    with pytest.raises(ValueError, match=r"got \[2\], \[1\] and \[1\]"):
        staged_reward(jnp.ones(2), jnp.ones(1), jnp.ones(1))
    with pytest.raises(ValueError, match=r"got \[4\] for \[20\] rows"):
        value_counts(REWARDS, GROUPS, jnp.ones(4))
    with pytest.raises(ValueError, match="power 2, smallest 0.0"):
        value_sampled(REWARDS, GROUPS, UNIFORMS, power=2)
