"""Requests in, rollouts out: who a completion depends on, what its log-probs are, and what is compiled."""

from collections import Counter
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.models import TransformerConfig, create, evaluate, logical_axes, shardings
from grpo_jax.sampling import LanguageModel, cast
from grpo_jax.sampling.weights import arrange
from grpo_jax.training.instruments import CompileCounter
from grpo_jax.training.mesh import make_mesh
from grpo_jax.types import Contexts, Prompt, Request, concat, regroup

CONFIG = TransformerConfig(
    vocab_size=13,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    sliding_window=6,
    sliding_layers=(True, False),
    initializer_range=0.4,
)
GRAPHDEF, PARAMS = create(CONFIG, jax.random.key(1))
KEY = jax.random.key(5)
T = 10


class Letters:
    """a to k are 0 to 10; 11 and 12 end a completion."""

    stop_ids = (11, 12)

    def encode(self, text):
        return np.array([ord(c) - ord("a") for c in text], np.int32)

    encode_prompt = encode

    def decode(self, ids):
        return "".join(chr(97 + int(i)) for i in ids if i < 11)


PROMPTS = [Prompt(40, "abcab"), Prompt(41, "k"), Prompt(52, "gfedcba"), Prompt(3, "hhi"), Prompt(17, "jc")]


def language(**changes):
    fields = dict(tokenizer=Letters(), max_prompt=8, max_new=T, tokens=10_000, temperature=0.9)
    mesh = changes.pop("mesh", None) or make_mesh(devices=jax.devices()[:1])
    return LanguageModel(graphdefs={"policy": GRAPHDEF}, mesh=mesh, **{**fields, **changes})


def sample(requests, numbers=None, *, key=KEY, params=PARAMS, **changes):
    return language(**changes).sample({"policy": params}, requests, key, numbers)


def asked(count=4, **options):
    return [Request(p, count=count, **options) for p in PROMPTS]


@pytest.fixture(scope="module")
def reference():
    """Four completions of each prompt, all in one launch."""
    return sample(asked())


@jax.jit
def trainer_logps(tokens, lengths, completions, temperature):
    rows = SimpleNamespace(
        contexts=Contexts(tokens=tokens, lengths=lengths), completions=completions, temperature=temperature
    )
    return evaluate(GRAPHDEF, PARAMS, rows).logps


def evaluated(rows, under):
    """The trainer's log-probs, every row under a context of its own, padded to one shape."""
    n, t, p = *rows.completions.shape, rows.contexts.tokens.shape[1]
    contexts = np.zeros((32, 20), np.int32)
    contexts[:n, :p] = rows.contexts.tokens[under]
    completions = np.full((32, 24), 9, np.int32)
    completions[:n, :t] = rows.completions
    filled = lambda values: np.pad(values, (0, 32 - n), constant_values=1)  # noqa: E731
    logps = trainer_logps(contexts, filled(rows.contexts.lengths[under]), completions, filled(rows.temperature))
    return np.asarray(logps)[:n, :t]


def by_row(rows):
    return {
        (int(p), int(i)): (tuple(tokens[:n].tolist()), bool(finished), logps[:n])
        for p, i, tokens, n, finished, logps in zip(
            rows.prompt_ids, rows.index, rows.completions, rows.lengths, rows.finished, rows.behavior_logps
        )
    }


def assert_same_rows(got, want, *, subset=False):
    got, want = by_row(got), by_row(want)
    if subset:
        want = {k: want[k] for k in got}
    assert got.keys() == want.keys()
    for k in got:
        assert got[k][:2] == want[k][:2], k
        np.testing.assert_allclose(got[k][2], want[k][2], atol=1e-4)


# ---- what comes back -----------------------------------------------------------------------------------------------


def test_rows_are_in_the_order_of_the_requests_and_well_formed(reference):
    rows = reference
    np.testing.assert_array_equal(rows.prompt_ids, np.repeat([p.id for p in PROMPTS], 4))
    np.testing.assert_array_equal(rows.index, np.tile(np.arange(4), 5))
    np.testing.assert_array_equal(rows.group_ids, np.repeat(np.arange(5), 4))
    assert rows.completions.shape == (20, T)
    ends = np.isin(rows.completions, (11, 12)) & rows.exists
    np.testing.assert_array_equal(rows.finished, ends.any(axis=1))
    assert 3 < rows.finished.sum() < 20  # both ends occur
    np.testing.assert_array_equal(rows.lengths, np.where(rows.finished, ends.argmax(axis=1) + 1, T))
    np.testing.assert_array_equal(rows.completion_mask, rows.exists)
    np.testing.assert_array_equal(np.isnan(rows.behavior_logps), ~rows.exists)
    np.testing.assert_allclose(rows.behavior_logps[rows.exists], rows.sampler_logps[rows.exists], atol=1e-6)
    assert not rows.injected.any()
    assert len({k[0] for k in by_row(rows).values()}) > 15  # a group is not one completion G times


