"""Plans for models and slices that people use, and how the time to make one grows with the depth of the model.

    pip install 'grpo_jax[tpu]'
    python -m benchmarks.plans [--only qwen3-8b ...] [--output benchmarks/results/plans.jsonl]

Every plan is a process of its own (`grpo-jax plan`), as users run it. A line of JSON each: the plan, and the seconds of
wall clock and of processors that it took. `depth` is Llama-3.1-70B's configuration with 12 layers, beside that with 80.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONFIGS = Path("configs/plans")
PLANS = {
    "qwen2.5-1.5b": ["v5e:2x4"],
    "qwen3-8b-v5e": ["v5e:8x8", "mesh.tensor=4"],
    "qwen3-8b": ["v6e:4x4"],
    "gemma-3-27b": ["v6e:8x8"],
    "llama-3.1-70b": ["v5p:8x8x8"],
    "depth": ["v5p:8x8x8"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PLANS, default=list(PLANS))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/plans.jsonl"))
    options = parser.parse_args()
    for name in options.only:
        line = planned(name)
        with options.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(row(line), flush=True)


def planned(name: str) -> dict:
    """A plan with what it cost to make."""
    topology, *overrides = PLANS[name]
    config = CONFIGS / f"{'llama-3.1-70b' if name == 'depth' else name.removesuffix('-v5e')}.yaml"
    with tempfile.TemporaryDirectory() as folder:
        if name == "depth":
            overrides = [*overrides, f"model.path={shallow(Path(folder))}"]
        target = Path(folder) / "plan.json"
        begun, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-m", "grpo_jax", "plan", str(config), *overrides, "--topology", topology]
        done = subprocess.run([*command, "--json", str(target)], stdout=subprocess.DEVNULL)
        if done.returncode not in (0, 2):
            raise SystemExit(f"{' '.join(command)} failed")
        after, plan = resource.getrusage(resource.RUSAGE_CHILDREN), json.loads(target.read_text())
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    cost = {"wall": round(time.perf_counter() - begun, 1), "processors": round(spent, 1)}
    return {"plan": name, "run": time.strftime("%Y-%m-%d"), "cores": cores(), "spent": cost, **plan}


def shallow(folder: Path) -> Path:
    """Llama-3.1-70B with twelve layers."""
    shape = json.loads((CONFIGS / "models" / "llama-3.1-70b" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(shape | {"num_hidden_layers": 12}))
    return folder


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def row(line: dict) -> str:
    """A plan in a line of a table."""
    fullest = max((p["memory"]["total"] or 0) / 2**30 for p in line["programs"])
    step = line["step_seconds"]
    cells = [
        line["plan"],
        line["topology"],
        " x ".join(f"{axis} {size}" for axis, size in line["mesh"].items()),
        f"{fullest:.1f} of {line['chip']['hbm'] / 2**30:.1f} GiB",
        "yes" if line["fits"] else "no",
        f"{step['overlapped']:.1f} to {step['one_after_the_other']:.1f} s",
        f"{line['mfu']['one_after_the_other']:.0%} to {line['mfu']['overlapped']:.0%}",
        f"{line['spent']['wall']:.0f} s, {line['spent']['processors']:.0f} of processors",
    ]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
