"""Requests as rows, rows as cells, and cells as a rollout, without a model."""

from collections import Counter

import numpy as np
import pytest

from grpo_jax.sampling import Drawn, bucket
from grpo_jax.sampling.requests import OPTIONS, cells_of, expand, pack, rollout_of
from grpo_jax.types import Prompt, Request

STOPS = (26, 27)


def encode(text):
    """Letters as 0..25; a chat as the letters of its messages."""
    text = text if isinstance(text, str) else "".join(m["content"] for m in text)
    return np.array([ord(c) - ord("a") for c in text], np.int32)


def rows_of(requests, numbers=None, stop_ids=STOPS, **defaults):
    return expand(
        requests,
        encode=encode,
        encode_text=encode,
        stop_ids=stop_ids,
        defaults={"max_new": 5, "temperature": 0.8, **defaults},
        numbers=Counter() if numbers is None else numbers,
    )


def contexts_of(rows, under):
    return ["".join(chr(97 + t) for t in rows.contexts.tokens[c][: rows.contexts.lengths[c]]) for c in under]


def given(ids, *logps):
    return np.array(ids), np.array(logps or [np.nan] * len(ids))


ABC, DE = Prompt(7, "abc"), Prompt(8, "de")


@pytest.mark.parametrize(
    "n, size", [(0, 8), (1, 8), (8, 8), (9, 16), (100, 128), (256, 256), (257, 512), (513, 768), (1000, 1024)]
)
def test_bucket(n, size):
    assert bucket(n) == size


# ---- rows ----------------------------------------------------------------------------------------------------------


def test_a_request_is_a_group_of_count_rows():
    rows = rows_of([Request(ABC, count=3), Request(DE, count=1), Request(ABC, count=2)])
    np.testing.assert_array_equal(rows.prompt_ids, [7, 7, 7, 8, 7, 7])
    np.testing.assert_array_equal(rows.group_ids, [0, 0, 0, 1, 2, 2])
    np.testing.assert_array_equal(rows.index, [0, 1, 2, 0, 3, 4])
    assert contexts_of(rows, rows.sampled_under) == ["abc"] * 3 + ["de"] + ["abc"] * 2
    np.testing.assert_array_equal(rows.budget, 5)
    np.testing.assert_allclose(rows.temperature, 0.8)
    assert len(rows.contexts.lengths) == 2


def test_index_runs_on_over_calls_by_role_and_prompt():
    numbers = Counter()
    rows_of([Request(ABC, count=2), Request(DE)], numbers)
    np.testing.assert_array_equal(rows_of([Request(ABC, count=2)], numbers).index, [2, 3])
    np.testing.assert_array_equal(rows_of([Request(ABC, role="judge")], numbers).index, [0])
    np.testing.assert_array_equal(rows_of([Request(DE), Request(ABC)], numbers).index, [1, 4])
    assert numbers == {("policy", 7): 5, ("policy", 8): 2, ("judge", 7): 1}


def test_contexts_are_stored_once_whoever_points_to_them():
    rows = rows_of(
        [
            Request(ABC, count=2),
            Request(ABC, count=2, context="abchint", train_context="abc"),
            Request(Prompt(9, "x"), context=encode("abc")),
            Request(DE, train_context=[{"role": "user", "content": "abchint"}]),
        ]
    )
    assert contexts_of(rows, rows.sampled_under) == ["abc", "abc", "abchint", "abchint", "abc", "de"]
    assert contexts_of(rows, rows.trained_under) == ["abc", "abc", "abc", "abc", "abc", "abchint"]
    assert len(rows.contexts.lengths) == 3 and rows.contexts.tokens.shape == (3, 7)


def test_options_fall_back_to_the_defaults_and_then_to_off():
    rows = rows_of([Request(ABC, options={"top_k": 3}), Request(DE, temperature=0.0)], top_p=0.9, temperature=1.3)
    np.testing.assert_array_equal(rows.options["top_k"], [3, 0])
    np.testing.assert_array_equal(rows.options["top_p"], [0.9, 0.9])
    np.testing.assert_array_equal(rows.options["min_p"], [0, 0])
    np.testing.assert_allclose(rows.temperature, [1.3, 0.0])
    assert set(rows.options) == set(OPTIONS)


def test_stop_texts_apply_to_their_own_rows():
    rows = rows_of([Request(ABC, stop=("xy", "q")), Request(DE, count=2), Request(ABC, stop=("q",))], stop=("zzz",))
    table = [tuple(s[s >= 0]) for s in rows.stops]
    mine = [{table[k] for k in np.flatnonzero(row)} for row in rows.stops_apply]
    always = {(26,), (27,), (25, 25, 25)}
    assert mine == [always | {(23, 24), (16,)}, always, always, always | {(16,)}]
    assert all((s[: (s < 0).sum()] < 0).all() for s in rows.stops)  # aligned to the right
    assert not rows_of([Request(ABC)], stop_ids=()).stops_apply.any()