def test_text_is_without_stops(reference):
    texts = language().text(reference)
    for text, ids, n, finished in zip(texts, reference.completions, reference.lengths, reference.finished):
        assert len(text) == n - finished and text == Letters().decode(ids[:n])


def test_sampler_and_trainer_agree():
    gfe = Letters().encode("gfe")
    logps = np.array([np.nan, -1.0, np.nan])
    rows = sample(
        [
            Request(PROMPTS[0], count=6),
            Request(PROMPTS[1], count=3, temperature=0.0),
            Request(PROMPTS[2], count=3, temperature=1.7, stop=("ab", "cde")),
            Request(PROMPTS[2], count=2, context="abcabcabcabcabcabc", train_context="gfedcba"),
            Request(PROMPTS[3], count=4, options={"top_k": 4, "top_p": 0.8, "min_p": 0.05, "min_new": 3}),
            Request(PROMPTS[3], count=4, prefix=(gfe, logps), max_new=5, temperature=0.6),
            Request(PROMPTS[4], prefix="abcdefghijk" * 2, max_new=2),
            Request(PROMPTS[4], prefix="fghijkabcd", max_new=0),
            Request(PROMPTS[4], prefix=(gfe, logps), max_new=0, temperature=2.0),
        ]
    )
    assert rows.completions.shape == (25, 24)  # a prefix longer than the budget gets room
    assert 23 <= rows.lengths[22] <= 24 and language().text(rows)[22].startswith("abcdefghijk" * 2)
    assert (rows.lengths[14:18] > 3).all() and not np.isin(rows.completions[14:18, :3], (11, 12)).any()  # min_new
    assert (rows.lengths[18:22] <= 3 + 5).all()  # max_new
    want = evaluated(rows, rows.sampled_under)
    gap = np.abs(rows.sampler_logps - want)[rows.exists]
    assert gap.max() <= 1e-4
    # the test would notice another temperature, and another context
    assert np.abs(evaluated(rows.replace(temperature=np.ones(25)), rows.sampled_under) - want)[rows.exists].max() > 0.1
    hinted = np.flatnonzero(rows.sampled_under != rows.trained_under)
    np.testing.assert_array_equal(hinted, [12, 13])
    assert np.abs(evaluated(rows, rows.trained_under) - want)[hinted, 0].min() > 1e-3
    np.testing.assert_allclose(
        rows.temperature, np.repeat(np.float32([0.9, 1, 1.7, 0.9, 0.6, 0.9, 1, 2]), [6, 3, 3, 6, 4, 1, 1, 1])
    )
    plain = np.r_[0:6, 9:14]
    np.testing.assert_allclose(
        rows.behavior_logps[plain], np.where(rows.exists, rows.sampler_logps, np.nan)[plain], atol=1e-5
    )
    assert (rows.behavior_logps[6:9][rows.exists[6:9]] == 0).all()  # greedy: certain
    restricted = rows.exists[14:18] & (rows.completions[14:18] >= 0)
    assert (rows.behavior_logps[14:18] >= rows.sampler_logps[14:18])[restricted].all()
    assert (rows.behavior_logps[14:18] > rows.sampler_logps[14:18] + 1e-3)[restricted].any()


def test_greedy_rows_of_a_prompt_agree_with_full_forwards():
    rows = sample(asked(temperature=0.0))
    for group in rows.groups():
        assert (group.completions == group.completions[0]).all()
    one = rows.take(range(0, 20, 4))
    for row in one.rows():
        for v in range(12):  # no token is likelier than the one that was taken, given those before it
            other = row.replace(completions=np.full_like(row.completions, v))
            for t in range(row.lengths[0]):
                other.completions[0, :t] = row.completions[0, :t]
                other.completions[0, t:] = v
                if t in (0, 3):
                    assert evaluated(other, other.sampled_under)[0, t] <= row.sampler_logps[0, t] + 1e-5


