"""Knapsack RL: what it asks for as it learns which prompts teach, and its advantages and loss against float64 loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import losses, methods
from grpo_jax.training.host_state import decode, encode
from grpo_jax.types import Decisions, Prompt, Request, State


class Pool:
    """All that the method asks of a pool: how many rows its ids stay below."""

    rows = 6


def resolve(make, **options):
    return methods.resolve("knapsack_rl", options=options, settings={**make.settings, "prompts": 3, "group_size": 4})


def step(make, method, state, ids, score):
    """One driven step: score(prompt, count) gives the rewards of a group. Returns the counts and the next state."""
    prompts = [Prompt(i, f"prompt {i}") for i in ids]
    plan = method.plan(state, lambda state, n: prompts[:n], None)
    requests = plan.send(None)
    assert all(isinstance(r, Request) for r in requests)
    counts = [r.count for r in requests]
    rows = make.rollout(
        np.repeat([r.prompt.id for r in requests], counts), group_ids=np.repeat(range(len(requests)), counts)
    )
    assert plan.send(rows) is rows  # asks for its scores
    scores = np.concatenate([score(r.prompt.id, r.count) for r in requests]).astype(np.float32)
    with pytest.raises(StopIteration) as end:
        plan.send(rows.replace(scores=scores[:, None], channels=("exact",), channel_weights=(0.5,)))
    host, (trained,) = end.value.value
    assert len(trained) == sum(counts)
    return counts, State(state.step + 1, {}, host)


def shares(**by_prompt):
    """The first of a group's completions succeed, this share of them."""
    return lambda prompt, count: np.arange(count) < round(by_prompt[f"p{prompt}"] * count)


def test_the_budget_follows_what_is_known(make):
    """4 rewards are not enough to know a prompt, 8 are; then of 12 completions the decided get 2 each."""
    method = resolve(make)
    score, state = shares(p0=0.25, p1=1.0, p2=0.0), method.init(Pool)
    for _ in range(2):
        counts, state = step(make, method, state, [0, 1, 2], score)
        assert counts == [4, 4, 4]
    assert state.host["seen"].tolist() == [8, 8, 8, 0, 0, 0]
    counts, state = step(make, method, state, [0, 1, 2], score)
    assert counts == [8, 2, 2]  # ln(0.1) / ln(0.75) = 8.004: within the cost of a mixed group
    np.testing.assert_allclose(state.host["rate"][:3], [0.25, 1, 0])
    counts, state = step(make, method, state, [1, 3, 2], score=lambda prompt, count: np.zeros(count))
    assert counts == [2, 6, 4]  # no signal anywhere: prompts that fail or are unknown get it
    counts, _ = step(make, resolve(make, fallback=None, largest=5), state, [0, 1, 2], score)
    assert sum(counts) == 12


def test_the_window_forgets(make):
    """A prompt that was hopeless comes alive as its last rewards say, not as all of them do."""
    method = resolve(make, window=4, fewest=4)
    score, state = shares(p0=0.0, p1=1.0, p2=0.0), method.init(Pool)
    _, state = step(make, method, state, [0, 1, 2], score)
    assert state.host["rate"].tolist() == [0, 1, 0, 0, 0, 0]
    counts, state = step(make, method, state, [0, 1, 2], shares(p0=0.4, p1=1.0, p2=0.0))
    assert counts == [5, 2, 5] and state.host["rate"][0] == pytest.approx(0.4)
    counts, _ = step(make, method, state, [0, 1, 2], score)
    assert counts == [6, 2, 4]


def test_success_is_a_reward_above_nothing(make):
    """Rewards of -1 and 0 are failures, those that do not apply are passed over."""
    method = resolve(make)
    rewards = {0: [-1, 0, 0.1, 2.0], 1: [np.nan, np.nan, 1, 0], 2: [np.nan] * 4}
    _, state = step(make, method, method.init(Pool), [0, 1, 2], lambda prompt, count: np.array(rewards[prompt]))
    assert state.host["seen"].tolist() == [4, 2, 0, 0, 0, 0]
    np.testing.assert_allclose(state.host["rate"], [0.5, 0.5, 0, 0, 0, 0])


