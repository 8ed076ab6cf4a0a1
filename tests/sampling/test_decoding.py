"""The sampling program against exact probabilities and against its own unbroken stream."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from grpo_jax.models import TransformerConfig, create, merge, softcap
from grpo_jax.sampling import Cells, draw

V = 11
STOP = 4
CONFIG = TransformerConfig(
    vocab_size=V,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    final_softcap=12.0,
    initializer_range=0.4,
)
GRAPHDEF, PARAMS = create(CONFIG, jax.random.key(3))
CONTEXT = [7, 1, 8, 2, 5]
C, G, T = 3, 24, 12
ALL = ("top_k", "top_p", "min_p", "min_new")


@jax.jit
def plain_forward(tokens):
    """Logits after every token of plain causal sequences [S, L]: no context is shared, nothing is cached."""
    model = merge(GRAPHDEF, PARAMS)
    none = jnp.zeros((len(tokens), 0), jnp.int32)
    hidden = model(none, jnp.zeros(len(tokens), jnp.int32), tokens[:, None])
    return softcap(hidden[:, 0] @ model.head(), CONFIG.final_softcap)


def next_logits(sequences):
    """Float64 logits of the token after each sequence."""
    tokens = np.zeros((16, 32), np.int32)
    for row, sequence in zip(tokens, sequences, strict=False):
        row[: len(sequence)] = sequence
    logits = np.asarray(plain_forward(tokens), np.float64)
    return np.stack([logits[i, len(s) - 1] for i, s in enumerate(sequences)])


def log_softmax(z):
    z = z - z.max()
    return z - np.log(np.exp(z).sum())


def truncated(logits, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, banned=()):
    """Float64 probabilities of the restricted distribution, token by token."""
    z = np.array(logits) / temperature
    z[list(banned)] = -np.inf
    order = sorted(range(len(z)), key=lambda v: -z[v])
    order = order[: top_k or None]
    p = np.exp(log_softmax(z))
    share = p[order].sum()
    kept, mass = [], 0.0
    for v in order:
        if mass < top_p or not kept:
            kept.append(v)
        mass += p[v] / share
    kept = [v for v in kept if p[v] >= min_p * p[kept[0]]]
    out = np.zeros(len(z))
    out[kept] = p[kept] / p[kept].sum()
    return out


def stop_table(*sequences):
    table = np.full((4, 3), -1, np.int32)
    for row, sequence in zip(table, sequences, strict=False):
        row[3 - len(sequence) :] = sequence
    return table


def cells(c, g, t, **changes):
    fill = lambda value, dtype: np.full((c, g), value, dtype)  # noqa: E731
    base = Cells(
        contexts=np.tile(np.array([CONTEXT], np.int32), (c, 1)),
        context_lengths=np.full(c, len(CONTEXT), np.int32),
        given=np.zeros((c, g, t), np.int32),
        given_lengths=fill(0, np.int32),
        budget=fill(t, np.int32),
        minimum=fill(0, np.int32),
        temperature=fill(1, np.float32),
        top_k=fill(0, np.int32),
        top_p=fill(1, np.float32),
        min_p=fill(0, np.float32),
        prompt_ids=np.arange(c, dtype=np.int32)[:, None] + fill(0, np.int32),
        index=np.arange(g, dtype=np.int32)[None] + fill(0, np.int32),
        stops=stop_table((STOP,)),
        stops_apply=np.ones((c, g, 4), bool) & (np.arange(4) == 0),
    )
    return base._replace(**changes)


def run(asked, seed=0, *, restricts=(), has_given=False):
    drawn = draw(GRAPHDEF, PARAMS, asked, jax.random.key(seed), restricts=restricts, has_given=has_given)
    return jax.tree.map(np.asarray, drawn)


# ---- what is drawn -------------------------------------------------------------------------------------------------

CASES = {
    "plain": {},
    "cool": {"temperature": 0.7},
    "hot": {"temperature": 1.6},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.8, "temperature": 1.3},
    "min_p": {"min_p": 0.12},
    "min_new": {"min_new": 1},
    "all": {"top_k": 6, "top_p": 0.9, "min_p": 0.05, "temperature": 1.4, "min_new": 2},
}
DRAWS = 3000


@pytest.fixture(scope="module")
def oracle():
    """Logits of the first token, and of the second after every first one."""
    return next_logits([CONTEXT])[0], next_logits([[*CONTEXT, v] for v in range(V)])


@pytest.fixture(scope="module")
def drawn():
    """Two tokens, DRAWS times, under every case side by side; the first three also by the unrestricted program."""
    column = lambda name, default, dtype: np.repeat(  # noqa: E731
        np.array([case.get(name, default) for case in CASES.values()], dtype)[:, None], DRAWS, axis=1
    )
    asked = cells(
        len(CASES),
        DRAWS,
        2,
        temperature=column("temperature", 1, np.float32),
        top_k=column("top_k", 0, np.int32),
        top_p=column("top_p", 1, np.float32),
        min_p=column("min_p", 0, np.float32),
        minimum=column("min_new", 0, np.int32),
    )
    off = {"top_k": 0, "top_p": 1, "min_p": 0, "minimum": 0}
    free = asked._replace(**{name: np.full_like(getattr(asked, name), value) for name, value in off.items()})
    return run(asked, restricts=ALL), run(free)


def exact(case, oracle, t, first=None):
    case = dict(case)
    banned = (STOP,) if case.pop("min_new", 0) > t else ()
    return truncated(oracle[0] if t == 0 else oracle[1][first], banned=banned, **case)


def check_frequencies(tokens, lengths, case, oracle):
    expected = {}
    for a, p in enumerate(exact(case, oracle, 0)):
        if a == STOP and not case.get("min_new"):
            expected[a,] = p
        elif p > 0:
            expected |= {(a, b): p * q for b, q in enumerate(exact(case, oracle, 1, a))}
    observed = dict.fromkeys(expected, 0)
    for row, n in zip(tokens, lengths):
        observed[tuple(int(x) for x in row[:n])] += 1  # a KeyError here: a row of probability 0
    assert all(observed[k] == 0 for k, p in expected.items() if p == 0)
    common = [k for k in expected if expected[k] * DRAWS >= 5]
    want = [expected[k] * DRAWS for k in common]
    seen = [observed[k] for k in common]
    want, seen = [*want, DRAWS - sum(want)], [*seen, DRAWS - sum(seen)]
    if want[-1] < 1e-6:
        want, seen = want[:-1], seen[:-1]
    assert len(want) > 6
    assert stats.chisquare(seen, np.array(want) * (sum(seen) / sum(want))).pvalue > 1e-4


@pytest.mark.parametrize("name", CASES)
def test_frequencies_are_the_exact_probabilities(name, drawn, oracle):
    row = list(CASES).index(name)
    check_frequencies(drawn[0].tokens[row], drawn[0].lengths[row], CASES[name], oracle)


@pytest.mark.parametrize("name", ["plain", "cool", "hot"])
def test_frequencies_without_restrictions(name, drawn, oracle):
    row = list(CASES).index(name)
    check_frequencies(drawn[1].tokens[row], drawn[1].lengths[row], CASES[name], oracle)


def test_an_unrestricted_row_does_not_notice_the_restrictions_of_others(drawn):
    for restricted, free in zip(drawn[0], drawn[1]):  # two programs: their log-probs are rounded in other places
        np.testing.assert_allclose(restricted[:3], free[:3], rtol=0, atol=1e-6 if free.dtype == np.float32 else 0)


@pytest.mark.parametrize("name", CASES)
def test_logps_are_those_of_what_was_drawn_from_and_of_the_policy(name, drawn, oracle):
    case, row = CASES[name], list(CASES).index(name)
    tokens, lengths = drawn[0].tokens[row], drawn[0].lengths[row]
    temperature = case.get("temperature", 1.0)
    for t in range(2):
        there = lengths > t
        firsts = tokens[there, 0] if t else np.zeros(there.sum(), int)
        with np.errstate(divide="ignore"):
            behavior = np.log(np.stack([exact(case, oracle, t, a) for a in range(V)]))
        logits = np.broadcast_to(oracle[t], (V, V)) / temperature
        policy = np.stack([log_softmax(z) for z in logits])
        at = (firsts, tokens[there, t])
        np.testing.assert_allclose(drawn[0].behavior_logps[row, there, t], behavior[at], atol=2e-5)
        np.testing.assert_allclose(drawn[0].sampler_logps[row, there, t], policy[at], atol=2e-5)
        assert (drawn[0].sampler_logps[row, ~there, t] == 0).all()
    if name not in ("plain", "cool", "hot"):
        assert (drawn[0].behavior_logps[row] > drawn[0].sampler_logps[row] + 1e-3).any()


def test_rows_are_independent(drawn):
    """First tokens of rows that differ in the index only, and of neighbouring prompts, are uncorrelated."""
    first = drawn[0].tokens[:3, :, 0]
    for a, b in [(first[0, :-1], first[0, 1:]), (first[0], first[1]), (first[0, 1:], first[1, :-1])]:
        table = np.zeros((V, V))
        np.add.at(table, (a, b), 1)
        table = table[table.sum(1) > 80][:, table.sum(0) > 80]
        assert stats.chi2_contingency(table).pvalue > 1e-4
    assert (first[0] != first[1]).any()


def test_another_key_draws_others():
    asked = cells(C, G, T)
    one, other, again = (run(asked, seed).tokens for seed in (1, 2, 1))
    assert (one != other).any()
    np.testing.assert_array_equal(one, again)


def test_greedy_is_the_argmax_of_full_forwards():
    asked = cells(C, G, T, temperature=np.zeros((C, G), np.float32), stops_apply=np.zeros((C, G, 4), bool))
    asked.temperature[0, 1] = 1.0  # greedy and drawn rows share a launch
    got = run(asked)
    want = list(CONTEXT)
    logps = []
    for _ in range(T):
        logits = next_logits([want])[0]
        want.append(int(logits.argmax()))
        logps.append(log_softmax(logits).max())
    greedy = asked.temperature == 0
    np.testing.assert_array_equal(got.tokens[greedy], np.tile(want[5:], (C * G - 1, 1)))
    assert (got.tokens[0, 1] != want[5:]).any()
    assert (got.behavior_logps[greedy] == 0).all()
    np.testing.assert_allclose(got.sampler_logps[greedy], np.tile(logps, (C * G - 1, 1)), atol=2e-5)


# ---- where it ends -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stream():
    """What the cells draw when nothing stops them."""
    drawn = run(cells(C, G, T, stops=stop_table(), stops_apply=np.zeros((C, G, 4), bool)))
    assert (drawn.lengths == T).all() and not drawn.finished.any()
    return drawn


def cut(tokens, stops, budget, minimum=0):
    """(length, finished) of a stream that stops behind the first sequence it contains."""
    for n in range(1, budget + 1):
        if n > minimum and any(n >= len(s) and tuple(tokens[n - len(s) : n]) == tuple(s) for s in stops):
            return n, True
    return budget, False


def test_stops_cut_the_stream_behind_them(stream):
    sequences = [(STOP,), (2,), (6, 9), (1, 0, 1)]
    common = tuple(int(x) for x in stream.tokens[0, 0, 2:5])
    sequences[3] = common  # at least one row meets the long one
    rng = np.random.default_rng(0)
    apply = rng.random((C, G, 4)) < 0.5
    apply[0, 0] = [False, False, False, True]
    budget = rng.integers(1, T + 1, (C, G)).astype(np.int32)
    budget[0, 0] = T
    got = run(cells(C, G, T, stops=stop_table(*sequences), stops_apply=apply, budget=budget))
    ends = set()
    for c in range(C):
        for g in range(G):
            mine = [s for s, a in zip(sequences, apply[c, g]) if a]
            n, finished = cut(stream.tokens[c, g], mine, budget[c, g])
            assert (got.lengths[c, g], got.finished[c, g]) == (n, finished)
            np.testing.assert_array_equal(got.tokens[c, g, :n], stream.tokens[c, g, :n])
            np.testing.assert_array_equal(got.behavior_logps[c, g, :n], stream.behavior_logps[c, g, :n])
            assert (got.behavior_logps[c, g, n:] == 0).all() and (got.sampler_logps[c, g, n:] == 0).all()
            if finished:
                ends |= {s for s in mine if tuple(got.tokens[c, g, n - len(s) : n]) == s}
    assert len(ends) >= 3  # single tokens and sequences both ended rows
    assert got.finished[0, 0] and got.lengths[0, 0] <= 5


def test_no_stop_of_any_kind_before_the_minimum(stream):
    pairs = [tuple(int(x) for x in stream.tokens[0, g, 1:3]) for g in range(3)]
    minimum = np.zeros((C, G), np.int32)
    minimum[0] = 5
    only_pairs = np.broadcast_to(np.array([True, True, True, False]), (C, G, 4))
    asked = cells(C, G, T, stops=stop_table(*pairs, (STOP,)), stops_apply=only_pairs, minimum=minimum)
    got = run(asked, restricts=ALL, has_given=True)
    for c in range(C):
        for g in range(G):
            n, finished = cut(stream.tokens[c, g], pairs, T, minimum[c, g])
            assert (got.lengths[c, g], got.finished[c, g]) == (n, finished)
            np.testing.assert_array_equal(got.tokens[c, g, :n], stream.tokens[c, g, :n])
    got = run(asked._replace(stops_apply=np.ones((C, G, 4), bool)), restricts=ALL, has_given=True)
    assert (got.lengths[0] > 5).all()
    assert (got.tokens[0, :, :5] != STOP).all()
    assert (got.tokens[1:] == STOP).any()


def test_padding_cells_stay_empty_and_disturb_nobody(stream):
    budget = np.full((C, G), T, np.int32)
    budget[1] = budget[:, 5] = 0
    got = run(cells(C, G, T, stops=stop_table(), stops_apply=np.zeros((C, G, 4), bool), budget=budget))
    np.testing.assert_array_equal(got.lengths, budget)
    there = budget > 0
    np.testing.assert_array_equal(got.tokens[there], stream.tokens[there])
    assert (got.tokens[~there] == 0).all() and not got.finished.any()


# ---- decisions that are there already ------------------------------------------------------------------------------


@pytest.mark.parametrize("shortest", [0, 3])
def test_ragged_prefixes_go_on_as_the_unbroken_stream(stream, shortest):
    rng = np.random.default_rng(1)
    lengths = rng.integers(shortest, T + 1, (C, G)).astype(np.int32)
    lengths[0, :3] = [shortest, shortest + 1, T]
    given = np.where(np.arange(T) < lengths[..., None], stream.tokens, 10).astype(np.int32)  # 10 is never looked at
    got = run(
        cells(C, G, T, given=given, given_lengths=lengths, stops=stop_table(), stops_apply=np.zeros((C, G, 4), bool)),
        restricts=ALL,
        has_given=True,
    )
    np.testing.assert_array_equal(got.tokens, stream.tokens)
    np.testing.assert_array_equal(got.lengths, T)
    np.testing.assert_allclose(got.sampler_logps, stream.sampler_logps, atol=2e-5)
    was_given = np.arange(T) < lengths[..., None]
    assert (got.behavior_logps[was_given] == 0).all()
    np.testing.assert_allclose(got.behavior_logps[~was_given], stream.behavior_logps[~was_given], atol=2e-5)


def test_a_stop_inside_a_prefix_does_not_end_and_at_its_end_only_without_budget():
    given = np.tile(np.array([3, STOP, 1, STOP] + [0] * 8, np.int32), (C, G, 1))
    lengths = np.full((C, G), 3, np.int32)
    lengths[:, 1::2] = 4
    budget = np.full((C, G), T, np.int32)
    budget[0] = lengths[0]  # only scored
    apply = np.broadcast_to(np.array([True, True, False, False]), (C, G, 4))
    asked = cells(C, G, T, given=given, given_lengths=lengths, budget=budget, stops=stop_table((STOP,), (2, 2, 2)))
    got = run(asked._replace(stops_apply=apply), restricts=ALL, has_given=True)
    np.testing.assert_array_equal(got.lengths[0], lengths[0])
    np.testing.assert_array_equal(got.finished[0], lengths[0] == 4)
    assert (got.lengths[1:] > lengths[1:]).all()
    for c in (1, 2):
        for g in range(G):
            n = got.lengths[c, g]
            new = got.tokens[c, g, lengths[c, g] : n]
            assert got.finished[c, g] == (new[-1] == STOP or tuple(new[-3:]) == (2, 2, 2)) and STOP not in new[:-1]


def test_minimum_counts_from_the_context_so_a_prefix_is_part_of_it():
    given = np.full((C, G, T), 3, np.int32)
    lengths = np.full((C, G), 4, np.int32)
    minimum = lengths + np.where(np.arange(G) % 2, 3, 0).astype(np.int32)
    asked = cells(C, G, T, given=given, given_lengths=lengths, minimum=minimum, stops=stop_table((STOP,), (2,)))
    apply = np.broadcast_to(np.array([True, True, False, False]), (C, G, 4))
    got = run(asked._replace(stops_apply=apply), restricts=ALL, has_given=True)
    assert (got.lengths > minimum).all()
    assert (got.lengths[:, ::2] <= 7).any()


# ---- what it costs -------------------------------------------------------------------------------------------------


def sizes(text):
    shapes = re.findall(r"\b(?:f32|bf16|s32|pred|u32)\[([\d,]+)\]", text)
    return {math.prod(map(int, shape.split(","))) for shape in shapes}


def test_keys_and_values_of_a_context_are_stored_once():
    """No array of the compiled program has contexts x rows x context tokens x head size elements, or a multiple."""
    c, g, p, head = 3, 5, 17, 14
    config = TransformerConfig(
        vocab_size=V, hidden_size=16, intermediate_size=32, num_layers=3, num_heads=2, num_kv_heads=2, head_dim=head
    )
    graphdef, params = create(config, jax.random.key(0))
    asked = cells(c, g, 11)._replace(contexts=np.zeros((c, p), np.int32))
    lowered = draw.lower(graphdef, params, asked, jax.random.key(0), restricts=(), has_given=True)
    found = sizes(lowered.compile().as_text())
    assert 3 * c * p * 2 * head in found  # keys of all layers: [L, C, P, Hkv, D]
    assert not [size for size in found if size % (c * g * p * 7) == 0]
