"""Stopping a run from outside, without losing a step."""

from __future__ import annotations

import signal
import threading


class StopSignal:
    """Ctrl-C, or SIGTERM (a preemption, a scheduler), asks for a stop after the step in hand; the second one stops at
    once."""

    asked = False

    def __enter__(self) -> StopSignal:
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _ask(self, *_: object) -> None:
        self.asked = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
