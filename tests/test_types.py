"""The arrays that flow: taking, joining and grouping rows loses nothing and changes nothing else."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.types import Batch, Contexts, Decisions, Prompt, Rollout, concat, regroup, renumber

VARYING = ("completions", "lengths", "completion_mask", "behavior_logps", "sampler_logps", "finished", "temperature")


def rollout(seed=0, *, n=6, t=4, contexts=3, width=5, prompts=(10, 10, 11, 11, 12, 12), k=0, **changes):
    """Rows with something different in every field."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, t + 1, n).astype(np.int32)
    exists = np.arange(t) < lengths[:, None]
    context_lengths = rng.integers(1, width + 1, contexts).astype(np.int32)
    tokens = rng.integers(1, 90, (contexts, width))
    behavior = np.where(exists & (rng.random((n, t)) < 0.7), -rng.random((n, t)), np.nan).astype(np.float32)
    fields = dict(
        contexts=Contexts(
            tokens=np.where(np.arange(width) < context_lengths[:, None], tokens, 0).astype(np.int32),
            lengths=context_lengths,
        ),
        sampled_under=rng.integers(0, contexts, n).astype(np.int32),
        trained_under=rng.integers(0, contexts, n).astype(np.int32),
        completions=np.where(exists, rng.integers(1, 90, (n, t)), 0).astype(np.int32),
        lengths=lengths,
        completion_mask=exists & ~np.isnan(behavior),
        behavior_logps=behavior,
        sampler_logps=np.where(exists, -rng.random((n, t)), 0).astype(np.float32),
        finished=rng.random(n) < 0.5,
        temperature=rng.random(n).astype(np.float32),
        prompt_ids=np.array(prompts, np.int32),
        index=np.arange(n, dtype=np.int32),
        group_ids=renumber(np.array(prompts)),
        weights=rng.random(n).astype(np.float32),
        update_ids=np.full(n, -1, np.int32),
        scores=rng.random((n, k)).astype(np.float32),
        columns={"answer": rng.random(n).astype(np.float32), "span": rng.integers(0, 9, (n, t)).astype(np.int32)},
    )
    return Rollout(**{**fields, **changes})


def described(rows):
    """Every row as plain values, whatever the order of the contexts and the width of the arrays."""
    out = []
    for i in range(len(rows)):
        n = int(rows.lengths[i])
        under = [
            tuple(rows.contexts.tokens[c][: rows.contexts.lengths[c]].tolist())
            for c in (rows.sampled_under[i], rows.trained_under[i])
        ]
        row = [under, n, bool(rows.finished[i]), float(rows.temperature[i]), int(rows.prompt_ids[i])]
        row += [int(rows.index[i]), float(rows.weights[i]), int(rows.update_ids[i]), rows.scores[i].tolist()]
        row += [str(getattr(rows, f)[i][:n].tolist()) for f in VARYING if getattr(rows, f).ndim == 2]
        row += [float(rows.columns["answer"][i]), str(rows.columns["span"][i][:n].tolist())]
        row += [str(rows.unit_ids[i][:n].tolist()) if rows.unit_ids is not None else None]
        out.append(row)
    return out


def partition(ids):
    return {frozenset(np.flatnonzero(ids == i).tolist()) for i in set(np.asarray(ids).tolist()) - {-1}}


# ---- pytrees -------------------------------------------------------------------------------------------------------


def test_a_rollout_is_a_pytree_whose_names_are_static():
    rows = rollout(k=2, channels=("a", "b"), channel_weights=(1.0, 2.0), role="judge")
    leaves, tree = jax.tree.flatten(rows)
    again = jax.tree.unflatten(tree, leaves)
    assert (again.role, again.channels, again.channel_weights) == ("judge", ("a", "b"), (1.0, 2.0))
    assert described(again) == described(rows)
    assert not any(isinstance(leaf, str) for leaf in leaves)
    assert tree != jax.tree.structure(rows.replace(role="policy"))
    hash(tree)

    @jax.jit
    def doubled(rows):
        assert isinstance(rows, Rollout) and rows.channels == ("a", "b")
        return rows.replace(weights=2 * rows.weights)

    np.testing.assert_array_equal(doubled(rows).weights, 2 * rows.weights)


