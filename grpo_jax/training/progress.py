"""What a person sees while a run is going: a progress line with rate and time left, tables, a sampled group."""

from __future__ import annotations

import html
import importlib
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderResult
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

# What a line shows of the numbers it is given, most important first, and what it calls them.
SHOWN = {
    "reward": "reward",
    "pass@1": "pass@1",
    "kl": "KL",
    "tokens_sampled_per_s": "tok/s",
    "loss": "loss",
    "length_mean": "length",
}
GOOD, BAD, QUIET = "green", "red", "bright_black"


def format_number(value: Any, *, digits: int = 3) -> str:
    """A number as people write it: 0.312, 41.2k, 1.3e-05; other things as they are, None and NaN as a dash."""
    if value is None or isinstance(value, bool) or not hasattr(value, "__float__"):
        return "–" if value is None else str(value)
    number = float(value)
    if not math.isfinite(number):
        return "–" if math.isnan(number) else ("∞" if number > 0 else "-∞")
    size = abs(number)
    if size >= 1e15 or 0 < size < 0.1:
        return f"{number:#.{digits - 1}g}"
    for unit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= unit:
            return f"{number / (1e3 if letter == 'k' else unit):.{digits}g}{letter}"
    if number.is_integer():
        return str(int(number))
    return f"{number:.{max(digits - max(len(str(int(size))) - (size < 1), 0), 0)}f}"


def format_seconds(seconds: float) -> str:
    """Seconds as a clock: 0:07, 12:30, 3:04:05, 2d 3h."""
    if not math.isfinite(seconds):
        return "–"
    minutes, second = divmod(int(round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24}d {hours % 24}h"
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


class Progress:
    """The state of long work in one line: steps, the main numbers, rate, time gone and time left.

    On a terminal and in a notebook the line is redrawn in place; elsewhere (a log, CI) a plain line appears every
    `every` seconds. `update` costs microseconds, so it may be called at every step.

    Args:
        total: number of steps.
        title: what the work is.
        start: steps done before (a resumed run).
        show: names of the numbers to show; default: those of `SHOWN` that are there, otherwise the first four given.
        every: seconds between plain lines.
        console: where to (default: standard output).
        enabled: False shows nothing (processes other than the first).
    """

    def __init__(
        self,
        total: int,
        title: str,
        *,
        start: int = 0,
        show: Sequence[str] | None = None,
        every: float = 5.0,
        console: Console | None = None,
        enabled: bool = True,
    ) -> None:
        if total < 0:
            raise ValueError(f"total is the number of steps and cannot be negative, got {total}")
        self.total, self.title, self.done = total, title, start
        self._start, self._show, self._every = start, show, every
        self._console, self._enabled = console or Console(), enabled
        self._numbers: dict[str, Any] = {}
        self._began = self._ended = None
        self._marks: list[tuple[float, int]] = []  # (time, steps done) at each update
        self._last_line = -math.inf
        self._live: Live | None = None
        self._notebook: Any = None

    def __enter__(self) -> Progress:
        self._began = time.perf_counter()
        if not self._enabled:
            return self
        if self._console.is_jupyter:
            display = importlib.import_module("IPython.display")
            self._notebook = display.display(self._html(), display_id=True)
        elif self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(self, console=self._console, refresh_per_second=5)
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended = time.perf_counter()
        if self._live:
            self._live.stop()
        elif self._notebook:
            self._notebook.update(self._html())
        elif self._enabled:
            self._print_line()

    def update(self, step: int, **numbers: Any) -> None:
        """Say that `step` steps are done, and what the numbers are now; those not given keep their last value."""
        now = time.perf_counter()
        self.done = step
        self._numbers |= numbers
        if step > self._start:  # what comes before the first step is no part of its rate
            self._marks.append((now, step))
        if len(self._marks) > 4096:  # thinned, so that a run of a million steps costs nothing
            self._marks = self._marks[:1] + self._marks[1::2]
        if not self._enabled or self._live:  # the terminal line redraws itself
            return
        if now - self._last_line < (0.5 if self._notebook else self._every):
            return
        self._last_line = now
        if self._notebook:
            self._notebook.update(self._html())
        else:
            self._print_line()

    def note(self, text: str) -> None:
        """Print a line above the progress line."""
        if self._enabled:
            self._console.print(Text(text), soft_wrap=not self._live)

    @property
    def elapsed(self) -> float:
        """Seconds since the work began."""
        return ((self._ended or time.perf_counter()) - self._began) if self._began else 0.0

    @property
    def rate(self) -> float:
        """Steps per second over the recent half of the updates (compilation falls out of it); NaN before the second."""
        if len(self._marks) < 2:
            return math.nan
        (first, start), (last, end) = self._marks[(len(self._marks) - 1) // 2], self._marks[-1]
        return (end - start) / (last - first) if last > first and end > start else math.nan

    @property
    def left(self) -> float:
        """Seconds left at that rate; NaN while it is unknown."""
        return 0.0 if self.done >= self.total else (self.total - self.done) / self.rate

    def _shown(self) -> list[tuple[str, str]]:
        names = self._show or [name for name in SHOWN if name in self._numbers] or list(self._numbers)[:4]
        found = [(SHOWN.get(name, name), format_number(self._numbers[name])) for name in names if name in self._numbers]
        return [(f"{value}", label) if label == "tok/s" else (label, value) for label, value in found]

    def _times(self) -> list[tuple[str, str]]:
        if self._ended:
            return [("in", format_seconds(self.elapsed))]
        rate, times = self.rate, [(format_seconds(self.elapsed), "gone"), (format_seconds(self.left), "left")]
        if math.isnan(rate):
            return times[:1]
        return [(format_number(rate), "step/s") if rate >= 1 else (format_number(1 / rate), "s/step")] + times

    def _print_line(self) -> None:
        share = f" ({self.done / self.total:.0%})" if self.total else ""
        parts = [f"{self.title}  {self.done}/{self.total}{share}"]
        parts += [" ".join(pair) for pair in self._shown() + self._times()]
        self._console.print(Text("  ".join(parts)), soft_wrap=True)

    def _html(self) -> Any:
        share = self.done / self.total if self.total else 1.0
        inner = f'<span style="display:block;width:{share:.1%};height:100%;background:#3b6fb6"></span>'
        bar = f'<span style="display:inline-block;width:12em;height:.6em;background:#8884">{inner}</span>'
        words = [f"<b>{html.escape(self.title)}</b> {bar} {self.done}/{self.total}"]
        words += [html.escape(" ".join(pair)) for pair in self._shown() + self._times()]
        page = f'<div style="font-family:monospace;white-space:pre-wrap">{"  ·  ".join(words)}</div>'
        return importlib.import_module("IPython.display").HTML(page)

    def __rich_console__(self, console: Console, options: Any) -> RenderResult:
        head, count = Text(self.title, style="bold"), Text(f"{self.done}/{self.total}")
        numbers = [self._pair(*pair) for pair in self._shown()]
        times = [self._pair(*pair) for pair in self._times()]
        parts = numbers + times
        room = options.max_width - head.cell_len - count.cell_len - 4
        # What does not fit beside a bar of 6 goes: first further numbers, then rate and time gone, then the rest.
        for part in numbers[:1:-1] + times[:-1] + numbers[1::-1] + times[-1:]:
            if sum(kept.cell_len + 2 for kept in parts) + 6 > room:
                parts.remove(part)
        width = max(min(room - sum(part.cell_len + 2 for part in parts), 40), 1)
        grid = Table.grid(padding=(0, 2, 0, 0))
        bar = ProgressBar(total=max(self.total, 1), completed=self.done if self.total else 1, width=width)
        grid.add_row(head, bar, count, *parts)
        yield grid

    @staticmethod
    def _pair(first: str, second: str) -> Text:
        number_first = second in ("tok/s", "step/s", "s/step", "gone", "left")
        styles = ("cyan", QUIET) if number_first else (QUIET, "cyan")
        return Text.assemble((first, styles[0]), " ", (second, styles[1]))


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]], *, console: Console | None = None) -> None:
    """Print a table: the first column names things, the others hold numbers or words.

    Raises: ValueError if a row has not as many cells as the header.
    """
    grid = Table(title=Text(title, style="bold"), title_justify="left", header_style=QUIET, border_style=QUIET)
    for column, name in enumerate(header):
        grid.add_column(Text(name), justify="right" if column else "left")
    for row in rows:
        if len(row) != len(header):
            raise ValueError(
                f"table {title!r} has {len(header)} columns {list(header)}, got a row of {len(row)}: {row!r}"
            )
        grid.add_row(*(cell if isinstance(cell, Text) else Text(format_number(cell)) for cell in row))
    (console or Console()).print(grid)