# ---- what a completion depends on ----------------------------------------------------------------------------------


def test_alone_or_among_others_in_any_order(reference):
    for prompt in PROMPTS[:2]:
        alone = sample([Request(prompt, count=4)], tokens=8 + 3 * T)  # three at a time, then one
        assert_same_rows(alone, reference, subset=True)
    others = [Request(Prompt(900 + i, "abcdefgh"[i:]), count=1 + i) for i in range(4)]
    rows = sample([others[0], *asked(count=7)[::-1], *others[1:]])
    keep = np.isin(rows.prompt_ids, [p.id for p in PROMPTS]) & (rows.index < 4)
    assert_same_rows(rows.take(keep), reference)


def test_rows_come_back_in_the_order_they_were_asked_for(reference):
    rows = sample([Request(p) for _ in range(4) for p in PROMPTS])
    np.testing.assert_array_equal(rows.prompt_ids, np.tile([p.id for p in PROMPTS], 4))
    assert_same_rows(rows, reference)
    np.testing.assert_allclose(rows.sampler_logps, evaluated(rows, rows.sampled_under) * rows.exists, atol=1e-4)


def test_several_launches_do_not_matter(reference):
    with CompileCounter() as compiled:
        assert_same_rows(sample(asked(), tokens=8 + 3 * T), reference)
    assert compiled.total.count <= 1, compiled.total.names  # seven launches


def test_with_cells_any_number_of_rows_streams_through_one_program(reference):
    assert_same_rows(sample(asked(), cells=(5, 4)), reference)
    with CompileCounter() as compiled:
        few = sample(asked(count=3)[:2], cells=(5, 4))
        many = sample(asked(count=11), cells=(5, 4))
    assert compiled.total.count == 0, compiled.total.names
    assert_same_rows(few, reference, subset=True)
    assert_same_rows(many.take(many.index < 4), reference)


@pytest.mark.parametrize(
    "sizes, weights",
    [(dict(data=8), "divided"), (dict(data=2, fsdp=2, tensor=2), "divided"), (dict(fsdp=2, sequence=4), "gathered")],
    ids=["data", "all", "gathered"],
)
def test_neither_padding_nor_the_mesh_matters(reference, sizes, weights):
    mesh = make_mesh(**sizes)
    params = jax.device_put(PARAMS, shardings(logical_axes(CONFIG), mesh))
    wider = dict(max_prompt=40, max_new=3 * T) if sizes.get("data") == 8 else {}
    wider["arrangement"] = arrange(CONFIG, mesh, jnp.float32, wanted=weights)
    assert_same_rows(sample(asked(max_new=T), params=params, mesh=mesh, **wider), reference)


def test_another_key_role_or_index_draws_others(reference):
    def share(rows):
        drawn = by_row(rows)
        return np.mean([drawn[k][0] == v[0] for k, v in by_row(reference).items() if len(v[0]) > 4])

    assert share(sample(asked())) == 1
    assert share(sample(asked(), key=jax.random.key(6))) < 0.1
    assert share(sample(asked(role="judge"))) < 0.1
    later = sample(asked(), Counter({("policy", p.id): 4 for p in PROMPTS}))
    np.testing.assert_array_equal(later.index, reference.index + 4)
    assert share(later.replace(index=later.index - 4)) < 0.1


def test_index_runs_on_within_a_step(reference):
    numbers = Counter()
    rounds = [sample([Request(p) for p in PROMPTS], numbers) for _ in range(4)]
    rows = concat(*rounds)
    assert_same_rows(rows, reference)
    assert len({*rows.group_ids.tolist()}) == 20
    joined = regroup(rows, by="prompt_ids")
    assert [g.index.tolist() for g in joined.groups()] == [[0, 1, 2, 3]] * 5
    assert len(rows.contexts.lengths) == 5


# ---- stops and lengths ---------------------------------------------------------------------------------------------