def test_prefixes_are_given_or_drawn_and_count_before_the_budget():
    rows = rows_of(
        [
            Request(ABC, prefix=given([1, 2, 3], np.nan, -0.5, -0.25), max_new=4),
            Request(ABC, prefix="xy"),
            Request(ABC, prefix="xy", max_new=0, train_given=True),
            Request(ABC),
        ]
    )
    np.testing.assert_array_equal(rows.given_lengths, [3, 2, 3, 0])
    np.testing.assert_array_equal(rows.budget, [7, 7, 3, 5])
    np.testing.assert_array_equal(rows.given[2, :3], [23, 24, 26])  # whole, so the first stop token follows
    np.testing.assert_array_equal(rows.given_logps[0, :3], [np.nan, -0.5, -0.25])
    assert np.isnan(rows.given_logps[1:]).all()
    np.testing.assert_array_equal(rows.trains_given, [False, False, True, False])


def test_temperature_of_rows_without_a_draw_is_one_unless_asked_for():
    drawn_before = given([1, 2], np.nan, -0.5)
    rows = rows_of(
        [
            Request(ABC, prefix="x"),
            Request(ABC, prefix="x", max_new=0),
            Request(ABC, prefix=drawn_before, max_new=0),
            Request(ABC, prefix="x", max_new=0, temperature=0.5),
        ]
    )
    np.testing.assert_allclose(rows.temperature, [0.8, 1.0, 0.8, 0.5])


def test_numeric_columns_go_with_the_rows_and_texts_stay():
    one = Prompt(1, "a", {"answer": 3, "hard": True, "name": "x", "mixed": 1, "level": 2.5, "none": None})
    two = Prompt(2, "b", {"answer": np.float64(4.5), "hard": False, "name": "y", "mixed": "z", "late": 9})
    rows = rows_of([Request(one, count=2), Request(two)])
    assert set(rows.columns) == {"answer", "hard", "level", "late"}
    np.testing.assert_array_equal(rows.columns["answer"], [3, 3, 4.5])
    np.testing.assert_array_equal(rows.columns["hard"], [1, 1, 0])
    np.testing.assert_array_equal(rows.columns["level"], [2.5, 2.5, np.nan])
    np.testing.assert_array_equal(rows.columns["late"], [np.nan, np.nan, 9])


@pytest.mark.parametrize(
    "request_, message",
    [
        (Request(ABC, options={"topk": 3}), r"take the options \['min_new', .*'top_p'\], got \['topk'\]"),
        (Request(ABC, options={"top_k": -1}), r"top_k is 0 \(off\) or more, got -1"),
        (Request(ABC, options={"top_p": 0.0}), r"top_p is above 0, and 1 \(off\) at most, got 0.0"),
        (Request(ABC, options={"top_p": 1.5}), r"top_p .* got 1.5"),
        (Request(ABC, options={"min_p": 1.5}), r"min_p is 0 \(off\) to 1, got 1.5"),
        (Request(ABC, options={"min_new": -2}), "min_new .* got -2"),
        (Request(ABC, temperature=-0.5), r"temperature is 0 \(greedy\) or above, got -0.5"),
        (Request(ABC, temperature=float("nan")), "temperature .* got nan"),
        (Request(Prompt(3, "")), "a context has no tokens"),
        (Request(ABC, context=np.zeros(0, int)), "a context has no tokens"),
        (Request(ABC, stop=("",)), "a stop has no tokens, got ''"),
        (Request(ABC, max_new=0), "prompt 7 asks for nothing: count 1, a prefix of 0 decisions and max_new 0"),
        (Request(ABC, max_new=-1, prefix="xyz"), "max_new -1"),
        (Request(ABC, count=0), "count 0"),
        (Request(ABC, prefix=(np.array([1, 2]), np.array([-1.0]))), r"got shapes \(2,\) and \(1,\)"),
    ],
)
def test_what_cannot_be_is_an_error_in_words(request_, message):
    with pytest.raises(ValueError, match=message):
        rows_of([Request(DE), request_])


# ---- cells ---------------------------------------------------------------------------------------------------------

MIXED = [
    Request(ABC, count=5),
    Request(DE, count=2, options={"min_new": 2, "top_k": 4, "top_p": 0.5, "min_p": 0.1}),
    Request(ABC, count=2, prefix="xy", max_new=3, stop=("zz",)),
    Request(Prompt(9, "fghij"), temperature=0.0),
]


