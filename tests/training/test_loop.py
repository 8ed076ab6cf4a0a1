"""The iteration with a policy that is a table and a sampler that is numpy: rounds, keys, roles, updates, shapes."""

import zlib
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax import methods
from grpo_jax.methods.grpo import grpo
from grpo_jax.training.batches import put
from grpo_jax.training.deal import Layout
from grpo_jax.training.inspection import RolloutError, UpdateError
from grpo_jax.training.instruments import CompileCounter
from grpo_jax.training.keys import fold
from grpo_jax.training.loop import Run, collect, iterate, verified
from grpo_jax.training.mesh import make_mesh, replicate
from grpo_jax.training.step import Policy, begin
from grpo_jax.types import Contexts, Prompt, Request, Role, Rollout, State, concat

T, VOCABULARY = 4, 5
MESH = make_mesh(data=1, devices=jax.devices()[:1])


@pytest.fixture(autouse=True)
def quick_to_compile():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


class Pool:
    """Prompt i is the text str(i); `take` goes round."""

    def __init__(self, size=16):
        self.position, self.size = 0, size

    def take(self, n):
        ids = [(self.position + i) % self.size for i in range(n)]
        self.position += n
        return [self[i] for i in ids]

    def __getitem__(self, i):
        return Prompt(i, str(i), {"double": 2 * i})

    def __len__(self):
        return self.size


class Sampler:
    """Draws from the table with a key per (key, role, prompt, index); remembers what it was asked. 0 stops."""

    def __init__(self):
        self.asked = []

    def __call__(self, params, requests, key, numbers=None):
        self.asked.append(requests)
        (role,) = {r.role for r in requests}
        table, before = (np.asarray(params[role][name], np.float64) for name in ("context", "before"))
        words = jax.random.key_data(key).tolist()
        asked = [r for r in requests for _ in range(r.count)]
        tokens, logps = np.zeros((len(asked), T), np.int32), np.full((len(asked), T), np.nan, np.float32)
        lengths, index = np.zeros(len(asked), np.int32), np.zeros(len(asked), np.int32)
        for i, request in enumerate(asked):
            index[i] = numbers[role, request.prompt.id]
            numbers[role, request.prompt.id] += 1
            draw = np.random.default_rng([*words, zlib.crc32(role.encode()), request.prompt.id, index[i]])
            last = 0
            for t in range(T if request.max_new is None else request.max_new):
                logits = table[int(request.context or request.prompt.text)] + before[last]
                weights = np.exp(logits) / np.exp(logits).sum()
                last = tokens[i, t] = draw.choice(VOCABULARY, p=weights)
                logps[i, t], lengths[i] = np.log(weights[last]), t + 1
                if last == 0:
                    break
        under = [(int(r.context or r.prompt.text), int(r.train_context or r.context or r.prompt.text)) for r in asked]
        names = sorted({c for pair in under for c in pair})
        n, exists = len(asked), np.arange(T) < lengths[:, None]
        return Rollout(
            contexts=Contexts(tokens=np.array(names, np.int32)[:, None], lengths=np.ones(len(names), np.int32)),
            sampled_under=np.array([names.index(a) for a, _ in under], np.int32),
            trained_under=np.array([names.index(b) for _, b in under], np.int32),
            completions=tokens,
            lengths=lengths,
            completion_mask=exists,
            behavior_logps=logps,
            sampler_logps=np.where(exists, logps, 0),
            finished=lengths < T,
            temperature=np.ones(n, np.float32),
            prompt_ids=np.array([r.prompt.id for r in asked], np.int32),
            index=index,
            group_ids=np.repeat(np.arange(len(requests)), [r.count for r in requests]).astype(np.int32),
            weights=np.ones(n, np.float32),
            update_ids=np.full(n, -1, np.int32),
            scores=np.zeros((n, 0), np.float32),
            role=role,
        )


class Verifier:
    """The share of the token 1; remembers the rows that it saw, and under which prompts and step."""

    def __init__(self):
        self.seen = []

    def __call__(self, prompts, rows, texts, step):
        assert [p.id for p in prompts] == rows.prompt_ids.tolist() and len(texts) == len(rows)
        self.seen.append((step, rows))
        share = (rows.completions == 1).sum(1) / rows.lengths
        return rows.replace(scores=share[:, None].astype(np.float32), channels=("ones",), channel_weights=(1.0,))


