"""The instruments of every runner: process start, peak memory, timing, one line of JSON. Standard library only."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def process_start() -> float:
    """When this process was started, on the scale of `time.time()`, to a hundredth of a second."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        running = float(Path("/proc/uptime").read_text().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")
    except OSError:  # not Linux: the interpreter's own start is not counted
        return time.time()
    return time.time() - running


def peak_gib() -> float:
    """The most memory that this process has held."""
    try:
        status = Path("/proc/self/status").read_text()
        kib = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        kib = peak / 1024 if sys.platform == "darwin" else peak
    return kib / 2**20


def timed(call: Callable[[], Any], repetitions: int, tokens: int) -> dict[str, float]:
    """One call that may compile, then `repetitions` that are counted; tokens of one call."""
    return by_turns([call], repetitions, tokens)[0]


def by_turns(calls: Sequence[Callable[[], Any]], repetitions: int, tokens: int) -> list[dict[str, float]]:
    """The same of several calls, one after the other in every repetition: what else the machine does hits all alike."""
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(repetitions + 1):
        for call, taken in zip(calls, seconds):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    return [_rate(first, rest, tokens) for first, *rest in seconds]


def _rate(first: float, rest: list[float], tokens: int) -> dict[str, float]:
    median = statistics.median(rest)
    return {
        "tokens_per_s": tokens / median,
        "median_s": median,
        "min_s": min(rest),
        "max_s": max(rest),
        "first_s": first,
        "repetitions": len(rest),
    }


def iterations(start: float, imported: float, finished: Sequence[float]) -> dict[str, Any]:
    """finished: when each update had landed. An iteration is the median of those after the second update."""
    seconds = [b - a for a, b in zip(finished, finished[1:])]
    return {
        "import_s": imported - start,
        "first_update_s": finished[0] - start,
        "iteration_s": statistics.median(seconds[1:] or seconds) if seconds else None,
        "iterations_s": seconds,
    }


def arguments(tasks: Sequence[str], text: str | None) -> argparse.Namespace:
    """What every runner takes. `--opt name=value` may come more than once; `opt` is a dict."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=tasks)
    parser.add_argument("--model", default="small")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "gpu"])
    parser.add_argument("--opt", action="append", default=[], metavar="NAME=VALUE")
    parsed = parser.parse_args()
    if wrong := [text for text in parsed.opt if "=" not in text]:
        parser.error(f"--opt takes name=value, got {wrong[0]!r}")
    parsed.opt = dict(text.split("=", 1) for text in parsed.opt)
    return parsed


def versions(*packages: str) -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in packages}


def report(peer: str, asked: argparse.Namespace, numbers: dict[str, Any]) -> None:
    """The last thing that a runner does: one line of JSON."""
    line = {"peer": peer, **vars(asked), **numbers, "peak_gib": peak_gib(), "load": os.getloadavg()[0]}
    sys.stdout.flush()
    print(json.dumps({name: _short(value) for name, value in line.items()}), flush=True)


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    return [_short(x) for x in value] if isinstance(value, (list, tuple)) else value