def test_stop_texts_end_only_the_rows_that_ask_for_them(reference):
    row = int(np.argmax(reference.lengths))
    end = Letters().decode(reference.completions[row, 1:3])
    group = row // 4
    requests = [Request(p, count=4, stop=(end, "kkk") if i == group else ()) for i, p in enumerate(PROMPTS)]
    got, want = by_row(sample(requests)), by_row(reference)
    cut = 0
    for (prompt, index), (tokens, finished, _) in want.items():
        text = Letters().decode(tokens)
        if prompt == PROMPTS[group].id and end in text:
            n = text.index(end) + len(end)
            tokens, finished = tokens[:n], True
            cut += 1
        assert got[prompt, index][:2] == (tokens, finished)
    assert cut >= 1
    configured = by_row(sample(asked(), stop=(end, "kkk")))
    assert all(end not in Letters().decode(tokens)[: -len(end)] for tokens, *_ in configured.values())


# ---- prefixes ------------------------------------------------------------------------------------------------------


def test_a_cut_row_resumed_at_its_index_is_the_row(reference):
    rng = np.random.default_rng(0)
    cuts = [int(rng.integers(0, n + 1)) for n in reference.lengths]
    resumed = sample(
        [
            Request(
                PROMPTS[i // 4],
                prefix=(reference.completions[i, :cut], reference.behavior_logps[i, :cut]) if cut else None,
                max_new=0 if reference.finished[i] and cut == reference.lengths[i] else T - cut,
            )
            for i, cut in enumerate(cuts)
        ]
    )
    assert max(cuts) > 4
    assert_same_rows(resumed, reference)
    np.testing.assert_array_equal(resumed.completion_mask, reference.completion_mask)
    np.testing.assert_allclose(resumed.sampler_logps, reference.sampler_logps, atol=1e-4)
    np.testing.assert_array_equal(resumed.temperature, reference.temperature)


def test_branches_from_one_prefix_differ_and_are_masked_where_it_was_given():
    ids = Letters().encode("bcd")
    rows = sample([Request(p, count=4, prefix=(ids, np.array([np.nan, -0.7, np.nan])), max_new=6) for p in PROMPTS])
    np.testing.assert_array_equal(rows.completions[:, :3], np.tile(ids, (20, 1)))
    np.testing.assert_array_equal(rows.completion_mask[:, :3], np.tile([False, True, False], (20, 1)))
    np.testing.assert_array_equal(rows.completion_mask[:, 3:], rows.exists[:, 3:])
    np.testing.assert_allclose(rows.behavior_logps[:, 1], -0.7)
    assert np.isnan(rows.behavior_logps[:, [0, 2]]).all()
    assert not np.isnan(rows.behavior_logps[rows.completion_mask]).any()
    assert all(len(set(map(tuple, g.completions.tolist()))) > 1 for g in rows.groups())
    assert not rows.injected.any()


def test_texts_are_scored_or_only_injected(reference):
    given = dict(count=4, max_new=0, train_given=True)
    requests = [Request(p, prefix="abcd"[: 1 + i % 4], **given) for i, p in enumerate(PROMPTS)]
    rows = sample(requests)
    np.testing.assert_array_equal(rows.lengths, np.repeat([2, 3, 4, 5, 2], 4))
    assert rows.finished.all() and rows.injected.all() and np.isnan(rows.behavior_logps).all()
    np.testing.assert_array_equal(rows.completion_mask, rows.exists)
    np.testing.assert_array_equal(rows.temperature, 1)
    gap = np.abs(rows.sampler_logps - evaluated(rows, rows.sampled_under))[rows.exists]
    assert gap.max() <= 1e-4
    with CompileCounter() as compiled:
        injected = sample(
            [Request(r.prompt, 4, prefix=r.prefix, max_new=0, options={"score": False}) for r in requests]
        )
    assert compiled.total.count == 0  # no program runs
    for name in ("completions", "lengths", "finished", "prompt_ids", "index", "temperature"):
        np.testing.assert_array_equal(getattr(injected, name), getattr(rows, name))
    assert np.isnan(injected.sampler_logps).all() and not injected.completion_mask.any()


# ---- contexts, roles, dtypes ---------------------------------------------------------------------------------------


def test_hinted_rows_are_those_drawn_under_the_hint(reference):
    renamed = [p._replace(text="ddd") for p in PROMPTS]
    rows = sample([Request(p, count=4, context=q.text, train_context=p.text) for p, q in zip(renamed, PROMPTS)])
    assert_same_rows(rows, reference)
    assert len(rows.contexts.lengths) == 6 and len(set(rows.trained_under.tolist())) == 1
    text = Letters().decode(rows.contexts.tokens[rows.trained_under[0]][:3])
    assert text == "ddd" and (rows.sampled_under != rows.trained_under).all()


def test_columns_are_carried():
    rows = sample([Request(p._replace(columns={"answer": p.id / 2, "name": "x"}), count=4) for p in PROMPTS])
    assert set(rows.columns) == {"answer"}
    np.testing.assert_array_equal(rows.columns["answer"], rows.prompt_ids / 2)


def test_a_role_has_its_own_parameters_or_the_policys():
    other = jax.tree.map(lambda x: 0.7 * x, PARAMS)
    model = language()
    requests = asked(role="judge")
    shared = model.sample({"policy": PARAMS}, requests, KEY)
    own = model.sample({"policy": PARAMS, "judge": other}, requests, KEY)
    same = model.sample({"policy": other, "judge": PARAMS}, requests, KEY)
    assert shared.role == own.role == "judge"
    assert (own.completions != shared.completions).any()
    np.testing.assert_array_equal(same.completions, shared.completions)


def test_in_bfloat16_the_log_probs_are_still_float32():
    low = cast(PARAMS, jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(low)} == {jnp.dtype(jnp.bfloat16)} and cast(PARAMS, None) is PARAMS
    rows = sample(asked(), compute_dtype=jnp.bfloat16)
    assert rows.behavior_logps.dtype == rows.sampler_logps.dtype == np.float32
    gap = np.abs(rows.sampler_logps - evaluated(rows, rows.sampled_under))[rows.exists]
    assert 1e-4 < gap.max() < 0.5


# ---- compilation and errors ----------------------------------------------------------------------------------------


def test_what_was_traced_ahead_is_not_traced_again():
    """And nothing is compiled before rows are drawn."""
    language_model, params = language(max_new=T + 1, cells=(5, 4)), {"policy": PARAMS}
    traced: list[str] = []
    hear = lambda event, seconds, **more: traced.append(more["fun_name"]) if "trace_dur" in event else None  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(hear)
    try:
        with CompileCounter() as compiled:
            language_model.traced_for(params, [Request(PROMPTS[0], count=4)] * 5, KEY)
        assert traced.count("draw") == 1 and "jit(draw)" not in compiled.total.names
        language_model.sample(params, asked(), jax.random.key(9))
        assert traced.count("draw") == 1
    finally:
        jax.monitoring.unregister_event_duration_listener(hear)


def test_other_prompts_of_the_same_sizes_compile_nothing(reference):
    rng = np.random.default_rng(2)
    with CompileCounter() as compiled:
        for step in range(3):
            texts = ["".join(chr(97 + i) for i in rng.integers(0, 11, rng.integers(1, 9))) for _ in PROMPTS]
            requests = [Request(Prompt(100 * step + i, text), count=4) for i, text in enumerate(texts)]
            requests[0] = Request(requests[0].prompt, count=4, max_new=6, temperature=0.5)
            sample(requests, key=jax.random.key(step))
    assert compiled.total.count == 0, compiled.total.names
    with CompileCounter() as compiled:
        jax.jit(lambda x: x * 3)(np.arange(7))
    assert compiled.total.count == 1  # the counter counts


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"serves one role, got requests of \['judge', 'policy'\]"):
        sample([Request(PROMPTS[0]), Request(PROMPTS[1], role="judge")])
    with pytest.raises(ValueError, match="got requests of no role at all"):
        sample([])
    with pytest.raises(ValueError, match=r"options .* got \['topk'\]"):
        sample([Request(PROMPTS[0], options={"topk": 1})])
    with pytest.raises(ValueError, match="a context has no tokens"):
        sample([Request(Prompt(0, ""))])
    with pytest.raises(ValueError, match="asks for nothing"):
        sample([Request(PROMPTS[0], max_new=0)])


def test_the_domain_is_two_functions_and_a_text(reference):
    model = language()
    domain = model.domain()
    rows = domain.sample({"policy": PARAMS}, asked(), KEY)
    assert_same_rows(rows, reference)
    assert domain.text(rows) == model.text(reference)
    decisions = jax.jit(lambda rows: domain.evaluate(PARAMS, rows, "policy", ("entropy",)))(rows)
    gap = np.abs(decisions.logps - rows.sampler_logps)[np.asarray(rows.exists)]
    assert gap.max() <= 1e-4 and decisions.stats["entropy"].shape == (20, T)
    assert model.prompt_length(PROMPTS[2]) == 7
