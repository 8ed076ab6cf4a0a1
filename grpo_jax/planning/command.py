"""`grpo-jax plan`: compile, show how far it is, print or write the plan."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from grpo_jax.planning.chips import Slice, open_slice
from grpo_jax.planning.mesh_search import Found, search
from grpo_jax.planning.plan import Plan, make_plan, to_json
from grpo_jax.planning.programs import Built
from grpo_jax.planning.tables import show
from grpo_jax.training.configuration import Config
from grpo_jax.training.progress import Progress, table


def run(config: Config, *, topology: str, slices: int, auto: bool, json_file: str | None) -> bool:
    """Make the plan of a configuration, show it, and say whether it fits.

    json_file: where it goes as JSON, whole or not at all; "-": to standard output, instead of tables.
    """
    target = None if json_file in (None, "-") else Path(str(json_file))
    if target is not None and not target.parent.is_dir():
        raise FileNotFoundError(f"--json {target}: there is no directory {target.parent}; make it first")
    place, console = open_slice(topology, slices), Console(stderr=True)
    found: Found | None = None
    if auto:
        found = _searched(config, place, console)
        plan = found.best
    else:
        plan = _planned(config, place, console)
    value: Any = [to_json(p) for _, p in found.tried] if plan is None and found else plan and to_json(plan)
    if found and plan:
        value["tried"] = [_summary(c.keys, p) for c, p in found.tried]
    if target is not None:
        _write(target, value)
    if json_file == "-":
        print(json.dumps(value, indent=2))
    else:
        _tell(plan, found)
    return plan is not None and plan.fits


def _planned(config: Config, place: Slice, console: Console) -> Plan:
    with Progress(_programs(config), f"compiling for {place.name}", console=console) as bar:
        count = 0

        def done(built: Built) -> None:
            nonlocal count
            count += 1
            bar.total = max(bar.total, count)
            bar.update(count)
            bar.note(f"{built.name}: compiled in {built.seconds:.0f} s")

        plan = make_plan(config, place, done=done)
        bar.total = count
    return plan


def _programs(config: Config) -> int:
    """About how many programs there will be: what a bar shows before it is known."""
    return 4 + bool(config.method.options.get("kl")) + (config.training.number > 1)


def _searched(config: Config, place: Slice, console: Console) -> Found:
    with Progress(1, f"planning for {place.name}", console=console) as bar:

        def said(done: int, of: int, what: str) -> None:
            bar.total = max(of, 1)
            bar.update(done)
            bar.note(what)

        return search(config, place, said=said)


def _tell(plan: Plan | None, found: Found | None) -> None:
    console = Console()
    if found:
        header = ["tried", "fits", "GiB free", "step s, at best", "at worst", "MFU at best"]
        rows = [[c.words, *list(_summary(c.keys, p).values())[1:]] for c, p in found.tried]
        table("meshes and micro-batches", header, rows, console=console)
    shown = plan or (found.tried[0][1] if found else None)
    if shown is not None:
        show(shown, console=console)
    if found and plan:
        console.print(Text(f"\nfor the configuration:\n{found.lines()}", style="bold"))


def _summary(keys: list[str], plan: Plan) -> dict[str, Any]:
    times = (round(plan.least, 3), round(plan.most, 3), f"{plan.mfu()[1]:.1%}") if plan.parts else ("–", "–", "–")
    least, most, mfu = times if plan.fits else ("–", "–", "–")
    return {
        "keys": " ".join(keys),
        "fits": "yes" if plan.fits else "no",
        "free_gib": f"{plan.free / 2**30:.2f}",
        "at_best": least,
        "at_worst": most,
        "mfu": mfu,
    }


def _write(target: Path, value: Any) -> None:
    part = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
    part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(part, target)
