"""Iterations as one program: those of the loop, whatever the method, the number at a time, or a restart."""

from __future__ import annotations

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax import data, methods
from grpo_jax.experiment import Experiment
from grpo_jax.methods.grpo import grpo
from grpo_jax.rewards import RewardError, in_graph, resolve
from grpo_jax.training import assemble
from grpo_jax.training.deal import Layout, lay_out
from grpo_jax.training.fused import Fused, check_scores, laid_out, obstacle
from grpo_jax.training.loop import Run, iterate
from grpo_jax.training.mesh import make_mesh, replicate
from grpo_jax.types import Contexts, Domain, Request, Role, Rollout, Scored, State

T = 4
ONE = make_mesh(data=1, devices=jax.devices()[:1])


@pytest.fixture(autouse=True)
def quick_to_compile():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


class Digits:
    """A prompt is one digit; what follows is of the tokens 0 to 4, of which 0 stops."""

    vocab_size, stop_ids, pad_id = 10, (0,), 0

    def encode(self, text):
        return np.array([int(c) for c in text], np.int32)

    encode_prompt = encode


def prepare(requests, numbers):
    """Rows of the table policy, nothing drawn."""
    asked = [r for r in requests for _ in range(r.count)]
    n, names = len(asked), sorted({int(r.prompt.text) for r in requests})
    under = np.array([names.index(int(r.prompt.text)) for r in asked], np.int32)
    index = np.array([numbers.update([r.prompt.id]) or numbers[r.prompt.id] - 1 for r in asked], np.int32)
    nothing, empty = np.zeros((n, T), np.int32), np.zeros(n, np.int32)
    wanted = [r.prompt.columns["wanted"] for r in asked]
    rows = Rollout(
        contexts=Contexts(tokens=np.array(names, np.int32)[:, None], lengths=np.ones(len(names), np.int32)),
        **dict.fromkeys(("sampled_under", "trained_under"), under),
        **dict.fromkeys(("behavior_logps", "sampler_logps"), nothing.astype(np.float32)),
        completions=nothing,
        lengths=empty,
        completion_mask=nothing > 0,
        finished=empty > 0,
        **dict.fromkeys(("temperature", "weights"), np.ones(n, np.float32)),
        prompt_ids=np.array([r.prompt.id for r in asked], np.int32),
        index=index,
        group_ids=np.repeat(np.arange(len(requests)), [r.count for r in requests]).astype(np.int32),
        update_ids=empty - 1,
        scores=np.zeros((n, 0), np.float32),
        columns={"wanted": np.array(wanted, np.float32)},
    )
    return rows, np.zeros(0)


def draw(params, batch, launches, key):
    """What the table policy says, until a 0; in jit."""
    table = params["policy"]
    keys = jax.vmap(lambda p, i: jax.random.fold_in(jax.random.fold_in(key, p), i))(batch.prompt_ids, batch.index)
    noise = jax.vmap(lambda k: jax.random.gumbel(k, (T, 5)))(keys)

    def choose(carry, noise):
        going, last = carry
        logits = table["context"][batch.contexts.tokens[batch.sampled_under, 0]] + table["before"][last]
        token = jnp.argmax(logits + noise, axis=1).astype(jnp.int32)
        logp = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=1)[:, 0]
        return (going & (token != 0), token), (jnp.where(going, token, 0), jnp.where(going, logp, jnp.nan))

    real = batch.prompt_ids >= 0
    start = real, jnp.zeros(len(batch), jnp.int32)
    (going, _), drawn = jax.lax.scan(choose, start, noise.swapaxes(0, 1))
    tokens, logps = (x.swapaxes(0, 1) for x in drawn)
    exists = ~jnp.isnan(logps)
    return batch.replace(
        completions=tokens,
        lengths=exists.sum(1),
        completion_mask=exists,
        behavior_logps=logps,
        sampler_logps=jnp.where(exists, logps, 0.0),
        finished=real & ~going,
    )


def domain(toy) -> Domain:
    def sample(params, requests, key, numbers):
        return jax.device_get(jax.jit(draw)(params, prepare(requests, numbers)[0], None, key))

    return toy.domain(sample)._replace(prepare=prepare, draw=draw)


