"""Results as text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.floors import Machine, floor_tokens_per_s
from benchmarks.peers.targets import TARGETS, Lines, judge
from benchmarks.peers.workload import MODELS, Shape


def read(path: Path, run: str | None = None) -> Lines:
    """The lines of one run (default: the last) of a results file. Raises: ValueError without that run."""
    lines = [json.loads(text) for text in path.read_text().splitlines() if text.strip()]
    runs = list(dict.fromkeys(line["run"] for line in lines))
    if not runs or (run is not None and run not in runs):
        raise ValueError(f"{path} has the runs {', '.join(runs) or 'of no one'}; got {run or 'an empty file'}")
    return [line for line in lines if line["run"] == (run or runs[-1])]


def machine_of(lines: Lines) -> Machine | None:
    """The rates that the run measured."""
    found = [x for x in lines if x["task"] == "limits" and "error" not in x]
    return Machine(found[-1]["gflops"] * 1e9, found[-1]["gbs"] * 1e9) if found else None


def figures(lines: Lines, peers: Sequence[str] = ("ours",)) -> str:
    """Every result of these peers, with the machine's floor beside it."""
    machine, body = machine_of(lines), []
    for line in lines:
        if line["peer"] not in peers or line["task"] == "limits":
            continue
        floor = None
        if machine and "tokens_per_s" in line:
            floor = floor_tokens_per_s(line, MODELS[line["model"]], Shape(*line["shape"]), machine)
        share = f"{line['tokens_per_s'] / floor:.0%}" if floor else ""
        body.append([line["peer"], _asked(line), figure(line), number(floor), share, number(line.get("peak_gib"))])
    return grid(["", "task", "figure", "floor", "share of it", "peak GiB"], body)


def comparison(lines: Lines) -> str:
    """Our figure beside the best peer's, what it should be, and whether it is."""
    rows = [judge(target, lines) for target in TARGETS]
    body = [
        [
            row.work,
            number(row.ours),
            f"{number(row.theirs)} {row.peer}".strip(),
            number(row.judged),
            number(row.at_least),
            number(row.aim),
            row.verdict,
        ]
        for row in rows
    ]
    return grid(["work", "ours", "best peer", "ratio", "at least", "aim", "reached"], body)


def limits(lines: Lines) -> str:
    found = [x for x in lines if x["task"] == "limits" and "error" not in x]
    if not found:
        return "the machine's rates were not measured in this run: no floors"
    x = found[-1]
    return (
        f"matrix products: JAX {number(x['jax_gflops'])}, numpy {number(x['numpy_gflops'])} GFLOP/s; long reads: JAX "
        f"{number(x['jax_gbs'])}, numpy {number(x['numpy_gbs'])} GB/s; floors at {number(x['gflops'])} GFLOP/s and "
        f"{number(x['gbs'])} GB/s, each prompt computed once"
    )


def grid(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table that is Markdown and can be read as it is."""
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    row = lambda line: "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths)) + " |"  # noqa: E731
    return "\n".join([row(head), "|" + "|".join("-" * (w + 2) for w in widths) + "|", *map(row, body)])


def number(value: Any) -> str:
    """Three digits; nothing for what is not there."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _asked(line: dict[str, Any]) -> str:
    return " ".join([line["label"], *line["argv"][1:], *([line["waiting"]] if line.get("waiting") else [])])


def figure(line: dict[str, Any]) -> str:
    if "error" in line:
        return f"failed: {line['error']}"[:60]
    parts = {
        "tokens_per_s": "tokens/s",
        "against_uniform": "of uniform",
        "first_update_s": "s to the first update",
        "iteration_s": "s/iteration",
        "gap_max": "largest gap",
        "between_shapes_max": "between shapes",
        "fused_per_s": "fused/s",
        "unfused_per_s": "unfused/s",
    }
    said = [f"{number(line[name])} {unit}" for name, unit in parts.items() if line.get(name) is not None]
    if "compilations" in line:
        said.append(f"compiled by step {'+'.join(map(str, line['compilations']))}")
    return ", ".join(said)
