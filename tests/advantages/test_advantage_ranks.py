"""Rewards by rank: the worked example, loops in float64, and what must not matter."""

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from hypothesis import given, settings, strategies

from grpo_jax.advantages.group import group_z_score
from grpo_jax.advantages.ranks import item_ids, per_rank, rank_rewards, rank_z_scores, with_length_terms

TOKENS = np.array([[11, 10, 12, 13, 2, 0], [14, 15, 10, 16, 2, 0], [17, 10, 18, 10, 19, 2]])
EXISTS = np.arange(6) < np.array([[5], [5], [6]])
HITS = np.array([[1, 0], [0, 1], [0, 0.0]])
TOGETHER = np.zeros(3, int)


def test_worked_example():
    ids = item_ids(TOKENS == 10, EXISTS)
    np.testing.assert_array_equal(ids, [[0, 0, 1, 1, 1, -1], [0, 0, 0, 1, 1, -1], [0, 0, 1, 1, 2, 2]])
    scores = rank_z_scores(rank_rewards(HITS), TOGETHER)
    np.testing.assert_allclose(scores, [[1.154501, -0.577250], [-0.577250, 1.154501], [-0.577250] * 2], atol=1e-6)
    tokens = with_length_terms(per_rank(scores, ids), ids, TOKENS == 2, ranks=2)
    up, down = 1.154501, -0.577250
    expected = [[up, up, down, down, 0.1, 0], [down, down, down, up, 0.1, 0], [down] * 4 + [-0.1, -0.1]]
    np.testing.assert_allclose(tokens, expected, atol=1e-6)
    later = rank_rewards(HITS, decay="log_decay")
    np.testing.assert_allclose(later, [[1, 0], [0.630930, 0.630930], [0, 0]], atol=1e-6)
    expected = [[0.902280, -0.577192], [0.172577, 1.154384], [-1.074857, -0.577192]]
    np.testing.assert_allclose(rank_z_scores(later, TOGETHER), expected, atol=1e-6)


def rewards_oracle(hits, decay):
    n, ranks = hits.shape
    result = np.zeros((n, ranks))
    for i in range(n):
        for k in range(ranks):
            for j in range(k, ranks):
                share = {"exp_inf": float(j == k), "log_decay": 1 / np.log2(j + 2)}.get(decay)
                share = decay ** -float(j - k) if share is None else share
                result[i, k] += 0 if np.isnan(hits[i, j]) else share * hits[i, j]
            if np.isnan(hits[i, k]):
                result[i, k] = np.nan
    return result


def scores_oracle(rewards, groups, ddof=1, epsilon=1e-4):
    result = np.zeros(rewards.shape)
    for i, k in np.ndindex(rewards.shape):
        if groups[i] < 0 or np.isnan(rewards[i, k]):
            continue
        others = [rewards[j, k] for j in range(len(groups)) if groups[j] == groups[i] and not np.isnan(rewards[j, k])]
        if len(others) > 1 and np.ptp(others) > 0:
            result[i, k] = (rewards[i, k] - np.mean(others)) / (np.std(others, ddof=ddof) + epsilon)
    return result


def lists(seed, n=20, ranks=5):
    draw = np.random.default_rng(seed)
    hits = draw.integers(0, 2, (n, ranks)).astype(float)
    groups = draw.integers(-1, 5, n)
    hits[draw.random((n, ranks)) < 0.1] = np.nan
    hits[groups == 2] = 0.85
    hits[3] = np.nan
    return hits, groups


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("decay", ["exp_inf", "log_decay", 1.0, 2.5])
def test_against_float64(decay, seed):
    hits, groups = lists(seed)
    rewards = jax.jit(lambda h: rank_rewards(h, decay=decay))(hits)
    np.testing.assert_allclose(rewards, rewards_oracle(hits, decay), rtol=1e-6, atol=1e-6)
    scores = jax.jit(rank_z_scores)(rewards, groups)
    np.testing.assert_allclose(scores, scores_oracle(np.asarray(rewards, np.float64), groups), rtol=2e-5, atol=2e-5)
    assert scores.dtype == jnp.float32 and not np.asarray(scores)[groups == -1].any()
    if decay == "exp_inf":
        assert not np.asarray(scores)[groups == 2].any()  # 0.85 throughout
    other = rank_z_scores(rewards, groups, ddof=0, epsilon=0.3)
    np.testing.assert_allclose(other, scores_oracle(np.float64(rewards), groups, 0, 0.3), rtol=2e-5, atol=2e-5)


def test_infinite_decay_is_the_hit_itself():
    hits, _ = lists(0)
    np.testing.assert_array_equal(rank_rewards(hits, decay=np.inf), np.float32(hits))
    np.testing.assert_array_equal(rank_rewards(hits), np.float32(hits))


def test_gradients():
    """Soft hits may be differentiated; absent ones neither get nor spoil a gradient."""
    hits, groups = lists(2, n=10, ranks=3)
    hits += np.random.default_rng(0).normal(0, 0.3, hits.shape)
    pull = np.random.default_rng(1).normal(size=hits.shape)

    def slow(h):
        return (pull * scores_oracle(rewards_oracle(h, 2.0), groups)).sum()

    fast = jax.jit(jax.grad(lambda h: jnp.sum(pull * rank_z_scores(rank_rewards(h, decay=2.0), groups))))
    gradient = fast(jnp.float32(hits))
    assert not np.asarray(gradient)[np.isnan(hits)].any() and np.isfinite(gradient).all()
    for place in zip(*np.nonzero(~np.isnan(hits))):
        up, down = hits.copy(), hits.copy()
        up[place] += 1e-5
        down[place] -= 1e-5
        np.testing.assert_allclose(gradient[place], (slow(up) - slow(down)) / 2e-5, rtol=1e-3, atol=1e-3)