def test_a_batch_is_filled_from_top_to_bottom_and_stays_a_pytree():
    rows = rollout()
    batch = Batch(**{f.name: getattr(rows, f.name) for f in dataclasses.fields(rows)})
    assert batch.old is None and batch.ref is None and batch.rewards is None and batch.advantages is None
    before = len(jax.tree.leaves(batch))
    batch = batch.replace(old=Decisions(logps=rows.sampler_logps, stats={"entropy": rows.sampler_logps}))
    assert len(jax.tree.leaves(batch)) == before + 2
    assert isinstance(jax.tree.map(jnp.asarray, batch), Batch)
    np.testing.assert_array_equal(batch.take([3, 1]).old.stats["entropy"], rows.sampler_logps[[3, 1]])


def test_rollouts_are_frozen_and_replace_leaves_the_original():
    rows = rollout()
    with pytest.raises(dataclasses.FrozenInstanceError):
        rows.weights = np.zeros(6)
    changed = rows.replace(weights=np.zeros(6))
    assert rows.weights.all() and not changed.weights.any()
    with pytest.raises(TypeError, match="wieghts"):
        rows.replace(wieghts=0)
    assert all(p.kind is p.KEYWORD_ONLY for p in inspect.signature(Rollout).parameters.values())


# ---- what exists, what is trained, what was drawn -------------------------------------------------------------------


def test_exists_and_injected():
    nan = np.nan
    rows = rollout(
        n=4,
        prompts=(1, 2, 3, 4),
        lengths=np.array([2, 3, 0, 4]),
        completion_mask=np.array([[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0], [0, 0, 1, 1]], bool),
        behavior_logps=np.array([[-1, nan, nan, nan], [nan] * 4, [nan] * 4, [-1, -1, nan, nan]], np.float32),
    )
    want = [[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]]
    np.testing.assert_array_equal(rows.exists, np.array(want, bool))
    # drawn and trained; given and trained; empty; drawn decisions that are not trained
    np.testing.assert_array_equal(rows.injected, [False, True, True, True])
    np.testing.assert_array_equal(jax.jit(lambda r: r.exists & ~r.injected[:, None])(rows)[0], [1, 1, 0, 0])


# ---- choosing rows -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [[0], [5, 0, 3], [2, 2], [], np.array([4, 1])])
def test_take_gives_those_rows_and_their_contexts_only(rows):
    whole = rollout(unit_ids=np.arange(24).reshape(6, 4))
    some = whole.take(rows)
    assert described(some) == [described(whole)[i] for i in rows]
    used = {int(c) for i in rows for c in (whole.sampled_under[i], whole.trained_under[i])}
    assert some.contexts.tokens.shape[0] == len(some.contexts.lengths) == len(used)
    assert some.sampled_under.dtype == some.trained_under.dtype == np.int32
    assert partition(some.group_ids) == partition(whole.group_ids[np.asarray(rows, int)])
    assert set(some.group_ids.tolist()) == set(range(len(set(some.group_ids.tolist()))))
    np.testing.assert_array_equal(some.columns["span"], whole.columns["span"][np.asarray(rows, int)])


def test_take_by_mask_is_take_by_number():
    whole = rollout()
    mask = np.array([False, True, False, False, True, True])
    assert described(whole.take(mask)) == described(whole.take([1, 4, 5]))


def test_take_carries_what_contexts_hold_besides_tokens():
    whole = rollout()
    pixels = np.arange(3 * 2 * 2).reshape(3, 2, 2)
    whole = whole.replace(contexts=whole.contexts.replace(extras={"pixels": pixels}))
    for i, row in enumerate(whole.rows()):
        np.testing.assert_array_equal(
            row.contexts.extras["pixels"][row.sampled_under[0]], pixels[whole.sampled_under[i]]
        )


def test_groups_are_in_the_order_of_their_first_rows_and_nobody_is_in_none():
    rows = rollout(group_ids=np.array([2, -1, 0, 2, 0, -1], np.int32))
    groups = rows.groups()
    assert [described(g) for g in groups] == [[described(rows)[i] for i in members] for members in ([0, 3], [2, 4])]
    assert all((g.group_ids == 0).all() for g in groups)


