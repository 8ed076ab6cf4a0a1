"""The window of successes against dictionaries and lists; scans, padding, order, and what is refused."""

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest

from grpo_jax.advantages.success import success_rates, success_window

PROMPTS = 7


def steps(seed, count=12):
    """Rewards and prompts of several steps, some prompts with many rows at once, missing rewards and padding rows."""
    draw = np.random.default_rng(seed)
    for _ in range(count):
        prompts = draw.choice([-1, 0, 1, 1, 1, 4, 5], 24)
        rewards = draw.choice([1.0, 0.0, -1.0, 0.25], 24)
        rewards[draw.random(24) < 0.15] = np.nan
        yield rewards, prompts


class ByHand:
    def __init__(self, window):
        self.window, self.rate = window, np.zeros(PROMPTS)
        self.history = [[] for _ in range(PROMPTS)]

    def update(self, rewards, prompts):
        for prompt in range(PROMPTS):
            new = [max(r, 0.0) for r, p in zip(rewards, prompts) if p == prompt and not np.isnan(r)]
            if not new:
                continue
            self.history[prompt] += new
            recent = new if len(new) >= self.window else self.history[prompt][-self.window :]
            self.rate[prompt] = sum(recent) / len(recent)


@pytest.mark.parametrize("window", [1, 4, 16])
@pytest.mark.parametrize("seed", [0, 1])
def test_against_lists(seed, window):
    init, update = success_window(window=window)
    state, by_hand = init(PROMPTS), ByHand(window)
    update = jax.jit(update)
    for rewards, prompts in steps(seed):
        state = update(state, rewards, prompts)
        by_hand.update(rewards, prompts)
        np.testing.assert_allclose(state.rate, by_hand.rate, atol=1e-6)
        np.testing.assert_array_equal(state.seen, [len(h) for h in by_hand.history])
    known = [len(h) >= 8 for h in by_hand.history]
    assert any(known) and not all(known)
    np.testing.assert_allclose(success_rates(state), np.where(known, by_hand.rate, np.nan), atol=1e-6)


def test_worked_example():
    """16 new rewards replace the rate, fewer move the window, and 8 are needed to believe it."""
    init, update = success_window()
    update = jax.jit(update)

    def seen(state, rewards):  # by the prompt in the middle; padding to one shape
        return update(state, np.pad(rewards, (0, 20 - len(rewards))), np.where(np.arange(20) < len(rewards), 1, -1))

    state = seen(init(3), [1.0] * 4 + [0.0] * 3)
    assert float(state.rate[1]) == pytest.approx(4 / 7) and np.isnan(success_rates(state)).all()
    state = seen(state, [-1.0])
    np.testing.assert_allclose(success_rates(state), [np.nan, 0.5, np.nan])
    state = seen(state, [1.0] * 12)  # the last 16: 0 0 0 -1 and twelve 1
    assert float(state.rate[1]) == 0.75
    state = seen(state, [1.0] * 5 + [0.0] * 15)  # all 20, not the last 16
    assert float(state.rate[1]) == 0.25
    state = seen(state, [1.0])  # fifteen 0 and a 1
    assert float(state.rate[1]) == 1 / 16
    assert success_rates(state, fewest=100).shape == (3,) and np.isnan(success_rates(state, fewest=100)).all()


def test_rows_pass_through_jit_vmap_and_shard_map():
    """The state is no array of rows: what is checked is the rate that each row would read afterwards."""
    init, update = success_window(window=4)
    rewards, prompts = next(steps(3))

    def after(rewards, prompt_ids):
        state = update(init(24), rewards, prompt_ids)
        return state.rate.sum(), state.seen.sum()

    laws.rows(jax.jit(after), {"rewards": rewards, "prompt_ids": prompts}, ids=("prompt_ids",), ordered=True, half=None)


def test_it_is_a_pure_scan():
    """No step changes the state that it was given; a scan over steps is the loop."""
    init, update = success_window()
    rewards, prompts = map(np.stack, zip(*steps(5)))
    start = init(PROMPTS)
    state, _ = jax.lax.scan(lambda s, x: (update(s, *x), None), start, (jnp.float32(rewards), jnp.asarray(prompts)))
    for r, p in zip(rewards, prompts):
        start_of_step, start = start, update(start, r, p)
    assert int(start_of_step.seen.sum()) < int(start.seen.sum())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state, start)


def test_what_is_refused():
    init, update = success_window()
    with pytest.raises(ValueError, match="one reward or more, got 0"):
        success_window(window=0)
    with pytest.raises(ValueError, match="one prompt or more, got 0"):
        init(0)
    with pytest.raises(ValueError, match=r"one reward and one prompt per row, got \[2, 1\] and \[2\]"):
        update(init(3), jnp.zeros((2, 1)), jnp.zeros(2, jnp.int32))
