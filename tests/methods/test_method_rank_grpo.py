"""Rank-GRPO: the worked example, and loops in float64 on ragged lists."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import losses
from grpo_jax.methods.rank_grpo import rank_grpo
from grpo_jax.types import Decisions

SETTINGS = {"prompts": 1, "group_size": 3}


def lists(make, tokens, lengths, hits, *, finished=True, **fields):
    """A batch of lists with their hits; completions and what is trained."""
    tokens, lengths, n = np.asarray(tokens), np.asarray(lengths), len(tokens)
    exists = np.arange(tokens.shape[1]) < lengths[:, None]
    batch = make.batch(hits, mask=exists & fields.pop("trained", True), **fields)
    return batch.replace(
        completions=jnp.asarray(tokens),
        lengths=jnp.asarray(lengths),
        finished=jnp.broadcast_to(jnp.asarray(finished), (n,)),
        channels=tuple(f"hits/{k}" for k in range(np.shape(hits)[1])),
    )


def computed(method, batch, new):
    @jax.jit
    @jax.value_and_grad
    def loss(logps):
        shaped, _ = method.advantage(batch, {}, None)
        each, _ = method.objective(Decisions(logps=logps), shaped, {})
        return losses.weighted_sum(each, method.aggregate(shaped))

    return loss(jnp.asarray(new, jnp.float32))


TOKENS = [[11, 10, 12, 13, 2, 0], [14, 15, 10, 16, 2, 0], [17, 10, 18, 10, 19, 2]]
HITS = [[1, 0], [0, 1], [0, 0]]
NEW = [[-0.5, -0.1, -1, -0.4, -0.2, 0], [-0.9, -0.3, -0.1, -0.7, -0.3, 0], [-0.6, -0.2, -0.8, -0.1, -1.2, -0.4]]
OLD = [[-0.6, -0.12, -0.9, -0.5, -0.2, 0], [-0.8, -0.3, -0.1, -0.9, -0.35, 0], NEW[2]]


def test_worked_example(make):
    batch = lists(make, TOKENS, [5, 5, 6], HITS, groups=[0] * 3, old=OLD, ref=OLD)
    for options, expected in [
        ({}, 0.089492),
        ({"decay": "log_decay"}, 0.049180),
        ({"length_bonus": 0, "mean_over": "ranks", "kl": 0.0}, -0.030446),
    ]:
        loss, _ = computed(rank_grpo(**SETTINGS, **options), batch, NEW)
        assert float(loss) == pytest.approx(expected, abs=1e-6), options
    shaped, _ = rank_grpo(**SETTINGS).advantage(batch, {}, None)
    _, reported = rank_grpo(**SETTINGS).objective(Decisions(logps=jnp.float32(NEW)), shaped, {})
    ratios = [[1.061837] * 2 + [1] * 3, [0.967216] * 3 + [1.133148] * 2, [1] * 6]
    for got, ratio in zip(reported["ratio"], ratios):
        np.testing.assert_allclose(got[: len(ratio)], ratio, atol=1e-6)


class Case:
    """Lists of several lengths in groups of several sizes, cut off or ended, with decisions that are not trained."""

    def __init__(self, make, seed):
        draw = np.random.default_rng(seed)
        n, t, self.ranks = 12, 9, 3
        self.lengths = np.concatenate([[t, 1], draw.integers(2, t + 1, n - 2)])
        self.tokens = np.where(draw.random((n, t)) < 0.3, 10, draw.integers(11, 20, (n, t)))
        self.tokens[draw.random((n, t)) < 0.08] = 21  # two newlines in one token
        self.finished = draw.random(n) < 0.7
        self.trained = draw.random((n, t)) < 0.9
        self.mask = (np.arange(t) < self.lengths[:, None]) & self.trained
        self.groups = draw.permutation(np.repeat([0, 1, 2, 3, -1], [4, 3, 3, 1, 1]))
        self.hits = draw.integers(0, 2, (n, self.ranks)).astype(float)
        self.hits[np.flatnonzero(self.groups == 1)[0], 1] = np.nan
        self.old = -draw.exponential(1.0, (n, t))
        self.new = self.old + draw.normal(0, 0.15, (n, t))
        self.ref = self.new + draw.normal(0, 0.3, (n, t))
        self.weights = draw.permutation(np.concatenate([[2, 0.5, 0], np.ones(n - 3)]))
        self.batch = lists(
            make,
            self.tokens,
            self.lengths,
            self.hits,
            finished=self.finished,
            trained=self.trained,
            groups=self.groups,
            old=self.old,
            ref=self.ref,
            weights=self.weights,
        )

    def lines(self, i):
        line, lines = 0, []
        for token in self.tokens[i][: self.lengths[i]]:
            lines.append(line)
            line += {10: 1, 21: 2}.get(token, 0)
        return lines

    def score(self, i, k, rewards):
        if self.groups[i] < 0 or np.isnan(rewards[i, k]):
            return 0.0
        peers = [rewards[j, k] for j in range(len(rewards)) if self.groups[j] == self.groups[i]]
        peers = [p for p in peers if not np.isnan(p)]
        return (rewards[i, k] - np.mean(peers)) / (np.std(peers, ddof=1) + 1e-4) if np.ptp(peers) > 0 else 0.0

    def advantage(self, i, bonus):
        """For every decision that exists."""
        lines, result = self.lines(i), []
        for t, line in enumerate(lines):
            end = self.finished[i] and t == len(lines) - 1
            if bonus and line >= self.ranks:
                result.append(-bonus)
            elif bonus and end:
                result.append(bonus if max(lines) + 1 == self.ranks else -bonus)
            else:
                result.append(self.score(i, line, self.hits) if line < self.ranks else 0.0)
        return result

    def loss(self, new, *, bonus, over_ranks, kl):
        total, whole = 0.0, 0.0
        for i in range(len(self.tokens)):
            lines, weight = self.lines(i), self.weights[i]
            bins = {}
            for t, line in enumerate(lines):
                if self.mask[i, t] and not (over_ranks and not bonus and line >= self.ranks):
                    bins.setdefault(min(line, self.ranks), []).append(t)
            advantage = self.advantage(i, bonus)
            for members in bins.values():
                ratio = np.exp((new[i, members] - self.old[i, members]).mean())
                each = []
                for t in members:
                    a, d = advantage[t], new[i, t] - self.ref[i, t]
                    each.append(max(-a * ratio, -a * np.clip(ratio, 0.94, 1.08)) + kl * (np.exp(-d) + d - 1))
                total += weight * (np.mean(each) if over_ranks else np.sum(each))
                whole += weight * (1 if over_ranks else len(each))
        return total / whole


def slopes(function, x, step=1e-6):
    result = np.zeros_like(x)
    for place in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[place] += step
        down[place] -= step
        result[place] = (function(up) - function(down)) / (2 * step)
    return result


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("bonus", "mean_over"), [(0.1, "tokens"), (0.3, "ranks"), (0, "ranks")])
def test_against_float64(make, seed, bonus, mean_over):
    """The gradient shows that every token of a line moves with the line's other tokens, the stop token included."""
    case = Case(make, seed)
    method = rank_grpo(**SETTINGS, newlines={10: 1, 21: 2}, length_bonus=bonus, mean_over=mean_over, kl=0.05)
    shaped, _ = jax.jit(lambda batch: method.advantage(batch, {}, None))(case.batch)
    expected = np.zeros(case.mask.shape)
    for i in range(len(expected)):
        expected[i, : case.lengths[i]] = case.advantage(i, bonus)
    np.testing.assert_allclose(shaped.advantages, np.where(case.mask, expected, 0), rtol=1e-5, atol=1e-5)
    slow = lambda new: case.loss(new, bonus=bonus, over_ranks=mean_over == "ranks", kl=0.05)  # noqa: E731
    loss, gradient = computed(method, case.batch, case.new)
    differences = slopes(slow, case.new)
    assert float(loss) == pytest.approx(slow(case.new), rel=2e-5, abs=1e-6)
    np.testing.assert_allclose(gradient, differences, atol=3e-5 * np.abs(differences).max())
    assert not np.asarray(gradient)[~case.mask].any()


