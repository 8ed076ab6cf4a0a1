"""The instruments of a run: a clock for where the time goes, a counter of compilations, and memory."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import jax

from grpo_jax.training.compilation import Explanations


class Clock:
    """Where the time goes: `with clock("sample"): ...` adds to a section, `lap()` reads all of them and starts anew.

    A section inside another is taken out of the outer one, so sections never count twice. JAX returns before the
    device has finished: wait for the section's result (`jax.block_until_ready`) before leaving it, or the next
    section pays.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._inner: list[float] = []  # per open section, seconds spent in sections inside it
        self._totals: dict[str, float] = {}
        self._start = time.perf_counter()

    @contextmanager
    def __call__(self, section: str) -> Iterator[None]:
        self._seconds.setdefault(section, 0.0)
        self._inner.append(0.0)
        start = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - start
            self._seconds[section] += elapsed - self._inner.pop()
            if self._inner:
                self._inner[-1] += elapsed

    def lap(self) -> dict[str, float]:
        """Seconds since the last lap: "seconds" in all, "seconds/<section>" for each, "seconds/other" for the rest."""
        if self._inner:
            raise RuntimeError("Clock.lap was called inside a section: leave the `with clock(...)` block first")
        now = time.perf_counter()
        total, self._start = now - self._start, now
        sections = self._seconds | {"other": max(total - sum(self._seconds.values()), 0.0)}
        if "other" in self._seconds:
            sections["other"] += self._seconds["other"]
        self._seconds = dict.fromkeys(self._seconds, 0.0)
        for name, seconds in sections.items():
            self._totals[name] = self._totals.get(name, 0.0) + seconds
        return {"seconds": total} | {f"seconds/{name}": seconds for name, seconds in sections.items()}

    def shares(self) -> dict[str, float]:
        """Share of each section, in [0, 1], of all laps so far."""
        total = sum(self._totals.values())
        return {name: seconds / total if total else 0.0 for name, seconds in self._totals.items()}


class Compilations(NamedTuple):
    """What XLA compiled (or fetched from its cache on disk) in some span of a run."""

    count: int
    seconds: float
    names: Counter[str]  # by function, "jit(step)"
    fetched: int = 0  # how many of them came from the cache
    causes: tuple[str, ...] = ()  # where they were `explained`: "step: batch['x'] is f32[4,7], was f32[4,5]"


class CompileCounter:
    """Counts XLA compilations from its creation (or the start of its `with` block) to `close`.

    `total` holds all of them, `lap()` those since the last lap; a function compiled more than once is in
    `recompiled()`. Costs nothing between compilations.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # compilation may happen on any thread
        self._events: list[tuple[str, float]] = []
        self._fetched: list[int] = []  # how many compilations had ended before each hit of the cache
        self._causes: list[tuple[int, str]] = []
        self._lapped = 0
        self._open = True
        jax.monitoring.register_event_duration_secs_listener(self._hear)
        jax.monitoring.register_event_listener(self._hear_of_cache)

    def _hear(self, event: str, seconds: float, **details: Any) -> None:
        if event.endswith("/backend_compile_duration"):
            with self._lock:
                self._events.append((str(details.get("fun_name", "unnamed")), seconds))

    def _hear_of_cache(self, event: str, **details: Any) -> None:
        if event.endswith("/compilation_cache/cache_hits"):
            with self._lock:
                self._fetched.append(len(self._events))

    @property
    def total(self) -> Compilations:
        """All compilations so far."""
        return self._since(0)

    def lap(self) -> Compilations:
        """The compilations since the last lap."""
        lap = self._since(self._lapped)
        self._lapped += lap.count
        return lap

    def recompiled(self) -> dict[str, int]:
        """Functions that were compiled more than once, and how often: each is a new shape, dtype or sharding."""
        return {name: count for name, count in self.total.names.items() if count > 1}

    def explained(self) -> AbstractContextManager[None]:
        """In this context it is also found out what differs, for each compilation, from the nearest one before."""
        return Explanations(self._note)

    def close(self) -> None:
        """Stop counting; what was counted stays readable."""
        if self._open:
            jax.monitoring.unregister_event_duration_listener(self._hear)
            jax.monitoring.unregister_event_listener(self._hear_of_cache)
        self._open = False

    def __enter__(self) -> CompileCounter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _since(self, start: int) -> Compilations:
        with self._lock:
            events = self._events[start:]
            fetched = sum(at >= start for at in self._fetched)
            causes = [cause for at, cause in self._causes if at >= start]
        names = Counter(name for name, _ in events)
        of_these = [cause for cause in causes if f"jit({cause.partition(':')[0]})" in names]  # not of what they call
        return Compilations(len(events), sum(s for _, s in events), names, fetched, tuple(dict.fromkeys(of_these)))

    def _note(self, cause: str) -> None:
        with self._lock:
            self._causes.append((len(self._events), cause))


def memory() -> dict[str, float]:
    """Peak memory in GiB: "host_memory_gib" of this process, "memory_gib" of its fullest device where the backend
    reports that (GPU, TPU), and of the process where it does not (CPU)."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices()]
    host = {"host_memory_gib": _peak_resident_bytes() / 2**30}
    return host | {"memory_gib": max(peaks) / 2**30 if any(peaks) else host["host_memory_gib"]}


def _peak_resident_bytes() -> float:
    try:
        import resource
    except ImportError:  # not a Unix
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
