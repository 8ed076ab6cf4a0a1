"""Which rows go into which update and which cell: nothing lost, nothing twice, groups whole."""

import numpy as np
import pytest

from grpo_jax.training.deal import Layout, choose_layout, deal, lay_out


def dealt(groups, *, weights=None, update_ids=None, updates=1, seed=0):
    n = len(groups)
    return deal(
        weights=np.ones(n) if weights is None else np.asarray(weights),
        group_ids=np.asarray(groups),
        update_ids=np.full(n, -1) if update_ids is None else np.asarray(update_ids),
        updates=updates,
        seed=np.random.SeedSequence(seed),
    )


def test_one_update_takes_all_rows_of_weight_in_their_order():
    (rows,) = dealt([3, 0, 0, -1, 3], weights=[1, 0, 2, 0.5, 1])
    assert rows.tolist() == [0, 2, 3, 4]
    assert dealt([0, 1], weights=[0, 0]) == [] and dealt([0, 1], weights=[0, 0], updates=3) == []


@pytest.mark.parametrize("updates", [2, 3, 4, 7])
def test_groups_are_whole_and_every_row_is_dealt_once(updates):
    draw = np.random.default_rng(updates)
    groups, weights = draw.integers(-1, 9, 60), draw.integers(0, 3, 60)
    parts = dealt(groups, weights=weights, updates=updates)
    assert sorted(np.concatenate(parts).tolist()) == np.flatnonzero(weights).tolist()
    assert len(parts) == updates and all((np.diff(p) > 0).all() for p in parts)
    where = [{g for g in groups[p].tolist() if g >= 0} for p in parts]
    assert sum(map(len, where)) == len(set.union(*where))
    alone = (groups[weights > 0] < 0).sum()
    shares = [len(w) + (groups[p] < 0).sum() for w, p in zip(where, parts)]
    assert sum(shares) == len(set.union(*where)) + alone and max(shares) - min(shares) <= 1


def test_rows_in_no_group_are_not_kept_together():
    parts = dealt([-1] * 8, updates=4)
    assert [len(p) for p in parts] == [2, 2, 2, 2]


def test_dealing_is_shuffled_by_the_seed_alone():
    groups = np.repeat(np.arange(32), 2)
    first, again, other = (dealt(groups, updates=4, seed=s) for s in (1, 1, 2))
    assert all((a == b).all() for a, b in zip(first, again))
    assert any(a.tolist() != b.tolist() for a, b in zip(first, other))
    assert any(a.tolist() != b.tolist() for a, b in zip(first, np.array_split(np.arange(64), 4)))


def test_more_updates_than_groups():
    assert sorted(p.tolist() for p in dealt([0, 0, 1], updates=5)) == [[0, 1], [2]]


def test_update_ids_are_taken_ascending_and_exactly():
    parts = dealt([0, 0, 1, 1, 2], update_ids=[7, 2, 2, 7, 0], weights=[1, 1, 1, 1, 0], updates=9)
    assert [p.tolist() for p in parts] == [[1, 2], [0, 3]]


def test_update_ids_for_some_rows_only():
    with pytest.raises(ValueError, match="2 of 3 rows have none"):
        dealt([0, 0, 1], update_ids=[-1, 0, -1])
    (rows,) = dealt([0, 0, 1], update_ids=[-1, 0, 0], weights=[0, 1, 1])
    assert rows.tolist() == [1, 2]


def test_cells_hold_rows_of_one_context_side_by_side():
    under = np.array([5, 2, 5, 5, 2, 9, 5])
    part = lay_out(under, np.array([0, 1, 2, 3, 4, 6]), Layout(2, 3, 1, 1))
    assert part.order.tolist() == [[[0, 2, 3], [6, -1, -1]], [[1, 4, -1], [-1, -1, -1]]]
    assert part.count == 2 and part.order.dtype == np.int32


@pytest.mark.parametrize(("capacity", "sweeps"), [(1, 4), (3, 3), (4, 4), (8, 8)])
def test_the_shape_is_the_capacity_or_the_next_doubling_of_it(capacity, sweeps):
    part = lay_out(np.arange(6), np.arange(6), Layout(2, 1, 1, 1), capacity=capacity)
    assert part.order.shape == (sweeps, 2, 1) and part.count == 3
    assert (part.order[3:] == -1).all()


def test_no_rows():
    part = lay_out(np.arange(6), np.array([], int), Layout(2, 3, 1, 1), capacity=2)
    assert part.count == 0 and part.order.shape == (2, 2, 3) and (part.order == -1).all()


def test_random_cells():
    draw = np.random.default_rng(0)
    for _ in range(20):
        under, layout = draw.integers(0, 7, 40), Layout(int(draw.integers(1, 5)), int(draw.integers(1, 6)), 1, 1)
        rows = np.flatnonzero(draw.random(40) < 0.7)
        part = lay_out(under, rows, layout)
        assert sorted(part.order[part.order >= 0].tolist()) == rows.tolist()
        for run in part.order.reshape(-1, layout.rows):
            assert len(set(under[run[run >= 0]].tolist())) <= 1
        assert (part.order[part.count :] == -1).all()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        # all in one: 4 prompts x (10 + 8 x 5) = 200 tokens
        ({"group_size": 8, "prompts": 4, "tokens_per_device": 200}, Layout(4, 8, 10, 5, 1)),
        # 199 tokens hold 3 groups; 4 groups in two sweeps of 2
        ({"group_size": 8, "prompts": 4, "tokens_per_device": 199}, Layout(2, 8, 10, 5, 2)),
        # 49 hold 7 rows of a group of 8: cut evenly into 4 + 4, of 30 tokens each, one at a time
        ({"group_size": 8, "prompts": 4, "tokens_per_device": 49}, Layout(1, 4, 10, 5, 8)),
        # a row at a time
        ({"group_size": 3, "prompts": 2, "tokens_per_device": 15}, Layout(1, 1, 10, 5, 6)),
        # on 4 shards: a group each
        ({"group_size": 8, "prompts": 4, "tokens_per_device": 60, "shards": 4}, Layout(4, 8, 10, 5, 1)),
        # 6 groups on 4 shards: 2 each, padding included
        ({"group_size": 8, "prompts": 6, "tokens_per_device": 60, "shards": 4}, Layout(4, 8, 10, 5, 2)),
        ({"group_size": 8, "prompts": 6, "tokens_per_device": 100, "shards": 4}, Layout(8, 8, 10, 5, 1)),
    ],
)
def test_the_numbers_that_follow_from_three(given, expected):
    layout = choose_layout(context_width=10, decisions=5, **given)
    assert layout == expected
    shards = given.get("shards", 1)
    assert layout.contexts // shards * (10 + 5 * layout.rows) <= given["tokens_per_device"]
    assert layout.contexts * layout.rows * layout.sweeps >= given["group_size"] * given["prompts"]


def test_a_row_that_does_not_fit():
    with pytest.raises(
        ValueError, match=r"tokens_per_device is 14, .* up to 15 tokens \(10 \+ 5\): raise it to at least 15"
    ):
        choose_layout(group_size=8, prompts=4, context_width=10, decisions=5, tokens_per_device=14)
