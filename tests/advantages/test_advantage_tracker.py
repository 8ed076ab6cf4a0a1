"""SPO's tracker: the worked example, float64 loops, the order of visits, whitening, and what lies under the mask."""

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec

from grpo_jax.advantages.tracker import (
    Tracker,
    completion_drift,
    forgetting,
    prompt_weights,
    single_stream,
    success_rate,
    tracker_init,
    tracker_update,
)


def test_worked_example():
    tracker = tracker_init(jnp.array([1, 4, 7]), jnp.array([8, 8, 8]))
    np.testing.assert_allclose(tracker.alpha, [1.333333, 4, 6.666667], rtol=1e-6)
    np.testing.assert_allclose(tracker.beta, [6.666667, 4, 1.333333], rtol=1e-6)
    np.testing.assert_allclose(success_rate(tracker), [0.166667, 0.5, 0.833333], atol=1e-6)
    weights = prompt_weights(tracker)
    np.testing.assert_allclose(weights, [0.422678, 0.55, 0.422678], atol=1e-6)
    np.testing.assert_allclose(weights / weights.sum(), [0.302918, 0.394165, 0.302918], atol=1e-6)
    rewards, ids = jnp.array([1.0, 0, 1]), jnp.arange(3)
    np.testing.assert_allclose(single_stream(rewards, success_rate(tracker), ids), [1, -1, 0], atol=1e-6)
    rho = forgetting(jnp.array([0, 0.006, 0.03]))
    np.testing.assert_allclose(rho, [0.96, 0.933033, 0.875], atol=1e-6)
    after = tracker_update(tracker, ids, rewards, rho)
    np.testing.assert_allclose(after.alpha, [2.28, 3.732132, 6.833333], rtol=1e-6)
    np.testing.assert_allclose(after.beta, [6.4, 4.732132, 1.166667], rtol=1e-6)
    np.testing.assert_allclose(success_rate(after), [0.262673, 0.440928, 0.854167], atol=1e-6)


def test_nothing_known_is_a_half_with_little_mass():
    tracker = tracker_init(jnp.array([0, 3]), jnp.array([0, 3]), rho_min=0.75)
    np.testing.assert_allclose(tracker.alpha, [0.5, 4 * 3.5 / 4], rtol=1e-6)
    np.testing.assert_allclose(tracker.beta, [0.5, 4 * 0.5 / 4], rtol=1e-6)


def test_weights_with_mass():
    tracker = Tracker(jnp.array([2.0, 6.0]), jnp.array([2.0, 3.0]))
    expected = [0.5 / 4**0.5 + 0.1, np.sqrt(6 * 3) / 9 / 9**0.5 + 0.1]
    np.testing.assert_allclose(prompt_weights(tracker, gamma=0.5, explore=0.1), expected, rtol=1e-6)


# ---- advantages ------------------------------------------------------------------------------------------------------


def oracle(rewards, baselines, groups, counts=None):
    rows = [i for i in range(len(rewards)) if groups[i] >= 0 and not np.isnan(rewards[i])]
    values = [rewards[i] - baselines[i] for i in rows]
    result = np.zeros(len(rewards))
    if len(rows) == 1:
        result[rows[0]] = values[0]
        return result
    often = [1 if counts is None else int(counts[i]) for i in rows]
    every = [v for v, n in zip(values, often) for _ in range(n)]
    if not every or max(every) == min(every):
        return result
    for i, value in zip(rows, values):
        result[i] = (value - np.mean(every)) / (np.std(every, ddof=1) + 1e-8)
    return result


@pytest.fixture(params=[0, 1])
def ragged(request):
    draw = np.random.default_rng(request.param)
    rewards = draw.integers(0, 2, 21).astype(float)
    rewards[draw.random(21) < 0.2] = np.nan
    return {
        "rewards": rewards,
        "baselines": draw.uniform(0.05, 0.95, 21),
        "group_ids": np.where(draw.random(21) < 0.2, -1, draw.permutation(21)),
    }, draw.integers(0, 9, 21)


@pytest.mark.parametrize("by_tokens", [False, True])
def test_against_float64(ragged, by_tokens):
    rows, lengths = ragged
    extra = {"lengths": lengths} if by_tokens else {}
    again = jax.jit(single_stream)(**rows, **extra)
    got = laws.rows(single_stream, {**rows, **extra}) if by_tokens else again
    np.testing.assert_allclose(again, got, rtol=1e-5, atol=1e-6)
    expected = oracle(*rows.values(), lengths if by_tokens else None)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    assert np.abs(expected).max() > 0.5
    present = (rows["group_ids"] >= 0) & ~np.isnan(rows["rewards"])
    share = np.where(present, lengths if by_tokens else 1, 0)
    assert np.sum(share * got) == pytest.approx(0, abs=1e-4)  # centred in what the loss consumes


