"""`score`: what functions are given, what they may return, and how each failure is told."""

import asyncio
import functools
import gc
import re
import sys
import threading
import time
import traceback
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import rewards as R
from grpo_jax.types import Scored

ROOT = Path(__file__).parents[2]
PROMPTS = ["2+2=", "2+2=", "3+3=", "3+3="]
COMPLETIONS = ["4", "5", "6", "7"]
COLUMNS = {
    "answer": ["4", "4", "6", "6"],
    "step": 3,
    "prompt_id": [10, 10, 11, 11],
    "completion_ids": [[52], [53], [54], [55]],
    "finished": [True, True, True, False],
    "lengths": [1, 1, 1, 1],
}


def score(*functions, prompts=PROMPTS, completions=COMPLETIONS, columns=COLUMNS, **options):
    return R.score([R.resolve(f) for f in functions], prompts, completions, columns, **options)


def on_a_thread(function):
    """What the function returns or raises when it runs on another thread than the main one."""
    outcome = []

    def run():
        try:
            outcome.append(function())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


@pytest.fixture(params=["main thread", "other thread"])
def where(request):
    return (lambda function: function()) if request.param == "main thread" else on_a_thread


# What a function is given


def test_a_function_gets_the_columns_that_it_names():
    seen = {}

    def named(completions, answer, prompt_id):
        seen["named"] = (completions, answer, prompt_id)
        return [float(c == a) for c, a in zip(completions, answer)]

    def everything(prompts, completions, **columns):
        seen["everything"] = (prompts, completions, columns)
        return [0.0] * len(prompts)

    def by_position(prompts, completions, /, lengths, unknown=None):
        seen["by_position"] = (prompts, completions, lengths, unknown)
        return lengths

    class Stateful:
        def __call__(self, *, completions, finished):
            return finished

    batch = score(named, everything, by_position, Stateful())
    assert seen["named"] == (COMPLETIONS, COLUMNS["answer"], COLUMNS["prompt_id"])
    assert seen["everything"] == (PROMPTS, COMPLETIONS, COLUMNS)
    assert seen["by_position"] == (PROMPTS, COMPLETIONS, COLUMNS["lengths"], None)
    np.testing.assert_array_equal(batch.scores, [[1, 0, 1, 1], [0, 0, 1, 1], [1, 0, 1, 1], [0, 0, 1, 0]])
    assert batch.scores.dtype == batch.weights.dtype == np.float32
    assert batch.channels == ("named", "everything", "by_position", "Stateful")
    assert (batch.columns, batch.failures) == ({}, [])


def test_chat_prompts_and_completions_are_passed_as_they_are():
    prompts = [[{"role": "user", "content": p}] for p in PROMPTS]
    completions = [[{"role": "assistant", "content": c}] for c in COMPLETIONS]

    def trl_style(completions, **kwargs):
        return [float(len(c[0]["content"])) for c in completions]

    batch = score(trl_style, "exact", "numeric", prompts=prompts, completions=completions)
    np.testing.assert_array_equal(batch.scores, [[1, 1, 1], [1, 0, 0], [1, 1, 1], [1, 0, 0]])


def test_a_missing_column_is_an_error_before_any_function_is_called():
    def first(completions):
        raise AssertionError("called")

    def needy(completions, anwser, level):
        return []

    rewards = [R.resolve(first), R.resolve(needy)]
    wanted = r"reward 'needy' \(.*test_reward_scoring.py:\d+\) needs 'anwser' and 'level'.*There are: prompts, .*answer"
    with pytest.raises(ValueError, match=wanted + ".*Did you mean 'answer'"):
        R.score(rewards, PROMPTS, COMPLETIONS, COLUMNS)
    with pytest.raises(ValueError, match="anwser"):
        R.check(rewards, COLUMNS)
    R.check(rewards, [*COLUMNS, "anwser", "level"])
    with pytest.raises(ValueError, match="needs 'solution'"):
        score({"function": "exact", "column": "solution"})
    with pytest.raises(ValueError, match="the column 'completions' has the name"):
        R.check([], ["completions"])


def test_a_bound_option_is_not_replaced_by_a_column_of_its_name():
    def above(completions, lengths, answer="x"):
        return [float(answer == "mine")] * len(completions)

    assert score({"function": above, "answer": "mine"}).scores.all()
    assert score(functools.partial(above, answer="mine")).scores.all()
    assert not score(above).scores.any()

    def takes_all(completions, **columns):
        return [float(columns["answer"] == "mine" and columns["step"] == 3)] * len(completions)

    assert score(functools.partial(takes_all, answer="mine")).scores.all()


def test_columns_have_one_value_per_completion():
    with pytest.raises(ValueError, match="'answer' has 3 values for 4 completions"):
        score("exact", columns={**COLUMNS, "answer": ["4"] * 3})
    with pytest.raises(ValueError, match="2 prompts, 4 completions"):
        score("exact", prompts=["a", "b"])


# What it may return


