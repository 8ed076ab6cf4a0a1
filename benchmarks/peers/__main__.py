"""Run the comparison and print its tables.

    python -m benchmarks.peers                         ours alone, with floors
    python -m benchmarks.peers --peers all             every project that is installed (benchmarks.peers.install)
    python -m benchmarks.peers --peers ours,torch --tasks "sample A; sample B"
    python -m benchmarks.peers --table FILE            the tables of the last run in a results file

Every result is a line of JSON in benchmarks/results/DATE.jsonl. Run nothing else on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.peers import table
from benchmarks.peers.schedule import MODELS_NEEDED, PEERS, PLAN, Entry, better_waiting, missing, schedule
from benchmarks.peers.workload import path

ROOT = Path(__file__).parents[2]
TIME_LIMIT = 900  # seconds for one process
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "WANDB_MODE": "disabled",
    "PYTHONWARNINGS": "ignore",
    "JAX_PLATFORMS": "cpu",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", default="ours", help=f"all, or some of {','.join(PEERS)} (default: ours)")
    parser.add_argument("--tasks", help=f"default: all of {'; '.join(PLAN)}")
    parser.add_argument("--out", type=Path, help="results file (default: benchmarks/results/DATE.jsonl)")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the tables of this file and run nothing")
    asked = parser.parse_args()
    if asked.table:
        say_tables(table.read(asked.table))
        return
    peers = list(PEERS) if asked.peers == "all" else asked.peers.split(",")
    tasks = [task.strip() for task in asked.tasks.split(";")] if asked.tasks else None
    try:
        schedule(peers, tasks)
    except ValueError as error:
        parser.error(str(error))
    for name in missing(peers):
        print(f"{name} is left out: it is not installed in {PEERS[name].python.parents[1]} (make bench-install)")
    there = [name for name in peers if name not in missing(peers)]
    entries = schedule(there, tasks)
    if not entries:
        parser.error("nothing is left to run: none of these peers takes part in these tasks")
    out = asked.out or ROOT / "benchmarks" / "results" / time.strftime("%Y-%m-%d.jsonl")
    make_models()
    say_tables(run_all(entries, out))
    print(f"\nresults in {out}")


def run_all(entries: list[Entry], out: Path) -> table.Lines:
    """One process after the other; each result is written down as soon as it is there."""
    run, lines, spent, expected = time.strftime("%Y-%m-%d %H:%M:%S"), [], 0.0, 0.0
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="grpo_jax_bench_") as scratch:
        for number, entry in enumerate(entries):
            pace = spent / expected if expected else 1.0
            left = pace * sum(e.seconds for e in entries[number:]) / 60
            print(f"[{number + 1}/{len(entries)}, {left:.0f} min left] {entry.task}: {entry.peer} ", end="", flush=True)
            if entry.waiting == "best":
                entry = entry._replace(waiting=better_waiting(lines, entry.task))
            cache = Path(scratch) / (entry.cache or f"alone-{number}")
            line = {"run": run, "machine": machine_name(), **launch(entry, Path(scratch), cache)}
            spent, expected = spent + line["wall_s"], expected + entry.seconds
            lines.append(line)
            with out.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(f"{table.figure(line)}  ({line['wall_s']:.0f} s)", flush=True)
    return lines


def launch(entry: Entry, scratch: Path, cache: Path) -> dict[str, Any]:
    """The result of one runner: its line of JSON, or what it said last before it failed."""
    peer = PEERS[entry.peer]
    command = [str(peer.python), "-m", f"benchmarks.peers.{peer.module}", *entry.arguments]
    environment = os.environ | QUIET | {"PYTHONPATH": str(ROOT), "MPLCONFIGDIR": str(scratch / "matplotlib")}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    if entry.peer == "ours":
        environment["XDG_CACHE_HOME"] = str(cache)  # where our compiled programs are kept
    if entry.waiting:
        environment["OMP_WAIT_POLICY"] = entry.waiting
    where = ROOT if entry.peer == "ours" else scratch  # configurations name files from where they are run
    start = time.time()
    try:
        done = subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True, timeout=TIME_LIMIT)
        result = result_of(done.returncode, done.stdout, done.stderr)
    except subprocess.TimeoutExpired:
        result = {"error": f"no result in {TIME_LIMIT} s"}
    asked = {"label": entry.task, "peer": entry.peer, "task": entry.arguments[0], "argv": list(entry.arguments)}
    return {**result, **asked, "waiting": entry.waiting, "wall_s": round(time.time() - start, 1)}


def result_of(status: int, said: str, complained: str) -> dict[str, Any]:
    """The last line of what a runner said, if it ended well and that is an object of JSON."""
    last = (said.strip().splitlines() or [""])[-1]
    if status == 0:
        try:
            result = json.loads(last)
            if isinstance(result, dict):
                return result
        except ValueError:
            pass
        return {"error": f"its last line is no JSON: {last[:200]}"}
    return {"error": (complained.strip().splitlines() or [last or f"exit status {status}"])[-1][:300]}


def make_models() -> None:
    """In a process of its own: what this one holds would count as its children's peak memory on some systems."""
    lacking = [name for name in MODELS_NEEDED if not (path(name) / "prompts.json").exists()]
    if lacking:
        print(f"writing the models {', '.join(lacking)}", flush=True)
        command = [sys.executable, "-m", "benchmarks.peers.models", *lacking]
        subprocess.run(command, check=True, env=os.environ | QUIET | {"PYTHONPATH": str(ROOT)})


def machine_name() -> str:
    """The processor and how many of its cores this process may use."""
    try:
        text = Path("/proc/cpuinfo").read_text()
        name = next(line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores"


def say_tables(lines: table.Lines) -> None:
    peers = list(dict.fromkeys(line["peer"] for line in lines))
    print(f"\n{lines[0]['run']}, {lines[0]['machine']}\n{table.limits(lines)}\n\n{table.figures(lines, peers)}")
    if len(peers) > 1:
        print(f"\n{table.comparison(lines)}")


if __name__ == "__main__":
    main()