def test_batches_without_spread():
    ids = jnp.array([0, 1, -1, 2])
    one = single_stream(jnp.array([jnp.nan, 1, 1, jnp.nan]), jnp.full(4, 0.2), ids)
    np.testing.assert_allclose(one, [0, 0.8, 0, 0], atol=1e-7)
    for lengths in (None, jnp.array([3, 7, 1, 2])):
        got = single_stream(jnp.array([0.85, 0.85, 9.0, 0.85]), jnp.full(4, 0.1), ids, lengths)
        assert not np.asarray(got).any()
    assert not np.asarray(single_stream(jnp.ones(4), jnp.zeros(4), jnp.full(4, -1))).any()


def test_garbage_outside_reaches_nothing(ragged):
    """Values and gradients of the rows that count are those of a batch without the others."""
    rows, _ = ragged
    rewards, baselines, groups = rows.values()
    out = (groups < 0) | np.isnan(rewards)
    dirty = np.where(groups < 0, np.inf, rewards), np.where(out, np.nan, baselines)
    pull = np.random.default_rng(0).normal(size=21)

    @jax.value_and_grad
    def summed(rewards, baselines):
        return jnp.sum(jnp.where(out, 0, pull * single_stream(rewards, baselines, groups)))

    value, slope = summed(*map(jnp.float32, dirty))
    assert float(value) == pytest.approx(pull @ oracle(rewards, baselines, groups), rel=1e-4)
    for i in range(21):
        up, down = rewards.copy(), rewards.copy()
        up[i], down[i] = up[i] + 1e-5, down[i] - 1e-5
        moved = pull @ (oracle(up, baselines, groups) - oracle(down, baselines, groups)) / 2e-5
        np.testing.assert_allclose(slope[i], 0 if out[i] else moved, rtol=1e-3, atol=1e-3)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.floats(-2, 2), st.floats(0.5, 4))
def test_shift_and_scale_do_not_matter(seed, shift, scale):
    draw = np.random.default_rng(seed)
    rewards, baselines, ids = draw.integers(0, 2, 8), draw.random(8), np.arange(8)
    base = single_stream(rewards, baselines, ids)
    moved = single_stream(scale * rewards + shift, scale * baselines, ids)
    np.testing.assert_allclose(moved, base, rtol=1e-3, atol=1e-4)


# ---- drift and memory ------------------------------------------------------------------------------------------------


def test_drift_against_float64_and_garbage():
    draw = np.random.default_rng(0)
    stored, now = draw.normal(size=(2, 9, 5))
    mask = draw.random((9, 5)) < 0.6
    mask[3] = False
    expected = [
        sum(abs(a - b) for a, b, m in zip(*row) if m) / max(row[2].sum(), 1e-8) for row in zip(stored, now, mask)
    ]
    dirty = jnp.where(mask, stored, jnp.nan), jnp.where(mask, now, jnp.inf)
    got = completion_drift(*dirty, mask)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert got[3] == 0 and got.max() > 0.5
    slope = jax.grad(lambda now: completion_drift(dirty[0], now, mask).sum())(dirty[1])
    np.testing.assert_allclose(
        slope[mask], (np.sign(now - stored) / np.maximum(mask.sum(1), 1)[:, None])[mask], rtol=1e-5
    )
    assert not np.asarray(slope)[~mask].any()


def test_memory_halves_with_the_half_life():
    got = forgetting(jnp.array([0.0, 0.1, 0.2, 9.0]), half_life=0.1, rho_min=0.2, rho_max=0.9)
    np.testing.assert_allclose(got, [0.9, 0.5, 0.25, 0.2], rtol=1e-6)


# ---- the update ------------------------------------------------------------------------------------------------------


def visits(draw, n=25, prompts=6):
    ids = draw.integers(-1, prompts, n)
    rewards = np.where(draw.random(n) < 0.2, np.nan, draw.random(n).round(1))
    return ids, rewards, draw.uniform(0.8, 1, n)