def test_laws():
    hits, groups = lists(3)
    hits = np.where(np.isnan(hits), 0.25, hits)

    def whole(hits, group_ids):
        return rank_z_scores(rank_rewards(hits, decay="log_decay"), group_ids)

    laws.rows(whole, {"hits": hits, "group_ids": groups})
    laws.rows(rank_rewards, {"hits": hits}, ids=())


def test_a_rank_does_not_see_the_others():
    hits, groups = lists(4)
    alone = group_z_score(hits[:, 1], groups, epsilon=1e-4)
    np.testing.assert_allclose(rank_z_scores(hits, groups)[:, 1], alone, atol=1e-6)
    shifted = rank_z_scores(hits + np.arange(5), groups)  # ranks of other scales are each centred on their own
    np.testing.assert_allclose(shifted, rank_z_scores(hits, groups), rtol=1e-4, atol=1e-5)


# ---- items -----------------------------------------------------------------------------------------------------------


def walk(newlines, exists):
    ids = np.full(exists.shape, -1)
    for i in range(len(exists)):
        k = 0
        for t in range(exists.shape[1]):
            if exists[i, t]:
                ids[i, t] = k
                k += newlines[i, t]
    return ids


def spread_oracle(values, ids, ends, size):
    result = np.zeros(ids.shape)
    ranks = values.shape[1]
    for i, t in np.ndindex(ids.shape):
        emitted = max(ids[i]) + 1
        if ids[i, t] >= ranks:
            result[i, t] = -size
        elif ids[i, t] >= 0 and ends[i, t]:
            result[i, t] = size if emitted == ranks else -size
        elif ids[i, t] >= 0:
            result[i, t] = values[i, ids[i, t]]
    return result


@given(seed=strategies.integers(0, 10**6))
@settings(max_examples=15, deadline=None)
def test_items_against_a_walk(seed):
    """Tokens with several newlines, empty completions, completions that were cut off, garbage after the end."""
    draw = np.random.default_rng(seed)
    newlines = draw.choice([0, 0, 0, 1, 2], (6, 9))
    lengths = draw.integers(0, 10, 6)
    exists = np.arange(9) < lengths[:, None]
    ids = item_ids(newlines, exists)
    np.testing.assert_array_equal(ids, walk(newlines, exists))
    values = draw.normal(size=(6, 3))
    ends = (np.arange(9) == lengths[:, None] - 1) & (draw.random((6, 1)) < 0.7)
    got = with_length_terms(per_rank(values, ids), ids, ends, ranks=3, size=0.2)
    np.testing.assert_allclose(got, spread_oracle(values, np.asarray(ids), ends, 0.2), atol=1e-6)


def test_a_newline_before_the_end_is_one_item_too_many():
    newlines, exists = np.array([[0, 1, 0, 1, 0]]), np.ones((1, 5), bool)
    ids = item_ids(newlines, exists)
    ends = np.arange(5)[None] == 4
    got = with_length_terms(jnp.zeros((1, 5)), ids, ends, ranks=2)
    np.testing.assert_allclose(got, [[0, 0, 0, 0, -0.1]])


def test_values_that_belong_to_no_decision_do_no_harm():
    """A NaN at a rank that was not written reaches no token and no gradient."""
    ids = jnp.array([[0, 0, 1, -1]])
    values = jnp.array([[1.0, 2.0, jnp.nan]])
    np.testing.assert_array_equal(per_rank(values, ids), [[1, 1, 2, 0]])
    gradient = jax.grad(lambda v: per_rank(v, ids).sum())(values)
    np.testing.assert_array_equal(gradient, [[2, 1, 0]])


def test_laws_of_spreading():
    draw = np.random.default_rng(0)
    ids = draw.integers(-1, 5, (11, 7))
    arrays = {"values": draw.normal(size=(11, 4)), "items": ids}
    laws.rows(per_rank, arrays, ids=())
    laws.rows(item_ids, {"newlines": draw.integers(0, 2, (11, 7)), "exists": ids >= 0}, ids=(), half=None)


def test_messages():
    with pytest.raises(ValueError, match="at least 1, got 'exp'"):
        rank_rewards(HITS, decay="exp")
    with pytest.raises(ValueError, match=r"at least 1, got 0\.5"):
        rank_rewards(HITS, decay=0.5)
    with pytest.raises(ValueError, match=r"\[N, K\], got \[3\]"):
        rank_rewards(HITS[:, 0])
    with pytest.raises(ValueError, match=r"one id per row, got \[3, 2\] and group_ids \[2\]"):
        rank_z_scores(HITS, TOGETHER[:2])
    with pytest.raises(ValueError, match=r"one entry per decision \[N, T\], got \[3\] and \[3, 6\]"):
        item_ids(np.zeros(3, int), EXISTS)
    with pytest.raises(ValueError, match=r"the same rows, got \[3, 2\] and \[2, 6\]"):
        per_rank(HITS, np.zeros((2, 6), int))