@pytest.mark.parametrize("width, slots", [(1, 1), (2, 3), (3, 2), (4, 8), (7, 4)])
def test_pack_holds_every_row_once_one_context_per_slot(width, slots):
    rows = rows_of(MIXED)
    launches = pack(rows, width=width, slots=slots)
    assert all(launch.shape == (slots, width) for launch in launches)
    placed = np.concatenate([launch.reshape(-1) for launch in launches])
    np.testing.assert_array_equal(np.sort(placed[placed >= 0]), np.arange(len(rows)))
    for slot in np.concatenate(launches):
        assert len(set(rows.sampled_under[slot[slot >= 0]])) <= 1
    assert sum((launch >= 0).any() for launch in launches) == len(launches)
    needed = sum(-(-n // width) for n in Counter(rows.sampled_under.tolist()).values())
    assert len(launches) == -(-needed // slots)


def test_cells_say_of_every_row_what_was_asked():
    rows = rows_of(MIXED)
    (launch,) = pack(rows, width=3, slots=8)
    cells = cells_of(rows, launch, context_width=16, decisions=12)
    assert cells.contexts.shape == (8, 16) and cells.given.shape == (8, 3, 12)
    for slot, members in enumerate(launch):
        for place, i in enumerate(members):
            cell = {name: value[slot, place] for name, value in cells._asdict().items() if value.shape[:2] == (8, 3)}
            if i < 0:
                assert cell["budget"] == 0 and cell["prompt_ids"] == -1 and not cell["stops_apply"].any()
                continue
            n = rows.contexts.lengths[rows.sampled_under[i]]
            assert cells.context_lengths[slot] == n
            np.testing.assert_array_equal(cells.contexts[slot, :n], rows.contexts.tokens[rows.sampled_under[i]][:n])
            for name in ("given_lengths", "budget", "temperature", "prompt_ids", "index"):
                assert cell[name] == getattr(rows, name)[i], name
            for name in ("top_k", "top_p", "min_p"):
                assert cell[name] == np.float32(rows.options[name][i]), name
            assert cell["minimum"] == rows.options["min_new"][i] + rows.given_lengths[i]
            np.testing.assert_array_equal(cell["given"][:2], rows.given[i, :2])
            np.testing.assert_array_equal(cell["stops_apply"], rows.stops_apply[i])
    assert (cells.context_lengths >= 1).all()
    floats = {"temperature", "top_p", "min_p"}
    kinds = {name: value.dtype for name, value in cells._asdict().items()}
    assert all(kinds[n] == (np.float32 if n in floats else bool if n == "stops_apply" else np.int32) for n in kinds)


# ---- rollouts ------------------------------------------------------------------------------------------------------


def test_rollout_keeps_apart_what_exists_what_is_trained_and_what_was_drawn():
    rows = rows_of(
        [
            Request(ABC, max_new=4),
            Request(ABC, prefix=given([1, 2], np.nan, -0.5), max_new=2),
            Request(ABC, prefix=given([1, 2], np.nan, -0.5), max_new=2, train_given=True, temperature=0.0),
        ]
    )
    drawn = Drawn(
        tokens=np.arange(12).reshape(3, 4),
        lengths=np.array([3, 4, 3]),
        finished=np.array([True, False, True]),
        behavior_logps=np.full((3, 4), -2.0),
        sampler_logps=np.full((3, 4), -3.0),
    )
    got = rollout_of(rows, drawn, role="judge")
    nan = np.nan
    np.testing.assert_array_equal(got.behavior_logps, [[-2, -2, -2, nan], [nan, -0.5, -2, -2], [nan, -0.5, -2, nan]])
    np.testing.assert_array_equal(got.completion_mask, [[1, 1, 1, 0], [0, 1, 1, 1], [1, 1, 1, 0]])
    np.testing.assert_array_equal(got.exists, [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 0]])
    np.testing.assert_array_equal(got.completions, [[0, 1, 2, 0], [4, 5, 6, 7], [8, 9, 10, 0]])
    np.testing.assert_array_equal(got.finished, [True, False, True])
    np.testing.assert_allclose(got.temperature, [0.8, 0.8, 1.0])
    assert got.role == "judge" and got.scores.shape == (3, 0) and got.channels == ()
    np.testing.assert_array_equal(got.weights, 1)
    np.testing.assert_array_equal(got.update_ids, -1)


def test_injected_rows_need_no_model():
    rows = rows_of(
        [
            Request(ABC, count=2, prefix="xy", max_new=0, train_given=True),
            Request(ABC, prefix=given([1, 26, 2]), max_new=0),
            Request(ABC, prefix=given([25, 25]), max_new=0, stop=("zz",)),
            Request(ABC, prefix=given([25]), max_new=0, stop=("zz",)),
        ]
    )
    got = rollout_of(rows, None, role="policy")
    np.testing.assert_array_equal(got.lengths, [3, 3, 3, 2, 1])
    np.testing.assert_array_equal(got.finished, [True, True, False, True, False])
    np.testing.assert_array_equal(got.completion_mask.sum(1), [3, 3, 0, 0, 0])
    assert np.isnan(got.behavior_logps).all() and np.isnan(got.sampler_logps).all()
    assert got.injected.all()
    np.testing.assert_array_equal(got.temperature, 1)