def loop(alpha, beta, ids, rewards, rho):
    alpha, beta = alpha.astype(float).copy(), beta.astype(float).copy()
    for i, r, keep in zip(ids, rewards, rho):
        if i >= 0 and not np.isnan(r):
            alpha[i] = keep * alpha[i] + r
            beta[i] = keep * beta[i] + 1 - r
    return alpha, beta


@pytest.mark.parametrize("seed", [0, 1])
def test_update_against_float64(seed):
    """Prompts come several times, in order; padding (with whatever rho), missing rewards and others leave no trace."""
    draw = np.random.default_rng(seed)
    start = Tracker(*jnp.float32(draw.uniform(0.5, 4, (2, 6))))
    ids, rewards, rho = visits(draw)
    got = jax.jit(tracker_update)(start, ids, rewards, np.where((ids < 0) | np.isnan(rewards), np.nan, rho))
    expected = loop(np.asarray(start.alpha), np.asarray(start.beta), ids, rewards, rho)
    np.testing.assert_allclose(got.alpha, expected[0], rtol=1e-5)
    np.testing.assert_allclose(got.beta, expected[1], rtol=1e-5)
    half = tracker_update(start, ids, jnp.asarray(rewards, jnp.bfloat16), rho)
    assert half.alpha.dtype == jnp.float32
    np.testing.assert_allclose(half.alpha, expected[0], rtol=0.02)
    reverse = tracker_update(start, ids[::-1], rewards[::-1], rho[::-1])
    assert np.abs(reverse.alpha - got.alpha).max() > 0.05  # the order of a prompt's visits counts


def test_update_is_a_moving_average():
    start = Tracker(jnp.array([2.0]), jnp.array([3.0]))
    after = tracker_update(start, jnp.array([0]), jnp.array([0.3]), jnp.array([0.9]))
    assert float(success_rate(after)[0]) == pytest.approx(0.4 + (0.3 - 0.4) / (0.9 * 5 + 1), rel=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000))
def test_rates_stay_inside_and_mass_stays_bounded(seed):
    draw = np.random.default_rng(seed)
    tracker = tracker_init(jnp.zeros(3), jnp.zeros(3))
    rho = forgetting(jnp.float32(draw.exponential(0.05, 60)))
    tracker = tracker_update(tracker, draw.integers(0, 3, 60), draw.integers(0, 2, 60), rho)
    rate, mass = success_rate(tracker), tracker.alpha + tracker.beta
    assert ((rate > 0) & (rate < 1)).all() and (mass <= 1 / (1 - 0.96) + 1e-3).all()


def test_update_under_vmap_and_shard_map():
    """On a mesh every device gathers the visits and gets the same tables."""
    draw = np.random.default_rng(3)
    start = Tracker(*jnp.float32(draw.uniform(0.5, 4, (2, 6))))
    ids, rewards, rho = visits(draw, 32)
    rows = jnp.int32(ids), jnp.float32(rewards), jnp.float32(rho)
    whole = tracker_update(start, *rows)
    twice = jax.vmap(tracker_update, in_axes=(None, 0, 0, 0))(start, *(jnp.stack([x, x]) for x in rows))
    np.testing.assert_allclose(twice.beta, jnp.stack([whole.beta, whole.beta]), rtol=1e-6)

    def local(start, *rows):
        after = tracker_update(start, *(jax.lax.all_gather(x, "data", tiled=True) for x in rows))
        return jax.lax.pmean(after, "data")

    over = PartitionSpec("data")
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",))
    spread = jax.shard_map(local, mesh=mesh, in_specs=(PartitionSpec(), over, over, over), out_specs=PartitionSpec())
    np.testing.assert_allclose(jax.jit(spread)(start, *rows).alpha, whole.alpha, rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tracker_init(jnp.zeros(2), jnp.zeros(3)), r"successes \[P\] and trials \[P\], got \[2\] and \[3\]"),
        (lambda: tracker_init(jnp.zeros(2), jnp.zeros(2), rho_min=1), r"in \[0, 1\), got 1"),
        (lambda: forgetting(jnp.zeros(2), half_life=0.0), "above 0, got 0.0"),
        (lambda: forgetting(jnp.zeros(2), rho_max=1.5), r"rho_max .* in \[0, 1\], got 1.5"),
        (lambda: single_stream(jnp.zeros(2), jnp.zeros(1), jnp.zeros(2)), r"rewards \[2\], baselines \[1\]"),
        (
            lambda: tracker_update(Tracker(1, 1), jnp.zeros(2, int), jnp.zeros(2), jnp.ones(3)),
            r"got \[2\], \[2\] and \[3\]",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
