"""What an iteration trains on, and in which shapes: padding, steps of any size, nothing compiled anew."""

from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy_run import T, host, make, plain

from grpo_jax import methods
from grpo_jax.training.batches import put
from grpo_jax.training.instruments import CompileCounter
from grpo_jax.training.keys import fold
from grpo_jax.training.loop import iterate, verified
from grpo_jax.types import Request, State


@pytest.fixture(autouse=True)
def quick_to_compile():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def test_what_advantage_edits_is_what_is_trained(toy):
    """Weights, groups, masks, columns: the update sees them."""

    def advantage(batch, arrays, key):
        batch, arrays = plain().advantage(batch, arrays, key)
        first = jnp.arange(T) == 0
        return batch.replace(
            weights=jnp.where(batch.group_ids == 1, 0.0, batch.weights),
            completion_mask=batch.completion_mask & first,
            columns={"mark": jnp.full(batch.weights.shape, 3.0)},
        ), {"steps": arrays["steps"] + 1}

    def objective(new, batch, arrays):
        spread = lambda x: jnp.broadcast_to(x, batch.completion_mask.shape)  # noqa: E731
        trained = batch.completion_mask * spread(batch.weights[:, None])
        return -batch.advantages * new.logps, {
            "mark": spread(batch.columns["mark"][:, None]),
            "steps": spread(arrays["steps"]).astype(jnp.float32),
            "beyond": trained * spread(jnp.arange(T) > 0),
        }

    method = plain().replace(advantage=advantage, objective=objective, init=lambda pool: State(0, {"steps": 4}, {}))
    run, _, _, logged = make(toy, method)
    iterate(run)
    batch, (report,) = logged[0]
    assert (report["mark"], report["steps"], report["beyond"]) == (3.0, 5.0, 0.0)
    assert np.asarray(batch.completion_mask).sum(1).max() == 1
    assert not np.asarray(batch.weights)[np.asarray(batch.group_ids) == 1].any()
    before, after = host(toy.parameters()), host(run.params["policy"])
    assert (before["context"][1] == after["context"][1]).all()  # prompt 1: weight 0
    assert (before["before"][1:] == after["before"][1:]).all()  # no later decision
    assert (before["context"][0] != after["context"][0]).any()


def test_put_pads_with_nothing(toy):
    """Padding rows weigh nothing and stand in no group; an empty completion weighs nothing and keeps its group."""
    run, sampler, *_ = make(toy, plain(), sweeps=2)
    rows = sampler(run.params, [Request(run.pool[i], count=2) for i in range(3)], fold(0), Counter())
    rows = verified(run, rows.replace(completion_mask=rows.completion_mask & (np.arange(6) != 3)[:, None]))
    rows = rows.replace(columns={"level": np.arange(6.0, dtype=np.float32)})
    batch = host(put(rows, run.layout, run.mesh, updates=run.updates))
    assert batch.weights.tolist() == [1, 1, 1, 0, 1, 1] + [0] * 18
    assert batch.group_ids.tolist() == [0, 0, 1, 1, 2, 2] + [-1] * 18
    assert batch.prompt_ids[6:].tolist() == batch.update_ids[6:].tolist() == [-1] * 18
    assert not batch.completion_mask[6:].any() and not batch.lengths[6:].any()
    assert np.isnan(batch.behavior_logps[6:]).all() and np.isnan(batch.scores[6:]).all()
    assert (
        batch.columns["level"][:6].tolist() == list(range(6)) and batch.contexts.lengths.tolist() == [1] * 3 + [0] * 5
    )


# ---- shapes ----------------------------------------------------------------------------------------------


def test_ragged_steps_compile_nothing_new(toy):
    """Other numbers of rows, groups and contexts, an update fewer: the programs of the first step serve."""
    sizes = [(4, 3), (1, 3), (3, 1), (4, 2), (2, 3), (1, 1)]

    def plan(state, draw, key):
        prompts, count = sizes[state.step % len(sizes)]
        rows = yield (yield [Request(p, count=max(1, count - i % 2)) for i, p in enumerate(draw(state, prompts))])
        return state.host, [rows]

    run, *_ = make(toy, plain(kl=0.1).replace(plan=plan), prompts=2, updates=2)
    iterate(run)
    with CompileCounter() as compiled:
        for _ in range(1, len(sizes)):
            iterate(run)
    assert compiled.total.count == 0, compiled.total.names


def test_ragged_steps_of_lone_contexts_compile_nothing_new(toy):
    """Rows with a context each, in numbers that differ from step to step."""

    def plan(state, draw, key):
        (prompt,) = draw(state, 1)
        rows = yield (yield [Request(prompt, context=str(c)) for c in range(12 - state.step)])
        return state.host, [rows]

    run, *_ = make(toy, plain(kl=0.1).replace(plan=plan), prompts=4, group_size=3)
    iterate(run)
    with CompileCounter() as compiled:
        for _ in range(3):
            iterate(run)
    assert compiled.total.count == 0, compiled.total.names


def test_a_step_that_is_larger_than_usual_still_runs(toy):
    """More groups than the layout was made for, more rows than a cell holds: the same update as with room for all."""

    def plan(state, draw, key):
        rows = yield (yield [Request(p, count=5) for p in draw(state, 7)])
        return state.host, [rows]

    results = []
    for prompts, group_size in ((2, 2), (7, 5)):
        run, *_ = make(toy, plain().replace(plan=plan), prompts=prompts, group_size=group_size)
        iterate(run)
        results.append(host(run.params["policy"]))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), *results)


def test_rows_with_contexts_of_their_own(toy):
    """As many contexts as rows, beyond the cells of a usual step: one row per cell, and the same numbers."""

    def plan(state, draw, key):
        asked = draw(state, 4)
        rows = yield (yield [Request(p, context=str(c)) for p in asked for c in range(p.id, p.id + 3)])
        return state.host, [rows]

    results = []
    for prompts, group_size in ((4, 3), (12, 1)):
        method = plain().replace(
            plan=plan, advantage=lambda b, a, k: (b.replace(advantages=0.0 * b.behavior_logps + 1), a)
        )
        run, _, _, logged = make(toy, method, prompts=prompts, group_size=group_size)
        iterate(run)
        results.append((host(run.params["policy"]), logged[0][1][0]["loss"]))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), *results)


def test_the_reward_rises(toy):
    """The whole loop does what it is for: the token 1 is paid, and becomes likely."""
    run, _, verifier, _ = make(
        toy, methods.resolve("grpo", options={}, settings={"prompts": 4, "group_size": 8}), group_size=8
    )
    run.optimizer = optax.sgd(0.5, momentum=0.9)
    for _ in range(30):
        iterate(run)
    reward = [np.mean((rows.completions == 1).sum(1) / rows.lengths) for _, rows in verifier.seen]
    assert np.mean(reward[:3]) < 0.45 and np.mean(reward[-3:]) > 0.8
