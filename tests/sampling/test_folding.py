"""Rows may have more columns than there is room for at first: where those lie, who sees them, and what is drawn."""

from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.models import KeysValues, create, folding, logical_axes, shardings
from grpo_jax.models.cached import attend_cached, moved, written
from grpo_jax.models.folding import FOLDS, columns_at_first, folded, folds_of
from grpo_jax.models.kernels.decoding import decode_attention
from grpo_jax.sampling import compaction, decoding, draw, language_model
from grpo_jax.sampling.compaction import Grid, can_fold, ladder
from grpo_jax.sampling.decoding import grids_of
from grpo_jax.training.instruments import CompileCounter
from grpo_jax.training.mesh import make_mesh
from grpo_jax.types import Prompt, Request
from tests.sampling.test_compaction import CONFIG, ragged
from tests.sampling.test_language_model import CONFIG as MODEL
from tests.sampling.test_language_model import PARAMS, assert_same_rows, language

T = 48


@pytest.fixture
def short(monkeypatch):
    """Folding and smaller grids, which pay from some hundred columns on, from 16 on; and few grids."""
    monkeypatch.setattr(folding, "COLUMNS", 4)
    monkeypatch.setattr(language_model, "COLUMNS", 4)
    monkeypatch.setattr(compaction, "FEWEST_DECISIONS", 16)
    monkeypatch.setattr(compaction, "GRIDS", 5)
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.parametrize("places, blocks", [(4, 1), (8, 3), (11, 2), (64, 4)])
def test_no_two_columns_of_rows_in_hand_have_one_place(places, blocks):
    for rows in range(1, places + 1):
        held = set()
        for block in range(blocks * folds_of(rows, places)):
            at, first = folded(block, blocks, places)
            assert first + rows <= places and at < blocks
            held |= {(at, first + row) for row in range(rows)}
        assert len(held) == rows * blocks * folds_of(rows, places)
    assert folds_of(places // 4, places) == FOLDS == 2 * folds_of(places // 4 + 1, max(places, 8)) or places < 8


def test_room_is_for_a_quarter_of_the_columns_in_whole_blocks():
    assert [columns_at_first(n, FOLDS) for n in (512, 513, 1024, 1025, 8192)] == [128, 256, 256, 384, 2048]
    assert columns_at_first(100, 1) == 100


def test_what_can_fold_gets_to_a_quarter_in_slots_that_begin_with_it():
    assert can_fold(ladder(16, 8, 512)) and can_fold(ladder(7, 32, 512, by_rows=True))
    assert not can_fold([Grid(8, 8), Grid(32, 1)])  # to a half alone
    assert not can_fold([Grid(4, 6), Grid(3, 4), Grid(3, 2)])  # a quarter is 6 rows, no multiple of 4


def in_kernel(layer, query, positions, prefix, lengths, own, filled):
    far, near = ((jnp.swapaxes(x.keys, -1, -2), x.values) for x in (prefix, own))
    near = tuple(x[:, 0] for x in near)
    return decode_attention(query[:, :, 0], far, lengths, near, filled, layer, scale=0.3, interpret=True)[:, :, None]


def in_products(layer, *arguments):
    return attend_cached(*arguments[:-1], layer, arguments[-1], scale=0.3, folds=FOLDS)


def plain(query, keys, values):
    weights = np.exp(keys.astype(np.float64) @ query * 0.3)
    return weights @ values / weights.sum()


@pytest.mark.parametrize("attend, shards, blocks", [(in_products, 1, 2), (in_products, 2, 2), (in_kernel, 2, 1)])
def test_every_column_is_seen_where_it_was_written(attend, shards, blocks):
    """Eight pairs of rows for a quarter of the columns, then four, then two, of each device."""
    L, layer, heads, D, P, width = 2, 1, 2, 8, 3, 4
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    far, lengths = KeysValues(normal(L, 8 * shards, heads, D, P), normal(L, 8 * shards, heads, P, D)), np.arange(16) % 4
    lengths = lengths[: 8 * shards].astype(np.int32)
    own = KeysValues(*(jnp.full((L, blocks, shards, 16, heads, *x), 7.0) for x in ((D, width), (width, D))))
    pairs, said = np.arange(8 * shards).reshape(shards, 8), []  # keys and values [pairs, 2, heads, D] of each column
    put, see = jax.jit(partial(written, layer=layer)), jax.jit(partial(attend, layer))
    for column in range(FOLDS * blocks * width):
        if column in (blocks * width, 2 * blocks * width):
            chosen = np.stack([np.sort(rng.choice(pairs.shape[1], pairs.shape[1] // 2, replace=False)) for _ in pairs])
            places = (2 * chosen[..., None] + np.arange(2)).reshape(shards, -1)
            own = moved(own, places, 2 * pairs.shape[1], np.int32(column), folds=FOLDS)
            pairs = np.take_along_axis(pairs, chosen, axis=1)
        here = pairs.ravel()
        said.append(normal(2, 8 * shards, 2, heads, D))
        own = put(own, *said[-1][:, here, :, None], column=np.int32(column))
        query = normal(len(here), 2, 1, 2 * heads, D)
        prefix = KeysValues(*(x[:, here] for x in far))
        got = np.asarray(see(query, lengths[here, None] + column, prefix, lengths[here], own, np.int32(column + 1)))
        mine = np.moveaxis(np.stack(said), 0, 3)  # [keys and values, pairs, 2, columns, heads, D]
        for i, g, h in np.ndindex(len(here), 2, 2 * heads):
            c, k = here[i], h // 2
            context = far.keys[layer, c, k].T, far.values[layer, c, k]
            heard = (np.concatenate([x[: lengths[c]], y[c, g, :, k]]) for x, y in zip(context, mine))
            np.testing.assert_allclose(got[i, g, 0, h], plain(query[i, g, 0, h], *heard), atol=1e-5)


def test_a_folded_cache_draws_what_a_whole_one_draws_as_far_as_there_is_room(short):
    graphdef, params = create(CONFIG, jax.random.key(1))
    cells, key = ragged(4, 4, T), jax.random.key(2)

    def run(budget, **options):
        of = cells._replace(budget=np.array(budget, np.int32).reshape(4, 4), stops_apply=np.zeros((4, 4, 2), bool))
        return jax.tree.map(np.asarray, draw(graphdef, params, of, key, restricts=(), has_given=False, **options))

    fits = [1, 12, 3, 40, 12, 11, 13, 5, 48, 7, 12, 2, 47, 9, 4, 8]
    want, got = run(fits), run(fits, folds=FOLDS)
    np.testing.assert_array_equal(got.lengths.ravel(), fits)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_allclose(got.sampler_logps, want.sampler_logps, atol=2e-5)

    want, got = run([T] * 16), run([T] * 16, folds=FOLDS)
    room = [max(g.rows for g in grids_of(4, 4, T, 6, 1) if folds_of(g.rows, 16) == n) for n in (2, FOLDS)]
    lengths, numbers = np.unique(got.lengths, return_counts=True)
    assert lengths.tolist() == [T / 4, T / 2, T] and numbers.tolist() == [16 - room[0], room[0] - room[1], room[1]]
    there = np.arange(T) < got.lengths[..., None]
    np.testing.assert_array_equal(got.tokens, np.where(there, want.tokens, 0))
    np.testing.assert_allclose(got.sampler_logps, np.where(there, want.sampler_logps, 0), atol=2e-5)
    assert not got.finished.any()


PROMPTS = [Prompt(i, text) for i, text in enumerate(["abcab", "k", "gfedcba", "hhi", "jc", "ba", "cdc", "eee"])]


FEW = 8 + 8 * T  # tokens of one prompt's rows


def requests(**options):
    return [Request(p, count=8, **options) for p in PROMPTS]


def sampled(asked, key=5, **options):
    policy = language(max_new=T, cells=(8, 8), temperature=1.0, **options)
    launches = policy.launches(policy.rows_of(asked, Counter()))
    params = jax.device_put(PARAMS, shardings(logical_axes(MODEL), policy.mesh))
    return launches, policy.sample({"policy": params}, asked, jax.random.key(key))


@pytest.mark.parametrize(
    "options, stop, sizes",
    [
        ({"min_new": 30}, ("a", "bc", "d"), {}),
        ({"min_new": 20, "top_k": 5, "top_p": 0.9}, ("ab", "cd", "ga"), {"fsdp": 2, "tensor": 2}),
    ],
    ids=["whole", "of the likeliest, on a mesh"],
)
def test_rows_that_found_no_room_go_on_as_if_nothing_had_been(short, options, stop, sizes):
    asked, mesh = requests(options=options, stop=stop), make_mesh(**sizes, devices=jax.devices()[: 4 if sizes else 1])
    (one,), want = sampled(asked, tokens=8 * FEW)
    launches, got = sampled(asked, tokens=3 * FEW // (2 if sizes else 1) + 60, mesh=mesh)
    assert [x.options["folds"] for x in (one, *launches)] == [1, FOLDS, 1] and launches[1].options["has_given"]
    assert launches[0].slots * launches[0].width == 64, "all begin at once"
    assert (got.lengths > T // 2).sum() > 16, "more than there was room for"
    assert got.finished.sum() > 16
    assert_same_rows(got, want)
    np.testing.assert_allclose(got.sampler_logps, want.sampler_logps, atol=1e-4)
    for name in ("prompt_ids", "index", "group_ids", "completion_mask", "sampled_under"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name))


def test_whatever_the_lengths_nothing_is_compiled_later(short):
    """In the first call no row finds too little room, in the second most do, and the third has fewer rows."""
    everything = tuple("abcdefghijk")
    _, rows = sampled(requests(stop=everything, options={"min_new": 1}), tokens=3 * FEW)
    assert rows.lengths.max() == 2
    with CompileCounter() as compiled:
        _, rows = sampled(asked := requests(stop=everything, options={"min_new": T}), tokens=3 * FEW, key=6)
        _, fewer = sampled(asked[:3], tokens=3 * FEW, key=6)
    assert rows.lengths.min() == T and fewer.lengths.min() == T and compiled.total.count == 0


def test_one_launch_is_enough_where_all_fit_or_rows_begin_with_something(short):
    given = np.array([3], np.int32), np.full(1, np.nan, np.float32)
    for asked, tokens in ((requests(), 8 * FEW), (requests(prefix=given, max_new=T - 1), 3 * FEW)):
        policy = language(max_new=T, cells=(8, 8), tokens=tokens)
        assert [x.options["folds"] for x in policy.launches(policy.rows_of(asked, Counter()))] == [1]


def test_memory_is_that_of_a_quarter_of_the_columns(monkeypatch):
    monkeypatch.setattr(decoding, "ladder", lambda *_, **__: [Grid(32, 8), Grid(32, 4), Grid(32, 2)])
    graphdef, params = create(CONFIG, jax.random.key(1))
    cells, key = jax.eval_shape(lambda: ragged(32, 8, 1024)), jax.random.key(2)
    used = {}
    jax.clear_caches()
    for folds in (1, FOLDS):
        program = draw.lower(graphdef, params, cells, key, restricts=(), has_given=False, folds=folds)
        used[folds] = program.compile().memory_analysis().temp_size_in_bytes
    jax.clear_caches()
    cache = 2 * 2 * 8 * 256 * 1024 * 4
    assert used[1] > cache and used[FOLDS] < used[1] - 0.7 * cache
