"""The line between the processes of a run: what they tell each other, and how one that ends ends the others.

It goes over the coordinator of `jax.distributed`, a key-value store in process 0, and not over the devices: it works
before there are any, and while they compute.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

PATIENCE = 3600.0  # seconds to wait for a process that is alive and says nothing
SETTLE = 10.0  # seconds in which processes that fail alike say so
WATCH = 1.0  # seconds between two looks at the others
FAREWELL = 300.0  # seconds that process 0 stays for those that still work
GOES_ON = "The same command on all of them goes on from the newest checkpoint"


class Disagreement(ValueError):
    """The processes of a run differ where they must be equal."""


class Group:
    """This process among `count`: its number, the others' names, and the thread that watches over them."""

    def __init__(self, client: Any, *, index: int, count: int) -> None:
        self.client, self.index, self.count = client, index, count
        self.names: list[str] = []
        self.section = 0  # of the calls that all processes make together, the number of the one that is open
        self.depth = 0
        self.failed = False  # in this section
        self.broken = self.over = False  # not all stand at the same place any more; nothing more is done
        self.live = set(range(count))
        self._exchanges = 0
        self._seen: dict[int, float] = {}  # when another process was first found to be ending
        self.names = [f"process {i} of {count} ({host})" for i, host in enumerate(self.exchange(socket.gethostname()))]
        self._on_abort = ctypes.CFUNCTYPE(None, ctypes.c_int)(self.aborted)  # Python's own handlers come too late
        ctypes.CDLL(None).signal(int(signal.SIGABRT), self._on_abort)
        self.thread = threading.Thread(target=self.watch, name="processes", daemon=True)
        self.thread.start()

    def exchange(self, value: str, what: str = "the start of the run") -> list[str]:
        """Every process's value. Raises: TimeoutError naming the process that did not come."""
        here, before = f"grpo_jax/said/{self._exchanges}/", f"grpo_jax/said/{self._exchanges - 1}/"
        self._exchanges += 1
        self.client.key_value_set(f"{here}{self.index}", value)
        if self.index:
            return json.loads(self._wait_for(f"{here}all", 0, what))
        values = [value] + [self._wait_for(f"{here}{i}", i, what) for i in range(1, self.count)]
        self.client.key_value_set(f"{here}all", json.dumps(values))
        self.client.key_value_delete(before)  # who has come here has read it
        return values

    def _wait_for(self, key: str, process: int, what: str) -> str:
        try:
            return self.client.blocking_key_value_get(key, int(PATIENCE * 1000))
        except Exception as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
            raise TimeoutError(f"{self.named(process)} did not come to {what} within {PATIENCE:.0f} s") from error

    def named(self, process: int) -> str:
        return self.names[process] if self.names else f"process {process} of {self.count}"

    def say_failed(self, error: BaseException) -> None:
        """Let the others know that this process cannot go on with what all do together."""
        self.failed = True
        with contextlib.suppress(Exception):  # the coordinator may be the one that is gone
            text = f"{type(error).__name__}: {error}"
            self.client.key_value_set(f"grpo_jax/failed/{self.section}/{self.index}", text, allow_overwrite=True)

    def failures(self) -> dict[int, str]:
        """What the processes that failed in this section said."""
        said = self.client.key_value_dir_get(f"grpo_jax/failed/{self.section}/")
        return {int(key.rpartition("/")[2]): text for key, text in said}

    def watch(self) -> None:
        """Until the end: look whether the others are still there, and stop if they are not."""
        while not self.over:
            try:
                self.live = set(self.client.get_live_nodes(list(range(self.count))))
                said = self.failures()
                if self.depth and not self.over:
                    self._judge(said)
                time.sleep(WATCH)
            except Exception:
                if self.depth and not self.over:
                    self.stop(f"{self.named(0)}, the coordinator, died or lost its connection")
                return

    def aborted(self, signal_number: int) -> NoReturn:
        """JAX aborts, from a thread of its own, when the coordinator is gone: a stack trace, and no word of the run."""
        print(
            f"grpo-jax: {self.named(self.index)} was aborted, for the reason above the stack trace; most likely "
            f"{self.named(0)}, the coordinator, died or lost its connection. {GOES_ON}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(128 + signal_number)

    def _judge(self, said: dict[int, str]) -> None:
        gone = set(range(self.count)) - self.live
        if dead := [i for i in sorted(gone) if i not in said]:
            self.stop(f"{self.named(dead[0])} died, ended or lost its connection")
        now = time.monotonic()
        for process in said.keys() - {self.index}:
            waited = now - self._seen.setdefault(process, now)
            if not self.failed and (process in gone or waited > 2 * SETTLE):
                self.stop(f"{self.named(process)} failed: {said[process]}")

    def stop(self, why: str) -> NoReturn:
        """End this process at once: its main thread may wait for an answer that will never come."""
        show_cursor = "\x1b[?25h\n" if sys.stdout.isatty() else ""
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.write(show_cursor if stream is sys.stdout else "")
                stream.flush()
        print(f"grpo-jax: {why}; {self.named(self.index)} stops too. {GOES_ON}", file=sys.stderr, flush=True)
        self._wait_for_last_words()
        os._exit(1)

    def _wait_for_last_words(self) -> None:
        """The coordinator stays until the others have said why they stop."""
        end = time.monotonic() + 3 * SETTLE
        with contextlib.suppress(Exception):
            self.client.key_value_set(f"grpo_jax/left/{self.index}", "", allow_overwrite=True)
            while self.index == 0 and time.monotonic() < end:
                left = {int(key.rpartition("/")[2]) for key, _ in self.client.key_value_dir_get("grpo_jax/left/")}
                if left >= self.live:
                    return
                time.sleep(0.1)

    def leave(self) -> None:
        """At the end of the process. The coordinator stays until the others are gone: without it they would crash."""
        if self.broken:  # the others may be gone, and JAX's farewell to them would not end
            sys.stdout.flush()
            sys.stderr.flush()
            self._wait_for_last_words()  # while the thread goes on: the others' looks wait for all that live
            os._exit(1)
        import jax

        self.over = True

        with contextlib.suppress(Exception):
            end = time.monotonic() + FAREWELL
            while self.index == 0 and time.monotonic() < end:
                if set(self.client.get_live_nodes(list(range(self.count)))) == {0}:
                    break
                time.sleep(0.05)
        jax.distributed.shutdown()


_group: Group | None = None


def enter(group: Group) -> None:
    """From here on this process is one of a group."""
    global _group
    _group = group


def current() -> Group | None:
    return _group


def count() -> int:
    """How many processes run this together."""
    return _group.count if _group else 1


def index() -> int:
    """Which of them this is, from 0. Process 0 is the one that writes and speaks."""
    return _group.index if _group else 0


def name(process: int | None = None) -> str:
    """ "process 1 of 4 (its host)", of this process or of another; nothing if there is only one."""
    return "" if _group is None else _group.named(_group.index if process is None else process)


def exchange(value: str, what: str) -> list[str]:
    """What every process says, in their order. All must call it, in the same order; `what` names the occasion.

    Raises: TimeoutError naming a process that is alive and does not come within an hour.
    """
    return [value] if _group is None else _group.exchange(value, what)


def agree(what: str, value: Callable[[], str]) -> None:
    """Raises: Disagreement, on every process, if they do not all say the same."""
    if _group is None:
        return
    said = _group.exchange(value(), what)
    usual = Counter(said).most_common(1)[0][0]
    if other := [i for i, text in enumerate(said) if text != usual]:
        one = next(i for i, text in enumerate(said) if text == usual)
        raise Disagreement(
            f"the processes disagree about {what}: {_group.named(one)} says {usual}; {_group.named(other[0])} says "
            f"{said[other[0]]}. All must compute the same: look for what depends on the host, the time, the order of a "
            "set, or random numbers other than those of the given key"
        )


def run_by_first(action: Callable[[], None], what: str) -> None:
    """Process 0 does it; what it raises, every process raises."""
    error: Exception | None = None
    if index() == 0:
        try:
            action()
        except Exception as caught:
            error = caught
    (text, *_) = exchange("" if error is None else f"{error}" or type(error).__name__, what)
    if error is not None:
        raise error
    if text:
        raise ValueError(text)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What all processes do together: in here, one that fails, leaves or dies ends the others, within a stated time.

    That is `heartbeat` seconds (see `join`) for one that dies without a word, and half a minute for one that fails.
    """
    group = _group
    if group is None or group.depth:
        yield
        return
    group.section += 1
    group._seen.clear()
    group.depth, group.failed = 1, False
    try:
        yield
        group.exchange("", "the end of what all do together")
    except BaseException as error:
        if not group.failed:
            settle(error)
        raise
    finally:
        group.depth = 0


def settle(error: BaseException) -> bool:
    """Whether all processes failed here, and so still stand at the same place. Notes on the error those that did not.

    One whose user wants it to end at once (a second Ctrl-C) does not wait for the others.
    """
    group = _group
    if group is None:
        return True
    group.say_failed(error)
    group.broken = not isinstance(error, Exception)
    if group.broken:
        return False
    end, said = time.monotonic() + SETTLE, {}
    with contextlib.suppress(Exception):
        while len(said := group.failures()) < group.count and time.monotonic() < end:
            time.sleep(0.1)
    if len(said) == group.count:
        return True
    group.broken = True
    silent = ", ".join(group.named(i) for i in range(group.count) if i not in said)
    for i, text in said.items():
        if i != group.index:
            error.add_note(f"{group.named(i)} stops too: {text}")
    error.add_note(f"nothing was heard within {SETTLE:.0f} s from {silent}, whose own output may say more")
    return False