def test_the_state_is_saved_as_it_is(make):
    method = resolve(make)
    _, state = step(make, method, method.init(Pool), [0, 1, 5], shares(p0=0.5, p1=1.0, p5=0.0))
    again = decode(*encode(state.host))
    jax.tree.map(np.testing.assert_array_equal, again, state.host)
    score = shares(p0=0.5, p1=1.0, p5=0.0)
    assert step(make, method, State(1, {}, again), [0, 1, 5], score)[0] == [4, 4, 4]


def advantages_by_hand(data, clamp):
    result = np.zeros(len(data.groups))
    for i, group in enumerate(data.groups):
        inside = [r for r, g in zip(data.total, data.groups) if g == group and not np.isnan(r)]
        if group >= 0 and not np.isnan(data.total[i]) and len(inside) > 1 and np.ptp(inside):
            result[i] = np.clip((data.total[i] - np.mean(inside)) / (np.std(inside, ddof=1) + 1e-6), -clamp, clamp)
    return result


def loss_by_hand(data, advantage, new, dual):
    total, mass = 0.0, 0.0
    for i, t in zip(*np.nonzero(data.mask)):
        a, ratio = advantage[i], np.exp(new[i, t] - data.old[i, t])
        loss = max(-a * ratio, -a * np.clip(ratio, 0.8, 1.28))
        total += data.weights[i] * (min(loss, -a * dual) if a < 0 else loss)
        mass += data.weights[i]
    return total / mass


@pytest.mark.parametrize(("clamp", "dual"), [(5.0, 10.0), (0.8, 1.3)])
@pytest.mark.parametrize("seed", [0, 1])
def test_advantages_loss_and_gradient(make, seed, clamp, dual):
    data = make.ragged(seed)
    method = resolve(make, clamp=clamp, dual=dual)
    batch, _ = jax.jit(lambda batch: method.advantage(batch, {}, None))(data.batch())
    advantage = advantages_by_hand(data, clamp)
    np.testing.assert_allclose(batch.advantages, np.where(data.mask, advantage[:, None], 0), rtol=1e-4, atol=1e-5)

    @jax.jit
    @jax.value_and_grad
    def loss(logps):
        each, _ = method.objective(Decisions(logps=logps), batch, {})
        return losses.weighted_sum(each, method.aggregate(batch))

    value, gradient = loss(jnp.asarray(data.new, jnp.float32))
    assert float(value) == pytest.approx(loss_by_hand(data, advantage, data.new, dual), rel=2e-5)
    for place in np.ndindex(data.new.shape):
        up, down = data.new.copy(), data.new.copy()
        up[place] += 1e-6
        down[place] -= 1e-6
        slope = (loss_by_hand(data, advantage, up, dual) - loss_by_hand(data, advantage, down, dual)) / 2e-6
        np.testing.assert_allclose(gradient[place], slope, atol=1e-5)


def test_a_lone_success_is_clamped(make):
    """1 of 128 stands 11.2 deviations above its group; it counts for 5."""
    rewards = np.eye(1, 128)[0]
    values = []
    for clamp in (100.0, 5.0):
        batch, _ = resolve(make, clamp=clamp).advantage(make.batch(rewards, groups=np.zeros(128)), {}, None)
        values.append(float(batch.advantages[0, 0]))
    assert values == pytest.approx([11.2251, 5.0], abs=1e-3)


def test_what_is_refused(make):
    with pytest.raises(ValueError, match="smallest 5, budget 4, largest 128"):
        resolve(make, smallest=5)
    with pytest.raises(ValueError, match="one reward or more, got 0"):
        resolve(make, window=0)
    with pytest.raises(ValueError, match="did you mean 'largest'"):
        resolve(make, larges=3)
