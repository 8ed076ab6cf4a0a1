"""Stopping a run from outside, without losing a step."""

from __future__ import annotations

import signal
import threading


class StopSignal:
    """SIGTERM (a preemption, a scheduler) asks for a stop after the step in hand."""

    asked = False

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *exception: object) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._before)

    def _ask(self, *_: object) -> None:
        self.asked = True