def test_several_rewards_add_up_rank_by_rank(make):
    """Channels of one name are ranks; others with a weight are refused, those without are only looked at."""
    rewards = [[1, 0, 0.5, 0.2, 1], [0, 1, np.nan, 0.4, 0], [0, 0, 0.1, 0.3, 0]]
    batch = lists(make, TOKENS, [5, 5, 6], rewards, groups=[0] * 3)
    batch = batch.replace(channels=("hits/0", "hits/1", "new/0", "new/1", "perfect"))
    several = batch.replace(channel_weights=(1.0, 1.0, 2.0, 2.0, 0.0))
    together = lists(make, TOKENS, [5, 5, 6], [[2, 0.4], [0, 1.8], [0.2, 0.6]], groups=[0] * 3)
    method = rank_grpo(**SETTINGS)
    got, expected = (method.advantage(b, {}, None)[0].advantages for b in (several, together))
    np.testing.assert_allclose(got, expected, atol=1e-5)
    with pytest.raises(ValueError, match=r"needs a reward per rank, a channel \[N, K\] of Scored.*'perfect'"):
        method.advantage(batch, {}, None)


def test_messages():
    with pytest.raises(ValueError, match=r"one of \('tokens', 'ranks'\), got 'lists'"):
        rank_grpo(**SETTINGS, mean_over="lists")
    with pytest.raises(ValueError, match="at least 2 of them, got 1"):
        rank_grpo(prompts=4, group_size=1)
