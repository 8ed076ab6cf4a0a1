"""Calls that end: a function of a user's, or several coroutines, within so many seconds.

On the main thread an interval timer interrupts the call, so that even a regular expression that backtracks for ever
(it never lets another thread run) is cut off, and functions that set alarms of their own work. On another thread the
call goes to a daemon thread, which is left behind when it hangs and does not keep the process from ending.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import queue
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, cast


class OutOfTime(Exception):
    """The call did not end within its limit."""


class _Interrupt(BaseException):
    """Raised in the middle of a user's function; no `except Exception` of his may swallow it."""


def call(function: Callable[[], Any], seconds: float) -> Any:
    """What `function()` returns or raises; OutOfTime after `seconds`."""
    if hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread():
        return _call_with_timer(function, seconds)
    return _call_on_daemon(function, seconds)


def _call_with_timer(function: Callable[[], Any], seconds: float) -> Any:
    inside = True

    def interrupt(*_):
        if inside:
            raise _Interrupt

    started = time.monotonic()
    handler = signal.signal(signal.SIGALRM, interrupt)
    # Again every second, should the first interrupt be swallowed by a bare `except:` or a destructor.
    others_left, others_interval = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        try:
            return function()
        finally:
            inside = False
    except _Interrupt:
        raise OutOfTime from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL if handler is None else handler)
        if others_left:
            left = others_left - (time.monotonic() - started)
            signal.setitimer(signal.ITIMER_REAL, max(left, 1e-3), others_interval)


def _call_on_daemon(function: Callable[[], Any], seconds: float) -> Any:
    outcome: queue.SimpleQueue = queue.SimpleQueue()

    def run():
        try:
            outcome.put((function(), None))
        except BaseException as error:
            outcome.put((None, error))

    threading.Thread(target=run, name="reward", daemon=True).start()
    try:
        value, error = outcome.get(timeout=seconds)
    except queue.Empty:
        raise OutOfTime from None
    if error is not None:
        raise error
    return value


_loop: asyncio.AbstractEventLoop | None = None
_loop_thread: threading.Thread | None = None
_loop_lock = threading.Lock()


def gather(awaitables: Sequence[Awaitable], seconds: float) -> list[Any]:
    """What each of the awaitables returned, or the exception it raised; OutOfTime() for those not done by then.

    They run at the same time, on an event loop that lives on a thread of its own: it serves notebooks, whose thread has
    a running loop already, and clients that are kept from call to call.
    """
    if not awaitables:
        return []
    future = asyncio.run_coroutine_threadsafe(_finish(awaitables, seconds), _running_loop())
    try:
        return future.result(timeout=seconds + 1.0)
    except concurrent.futures.TimeoutError:  # a coroutine blocks the loop itself: leave the thread behind
        _abandon_loop()
        return [OutOfTime() for _ in awaitables]
    except BaseException:
        future.cancel()
        raise


async def _finish(awaitables: Sequence[Awaitable], seconds: float) -> list[Any]:
    async def wait_for(awaitable):
        return await awaitable

    tasks = [asyncio.create_task(wait_for(awaitable)) for awaitable in awaitables]
    try:
        done, pending = await asyncio.wait(tasks, timeout=seconds)
    except asyncio.CancelledError:
        for task in tasks:
            task.cancel()
        raise
    for task in pending:
        task.cancel()
    outcomes: list[Any] = []
    for task in tasks:
        if task not in done:
            outcomes.append(OutOfTime())
        elif task.cancelled():
            outcomes.append(asyncio.CancelledError("the coroutine cancelled itself"))
        else:
            outcomes.append(task.exception() or task.result())
    return outcomes


def _running_loop() -> asyncio.AbstractEventLoop:
    global _loop, _loop_thread
    with _loop_lock:
        if _loop_thread is None or not _loop_thread.is_alive():  # not alive: a forked process has no threads
            _loop = asyncio.new_event_loop()
            _loop_thread = threading.Thread(target=_loop.run_forever, name="rewards' event loop", daemon=True)
            _loop_thread.start()
        return cast(asyncio.AbstractEventLoop, _loop)


def _abandon_loop() -> None:
    global _loop_thread
    with _loop_lock:
        loop = cast(asyncio.AbstractEventLoop, _loop)
        loop.call_soon_threadsafe(loop.stop)
        _loop_thread = None
