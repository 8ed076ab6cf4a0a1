"""`score` and functions that take too long: cut off, named, without harm to the next call."""

import asyncio
import contextlib
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from grpo_jax import rewards as R

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


def sleeps(completions):
    time.sleep(30)


def swallows_interrupts(completions):
    end = time.monotonic() + 30
    while time.monotonic() < end:
        with contextlib.suppress(Exception):
            time.sleep(0.01)


async def sleeps_async(completions):
    await asyncio.sleep(30)


async def blocks_the_loop(completions):
    time.sleep(3)


@pytest.mark.parametrize("function", [sleeps, swallows_interrupts, sleeps_async, blocks_the_loop])
def test_a_function_that_hangs(function, where):
    started = time.monotonic()
    with pytest.raises(
        R.RewardError, match=rf"reward '{function.__name__}' .* did not end within 0.2 s .*4 completions"
    ):
        where(lambda: score(function, time_limit=0.2))
    assert time.monotonic() - started < 2.5

    async def fine(completions):
        return [1.0] * 4

    started = time.monotonic()
    np.testing.assert_array_equal(where(lambda: score(fine)).scores, [[1]] * 4)
    assert time.monotonic() - started < 1.0  # the next call does not wait for what hangs


def test_a_coroutine_that_hangs_is_cancelled():
    ended = threading.Event()

    async def hangs(completions):
        try:
            await asyncio.sleep(30)
        finally:
            ended.set()

    with pytest.raises(R.RewardError, match="did not end"):
        score(hangs, time_limit=0.1)
    assert ended.wait(1.0)


def test_one_coroutine_that_hangs_does_not_spoil_the_others():
    async def fine(completions):
        return [1.0] * 4

    batch = score(fine, sleeps_async, "exact", time_limit=0.2, on_error="mask")
    np.testing.assert_array_equal(batch.scores[:, 0], [1, 1, 1, 1])
    assert np.isnan(batch.scores[:, 1]).all() and not np.isnan(batch.scores[:, 2]).any()
    assert len(batch.failures) == 1


def test_a_regular_expression_that_backtracks_for_ever_is_cut_off():
    """It never gives other threads a turn, so that only an interrupt of the main thread helps."""

    def backtracks(completions):
        return [float(bool(re.match(r"(a+)+$", "a" * 60 + "b"))) for _ in completions]

    started = time.monotonic()
    with pytest.raises(R.RewardError, match="did not end within 0.3 s"):
        score(backtracks, time_limit=0.3)
    assert time.monotonic() - started < 2


def test_an_interrupt_that_is_swallowed_comes_again():
    caught = []

    def stubborn(completions):
        while True:
            try:
                time.sleep(30)
            except:  # noqa: E722
                caught.append(time.monotonic())
                if len(caught) > 1:
                    raise

    with pytest.raises(R.RewardError, match="did not end within 0.1 s"):
        score(stubborn, time_limit=0.1)
    assert len(caught) == 2


def test_functions_that_set_alarms_work_and_alarms_of_others_survive():
    rung = []

    def with_alarm(completions):
        old = signal.signal(signal.SIGALRM, lambda *_: rung.append("inner"))
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        time.sleep(0.2)
        signal.signal(signal.SIGALRM, old)
        return [1.0] * 4

    previous = signal.signal(signal.SIGALRM, lambda *_: rung.append("outer"))
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    try:
        assert score(with_alarm).scores.all()
        assert rung == ["inner"]
        time.sleep(0.7)
        assert rung == ["inner", "outer"]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def test_a_process_with_hung_functions_can_exit():
    program = """
        import asyncio, threading, time
        from grpo_jax import rewards as R

        def hangs(completions):
            while True:
                time.sleep(0.1)

        async def hangs_async(completions):
            while True:
                time.sleep(0.1)

        def run():
            for function in (hangs, hangs_async):
                try:
                    R.score([R.resolve(function)], ["p"], ["c"], {}, time_limit=0.1)
                except R.RewardError as error:
                    print("stopped")

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, capture_output=True, text=True, timeout=40
    )
    assert (done.returncode, done.stdout) == (0, "stopped\nstopped\n"), done.stderr


def test_overhead_is_below_a_millisecond(where):
    columns = {name: values * 128 if isinstance(values, list) else values for name, values in COLUMNS.items()}
    prompts, completions = PROMPTS * 128, COMPLETIONS * 128
    values = [1.0] * 512
    rewards = [R.resolve(lambda prompts, completions, **columns: values)]

    def quickest():
        times = [1.0]
        for attempt in range(1000):  # on a busy machine the quick one may be a while in coming
            started = time.perf_counter()
            R.score(rewards, prompts, completions, columns)
            times.append(time.perf_counter() - started)
            if attempt >= 50 and min(times) < 1e-3:
                break
        return min(times)

    assert where(quickest) < 1e-3
