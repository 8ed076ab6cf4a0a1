"""A plan as people read it: memory, work, messages, time, and what to change."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from grpo_jax.planning.plan import GIB, Plan, Program
from grpo_jax.training.progress import format_number, table

SPLIT = {
    "parameters": "parameters",
    "optimizer": "optimizer",
    "copy": "sampling copy",
    "gradients": "gradients",
    "cache": "KV cache",
    "activations": "activations",
    "batch": "batch",
    "temporaries": "temporaries",
    "outputs": "outputs, code",
}
ASSUMED = """\
Assumptions: every prompt and every completion has its full length; matrix products run at the chip's bfloat16 peak,
memory and links at their published rates (per chip: {rates}); kernels are taken at what they say they cost; the
elementwise work of the vector unit and the host (rewards, text) take no time. "at best" hides every message behind
computation, "at worst" none. MFU counts the model's FLOPs once: no prompt repeated, nothing recomputed."""


def show(plan: Plan, *, console: Console | None = None) -> None:
    """Print a plan."""
    console = console or Console()
    chips, mesh = len(plan.place.devices), " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    say = lambda text, style="": console.print(Text(text, style=style), soft_wrap=True)  # noqa: E731
    say(f"{plan.config.name}: {plan.parameters:,} parameters on {plan.place.name}, {chips} chips, mesh {mesh or '1'}")
    say(plan.layout)
    say(plan.sampling) if plan.sampling else None
    _memory(plan, console)
    _messages(plan, console)
    _times(plan, console)
    _verdict(plan, console)


def _memory(plan: Plan, console: Console) -> None:
    rows = []
    for name, words in SPLIT.items():
        sizes = [getattr(program.memory, name) for program in plan.programs]
        if max(sizes) >= GIB / 200:
            rows.append([words, *map(_gib, sizes)])
    rows.append(["total", *(_gib(program.memory.total) for program in plan.programs)])
    free = [plan.place.chip.hbm - program.memory.total for program in plan.programs]
    rows.append(["free", *(Text(_gib(x)) if x >= 0 else Text(f"{_gib(-x)} short", style="red") for x in free)])
    title = f"memory of a chip in GiB, of {plan.place.chip.hbm / GIB:.4g}"
    table(title, ["", *map(_named, plan.programs)], rows, console=console)


def _named(program: Program) -> str:
    times = f" x {program.runs}" if program.runs > 1 else ""
    return f"{program.name}{times}{' (refused)' if program.refused else ''}"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}" if abs(size) >= GIB / 200 else "–"


def _messages(plan: Plan, console: Console) -> None:
    rows = [
        [program.name, c.kind, "*".join(c.axes) or "–", c.network, c.times, f"{c.wire / 1e9:.3g}"]
        for program in plan.programs
        for c in program.sends
        if c.wire >= 1e6
    ]
    header = ["program", "message", "axes", "over", "times", "GB sent"]
    if rows:
        table("what a chip sends in a step (above 1 MB)", header, rows, console=console)


def _times(plan: Plan, console: Console) -> None:
    parts = [part for part in plan.parts if part.most >= plan.most / 1000]  # what takes no time is left out
    low, high = plan.mfu()
    rows = [
        ["TFLOP", *(f"{p.flops / 1e12:.4g}" for p in parts), ""],
        ["GB of HBM", *(f"{p.bytes / 1e9:.4g}" for p in parts), ""],
    ]
    for words, name in {"compute": "compute", "HBM": "hbm", "ICI": "ici", "DCN": "dcn"}.items():
        seconds = [getattr(p, name) for p in parts]
        if any(seconds):
            rows.append([f"{words} s", *map(_seconds, seconds), ""])
    rows += [
        ["at best s", *(_seconds(p.least) for p in parts), _seconds(plan.least)],
        ["at worst s", *(_seconds(p.most) for p in parts), _seconds(plan.most)],
        ["bound by", *(p.bound for p in parts), ""],
        ["MFU at best", *(f"{plan.mfu(p)[1]:.0%}" if p.useful else "–" for p in parts), f"{high:.0%}"],
    ]
    table("a step's roofline, per chip", ["", *(p.name for p in parts), "a step"], rows, console=console)
    chip, work = plan.place.chip, plan.work
    rates = (
        f"{chip.peak / 1e12:.0f} TFLOP/s, HBM {chip.hbm_bandwidth / 1e9:.0f} GB/s, ICI {chip.link / 1e9:.0f} GB/s each "
        f"way on each of {chip.ports} links, DCN {chip.dcn / 1e9:.3g} GB/s"
    )
    tokens = work.contexts * work.rows * work.new
    slow, fast = (format_number(tokens / max(seconds, 1e-9)) for seconds in (plan.most, plan.least))
    said = (
        f"A step draws {tokens:,} tokens, {slow} to {fast} a second; MFU {low:.1%} to {high:.1%} (model FLOPs, once)."
    )
    console.print(Text(said), soft_wrap=True)
    console.print(Text(ASSUMED.format(rates=rates), style="bright_black"), soft_wrap=True)


def _seconds(x: float) -> str:
    return "–" if x <= 0 else f"{x:.3g}"


def _verdict(plan: Plan, console: Console) -> None:
    fullest = plan.peak
    if plan.fits:
        text = f"fits: {_gib(plan.free)} GiB of a chip are left in its fullest program ({fullest.name})"
        console.print(Text(text, style="bold green"), soft_wrap=True)
    else:
        text = f"does not fit: the program {fullest.name!r} lacks {_gib(-plan.free)} GiB on every chip"
        console.print(Text(text, style="bold red"), soft_wrap=True)
        for n, advice in enumerate(plan.advice, 1):
            keys = " ".join(advice.keys)
            console.print(Text(f"  {n}. {keys}  (about {_gib(advice.saves)} GiB: {advice.why})"), soft_wrap=True)
    console.print(Text(f"planned in {plan.seconds:.0f} s", style="bright_black"))
