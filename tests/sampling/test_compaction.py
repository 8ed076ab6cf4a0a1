"""Rows regrouped into fewer cells: nothing is lost, and what is drawn is what one grid draws."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.models import TransformerConfig, create
from grpo_jax.sampling import Cells, compaction, decoding, draw
from grpo_jax.sampling.compaction import Grid, ladder, regroup

V = 13
CONFIG = TransformerConfig(
    vocab_size=V,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    initializer_range=0.4,
)


def test_the_ladder_narrows_slots_and_ends_in_time():
    sizes = lambda *a, **k: [g[:2] for g in ladder(*a, **k)]  # noqa: E731
    assert sizes(8, 8, 512) == [(8, 8), (32, 1), (16, 1), (8, 1)]
    assert sizes(8, 8, 512, by_rows=True) == [(8, 8), *((n, 1) for n in (52, 42, 34, 27, 21, 17, 13, 9, 6, 4))]
    assert sizes(16, 16, 512) == [(16, 16), (64, 2), (64, 1), (32, 1), (16, 1), (8, 1)]
    assert sizes(16, 16, 512, context=512) == [(16, 16), (32, 4), (32, 2), (32, 1), (16, 1), (8, 1)]
    assert sizes(16, 16, 512, context=4096) == [(16, 16), (16, 8), (16, 4), (16, 2), (16, 1), (8, 1)]
    narrow = [(1, 64), (3, 16), (2, 16), (3, 8), (2, 8), (3, 4), (3, 2), (2, 2)]
    assert sizes(1, 64, 512, context=4096, by_rows=True) == narrow
    assert sizes(3, 4, 512) == [(3, 4)]
    assert sizes(16, 8, 128) == [(16, 8)]  # short rows: nothing to gain
    assert sizes(12, 8, 512, shards=4) == [(12, 8), (48, 1)]


@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize("asked", [(8, 8), (64, 4), (64, 64), (512, 64)])
def test_the_ladder_gets_to_few_rows_in_few_grids(asked, by_rows):
    grids = ladder(*asked, 4096, shards=4, context=8192, by_rows=by_rows)
    rows = [g.contexts * g.width for g in grids]
    assert len(rows) <= compaction.GRIDS and all(a > b for a, b in zip(rows, rows[1:]))
    assert all(g.contexts % 4 == 0 for g in grids)
    assert rows[-1] <= 4 * (8 if by_rows else 16), "the last rows do not drag many empty cells along"
    room = max(asked[0], asked[0] * asked[1] / 4 * 4096 / 8192)
    assert all(g.contexts < 2 * room for g in grids), "copies of contexts take their share of memory and no more"


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([1, 2]), st.sampled_from([1, 2, 3]))
def test_every_active_row_gets_one_cell_of_its_context(seed, shards, width):
    """Twice: rows of a context that lie in several slots come together again."""
    rng = np.random.default_rng(seed)
    c, g = 4, 6
    numbers, owners, active = np.arange(c * g).reshape(c, g), np.arange(c), rng.random((c, g)) < 0.6 * rng.random()
    for slots, grid in ((10, Grid(10, width, shards)), (8, Grid(8, 2, shards))):
        left = set(numbers[active].tolist())
        per_context = [-(-sum(n // g == i for n in left) // grid.width) for i in range(c)]
        fits = (np.reshape(per_context, (shards, -1)).sum(1) <= slots // shards).all()
        assert bool(grid.fits(jnp.asarray(active), jnp.asarray(owners))) == fits
        if not fits:
            return
        places = regroup(jnp.asarray(active), jnp.asarray(owners), grid)
        rows, there = np.asarray(places.rows(jnp.asarray(numbers))), np.asarray(places.there())
        assert sorted(rows[there]) == sorted(left)
        owners = np.asarray(places.of_contexts(jnp.asarray(owners)))
        assert (rows // g == owners[:, None])[there].all()
        device = np.arange(slots) * shards // slots
        assert (rows // g * shards // c == device[:, None])[there].all()  # no row leaves its device
        numbers, active = rows, there & (rng.random(there.shape) < 0.6)


def ragged(c, g, t, seed=0):
    rng = np.random.default_rng(seed)
    cells = lambda value, dtype: np.full((c, g), value, dtype)  # noqa: E731
    budget = np.minimum(rng.geometric(3 / t, (c, g)), t).astype(np.int32)
    budget[0], budget[1, 0] = 0, t  # a context of padding, and a straggler
    return Cells(
        contexts=rng.integers(0, V, (c, 6)).astype(np.int32),
        context_lengths=rng.integers(1, 7, c).astype(np.int32),
        given=np.zeros((c, g, t), np.int32),
        given_lengths=cells(0, np.int32),
        budget=budget,
        minimum=cells(0, np.int32),
        temperature=rng.choice([0.0, 0.7, 1.3], (c, g)).astype(np.float32),
        top_k=cells(0, np.int32),
        top_p=cells(1, np.float32),
        min_p=cells(0, np.float32),
        prompt_ids=np.repeat(np.arange(c, dtype=np.int32)[:, None], g, 1),
        index=np.tile(np.arange(g, dtype=np.int32), (c, 1)),
        stops=np.array([[-1, 3], [5, 7]], np.int32),
        stops_apply=np.stack([rng.random((c, g)) < 0.3, rng.random((c, g)) < 0.5], axis=-1),
    )


def test_a_shrinking_grid_draws_what_one_grid_draws(monkeypatch):
    shards = 2
    graphdef, params = create(CONFIG, jax.random.key(1))
    cells, key = ragged(6, 4, 24), jax.random.key(2)
    run = lambda: draw(graphdef, params, cells, key, restricts=(), has_given=False, shards=shards)  # noqa: E731
    want = run()
    smaller = [Grid(6, 4, shards), Grid(8, 2, shards), Grid(6, 2, shards), Grid(6, 1, shards), Grid(2, 1, shards)]
    monkeypatch.setattr(decoding, "ladder", lambda *_, **__: smaller)
    jax.clear_caches()
    got = run()
    jax.clear_caches()
    for name in ("tokens", "lengths", "finished"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name), err_msg=name)
    for name in ("behavior_logps", "sampler_logps"):
        np.testing.assert_allclose(getattr(got, name), getattr(want, name), atol=2e-6, err_msg=name)
    assert len(set(np.asarray(got.lengths).ravel().tolist())) > 5


def test_rows_move_within_the_one_cache_that_there_is(monkeypatch):
    """Compiled memory: with smaller grids, little more than without."""
    sizes = {"hidden_size": 32, "num_heads": 2, "num_kv_heads": 2, "head_dim": 64}
    graphdef, params = create(dataclasses.replace(CONFIG, **sizes), jax.random.key(1))
    cells, key = jax.eval_shape(lambda: ragged(8, 8, 1024)), jax.random.key(2)
    used = {}
    for name, grids in {"one grid": [Grid(8, 8)], "five": [Grid(8, 8), *(Grid(n, 1) for n in (50, 39, 22, 8))]}.items():
        monkeypatch.setattr(decoding, "ladder", lambda *_, grids=grids, **__: grids)
        jax.clear_caches()
        program = draw.lower(graphdef, params, cells, key, restricts=(), has_given=False)
        used[name] = program.compile().memory_analysis().temp_size_in_bytes
    jax.clear_caches()
    cache = 2 * 2 * 64 * 2 * 64 * 1024 * 4
    assert cache < used["one grid"] < used["five"] < used["one grid"] + cache / 4
