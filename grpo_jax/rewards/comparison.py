"""A few processes that compare mathematical expressions, each comparison within a time limit.

Symbolic algebra can run for ever or exhaust memory, and nothing inside a process can be relied upon to stop it: so it
happens in processes that are killed and replaced. They run `comparison_process.py` alone, started as a program of its
own: no copy of this process, no JAX, no second import of the user's script, whatever thread asks.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import enum
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, cast

PROGRAM = (sys.executable, "-P", str(Path(__file__).with_name("comparison_process.py")))
_GRACE = 1.0  # a process stops a slow comparison itself, which is cheaper than a new one; this long after, it is killed
_START = 120.0


class Outcome(enum.Enum):
    EQUAL = "equal"
    DIFFERENT = "different"
    NOT_MATHEMATICS = "not mathematics"  # the right answer could not be parsed
    TOO_SLOW = "too slow"
    CRASHED = "crashed"  # twice


class Comparisons:
    """Processes that are started when first needed and kept. One thread at a time may ask; others wait."""

    def __init__(self, program: Sequence[str] = PROGRAM):
        self._program = program
        self._processes: list[_Process] = []
        self._lock = threading.Lock()
        atexit.register(self.close)

    def judge(self, pairs: Sequence[tuple[str, str]], *, time_limit: float, processes: int) -> list[Outcome]:
        """For each pair (right answer, text with an answer) whether they agree.

        Takes at most `time_limit` + 1 seconds for each pair on one of the `processes`. Raises RuntimeError if the
        processes cannot be started.
        """
        with self._lock:
            try:
                return self._judge(pairs, time_limit, min(processes, len(pairs)))
            except BaseException:  # interrupted in the middle: what the processes are at is no longer known
                self.close()
                raise

    def close(self) -> None:
        """Ends the processes; the next question starts new ones."""
        for process in self._processes:
            process.kill()
        self._processes = []

    def _judge(self, pairs: Sequence[tuple[str, str]], time_limit: float, processes: int) -> list[Outcome]:
        outcomes: list[Outcome | None] = [None] * len(pairs)
        crashes: collections.Counter[int] = collections.Counter()
        todo = collections.deque(range(len(pairs)))
        replies: queue.SimpleQueue = queue.SimpleQueue()
        for process in list(self._processes):
            process.replies = replies
            if process.ended:  # since the last time; nobody was listening
                self._drop(process)
        while None in outcomes:
            for process in self._processes:
                if process.idle and todo:
                    process.ask(todo.popleft(), pairs, time_limit)
            while len(self._processes) < processes and len(todo) > sum(p.starting for p in self._processes):
                self._processes.append(_Process(self._program, replies))
            busy = [process for process in self._processes if not process.idle]
            try:
                process, reply = replies.get(timeout=max(min(p.deadline for p in busy) - time.monotonic(), 0))
            except queue.Empty:
                for process in [p for p in busy if p.deadline <= time.monotonic()]:
                    self._drop(process)
                    if process.asked is None:
                        raise RuntimeError(f"a process for mathematics did not start within {_START:g} s") from None
                    outcomes[process.asked] = Outcome.TOO_SLOW
                continue
            if process not in self._processes:  # the last words of one that was killed
                continue
            number, process.asked, was_starting = process.asked, None, process.starting
            process.starting = False
            if was_starting:
                if reply != "ready":
                    raise RuntimeError(f"a process for mathematics did not start: {reply or 'it ended at once'}")
            elif reply is not None:
                if number is not None:
                    outcomes[number] = Outcome(reply)
            else:
                self._drop(process)
                if number is not None:
                    crashes[number] += 1
                    if crashes[number] > 1:
                        outcomes[number] = Outcome.CRASHED
                    else:  # perhaps it was not the expression's fault
                        todo.append(number)
        return cast(list[Outcome], outcomes)

    def _drop(self, process: _Process) -> None:
        process.kill()
        self._processes.remove(process)


class _Process:
    """One process, the number of the pair that it was asked, and until when it may take."""

    def __init__(self, program: Sequence[str], replies: queue.SimpleQueue):
        self.replies = replies
        self.asked: int | None = None
        self.starting = True
        self.deadline = time.monotonic() + _START
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        self._process = subprocess.Popen(
            program,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        )
        self._questions = cast(IO[bytes], self._process.stdin)
        threading.Thread(target=self._listen, name="comparison", daemon=True).start()

    @property
    def idle(self) -> bool:
        return self.asked is None and not self.starting

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def ask(self, number: int, pairs: Sequence[tuple[str, str]], time_limit: float) -> None:
        self.asked, self.deadline = number, time.monotonic() + time_limit + _GRACE
        answer, text = pairs[number]
        with contextlib.suppress(OSError):  # it has ended; `_listen` says so
            self._questions.write(json.dumps([answer, text, time_limit]).encode() + b"\n")
            self._questions.flush()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        with contextlib.suppress(OSError):  # what it had not read
            self._questions.close()

    def _listen(self) -> None:
        with cast(IO[bytes], self._process.stdout) as lines:
            for line in lines:
                self.replies.put((self, json.loads(line)))
        self.replies.put((self, None))
