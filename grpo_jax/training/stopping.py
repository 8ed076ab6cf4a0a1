"""Where a run pauses: asked from outside, without losing a step, or because something is due."""

from __future__ import annotations

import math
import signal
import threading

from grpo_jax.processes import count, exchange


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

    def agreed(self) -> bool:
        """Whether any process of the run was asked; all call it at the same places, and so stop at the same step."""
        return self.asked if count() == 1 else "stop" in exchange("stop" if self.asked else "", "the end of a step")

    def _ask(self, *_: object) -> None:
        self.asked = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def due(step: int, every: int) -> bool:
    """Whether what happens every so many steps (0: never) is due, step 0 apart."""
    return every > 0 and step > 0 and step % every == 0


def next_due(step: int, every: int) -> float:
    """The next step after this one at which it is due."""
    return step - step % every + every if every else math.inf
