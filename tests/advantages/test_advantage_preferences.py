"""Win rates: the worked example, loops in float64, a tournament, and what must not matter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies
from jax.sharding import Mesh, PartitionSpec

from grpo_jax import segments
from grpo_jax.advantages.channels import decoupled, decoupled_over_rows
from grpo_jax.advantages.group import group_z_score
from grpo_jax.advantages.preferences import tournament, win_rates

TOGETHER = np.zeros(4, int)


def verdicts_of(n, said):
    verdicts = np.full((n, n), np.nan)
    for (i, j), verdict in said.items():
        verdicts[i, j] = verdict
    return verdicts


EXAMPLE = verdicts_of(4, {(0, 1): 1, (0, 2): 0, (0, 3): 0.5, (1, 2): 0, (1, 3): 1, (2, 3): 1})


def test_worked_example():
    rates = win_rates(EXAMPLE, TOGETHER)
    np.testing.assert_allclose(rates, [0.5, 1 / 3, 1, 1 / 6], rtol=1e-6)
    np.testing.assert_allclose(win_rates(EXAMPLE, TOGETHER, decimals=3), [0.5, 0.333, 1, 0.167], rtol=1e-6)
    rounded = group_z_score(win_rates(EXAMPLE, TOGETHER, decimals=3), TOGETHER, epsilon=1e-8)
    np.testing.assert_allclose(rounded, [0, -0.463902, 1.388928, -0.925026], atol=1e-6)
    scores = group_z_score(rates, TOGETHER, epsilon=1e-8)
    np.testing.assert_allclose(scores, [0, -0.462910, 1.388730, -0.925820], atol=1e-6)
    both = np.stack([rates, np.array([0.31, 0.29, 0.30, 0.32])], axis=1)
    expected = [0.232379, -0.882300, 0.323113, 0.326808]
    np.testing.assert_allclose(decoupled(both, TOGETHER, (0.4, 0.6), epsilon=1e-8), expected, atol=3e-6)
    whitened = decoupled_over_rows(both, TOGETHER, (0.4, 0.6), epsilon=1e-8)
    np.testing.assert_allclose(whitened, [0.393983, -1.495883, 0.547817, 0.554082], atol=3e-6)


def oracle(verdicts, groups):
    n = len(groups)
    result = np.full(n, np.nan)
    for i in range(n):
        won = []
        for j in range(n):
            if i == j or groups[i] != groups[j] or groups[i] < 0:
                continue
            if not np.isnan(verdicts[i, j]):
                won.append(verdicts[i, j])
            if not np.isnan(verdicts[j, i]):
                won.append(1 - verdicts[j, i])
        if won:
            result[i] = np.mean(won)
    return result


def rows(seed, n=18):
    """Pairs judged in one order, in both, or not at all; verdicts between groups, which count for nothing."""
    draw = np.random.default_rng(seed)
    groups = draw.integers(-1, 5, n)
    groups[0] = 7  # alone
    verdicts = draw.choice([0, 0.5, 1, np.nan], (n, n))
    return verdicts, groups


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_against_float64(seed):
    verdicts, groups = rows(seed)
    got = jax.jit(win_rates)(verdicts, groups)
    np.testing.assert_allclose(got, oracle(verdicts, groups), rtol=1e-6)
    assert got.dtype == jnp.float32 and np.isnan(got[0]) and np.isnan(np.asarray(got)[groups == -1]).all()
    np.testing.assert_allclose(win_rates(jnp.bfloat16(verdicts), groups), got, rtol=1e-6)


def test_order_padding_names_vmap_and_mesh():
    verdicts, groups = rows(3, n=16)
    base = win_rates(verdicts, groups)
    order = np.random.default_rng(0).permutation(16)
    np.testing.assert_allclose(win_rates(verdicts[order][:, order], groups[order]), base[order], rtol=1e-6)
    padded = np.pad(verdicts, ((0, 3), (0, 3)), constant_values=1)
    padded = win_rates(padded, np.append(groups, [-1] * 3))
    np.testing.assert_array_equal(padded, np.append(base, [np.nan] * 3))
    np.testing.assert_array_equal(win_rates(verdicts, np.where(groups < 0, -1, (groups * 5 + 1) % 16)), base)
    twice = jax.vmap(win_rates)(jnp.stack([verdicts] * 2), jnp.stack([groups] * 2))
    np.testing.assert_array_equal(twice, np.stack([base] * 2))
    mesh, over = Mesh(np.array(jax.devices()[:8]), ("data",)), PartitionSpec("data")
    divided = jax.shard_map(segments.across("data", win_rates), mesh=mesh, in_specs=(over, over), out_specs=over)
    np.testing.assert_array_equal(jax.jit(divided)(jnp.float32(verdicts), jnp.asarray(groups)), base)


def test_gradient_of_soft_verdicts():
    """A judge that gives probabilities can be differentiated; what was not judged has no part in it."""
    verdicts, groups = rows(4)
    pull = np.random.default_rng(0).normal(size=len(groups))
    gradient = jax.jit(jax.grad(lambda v: jnp.nansum(pull * win_rates(v, groups))))(jnp.float32(verdicts))
    base = oracle(verdicts, groups)
    for i, j in np.ndindex(verdicts.shape):
        moved = verdicts.copy()
        moved[i, j] += 1e-3
        slope = np.nansum(pull * (oracle(moved, groups) - base)) / 1e-3
        np.testing.assert_allclose(gradient[i, j], slope, atol=1e-5)


@given(seed=strategies.integers(0, 10**6), size=strategies.sampled_from([2, 3, 6]), both=strategies.booleans())
@settings(max_examples=15, deadline=None)
def test_what_win_rates_add_up_to(seed, size, both):
    """Half of every group; a strict order gives equal steps, so that only ranks matter; ties alone give nothing."""
    draw = np.random.default_rng(seed)
    quality = draw.permutation(size * 2).astype(float)
    prompts, groups = ["a"] * size + ["b"] * size, np.repeat([0, 1], size)

    def judge(prompts, first, second):
        return [float(a > b) for a, b in zip(first, second)]

    rates = np.asarray(jax.jit(win_rates)(tournament(judge, prompts, quality, groups, both_orders=both), groups))
    for group in (0, 1):
        mine = rates[groups == group]
        np.testing.assert_allclose(mine.sum(), size / 2, rtol=1e-5)
        places = np.argsort(np.argsort(quality[groups == group]))
        np.testing.assert_allclose(mine, places / (size - 1), rtol=1e-5, atol=1e-6)
    ties = jax.jit(win_rates)(tournament(lambda p, a, b: [None] * len(a), prompts, quality, groups), groups)
    assert (np.asarray(ties) == 0.5).all() and not np.asarray(group_z_score(ties, groups)).any()


def test_tournament():
    asked = []

    def leaning(prompts, first, second):  # always for what it sees first
        asked.append(list(zip(prompts, first, second)))
        return [1.0] * len(first)

    groups = np.array([0, 1, 0, 0, -1, 1, 2])
    prompts, completions = ["p", "q", "p", "p", "r", "q", "s"], list("abcdefg")
    verdicts = tournament(leaning, prompts, completions, groups)
    assert asked == [[("p", "a", "c"), ("p", "a", "d"), ("q", "b", "f"), ("p", "c", "d")]]
    np.testing.assert_array_equal(win_rates(verdicts, groups), [1, 1, 0.5, 0, np.nan, 0, np.nan])
    both = tournament(leaning, prompts, completions, groups, both_orders=True)
    assert len(asked[1]) == 8 and ("p", "d", "a") in asked[1]
    np.testing.assert_array_equal(win_rates(both, groups), [0.5, 0.5, 0.5, 0.5, np.nan, 0.5, np.nan])
    alone = tournament(leaning, ["p"], ["a"], [0])
    assert np.isnan(alone).all() and len(asked) == 2  # nobody to ask about


def test_messages():
    with pytest.raises(ValueError, match=r"\[N, N\] and N group_ids, got \[4, 3\] and \[4\]"):
        win_rates(EXAMPLE[:, :3], TOGETHER)
    with pytest.raises(ValueError, match="2 prompts, 2 completions, 4 group_ids"):
        tournament(lambda *a: [], ["a", "b"], ["a", "b"], TOGETHER)
    with pytest.raises(ValueError, match="asked about 1 pairs and returned 0 verdicts"):
        tournament(lambda *a: [], ["a", "b"], ["a", "b"], [0, 0])
    with pytest.raises(ValueError, match="got 2"):
        tournament(lambda *a: [2], ["a", "b"], ["a", "b"], [0, 0])
    with pytest.raises(ValueError, match="got nan"):
        tournament(lambda *a: [np.nan], ["a", "b"], ["a", "b"], [0, 0])