@in_graph
def ones(tokens, lengths, finished, wanted):
    """The share of the wanted token; does not apply to prompts that want none, nor to what was cut off at the start."""
    exists = jnp.arange(tokens.shape[1]) < lengths[:, None]
    return jnp.where(finished | (wanted > 1), ((tokens == wanted[:, None]) & exists).sum(1) / lengths, jnp.nan)


@in_graph
def parts(tokens, lengths, prompt_id, step, *, scale=1.0):
    first = tokens[:, :2] / scale
    return Scored({"first": first, "late": 1.0 * step + prompt_id}, {"short": lengths < 3})


ROWS = [{"prompt": text, "wanted": w} for text, w in (("8", 1), ("2", 2), ("7", None), ("3", 3), ("5", 1))]


def run_of(toy, method, functions=(ones,), *, mesh=ONE, group_size=4, optimizer=None, **options) -> Run:
    optimizer, pool = optimizer or optax.adam(0.1), data.Pool.open(ROWS, tokenizer=Digits())
    return Run(
        method=method,
        domain=domain(toy),
        pool=pool,
        verify=assemble.Verifier([resolve(f) for f in functions], ["wanted"], time_limit=60, on_error="stop"),
        optimizer=optimizer,
        mesh=mesh,
        layout=Layout(4, group_size, 1, T),
        policies=assemble.roles_of(method, replicate(toy.parameters(), mesh), optimizer, mesh),
        state=method.init(pool),
        **options,
    )


def logged(run: Run, go) -> list:
    """What a run logs and where it gets to, on the host."""
    seen = []
    run.log = lambda batch, reports: seen.append((batch.replace(old=None, ref=None), reports))
    go(run)
    return jax.device_get((seen, run.policies, run.state)), run.pool.state()


def together(*numbers):
    """Steps up to these, each time in one advance."""

    def go(run):
        assert obstacle(run) is None
        fused = Fused(run)
        for until in numbers:
            fused.advance(until, stopped=lambda: False, written=lambda step, times: None)
            fused.steps = 2

    return go


def one_by_one(steps):
    return lambda run: [iterate(run) for _ in range(steps)]


