"""What is run, in which order: task by task, so that all of a task are measured close together in time."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

ENVIRONMENTS = Path(os.environ.get("BENCH_VENVS", "~/.cache/grpo_bench/venvs")).expanduser()


class Peer(NamedTuple):
    """A project: the environment it is installed in, and the module that runs it."""

    environment: str | None
    module: str

    @property
    def python(self) -> Path:
        return ENVIRONMENTS / self.environment / "bin" / "python" if self.environment else Path(sys.executable)


PEERS = {
    "ours": Peer(None, "run_ours"),
    "torch": Peer("trl", "run_torch"),
    "trl": Peer("trl", "run_trl"),
    "tunix": Peer("tunix", "run_tunix"),
    "easydel": Peer("easydel", "run_easydel"),
}


class Entry(NamedTuple):
    """One process. waiting: how OpenMP's threads wait, as torch may be faster either way; "best" is the way that was
    better for torch in this task. cache: entries of the same name share their compiled programs."""

    task: str
    peer: str
    arguments: tuple[str, ...]
    seconds: float  # expected on four quiet cores
    waiting: str | None = None
    cache: str | None = None


# Of every task: peer, arguments, expected seconds, and (for ours) the name of a compile cache. Micro-batches of 16
# rows save torch and Tunix memory and cost them no time; TRL is faster with one of all rows, torch may be.
PLAN: dict[str, list[tuple]] = {
    "limits": [("ours", "limits", 15)],
    "sample A": [
        ("ours", "sampleA", 25),
        ("torch", "sampleA", 40),
        ("trl", "sampleA", 45),
        ("tunix", "sampleA", 45),
        ("easydel", "sampleA", 85),
    ],
    "sample B": [  # EasyDeL gave no result within five minutes
        ("ours", "sampleB", 30),
        ("torch", "sampleB", 95),
        ("trl", "sampleB", 95),
        ("tunix", "sampleB", 115),
    ],
    "update, 5 passes": [
        ("ours", "update --opt old=1", 60),
        ("torch", "update", 65),
        ("torch", "update --opt micro=16", 60),
        ("trl", "update", 75),
        ("tunix", "update --opt micro=16", 150),
    ],
    "update, 4 passes": [
        ("ours", "update", 50),
        ("torch", "update --opt old=0", 55),
        ("torch", "update --opt old=0 --opt micro=16", 50),
        ("trl", "update --opt old=0", 65),
        ("tunix", "update --opt old=0 --opt micro=16", 120),
        ("easydel", "update", 110),
    ],
    "vocabulary": [
        ("ours", "update --opt old=1 --model smallv32k --repetitions 1", 40),
        ("torch", "update --model smallv32k --repetitions 1", 55),
        ("trl", "update --model smallv32k --repetitions 1", 100),
        ("tunix", "update --model smallv32k --repetitions 1", 110),
    ],
    "iteration": [
        ("ours", "e2e", 60, "iteration"),
        ("ours", "e2e", 45, "iteration"),
        ("torch", "e2e --opt micro=16", 85),
        ("trl", "e2e", 100),
        ("tunix", "e2e", 140),
        ("easydel", "e2e", 190),
    ],
    "gap": [
        ("ours", "gap", 40),
        ("ours", "gap --dtype bfloat16", 45),
        ("ours", "gap --opt model.exact=true", 60),
        ("ours", "gap --dtype bfloat16 --opt model.exact=true", 65),
        ("torch", "gap", 20),
        ("tunix", "gap", 45),
    ],
    "recompile": [("ours", "recompile", 60)],
    "ragged": [
        ("ours", "ragged --opt group=8", 60),
        ("ours", "ragged --opt group=32", 120),
        ("ours", "ragged --opt group=128", 140),
        ("ours", "ragged --opt group=32 --opt batch.tokens_per_device=4128", 140),  # room for 64 rows at full length
    ],
    "fused": [("ours", "fused", 60)],
    "exact": [
        ("ours", "sampleA --opt model.exact=true", 40),
        ("ours", "update --opt model.exact=true", 60),
        ("ours", "e2e --opt model.exact=true", 90),
    ],
}
MODELS_NEEDED = ("small", "smallv32k")


def schedule(peers: Sequence[str], tasks: Iterable[str] | None = None) -> list[Entry]:
    """The entries of these peers and tasks (default: all). The first torch entry of a task runs both ways of waiting.

    Raises: ValueError for a peer or task that there is not.
    """
    chosen = list(PLAN) if tasks is None else list(tasks)
    for given, known in ((peers, PEERS), (chosen, PLAN)):
        if unknown := [name for name in given if name not in known]:
            raise ValueError(f"there is no {unknown[0]!r}; there are {'; '.join(known)}")
    entries: list[Entry] = []
    for task in chosen:
        for peer, arguments, seconds, *cache in PLAN[task]:
            if peer not in peers:
                continue
            again = any(e.task == task and e.peer == peer for e in entries)
            ways: tuple[str | None, ...] = {"torch": ("ACTIVE", "PASSIVE"), "trl": ("best",)}.get(peer, (None,))
            if peer == "torch" and again:
                ways = ("best",)
            name = cache[0] if cache else None
            entries += [Entry(task, peer, tuple(arguments.split()), seconds, way, name) for way in ways]
    return entries


def missing(peers: Iterable[str]) -> list[str]:
    """Those whose environment is not there."""
    return [name for name in peers if not PEERS[name].python.exists()]


def better_waiting(lines: Iterable[dict], task: str) -> str:
    """How torch's threads should wait, by its results in this task; PASSIVE, which loses less, where there are none."""
    ran = [x for x in lines if x["label"] == task and x["peer"] == "torch" and "error" not in x]
    return max(ran, key=speed)["waiting"] if ran else "PASSIVE"


def speed(line: dict) -> float:
    """More is better: tokens per second, or iterations per second."""
    return line.get("tokens_per_s") or 1 / line.get("iteration_s", float("inf"))