def test_rows_and_of():
    rows = rollout(prompts=(10, 11, 10, 12, 11, 10))
    assert [described(r) for r in rows.rows()] == [[d] for d in described(rows)]
    for wanted in (10, np.int32(10), Prompt(10, "text")):
        assert described(rows.of(wanted)) == [described(rows)[i] for i in (0, 2, 5)]
    assert len(rows.of(99)) == 0


# ---- joining rows --------------------------------------------------------------------------------------------------


def test_concat_is_undone_by_take_whatever_the_widths():
    one, other = rollout(0), rollout(1, t=7, width=9, contexts=2, prompts=(11, 11, 11, 13, 13, 10))
    both = concat(one, other)
    assert described(both) == described(one) + described(other)
    assert both.completions.shape == (12, 7) and both.contexts.tokens.shape[1] == 9
    assert described(both.take(range(6))) == described(one)
    assert partition(both.group_ids) == {
        frozenset(x) for x in ({0, 1}, {2, 3}, {4, 5}, {6, 7, 8}, {9, 10}, {11})
    }  # prompt 11 is in both, and stays two groups
    padded = both.completion_mask[:6, 4:]
    assert not padded.any() and np.isnan(both.behavior_logps[:6, 4:]).all() and (both.sampler_logps[:6, 4:] == 0).all()
    for field in dataclasses.fields(Rollout):
        value, origin = getattr(both, field.name), getattr(one, field.name)
        if isinstance(origin, np.ndarray):
            assert value.dtype == origin.dtype and len(value) == 12, field.name


def test_concat_stores_equal_contexts_once():
    one = rollout()
    wide = np.pad(one.contexts.tokens[::-1], ((0, 0), (0, 3)), constant_values=77)  # garbage behind the lengths
    turned = one.replace(
        contexts=Contexts(tokens=wide, lengths=one.contexts.lengths[::-1]),
        sampled_under=2 - one.sampled_under,
        trained_under=2 - one.trained_under,
    )
    both = concat(one, turned)
    assert len(both.contexts.lengths) == 3
    np.testing.assert_array_equal(both.sampled_under[:6], both.sampled_under[6:])
    assert described(both) == described(one) * 2


def test_concat_tells_a_prefix_from_the_whole_context():
    one = rollout(contexts=1)
    one.contexts.tokens[0, one.contexts.lengths[0] - 1] = 0  # a real token that looks like padding
    short = Contexts(tokens=one.contexts.tokens.copy(), lengths=one.contexts.lengths - 1)
    assert len(concat(one, one.replace(contexts=short)).contexts.lengths) == 2


def test_concat_of_groups_is_the_rollout_they_came_from():
    rows = rollout()
    assert described(concat(*rows.groups())) == described(rows)
    np.testing.assert_array_equal(concat(*rows.groups()).group_ids, rows.group_ids)
    assert described(concat(rows)) == described(rows)


def test_concat_keeps_nobody_and_gives_own_units_where_others_share():
    one = rollout(group_ids=np.full(6, -1, np.int32))
    other = rollout(1, t=6, unit_ids=np.repeat(np.arange(6)[:, None], 6, 1).astype(np.int32))
    both = concat(one, other)
    assert (both.group_ids[:6] == -1).all() and both.group_ids.max() == 2
    np.testing.assert_array_equal(both.unit_ids[:6], np.tile(np.arange(6), (6, 1)))
    np.testing.assert_array_equal(both.unit_ids[6:], other.unit_ids)
    assert concat(one, one).unit_ids is None


def test_concat_keeps_extras_of_contexts():
    one = rollout()
    extras = lambda start: {"frames": np.arange(start, start + 3)}  # noqa: E731
    a = one.replace(contexts=one.contexts.replace(extras=extras(0)))
    b = one.replace(contexts=one.contexts.replace(extras=extras(10)))
    both = concat(a, b)
    np.testing.assert_array_equal(both.contexts.extras["frames"][both.sampled_under[6:]], 10 + one.sampled_under)


