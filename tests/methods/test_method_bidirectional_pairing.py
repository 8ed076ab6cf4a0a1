"""Bidirectional pairing: how the pair is found and kept, what is trained, and loops in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import losses, methods
from grpo_jax.types import Decisions, Prompt, Rollout

OUTCOMES = np.array([1] + [0] * 7 + [1] * 7 + [0.0])


def resolve(prompts=4, group_size=8, **options):
    settings = {"prompts": prompts, "group_size": group_size}
    return methods.resolve("bidirectional_pairing", options={"candidates": 2, "probe": 8, **options}, settings=settings)


class Pool:
    """Prompts by number, handed out in order. rates: how often each succeeds."""

    def __init__(self, rates):
        self.rates, self.taken = rates, 0

    def __getitem__(self, i):
        return Prompt(i, f"prompt {i}")

    def take(self, n):
        self.taken += n
        return [self[i % len(self.rates)] for i in range(self.taken - n, self.taken)]


def step(make, method, pool, state):
    """Drives one plan. Returns the requests as (prompt, count) of every round, the state after it, what is trained."""
    asked, answer = [], None
    plan = method.plan(state, lambda state, n: method.select(state, pool, n, None), None)
    while True:
        try:
            ask = plan.send(answer)
        except StopIteration as end:
            return asked, state._replace(step=state.step + 1, host=end.value[0]), end.value[1]
        if isinstance(ask, Rollout):
            scores = np.concatenate(
                [np.arange(len(g)) < round(pool.rates[g.prompt_ids[0]] * len(g)) for g in ask.groups()]
            )
            answer = ask.replace(scores=np.float32(scores)[:, None], channels=("exact",), channel_weights=(1.0,))
        else:
            asked.append([(r.prompt.id, r.count) for r in ask])
            counts = [r.count for r in ask]
            answer = make.rollout(
                np.repeat([r.prompt.id for r in ask], counts), group_ids=np.repeat(range(len(ask)), counts)
            )


def test_the_pair_is_found_once(make):
    """0 is dead, 1 brittle, 2 in the middle, 3 hard, 4 hard as well: 3 and 1, from the first step to the last."""
    pool, method = Pool([0, 0.875, 0.5, 0.25, 0.125, 1]), resolve()
    asked, state, (rows,) = step(make, method, pool, method.init(None))
    assert asked == [[(0, 8), (1, 8)], [(2, 8), (3, 8)], [(3, 8), (3, 8), (1, 8), (1, 8)]]
    assert state.host == {"pair": [3, 1]} and rows.prompt_ids.tolist() == [3] * 16 + [1] * 16
    assert len(rows.groups()) == 4
    assert rows.columns["hard_prompt"].tolist() == [True] * 16 + [False] * 16
    assert rows.columns["pair_copy"].tolist() == ([0] * 8 + [1] * 8) * 2
    asked, state, (rows,) = step(make, method, pool, state)
    assert asked == [[(3, 8), (3, 8), (1, 8), (1, 8)]] and pool.taken == 4


def test_a_new_pair_when_it_is_asked_for(make):
    pool, method = Pool([0.25, 0.75, 0, 0, 0.125, 0.875]), resolve(every=2, max_rounds=2)
    _, state, _ = step(make, method, pool, method.init(None))
    assert state.host == {"pair": [0, 1]}
    asked, state, _ = step(make, method, pool, state)
    assert len(asked) == 1
    asked, state, _ = step(make, method, pool, state)  # step 2: two more rounds
    assert asked[:2] == [[(2, 8), (3, 8)], [(4, 8), (5, 8)]] and state.host == {"pair": [4, 5]}
    pool.rates = [0.5] * 6
    _, state, _ = step(make, method, pool, state)
    asked, state, _ = step(make, method, pool, state)  # step 4: nobody is in a band
    assert len(asked) == 3 and state.host == {"pair": [4, 5]}


def test_steps_without_signal_train_on_nothing(make):
    method = resolve(max_rounds=3)
    asked, state, rollouts = step(make, method, Pool([0, 0.5]), method.init(None))
    assert len(asked) == 3 and rollouts == [] and state.host == {"pair": None}
    pool = Pool([0, 1])
    asked, _, rollouts = step(make, method, pool, method.init(None)._replace(host={"pair": [0, 1]}))
    assert len(asked) == 1 and rollouts == []  # they are all alike by now


def shaped(make, method, outcomes, groups, **columns):
    batch = make.batch(outcomes, groups=groups).replace(columns={k: jnp.asarray(v) for k, v in columns.items()})
    return np.asarray(method.advantage(batch, {}, None)[0].advantages)[:, 0]


@pytest.mark.parametrize(
    ("norm", "failure", "expected"),
    [
        ("prompt_std", 1.0, [2.474870, -0.353553, 0.353553, -2.474870]),
        ("prompt_std", 0.5, [2.474869, -0.353553, 0.353553, -2.474869]),
        ("prompt_mean", 0.5, [1.3125, -0.1875, 0.1875, -1.3125]),
        ("post", 0.5, [2.474870, -0.176777, 0.353553, -1.237435]),
        ("role", 1.0, [0.968245, -0.968245, 0.968245, -0.968245]),
        ("role", 0.2, [2.420615, -0.484123, 0.484123, -2.420615]),
    ],
)
def test_worked_example(make, norm, failure, expected):
    groups = np.repeat([0, 1], 8)
    got = shaped(
        make, resolve(norm=norm, failure=failure), OUTCOMES, groups, hard_prompt=groups == 0, pair_copy=groups * 0
    )
    np.testing.assert_allclose(got[[0, 1, 8, 15]], expected, atol=6e-6)


def test_padding_rows_are_in_no_pair(make):
    """They come with 0 in every column, which is also the number of a pair."""
    groups = np.repeat([0, 1, -1], [8, 8, 2])
    outcomes = np.append(OUTCOMES, [1, 1])
    got = shaped(make, resolve(norm="role"), outcomes, groups, hard_prompt=groups == 0, pair_copy=groups * 0)
    np.testing.assert_allclose(np.abs(got), [0.968245] * 16 + [0] * 2, atol=1e-6)


@pytest.mark.parametrize("norm", ["prompt_std", "role"])
def test_against_float64(make, norm):
    data = make.ragged(0, binary=True)
    hard, n = data.groups % 2 == 0, len(data.groups)
    pairs = np.where(data.groups < 0, 0, data.groups // 2)
    method = resolve(norm=norm, failure=0.5)
    worth = data.total - 0.5 * (1 - data.total)
    if norm == "role":
        worth = np.where(hard, worth, 0.5 * data.total - (1 - data.total))
    together = pairs if norm == "role" else data.groups
    a = np.zeros(n)
    for i in range(n):
        peers = [j for j in range(n) if together[j] == together[i] and data.groups[j] >= 0 and not np.isnan(worth[j])]
        if i in peers and len(peers) > 1 and np.ptp(worth[peers]) > 0:
            a[i] = (worth[i] - worth[peers].mean()) / (worth[peers].std(ddof=1) + 1e-6)
    batch = data.batch().replace(columns={"hard_prompt": jnp.asarray(hard), "pair_copy": jnp.asarray(pairs)})
    batch, _ = jax.jit(lambda batch: method.advantage(batch, {}, None))(batch)
    np.testing.assert_allclose(batch.advantages, np.where(data.mask, a[:, None], 0), rtol=1e-5, atol=1e-5)
    each, _ = method.objective(Decisions(logps=jnp.float32(data.new)), batch, {})
    loss = losses.weighted_sum(each, method.aggregate(batch))
    ratio = np.exp(data.new - data.old)
    each = np.maximum(-a[:, None] * ratio, -a[:, None] * np.clip(ratio, 0.8, 1.2))
    rows = [i for i in range(n) if data.mask[i].any()]
    expected = sum(data.weights[i] * each[i][data.mask[i]].mean() for i in rows) / data.weights[rows].sum()
    assert float(loss) == pytest.approx(expected, rel=2e-5)


def test_messages():
    with pytest.raises(ValueError, match="copies of two prompts, got prompts 3"):
        resolve(prompts=3)
    with pytest.raises(ValueError, match=r"'post', 'role'\), got 'batch'"):
        resolve(norm="batch")
    with pytest.raises(ValueError, match="less than half of 4, got 2"):
        resolve(group_size=4)