def make(toy, method, *, prompts=4, group_size=3, updates=1, seed=0, optimizer=None, sweeps=1, roles=None):
    optimizer = optimizer or optax.sgd(0.5, momentum=0.9)
    policies = {"policy": begin(replicate(toy.parameters(), MESH), optimizer, MESH)}
    for name, role in method.roles.items():
        params = replicate(toy.parameters(5), MESH)
        policies[name] = begin(params, optimizer, MESH) if role.train else Policy(params)
    sampler, verifier, logged = Sampler(), Verifier(), []
    run = Run(
        method=method,
        domain=toy.domain(sampler),
        pool=Pool(),
        verify=verifier,
        optimizer=optimizer,
        mesh=MESH,
        layout=Layout(prompts, group_size, 1, T, sweeps),
        policies=policies,
        state=method.init(None),
        seed=seed,
        updates=updates,
        log=lambda batch, reports: logged.append((batch, reports)),
    )
    return run, sampler, verifier, logged


def plain(**options):
    return grpo(prompts=4, group_size=3, **options)


def host(tree):
    return jax.tree.map(np.asarray, tree)


def identical(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


# ---- keys, state -----------------------------------------------------------------------------------------


def completions(rows):
    return {(int(p), int(i)): rows.completions[n].tolist() for n, (p, i) in enumerate(zip(rows.prompt_ids, rows.index))}


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


def asks_in_reward(batch, arrays, key):
    return batch.scores + 0 * batch.old.logps.sum(1, keepdims=True)


def test_old_is_evaluated_only_where_something_asks(toy):
    for change, updates, wanted in (
        ({}, 1, False),
        ({}, 2, True),
        ({"reward": asks_in_reward}, 1, True),
        ({"advantage": lambda b, a, k: (b.replace(advantages=b.old.stats["entropy"]), a)}, 1, True),
        ({"objective": lambda new, b, a: (-b.advantages * jnp.exp(new.logps - b.old.logps), {})}, 1, False),
    ):
        run, _, _, logged = make(toy, plain().replace(**change), updates=updates)
        iterate(run)
        batch = logged[0][0]
        assert (batch.old is not None) == wanted
        if wanted:
            for i in np.flatnonzero(np.asarray(batch.prompt_ids) >= 0):
                tokens = np.asarray(batch.completions[i, : batch.lengths[i]])
                expected = toy.table_logps(toy.parameters(), int(batch.prompt_ids[i]), tokens)
                np.testing.assert_allclose(batch.old.logps[i, : len(tokens)], expected, atol=2e-6)


@pytest.mark.parametrize(
    "changes, updates, orders",
    [
        ({}, 1, ["reference scores"] * 2),
        ({}, 2, ["reference policy scores"] * 2),
        ({"reward": asks_in_reward}, 1, ["reference scores policy", "reference policy scores"]),
    ],
    ids=["reference", "two updates", "a reward that asks, which the first scores show"],
)
def test_the_host_scores_once_the_device_has_the_log_probs_to_make(toy, changes, updates, orders):
    run, _, verifier, logged = make(toy, plain(kl=0.1).replace(**changes), updates=updates)
    order, passes = [], run.compiled._evaluate

    def verify(prompts, rows, texts, step):
        order.append("scores")
        rows = verifier(prompts, rows, texts, step)
        return rows.replace(columns=rows.columns | {"said": np.arange(len(rows), dtype=np.float32)})

    run.verify = verify
    run.compiled._evaluate = lambda *a, role: (order.append(role), passes(*a, role=role))[1]
    for step, expected in enumerate(orders):
        with CompileCounter() as counter:
            iterate(run)
        assert order == expected.split() and (step == 0 or counter.total.count == 0)
        order.clear()
        batch, rows = logged[-1][0], verifier.seen[-1][1]
        np.testing.assert_array_equal(
            batch.scores[: len(rows), 0], np.float32((rows.completions == 1).sum(1) / rows.lengths)
        )
        np.testing.assert_array_equal(batch.columns["said"][: len(rows)], np.arange(len(rows)))
        assert batch.channels == ("ones",) and batch.channel_weights == (1.0,) and batch.ref is not None


def test_rows_that_the_plan_has_scored_go_through_the_same_programs(toy):
    def plan(state, draw, key):
        rows = yield [Request(p, count=3) for p in draw(state, 4)]
        if state.step:
            rows = yield rows
        return state.host, [rows]

    run, _, verifier, logged = make(toy, plain(kl=0.1).replace(plan=plan))
    for compiles in (True, False):
        with CompileCounter() as counter:
            iterate(run)
        assert bool(counter.total.count) == compiles
    assert len(verifier.seen) == len(logged) == 2 and all(batch.channels == ("ones",) for batch, _ in logged)


def hinted(state, draw, key):
    rows = yield (yield [Request(p, count=3, context="9", train_context=p.text) for p in draw(state, 4)])
    return state.host, [rows]


def test_rows_sampled_under_another_context_have_a_ratio_from_the_first_update(toy):
    run, _, _, logged = make(toy, plain().replace(plan=hinted))
    iterate(run)
    batch, (report,) = logged[0]
    ratios = []
    for i in np.flatnonzero(np.asarray(batch.prompt_ids) >= 0):
        tokens = np.asarray(batch.completions[i, : batch.lengths[i]])
        new = toy.table_logps(toy.parameters(), int(batch.prompt_ids[i]), tokens)
        ratios += list(np.exp(new - toy.table_logps(toy.parameters(), 9, tokens)))
    assert report["ratio_max"] == pytest.approx(max(ratios), rel=1e-5)
    np.testing.assert_allclose([report["ratio_p01"], report["ratio_p99"]], np.quantile(ratios, [0.01, 0.99]), rtol=1e-5)


@pytest.mark.parametrize("how", ["updates", "passes", "update_ids", "update_ids from advantage"])
def test_later_updates_measure_from_the_start_of_the_step(toy, how):
    """The first ratio is 1; the second is pi_1 / pi_0 on its own rows, whoever cut the batch into updates."""

    def plan(state, draw, key):
        rows = yield (yield [Request(p, count=3) for p in draw(state, 4)])
        cut = (rows.group_ids >= 2).astype(np.int32) if how == "update_ids" else rows.update_ids
        return state.host, [rows.replace(update_ids=cut)]

    def advantage(batch, arrays, key):
        batch, arrays = plain().advantage(batch, arrays, key)
        return batch.replace(update_ids=jnp.where(batch.group_ids >= 2, 1, 0)), arrays

    method = plain().replace(plan=plan, **({"advantage": advantage} if "advantage" in how else {}))
    run, _, _, logged = make(toy, method, updates=2 if how == "updates" else 1)
    run.passes = 2 if how == "passes" else 1
    seen, update = [], run.compiled.update

    def spy(batch, arrays, rows, *, first):
        seen.append((rows, first, host(run.params["policy"])))
        return update(batch, arrays, rows, first=first)

    run.compiled.update = spy
    iterate(run)
    batch, reports = logged[0]
    assert [s[1] for s in seen] == [True, False]
    assert [reports[0][k] for k in ("ratio_p01", "ratio_p99", "ratio_max")] == [1.0] * 3
    ratios = []
    for i in seen[1][0]:
        tokens, prompt = np.asarray(batch.completions[i, : batch.lengths[i]]), int(batch.prompt_ids[i])
        ratios += list(
            np.exp(toy.table_logps(seen[1][2], prompt, tokens) - toy.table_logps(toy.parameters(), prompt, tokens))
        )
    assert reports[1]["ratio_max"] == pytest.approx(max(ratios), rel=1e-5) and abs(max(ratios) - 1) > 1e-3
    groups = [set(np.asarray(batch.group_ids)[s[0]].tolist()) for s in seen]
    assert len(groups[0] | groups[1]) == 4 and len(groups[0] & groups[1]) == (4 if how == "passes" else 0)


def test_each_pass_is_over_the_whole_batch_dealt_anew(toy):
    run, _, _, logged = make(toy, plain(), updates=2)
    run.passes, seen, update = 6, [], run.compiled.update

    def spy(batch, arrays, rows, *, first):
        seen.append(rows.tolist())
        return update(batch, arrays, rows, first=first)

    run.compiled.update = spy
    iterate(run)
    passes = [(seen[i], seen[i + 1]) for i in range(0, 12, 2)]
    assert len(seen) == 12 and len(logged[0][1]) == 12
    assert {tuple(sorted(a + b)) for a, b in passes} == {tuple(sorted(seen[0] + seen[1]))}
    assert len({tuple(sorted(map(tuple, p))) for p in passes}) > 1


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