def test_concat_refuses_what_does_not_belong_together():
    rows = rollout()
    with pytest.raises(ValueError, match="at least one rollout"):
        concat()
    with pytest.raises(ValueError, match="same role, got 'policy' and 'judge'"):
        concat(rows, rows.replace(role="judge"))
    with pytest.raises(ValueError, match="same channels"):
        concat(rows, rollout(k=1, channels=("exact",)))
    batch = Batch(**{f.name: getattr(rows, f.name) for f in dataclasses.fields(rows)})
    with pytest.raises(TypeError, match="got a Batch"):
        concat(batch, batch)


def test_concat_fills_columns_that_some_rollouts_lack():
    rows = rollout()
    joined = concat(rows.replace(columns={}), rows)
    for name, values in rows.columns.items():
        assert np.isnan(joined.columns[name][: len(rows)]).all()
        np.testing.assert_array_equal(joined.columns[name][len(rows) :], values)


def test_regroup_joins_by_field_or_column():
    rows = rollout(prompts=(10, 11, 10, 12, 11, 10), group_ids=np.array([0, 1, 2, 3, 4, -1], np.int32))
    assert partition(regroup(rows, by="prompt_ids").group_ids) == {frozenset(x) for x in ({0, 2, 5}, {1, 4}, {3})}
    np.testing.assert_array_equal(regroup(rows).group_ids, [0, 1, 0, 2, 1, 0])
    stratum = rows.with_columns(stratum=np.array([1.5, -2, 1.5, -2, 0, 0]))
    np.testing.assert_array_equal(regroup(stratum, by="stratum").group_ids, [0, 1, 0, 1, 2, 2])
    for by in ("strata", "span", "take"):
        with pytest.raises(ValueError, match=rf"'{by}' is none; columns: \['answer', 'span'\]"):
            regroup(rows, by=by)


@pytest.mark.parametrize(
    "ids, want",
    [
        ([7, 7, 3, 9, 3], [0, 0, 1, 2, 1]),
        ([-1, 5, -1, 2, 5], [-1, 0, -1, 1, 0]),
        ([-1, -1], [-1, -1]),
        ([], []),
        ([0, 1, 2], [0, 1, 2]),
    ],
)
def test_renumber(ids, want):
    got = renumber(np.array(ids, int))
    np.testing.assert_array_equal(got, want)
    assert got.dtype == np.int32


# ---- columns and scores --------------------------------------------------------------------------------------------


def test_with_columns_takes_arrays_numbers_and_values_by_prompt():
    rows = rollout()
    more = rows.with_columns(
        order=np.arange(6), spans=np.ones((6, 4)), scale=0.5, prior={10: 0.1, 11: 0.2, 12: 0.3, 99: 9.0}
    )
    np.testing.assert_array_equal(more.columns["order"], np.arange(6))
    assert more.columns["spans"].shape == (6, 4)
    np.testing.assert_array_equal(more.columns["scale"], np.full(6, 0.5))
    np.testing.assert_allclose(more.columns["prior"], [0.1, 0.1, 0.2, 0.2, 0.3, 0.3])
    np.testing.assert_array_equal(more.columns["answer"], rows.columns["answer"])
    assert set(rows.columns) == {"answer", "span"}
    assert (rows.with_columns(answer=0).columns["answer"] == 0).all()
    with pytest.raises(ValueError, match="'order' needs one value for each of 6 rows, got 5"):
        rows.with_columns(order=np.arange(5))
    with pytest.raises(ValueError, match=r"'prior' has no value for the prompts \[11, 12\]"):
        rows.with_columns(prior={10: 1.0})


def test_score_adds_channels_by_weight_and_reads_one_by_name():
    nan = np.nan
    rows = rollout(
        n=3,
        prompts=(1, 1, 2),
        channels=("exact", "format"),
        channel_weights=(1.0, 0.5),
        scores=np.array([[1, 1], [nan, 2], [nan, nan]], np.float32),
    )
    np.testing.assert_allclose(rows.score(), [1.5, 1.0, np.nan])
    np.testing.assert_allclose(rows.score("format"), [1, 2, nan])
    np.testing.assert_allclose(rows.replace(channel_weights=()).score(), [2, 2, np.nan])
    with pytest.raises(KeyError, match="no reward channel 'fromat'; this rollout has.*exact.*format"):
        rows.score("fromat")
