"""The iteration with a policy that is a table and a sampler that is numpy: keys, rounds, failures, roles."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_run import MESH, completions, host, identical, make, plain

from grpo_jax.training.inspection import RolloutError, UpdateError
from grpo_jax.training.keys import fold
from grpo_jax.training.loop import collect, iterate
from grpo_jax.training.step import begin
from grpo_jax.types import Request, Role, State, concat


@pytest.fixture(autouse=True)
def quick_to_compile():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def test_two_runs_are_the_same_to_the_bit(toy):
    first, second = (make(toy, plain(), updates=2) for _ in range(2))
    for _ in range(3):
        iterate(first[0])
        iterate(second[0])
    identical(host(first[0].policies), host(second[0].policies))
    identical([reports for _, reports in first[3]], [reports for _, reports in second[3]])
    assert first[0].state.step == 3 and [len(reports) for _, reports in first[3]] == [2, 2, 2]
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), first[0].params["policy"], toy.parameters())
    assert min(jax.tree.leaves(moved)) > 0


def test_a_completion_is_a_function_of_seed_and_step(toy):
    """Not of the batch: fewer prompts, in another order, give the same completions; another seed or step others."""
    draws = {}
    for name, seed, step, ids in (
        ("all", 0, 0, [0, 1, 2]),
        ("some", 0, 0, [2, 0]),
        ("seed", 1, 0, [0, 1, 2]),
        ("step", 0, 1, [0, 1, 2]),
    ):
        run, sampler, verifier, _ = make(toy, plain(), seed=seed)
        run.method = run.method.replace(select=lambda state, pool, n, key, ids=ids: [pool[i] for i in ids])
        run.state = State(step, {}, {})
        draws[name] = completions(collect(run, fold(seed, step))[1][0])
    assert len(draws["all"]) == 9 and len(set(map(str, draws["all"].values()))) > 3
    assert all(draws["all"][k] == v for k, v in draws["some"].items()) and len(draws["some"]) == 6
    assert draws["seed"] != draws["all"] and draws["step"] != draws["all"]


def test_a_step_can_be_replayed_from_its_state(toy):
    """Two steps, and the second alone from what the first left behind."""
    run, *_ = make(toy, plain(kl=0.1), updates=2)
    iterate(run)
    policies, state, position = jax.tree.map(jnp.copy, run.policies), run.state, run.pool.position
    iterate(run)
    again, *_ = make(toy, plain(kl=0.1), updates=2)
    again.policies, again.state, again.pool.position = policies, state, position
    iterate(again)
    identical(host(again.policies), host(run.policies))


def test_every_purpose_has_its_own_key(toy):
    keys = []

    def reward(batch, arrays, key):
        jax.debug.callback(keys.append, jax.random.key_data(key))
        return batch.scores

    def advantage(batch, arrays, key):
        jax.debug.callback(keys.append, jax.random.key_data(key))
        return plain().advantage(batch, arrays, key)

    def select(state, pool, n, key):
        keys.append(jax.random.key_data(key))
        return pool.take(n)

    def plan(state, draw, key):
        keys.append(jax.random.key_data(key))
        return (yield from plain().plan(state, draw, key))

    run, *_ = make(toy, plain().replace(reward=reward, advantage=advantage, select=select, plan=plan))
    for _ in range(2):
        iterate(run)
    jax.effects_barrier()
    assert len(keys) == 8 and len({tuple(np.asarray(k).tolist()) for k in keys}) == 8
    assert fold(3, "a", 2) == fold(fold(3, "a"), 2)
    assert fold(3, "a", 2) != fold(3, "b", 2) and fold(3, "a", 2) != fold(3, "a", 1)


# ---- plans -----------------------------------------------------------------------------------------------


def test_a_plan_of_several_rounds(toy):
    """Asked again under another context, asked for nothing, scored: the plan sees rows, and rows with scores."""
    got = []

    def plan(state, draw, key):
        asked = draw(state, 2)
        rows = yield [Request(p, count=2) for p in asked]
        got.append(rows)
        assert (yield []) is None
        again = yield [Request(asked[0], count=1, context="9", train_context="0")]
        got.append(again)
        scored = yield concat(rows, again)
        got.append(scored)
        return {"rounds": 2}, [scored]

    run, sampler, verifier, logged = make(toy, plain().replace(plan=plan))
    iterate(run)
    rows, again, scored = got
    assert [len(r) for r in sampler.asked] == [2, 1]
    assert rows.index.tolist() == [0, 1, 0, 1] and again.index.tolist() == [2]
    assert scored.channels == ("ones",) and scored.scores.shape == (5, 1)
    assert len(verifier.seen) == 1  # scored once, not again before training
    assert run.state == State(1, {}, {"rounds": 2})
    ((batch, _),) = logged
    assert batch.old is not None  # one row's contexts differ


def test_a_plan_that_trains_on_nothing(toy):
    def plan(state, draw, key):
        yield [Request(p) for p in draw(state, 1)]
        return {"waited": state.host.get("waited", 0) + 1}, []

    run, _, verifier, logged = make(toy, plain().replace(plan=plan))
    for _ in range(2):
        iterate(run)
    identical(host(run.params["policy"]), host(toy.parameters()))
    assert run.state == State(2, {}, {"waited": 2}) and logged == [] and verifier.seen == []


def test_groups_that_are_kept_for_the_next_step(toy):
    """A stored rollout needs no sampling, is not scored again, and its ratio starts from today's policy."""

    def plan(state, draw, key):
        if state.host:
            return [], [concat(*state.host)]
        rows = yield (yield [Request(p, count=3) for p in draw(state, 4)])
        groups = rows.groups()
        return groups[2:], groups[:2]

    def joined(state, draw, key):
        host, rows = yield from plan(state, draw, key)
        return host, [concat(*rows)]

    run, sampler, verifier, logged = make(toy, plain().replace(plan=joined, init=lambda pool: State(0, {}, [])))
    for _ in range(2):
        iterate(run)
    assert len(sampler.asked) == 1 and len(verifier.seen) == 1
    trained = [np.asarray(b.prompt_ids)[np.asarray(b.prompt_ids) >= 0].tolist() for b, _ in logged]
    assert trained == [[0, 0, 0, 1, 1, 1], [2, 2, 2, 3, 3, 3]]
    assert logged[1][1][0]["ratio_max"] == 1.0 and logged[1][1][0]["gap_max"] > 0