def group_table(
    prompt: str | Sequence[Mapping[str, Any]],
    completions: Sequence[Any],
    rewards: Sequence[float] | Mapping[str, Sequence[float]],
    advantages: Sequence[float],
    *,
    limit: int = 400,
    console: Console | None = None,
) -> None:
    """Print a group: the prompt, then each completion with its rewards (one column per channel) and its advantage.

    `limit` is the number of characters shown of a completion. Raises: ValueError if the lengths differ.
    """
    channels = rewards if isinstance(rewards, Mapping) else {"reward": rewards}
    for name, values in {**channels, "advantages": advantages}.items():
        if len(values) != len(completions):
            raise ValueError(f"a group of {len(completions)} completions needs as many {name}, got {len(values)}")
    grid = Table(show_edge=False, header_style=QUIET, border_style=QUIET, expand=False)
    grid.add_column("", justify="right", style=QUIET)
    grid.add_column("completion", overflow="fold")
    for name in [*channels, "advantage"]:
        grid.add_column(Text(str(name)), justify="right", no_wrap=True)
    for row, completion in enumerate(completions):
        advantage = float(advantages[row])
        colour = GOOD if advantage > 0 else BAD if advantage < 0 else QUIET
        cells = [Text(format_number(values[row])) for values in channels.values()]
        grid.add_row(
            str(row), Text(_shorten(plain_text(completion), limit)), *cells, Text(f"{advantage:+.2f}", style=colour)
        )
    shown = Text.assemble(("prompt  ", QUIET), (_shorten(plain_text(prompt), 4 * limit), "bold"))
    (console or Console()).print(Panel(Group(shown, Text(""), grid), border_style=QUIET, expand=False))


def outcome(
    before: Mapping[str, float] | None, after: Mapping[str, float] | None, groups: Sequence[Mapping[str, Any]]
) -> None:
    """What a run came to: held-out numbers before and after, and its last sampled group that carries signal."""
    if before and after:
        table("held-out", ["", "before", "after"], [[n, before[n], after[n]] for n in before if n in after])
    if groups:
        last = ([g for g in groups if any(g["advantages"])] or groups)[-1]
        group_table(last["prompt"], last["completions"], last["rewards"], last["advantages"])


def plain_text(value: Any) -> str:
    """A prompt or completion as text: chats as "role: content" lines."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return f"{value.get('role', '?')}: {plain_text(value.get('content', ''))}"
    if isinstance(value, Sequence):
        return "\n".join(plain_text(item) for item in value)
    return str(value)


def _shorten(text: str, limit: int) -> str:
    more = f"… ({len(text) - limit} more characters)" if len(text) > limit else ""
    # A policy may sample any bytes: control characters are shown, not sent to the terminal.
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text[:limit]) + more