def test_none_becomes_nan():
    batch = score(lambda completions: [1, None, True, np.float16(0.5)], lambda completions: [None] * 4)
    np.testing.assert_array_equal(batch.scores[:, 0], [1, np.nan, 1, 0.5])
    assert np.isnan(batch.scores[:, 1]).all()
    assert batch.channels == ("reward", "reward_2")


@pytest.mark.parametrize("make", [np.asarray, jnp.asarray, tuple, lambda v: [jnp.asarray(x) for x in v]])
def test_arrays_of_any_library(make):
    np.testing.assert_array_equal(score(lambda completions: make([0.5, 1, 2, 3])).scores[:, 0], [0.5, 1, 2, 3])


def test_async_functions_run_together_and_in_a_notebook(where):
    loops = []

    async def slow(completions, lengths):
        loops.append(asyncio.get_running_loop())
        await asyncio.sleep(0.2)
        return lengths

    def returns_an_awaitable(completions):
        return slow(completions, [2.0] * 4)

    started = time.monotonic()
    batch = where(lambda: score(slow, slow, returns_an_awaitable))
    assert time.monotonic() - started < 0.5
    np.testing.assert_array_equal(batch.scores, [[1, 1, 2]] * 4)

    async def notebook():  # a cell runs inside a loop
        return score(slow)

    np.testing.assert_array_equal(asyncio.run(notebook()).scores, [[1]] * 4)
    assert len(set(loops)) == 1  # so that a client made in one call still works in the next


def test_scored_gives_channels_and_columns():
    def judge(completions):
        return Scored(
            {"helpful": [1.0, None, 0.5, 0.25], "steps": np.arange(8.0).reshape(4, 2)},
            {"spans": np.ones((4, 3), bool)},
        )

    batch = score({"function": judge, "weight": {"helpful": 2.0, "steps": 0.5}}, {"function": "exact", "weight": -1})
    assert batch.channels == ("helpful", "steps/0", "steps/1", "exact")
    np.testing.assert_array_equal(batch.weights, [2.0, 0.5, 0.5, -1.0])
    np.testing.assert_array_equal(batch.scores, [[1, 0, 1, 1], [np.nan, 2, 3, 0], [0.5, 4, 5, 1], [0.25, 6, 7, 0]])
    assert batch.columns["spans"].shape == (4, 3)


def test_names_are_kept_apart():
    batch = score("exact", {"function": "exact", "name": "exact_2"}, "exact")
    assert batch.channels == ("exact", "exact_2", "exact_3")


def test_no_completions_and_no_rewards():
    def never(completions):
        raise AssertionError("called")

    empty = {name: [] for name in COLUMNS}
    batch = score(never, "exact", prompts=[], completions=[], columns=empty)
    assert batch.scores.shape == (0, 2) and batch.channels == ("never", "exact")
    assert score().scores.shape == (4, 0)


# What goes wrong


def raises_on_six(completions):
    return [1.0 / (int(c) - 6) for c in completions]


async def raises_on_six_later(completions):
    await asyncio.sleep(0)
    return raises_on_six(completions)


@pytest.mark.parametrize("function", [raises_on_six, raises_on_six_later])
def test_a_function_that_raises(function, where):
    wanted = rf"reward '{function.__name__}' \(.*\) raised ZeroDivisionError: .*completion 2 of 4 \(prompt id 11\): '6'"
    with pytest.raises(R.RewardError, match=wanted) as caught:
        where(lambda: score(function))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    frames = [frame.name for frame in traceback.extract_tb(caught.value.__cause__.__traceback__)]
    assert "raises_on_six" in frames

    batch = where(lambda: score("exact", function, on_error="mask"))
    np.testing.assert_array_equal(batch.scores[:, 0], [1, 0, 1, 0])
    assert np.isnan(batch.scores[:, 1]).all()
    assert len(batch.failures) == 1 and "ZeroDivisionError" in batch.failures[0]


def test_a_function_that_raises_only_on_the_whole_batch_or_exits():
    def whole(completions):
        if len(completions) > 1:
            raise KeyError("no such thing")
        return [1.0]

    with pytest.raises(R.RewardError, match="KeyError: 'no such thing'; it was called on 4 completions, first .* '4'"):
        score(whole)
    with pytest.raises(R.RewardError, match="SystemExit"):
        score(lambda completions: sys.exit(3))


