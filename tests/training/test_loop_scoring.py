"""When an iteration asks for scores and for old log-probs, and what its updates measure from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_run import host, make, plain

from grpo_jax.training.instruments import CompileCounter
from grpo_jax.training.loop import iterate
from grpo_jax.types import Request


@pytest.fixture(autouse=True)
def quick_to_compile():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


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