def test_a_rollout_without_scores_is_scored_before_training(toy):
    def plan(state, draw, key):
        rows = yield [Request(p, count=3) for p in draw(state, 4)]
        return state.host, [rows]

    run, _, verifier, logged = make(toy, plain().replace(plan=plan))
    iterate(run)
    assert len(verifier.seen) == 1 and logged[0][0].channels == ("ones",)


@pytest.mark.parametrize("which", ["twice", "untrained", "unknown"])
def test_a_plan_returns_one_rollout_per_trained_policy(toy, which):
    def plan(state, draw, key):
        rows = yield [Request(p, count=3) for p in draw(state, 4)]
        other = rows.replace(role={"untrained": "reference"}.get(which, "stranger"))
        return state.host, [rows, rows] if which == "twice" else [other]

    run, *_ = make(toy, plain(kl=0.1).replace(plan=plan))
    with pytest.raises(
        ValueError, match=r"one rollout for each policy that it trains, out of \['policy'\]; got rollouts"
    ):
        iterate(run)


def test_a_sampler_gone_wrong_is_named(toy):
    run, *_ = make(toy, plain())
    run.policies["policy"] = begin(jax.tree.map(lambda x: x * jnp.nan, toy.parameters()), run.optimizer, MESH)
    sample = run.domain.sample

    def broken(params, requests, key, numbers):
        rows = sample({"policy": toy.parameters()}, requests, key, numbers)
        return rows.replace(sampler_logps=np.full_like(rows.sampler_logps, np.nan))

    run.domain = run.domain._replace(sample=broken)
    with pytest.raises(RolloutError, match="prompt ids 0, 1, 2, 3"):
        iterate(run)


def test_a_gradient_gone_wrong_stops_the_run_with_its_policy_whole(toy):
    run, *_ = make(toy, plain().replace(objective=lambda new, batch, arrays: (new.logps / 0.0, {})))
    with pytest.raises(UpdateError, match="update 0 of step 0"):
        iterate(run)
    identical(host(run.params["policy"]), host(toy.parameters()))
    assert run.state.step == 0


# ---- roles -----------------------------------------------------------------------------------------------


def test_a_role_that_follows(toy):
    """Every second step it moves a quarter of the way; with rate 1 it becomes the policy to the bit."""
    roles = {"slow": Role(follow=(0.25, 2)), "copy": Role(follow=(1.0, 1)), "still": Role()}
    run, *_ = make(toy, plain().replace(roles=roles))
    start = host(toy.parameters(5))
    iterate(run)
    identical(host(run.params["slow"]), start)
    identical(host(run.params["copy"]), host(run.params["policy"]))
    iterate(run)
    expected = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, start, host(run.params["policy"]))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7), host(run.params["slow"]), expected)
    identical(host(run.params["still"]), start)


def test_two_trained_policies(toy):
    """Each has its own rollout, shaped before either is updated."""
    order = []

    def plan(state, draw, key):
        asked = draw(state, 4)
        rows = yield (yield [Request(p, count=3) for p in asked])
        other = yield (yield [Request(p, count=3, role="hinter") for p in asked])
        return state.host, [rows, other]

    def advantage(batch, arrays, key):
        arrays = {"seen": arrays["seen"] + 1}
        return plain().advantage(batch, arrays, key)[0], arrays

    method = plain().replace(
        plan=plan, roles={"hinter": Role(train=True)}, advantage=advantage, init=lambda pool: State(0, {"seen": 0}, {})
    )
    run, sampler, _, logged = make(toy, method)
    shape = run.compiled.shape
    run.compiled.shape = lambda *a: (order.append("shape"), shape(*a))[1]
    run.log = lambda batch, reports: (order.append(batch.role), logged.append((batch, reports)))
    start = host(run.params)
    iterate(run)
    assert order == ["shape", "shape", "policy", "hinter"] and int(run.state.arrays["seen"]) == 2
    for role in ("policy", "hinter"):
        moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), host(run.params[role]), start[role])
        assert max(jax.tree.leaves(moved)) > 1e-3
    drawn = [completions(rows) for _, rows in run.verify.seen]
    assert drawn[0].keys() == drawn[1].keys() and drawn[0] != drawn[1]


def test_a_reference_only_where_the_method_has_one(toy):
    run, _, _, logged = make(toy, plain())
    iterate(run)
    assert run.policies.keys() == {"policy"} and logged[0][0].ref is None
    run, _, _, logged = make(toy, plain(kl=0.1))
    iterate(run)
    batch, (report,) = logged[0]
    for i in np.flatnonzero(np.asarray(batch.prompt_ids) >= 0):
        tokens = np.asarray(batch.completions[i, : batch.lengths[i]])
        expected = toy.table_logps(toy.parameters(5), int(batch.prompt_ids[i]), tokens)
        np.testing.assert_allclose(batch.ref.logps[i, : len(tokens)], expected, atol=2e-6)
    assert report["kl"] > 0
    identical(host(run.params["reference"]), host(toy.parameters(5)))


# ---- old log-probs, updates ------------------------------------------------------------------------------