@pytest.mark.parametrize(
    "returned, message",
    [
        ([1.0], "returned 1 value for 4 completions"),
        ([], "returned 0 values for 4 completions"),
        ([1.0] * 5, "returned 5 values for 4 completions"),
        (1.0, r"returned 1.0 \(float\), expected a list"),
        (None, "returned nothing, expected a list"),
        ("abcd", r"returned 'abcd' \(str\)"),
        ({"a": [1.0] * 4}, r"\(dict\).*returned as Scored"),
        ((x for x in range(4)), r"\(generator\)"),
        ([[1.0]] * 4, "returned lists in its list"),
        (np.ones((4, 1)), "returned lists in its list"),
        (np.float32(1.0), r"returned 1.0 \(float\)"),
        (Scored({"a": [1.0] * 3}), "returned in its channel 'a' 3 values"),
        (Scored({"a": [[1.0], [1.0, 2.0], [1.0], [1.0]]}), "rows of different lengths"),
        (Scored({"a": [1.0] * 4}, {"c": [1, 2]}), r"the column 'c' of shape \(2,\)"),
        (Scored({"a": [1.0] * 4}, {"c": ["x"] * 4}), "the column 'c' with <U1 values"),
    ],
)
def test_not_one_number_per_completion(returned, message):
    with pytest.raises(R.RewardError, match=r"^reward 'wrong' \(.*" + message):
        score({"function": lambda completions: returned, "name": "wrong"})
    batch = score({"function": lambda completions: returned, "name": "wrong"}, on_error="mask")
    assert np.isnan(batch.scores).all() and batch.channels == ("wrong",) and len(batch.failures) == 1
    assert batch.columns == {}


@pytest.mark.parametrize("bad", [float("nan"), float("-inf"), 1e39, "1.0", "yes", object(), np.nan, 10**400, b"1", 1j])
def test_a_value_that_is_no_finite_number(bad):
    def wrong(completions):
        return [1.0, bad, None, bad]

    shown = re.escape(repr(bad))
    with pytest.raises(
        R.RewardError, match=rf"(?s)returned {shown[:77]}.*2 completions, first completion 1 of 4 \(prompt id 10\): '5'"
    ):
        score(wrong)
    batch = score(wrong, on_error="mask")
    np.testing.assert_array_equal(batch.scores[:, 0], [1, np.nan, np.nan, np.nan])
    assert len(batch.failures) == 1 and "2 completions" in batch.failures[0]


def test_a_bad_value_in_a_channel_marks_that_row_of_that_channel():
    def judge(completions):
        return Scored({"a": [1.0] * 4, "b": np.array([[0, 1], [2, np.nan], [4, 5], [6, 7.0]])})

    with pytest.raises(R.RewardError, match="returned nan in its channel 'b'.*completion 1 of 4"):
        score(judge)
    batch = score(judge, on_error="mask")
    np.testing.assert_array_equal(batch.scores, [[1, 0, 1], [1, np.nan, np.nan], [1, 4, 5], [1, 6, 7]])


def test_channels_stay_the_same_when_a_later_call_fails_and_may_not_change():
    answers = [Scored({"a": [1.0] * 4, "b": [2.0] * 4}), ValueError("down"), Scored({"a": [1.0] * 4})]

    def judge(completions):
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    rewards = [R.resolve(judge)]
    batches = [R.score(rewards, PROMPTS, COMPLETIONS, COLUMNS, on_error="mask") for _ in range(3)]
    assert [batch.channels for batch in batches] == [("a", "b")] * 3
    assert np.isnan(batches[1].scores).all() and "down" in batches[1].failures[0]
    assert "returned the channels ['a'], earlier ['a', 'b']" in batches[2].failures[0]

    weighed = {"function": lambda completions: 1 / 0, "weight": {"a": 1.0, "b": 0.5}}
    batch = score(weighed, on_error="mask")  # fails in its first call: the weights name the channels
    assert batch.channels == ("a", "b")
    np.testing.assert_array_equal(batch.weights, [1.0, 0.5])
    with pytest.raises(R.RewardError, match=r"returned the channels \['x'\], but has weights for \['a'\]"):
        score({"function": lambda completions: Scored({"x": [1.0] * 4}), "weight": {"a": 1.0}})


def test_two_functions_may_not_return_the_same_column():
    def judge(completions):
        return Scored({}, {"c": [1, 2, 3, 4]})

    with pytest.raises(R.RewardError, match="returned the column 'c', as a reward function before it did"):
        score(judge, {"function": judge, "name": "other"})


def test_a_long_completion_is_shortened_in_messages():
    completions = ["5", "x" * 5000 + "END", "5", "5"]
    with pytest.raises(R.RewardError, match=r"'x{100} \.\.\. x{97}END'"):
        score(lambda completions: [float(c) for c in completions], completions=completions)


def test_completions_that_are_no_text():
    with pytest.raises(R.RewardError, match=r"completion 1 of 2: 'array\(\[1, 2\]\)'"):
        score(
            lambda completions: [1.0 / (2 - len(c)) for c in completions],
            prompts=["a", "b"],
            completions=[np.arange(1), np.array([1, 2])],
            columns={},
        )


def test_a_failed_call_leaves_no_coroutine_behind(recwarn):
    async def later(completions):
        return [1.0] * 4

    with pytest.raises(R.RewardError, match="ZeroDivisionError"):
        score(later, raises_on_six)
    gc.collect()
    assert not [w for w in recwarn if "never awaited" in str(w.message)]


def test_options_are_checked():
    with pytest.raises(ValueError, match="on_error must be 'stop' or 'mask'"):
        score("exact", on_error="ignore")
    with pytest.raises(ValueError, match="time_limit"):
        score("exact", time_limit=0)