def identical(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def alike(a, b):
    """Whole numbers identical; others to a few last bits, where the larger program adds and multiplies in one step."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), a, b)


def counting(**options):
    """A method with state: a running mean of the reward, taken off; and its rewards ask for the old policy."""

    def advantage(batch, arrays, key):
        mean = jnp.nanmean(jnp.where(batch.group_ids[:, None] >= 0, batch.rewards, jnp.nan))
        values = jnp.nan_to_num(batch.rewards.sum(1) - arrays["mean"]) + jax.random.uniform(key, (len(batch),))
        kept = {"mean": 0.9 * arrays["mean"] + 0.1 * mean, "steps": arrays["steps"] + 1}
        return batch.replace(advantages=jnp.where(batch.completion_mask, values[:, None], 0)), kept

    def reward(batch, arrays, key):
        return batch.scores - 0.01 * jnp.where(batch.completion_mask, batch.old.logps, 0).sum(1, keepdims=True)

    arrays = {"mean": np.float32(0), "steps": np.int32(0)}
    return grpo(**options).replace(advantage=advantage, reward=reward, init=lambda pool: State(0, arrays, {}))


def following(**options):
    return grpo(kl=0.1, **options).replace(roles={"reference": Role(follow=(0.5, 2))})


def test_the_same_steps_as_the_loop(toy):
    """Completions, scores, advantages, reports, both policies, optimiser and place in the prompts; and with rows cut
    over devices to rounding."""
    functions = (ones, {"function": parts, "scale": 2.0, "weight": 0.1})
    mesh = make_mesh(data=2, fsdp=2, devices=jax.devices()[:4])
    run, loop, spread = (
        run_of(toy, following(prompts=3, group_size=4), functions, mesh=m, optimizer=optax.sgd(0.5, momentum=0.9))
        for m in (ONE, ONE, mesh)
    )
    a, b, c = logged(run, together(1, 4)), logged(loop, one_by_one(4)), logged(spread, together(4))
    alike(a[0], b[0])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), a[0], c[0])
    assert a[1] == b[1] == c[1] and run.whole
    batches = [batch for batch, _ in a[0][0]]
    assert any(np.isnan(b.scores).any() for b in batches) and any(len(np.unique(b.scores[:, 0])) > 2 for b in batches)
    assert len(batches) == 4 and {len(reports) for _, reports in a[0][0]} == {1} and "kl" in a[0][0][0][1][0]
    assert batches[0].channels == ("ones", "first/0", "first/1", "late") and "short" in batches[0].columns
    assert batches[3].scores[0, 3] == 3 + batches[3].prompt_ids[0]


def test_with_state_and_stopped(toy):
    """A method with state that reads the old policy. A stop is after the steps under way, and the program is the same
    for one step and for many, so stopping changes nothing."""
    loop, run = (run_of(toy, counting(prompts=3, group_size=4)) for _ in range(2))
    written: list[int] = []

    def stopping(run):
        fused = Fused(run)
        fused.steps = 2
        fused.advance(6, stopped=lambda: run.state.step > 2, written=lambda step, times: written.append(step))
        assert written == [0, 1, 2, 3] and run.state.step == 4 and run.whole
        fused.advance(6, stopped=lambda: False, written=lambda step, times: written.append(step))

        def fail(step, times):
            raise OSError("the disk is full")

        before = jax.device_get((run.policies, run.state)), run.pool.state()
        with pytest.raises(OSError, match="full"):
            fused.advance(7, stopped=lambda: False, written=fail)
        assert not run.whole, "the state is that of a step that was not written down"
        run.policies, run.state = before[0]
        run.pool.restore(before[1])

    whole, parted = logged(loop, one_by_one(6)), logged(run, stopping)
    alike(whole[0][1:], parted[0][1:])
    alike(whole[0][0], parted[0][0][:6])
    assert whole[1] == parted[1]


def test_rows_laid_out_in_jit_as_on_the_host():
    draw = np.random.default_rng(0)
    laid = jax.jit(laid_out, static_argnums=2)
    for _ in range(20):
        under, live = draw.integers(0, 7, 30).astype(np.int32), draw.random(30) < draw.choice([0.0, 0.5, 1.0])
        layout = Layout(contexts=3, rows=4, context_width=8, decisions=5)
        part = lay_out(under, np.flatnonzero(live), layout, capacity=8)
        order, count = laid(under, live, part.order.shape)
        np.testing.assert_array_equal(order, part.order)
        assert count == part.count


def test_why_not(toy):
    """Whatever needs the host is named, and looking has moved nothing."""

    @in_graph
    def flat(tokens):
        return jnp.zeros(len(tokens))

    def hosted(completions):
        return [0.0] * len(completions)

    def looks(state, draw, key):
        rows = yield [Request(p, count=4) for p in draw(state, 3)]
        return state.host, [rows.take(rows.lengths > 1)]

    def again(state, draw, key):
        rows = yield [Request(p, count=4) for p in draw(state, 3)]
        yield [Request(p, count=4) for p in draw(state, 3)]
        return state.host, [rows]

    def keeps(state, draw, key):
        rows = yield [Request(p, count=4) for p in draw(state, 3)]
        return {"kept": 1}, [rows]

    plain = grpo(prompts=3, group_size=4)
    grows = plain.replace(advantage=lambda b, a, k: (b.replace(advantages=0.0 * b.behavior_logps), {"more": b.scores}))
    for method, options, words in (
        (plain, {"functions": (ones, hosted)}, "'hosted' is computed on the host"),
        (plain, {"updates": 2}, "2 updates"),
        (plain.replace(roles={"other": Role(train=True)}), {}, "policy, other"),
        (plain.replace(plan=looks), {}, "looks at what was sampled"),
        (plain.replace(plan=again), {}, "several rounds"),
        (plain.replace(plan=keeps), {}, "keeps something"),
        (grows, {}, "changes its shapes"),
        (methods.resolve("spo", options={}, settings={"prompts": 3, "group_size": 1}), {}, "the method's plan"),
    ):
        run = run_of(toy, method, **{"functions": (flat,), **options})
        position = run.pool.state()
        assert words in obstacle(run), words
        assert run.pool.state() == position and run.state.step == 0
    assert obstacle(run_of(toy, plain, (flat,))) is None


def test_rewards_that_cannot_be_traced(toy):
    """Before anything is sampled, in the fused iteration; and the same words from the loop."""

    @in_graph
    def wrong_shape(tokens):
        return tokens.sum()

    @in_graph
    def branches(tokens, lengths):
        return jnp.ones(len(tokens)) if lengths[0] > 2 else jnp.zeros(len(tokens))

    @in_graph
    def reads(completions, lengths):
        return lengths * 1.0

    @in_graph
    def asks(tokens, wannted):
        return wannted

    for function, words in (
        (wrong_shape, r"returned the shape \[\] for 1[26] completions"),
        (branches, "no if, float"),
        (reads, "asks for the text 'completions'"),
    ):
        for go in (together(1), one_by_one(1)):
            with pytest.raises((ValueError, RewardError), match=words):
                go(run_of(toy, grpo(prompts=3, group_size=4), (function,)))
    with pytest.raises(ValueError, match="Did you mean 'wanted'"):
        run_of(toy, grpo(prompts=3, group_size=4), (asks,))


def test_an_infinite_reward_is_an_error(toy):
    batch = toy.batch(toy.rollout())
    check_scores(batch)
    with pytest.raises(RewardError, match="'exact' returned inf for 1 completions, first of prompt 100"):
        check_scores(batch.replace(scores=np.asarray(batch.scores.at[2, 0].set(jnp.inf))))


def test_a_run_fused_or_not_is_the_same_run(tmp_path, monkeypatch, capsys):
    """Through `Experiment`: records and parameters, and those of a run resumed in the middle to the bit."""
    monkeypatch.setattr(assemble, "make_mesh", lambda **sizes: ONE)
    monkeypatch.setattr("grpo_jax.experiment.report", lambda directory: ("", ""))
    rows = [{"prompt": f"{i}+{j}=", "wanted": 48 + i} for i in range(4) for j in range(4)]
    config = {
        "steps": 5,
        "model": {"path": "tiny", "dtype": "float32", "tiny": {"layers": 1, "hidden": 16, "heads": 2, "mlp": 16}},
        "data": {"source": "memory", "max_prompt": 6},
        "batch": {"prompts": 3, "group_size": 4, "tokens_per_device": 1024},
        "sampling": {"max_new": 3},
        "method": {"name": "grpo", "kl": 0.1},
        "optimizer": {"learning_rate": 1e-2},
        "checkpoint": {"every": 3},
        "metrics": {"tensorboard": False},
    }

    @in_graph
    def close(tokens, wanted):
        return -jnp.abs(tokens[:, 0] - wanted) / 100

    def train(name, fused, *stops):
        for stop in stops:
            changes = {"directory": str(tmp_path / name), "training": {"fused": fused}}
            experiment = Experiment({**config, **changes}, prompts=rows, reward_functions=[close])
            experiment.train(stop)
        lines = (experiment.directory / "metrics.jsonl").read_text().splitlines()
        left_out = ("kind", "seconds", "tokens_", "memory", "host_memory", "time", "compilations")
        records = [{k: v for k, v in json.loads(line).items() if not k.startswith(left_out)} for line in lines]
        return jax.device_get(experiment.run.policies), records

    fused, resumed, loop = train("fused", True, 5), train("resumed", True, 4, 5), train("loop", False, 5)
    said = capsys.readouterr().out
    assert "one program, fused" in said and "part by part: training.fused is false" in said
    assert len(fused[1]) == 5 and "kl" in fused[1][0]
    identical(fused[0], resumed[0])
    assert fused[1] == resumed[1]
    # The compiler may join a transformer's operations otherwise in the larger program, and round otherwise.
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), fused, loop)
