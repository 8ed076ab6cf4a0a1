"""The curves of a run in one picture, drawn with matplotlib (imported when a picture is asked for)."""

from __future__ import annotations

import io
import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from grpo_jax.training.metrics import Series, read_metrics
from grpo_jax.training.progress import format_number, format_seconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Run = str | os.PathLike | Mapping[str, Series]

INK, MUTED, GRID = "#1f2937", "#6b7280", "#e5e7eb"
BLUE, ORANGE, TEAL, PURPLE, RED, SAND, GREY = (
    "#2f6db5",
    "#e0802f",
    "#21918c",
    "#7b5ea7",
    "#c8443c",
    "#d9b44a",
    "#b6bcc6",
)
SECTIONS = {"sample": BLUE, "reward": SAND, "update": TEAL, "evaluate": PURPLE, "other": GREY}
SPARE = (ORANGE, "#8c6d46", "#5aa9c9", "#b0628f")
ACCURACY = {"pass@1": BLUE, "greedy": ORANGE, "maj@8": PURPLE, "pass@8": TEAL}
STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,  # a run may be called anything
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "legend.handlelength": 1.2,
    "legend.labelcolor": MUTED,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


def figure(run: Run, *, title: str | None = None) -> Figure:
    """The curves of a run: reward, held-out accuracy, KL, entropy, completion length, time. Series that the run does
    not have are left out. In a notebook the figure shows itself.

    Args:
        run: a run directory, or what `read_metrics` gives.
        title: default: the directory's name.
    Raises: FileNotFoundError if the directory holds no run, ValueError if it holds nothing to draw.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.ticker import MaxNLocator

    series = as_series(run)
    panels = [(draw, name) for name, draw in PANELS.items() if _has(series, name)]
    if not panels:
        raise ValueError(
            f"nothing to draw: none of {', '.join(PANELS)} in this run, which has {sorted(series) or 'none'}"
        )
    if title is None:
        title = "" if isinstance(run, Mapping) else Path(run).resolve().name
    rows = 1 if len(panels) <= 3 else 2
    columns = math.ceil(len(panels) / rows)
    with matplotlib.rc_context(STYLE):
        drawn = _figure_class()(figsize=(4.3 * columns, 3.05 * rows + 0.55), dpi=150)
        FigureCanvasAgg(drawn)
        margin = 0.55 / drawn.get_figheight()
        grid = drawn.add_gridspec(
            rows,
            columns,
            left=0.5 / drawn.get_figwidth(),
            right=1 - 0.3 / drawn.get_figwidth(),
            bottom=0.8 * margin,
            top=1 - 1.08 / drawn.get_figheight(),
            wspace=0.22,
            hspace=0.5,
        )
        for place, (draw, _) in enumerate(panels):
            axes = drawn.add_subplot(grid[place // columns, place % columns])
            axes.set_xlabel("step" if place >= len(panels) - columns else "", fontsize=8)
            axes.margins(x=0.02)
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:.4g}")
            draw(axes, series)
        top = 1 - 0.3 / drawn.get_figheight()
        left = 0.5 / drawn.get_figwidth()
        head = drawn.text(left, top, title, fontsize=14, fontweight="bold", va="center")
        summary = headline(series)
        if title:
            drawn.draw_without_rendering()
            left = head.get_window_extent().transformed(drawn.transFigure.inverted()).x1 + 0.16 / drawn.get_figwidth()
        drawn.text(left, top, summary, fontsize=11, color=MUTED, va="center")
    return drawn


def plot(run: Run, path: str | os.PathLike, *, title: str | None = None) -> Path:
    """Save `figure` as a PNG (or what the ending of `path` says). Returns the path."""
    path = Path(path)
    drawn = figure(run, title=title)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path)
    return path


def as_series(run: Run) -> dict[str, Series]:
    """The metrics of a run directory, or those given."""
    series = run if isinstance(run, Mapping) else read_metrics(run)
    return {name: Series(*map(np.asarray, pair)) for name, pair in series.items()}


def _figure_class() -> type[Figure]:
    from matplotlib.figure import Figure

    class RunFigure(Figure):
        """Shows itself in a notebook without pyplot and without a choice of backend."""

        def _repr_png_(self) -> bytes:
            image = io.BytesIO()
            self.savefig(image, format="png")
            return image.getvalue()

    return RunFigure


# ---------------------------------------------------------------------------------------------------------------------
# Panels


def _reward(axes: Axes, series: Mapping[str, Series]) -> None:
    steps, values = series["reward"]
    smooth = _smooth(values)
    if "reward_std" in series and len(series["reward_std"].values) == len(values):
        spread = _smooth(series["reward_std"].values)
        axes.fill_between(steps, smooth - spread, smooth + spread, color=BLUE, alpha=0.12, linewidth=0)
        caption = "mean of the batch ± one standard deviation"
    else:
        caption = "mean of the batch"
    low, high = _curve(axes, series["reward"], BLUE, "mean")
    channels = [name for name in series if name.startswith("reward/")]
    if len(channels) > 1:
        for name, color in zip(channels, itertools.cycle(SPARE)):
            smooth = _smooth(series[name].values)
            axes.plot(series[name].steps, smooth, color=color, linewidth=1.2, label=name[7:])
            low, high = np.nanmin([low, *smooth]), np.nanmax([high, *smooth])
        axes.legend(loc="upper left")
    pad = 0.2 * (high - low) or 0.2 * abs(high) or 0.1
    axes.set_ylim(low - pad, high + pad)  # follows the mean; a wide band may leave the panel
    _title(axes, "Reward", caption)


def _accuracy(axes: Axes, series: Mapping[str, Series]) -> None:
    names = [name for name in ACCURACY if f"eval/{name}" in series]
    others = sorted(n[5:] for n in series if n.startswith(("eval/pass@", "eval/maj@")) and n[5:] not in ACCURACY)
    colors = ACCURACY | dict(zip(others, itertools.cycle(SPARE)))
    labels = []
    for name in names + others:
        steps, values = series[f"eval/{name}"]
        main = name == "pass@1"
        axes.plot(
            steps,
            values,
            color=colors[name],
            linewidth=2.2 if main else 1.3,
            marker="o" if len(steps) <= 40 else None,
            markersize=4 if main else 2.5,
            zorder=3 if main else 2,
        )
        labels.append((float(values[-1]), name, colors[name]))
        if main and len(steps) > 1:
            axes.annotate(
                f"{values[0]:.2f}",
                (steps[0], values[0]),
                (0, -11 if values[0] > 0.1 else 5),
                textcoords="offset points",
                color=BLUE,
            )
    axes.set_ylim(0, 1.03)
    _end_labels(axes, labels)
    _title(axes, "Held-out accuracy", "share of problems solved")


def _kl(axes: Axes, series: Mapping[str, Series]) -> None:
    low, high = _curve(axes, series["kl"], PURPLE)
    axes.set_ylim(min(1.08 * low, 0.0), 1.08 * high if high > 0 else 1)
    _title(axes, "KL to the reference", "nats per token")


def _entropy(axes: Axes, series: Mapping[str, Series]) -> None:
    axes.set_ylim(0, 1.08 * _curve(axes, series["entropy"], ORANGE)[1] or 1)
    _title(axes, "Entropy of the policy", "nats per token")


def _length(axes: Axes, series: Mapping[str, Series]) -> None:
    highest = _curve(axes, series["length_mean"], TEAL, "mean")[1]
    if "length_max" in series:
        smooth = _smooth(series["length_max"].values)
        axes.plot(series["length_max"].steps, smooth, color=GREY, linewidth=1.3, label="longest")
        highest = np.nanmax([highest, *smooth])
    axes.set_ylim(0, 1.2 * highest or 1)
    if "truncated" in series:
        share = axes.twinx()
        share.fill_between(
            series["truncated"].steps, 100 * _smooth(series["truncated"].values), color=RED, alpha=0.25, linewidth=0
        )
        share.set_ylim(0, 100)
        share.grid(False)
        share.set_yticks([0, 50, 100], ["0%", "50%", "100%"], color=RED, fontsize=7)
        axes.fill_between([], [], color=RED, alpha=0.25, label="cut off, right axis")
    axes.legend(loc="upper left", ncols=3, borderaxespad=0, columnspacing=1.0)
    _title(axes, "Completion length", "tokens")


def _time(axes: Axes, series: Mapping[str, Series]) -> None:
    total = series["seconds"]
    parts = {n[8:]: dict(zip(*map(np.ndarray.tolist, series[n]))) for n in series if n.startswith("seconds/")}
    names = [n for n in SECTIONS if n in parts] + [n for n in parts if n not in SECTIONS]
    steps = total.steps
    layers = {n: np.nan_to_num([parts[n].get(step, 0.0) for step in steps.tolist()]) for n in names}
    rest = np.clip(np.nan_to_num(total.values) - sum(layers.values(), np.zeros(len(steps))), 0, None)
    if rest.sum() > 0.01 * max(np.nansum(total.values), 1e-12):
        layers["other"] = layers.pop("other", 0.0) + rest
    largest = sorted(layers, key=lambda n: -np.sum(layers[n]))[:6]
    least = 0.01 * np.nansum(total.values)
    for small in [n for n in layers if n != "other" and (n not in largest or np.sum(layers[n]) < least)]:
        layers["other"] = layers.pop("other", 0.0) + layers.pop(small)
    layers = {n: layer for n, layer in layers.items() if np.sum(layer) > 0}
    colors = SECTIONS | dict(zip([n for n in layers if n not in SECTIONS], itertools.cycle(SPARE)))
    edges = np.unique(np.linspace(0, len(steps), min(len(steps), 60) + 1).astype(int))
    # The median of a bin, so that one compilation does not flatten the rest of the picture.
    binned = [[float(np.median(layer[a:b])) for a, b in zip(edges, edges[1:])] for layer in layers.values()]
    sums = {n: float(np.sum(layer)) for n, layer in layers.items()}
    labels = [f"{n} {part / sum(sums.values()):.0%}" for n, part in sums.items()]
    at = [float(steps[a:b].mean()) for a, b in zip(edges, edges[1:])]
    if len(at) == 1:
        at, binned = [at[0] - 0.5, at[0] + 0.5], [layer * 2 for layer in binned]
    axes.stackplot(at, binned, colors=[colors[n] for n in layers], labels=labels, alpha=0.85, linewidth=0)
    height = float(np.max(np.sum(binned, axis=0)))
    axes.set_ylim(0, height * (1.3 if len(layers) <= 4 else 1.45) or 1)
    columns = len(layers) if len(layers) <= 4 else math.ceil(len(layers) / 2)
    options = {"columnspacing": 0.9, "handlelength": 0.8, "handletextpad": 0.5, "fontsize": 7.5}
    axes.legend(loc="upper left", ncols=columns, borderaxespad=0, **options)
    _title(axes, "Where the time goes", f"seconds per step; {format_seconds(float(np.nansum(total.values)))} in all")


PANELS: dict[str, Callable[[Any, Mapping[str, Series]], None]] = {
    "reward": _reward,
    "eval/pass@1": _accuracy,
    "kl": _kl,
    "entropy": _entropy,
    "length_mean": _length,
    "seconds": _time,
}


def _has(series: Mapping[str, Series], name: str) -> bool:
    names = [n for n in series if n.startswith("eval/pass@")] + ["eval/greedy"] if name == "eval/pass@1" else [name]
    known = [series[n].values[np.isfinite(series[n].values)] for n in names if n in series]
    return any(values.any() if name == "seconds" else len(values) for values in known)


def _curve(axes: Axes, one: Series, color: str, label: str | None = None) -> tuple[float, float]:
    """The smoothed line over the faint raw one. Returns the range to show; single outliers may lie outside."""
    smooth = _smooth(one.values)
    axes.plot(one.steps, one.values, color=color, alpha=0.22, linewidth=0.8)
    axes.plot(one.steps, smooth, color=color, label=label, marker="o" if len(smooth) == 1 else None)
    usual = [*smooth, *np.nanpercentile(one.values, [1, 99])]
    return float(np.nanmin(usual)), float(np.nanmax(usual))


def _title(axes: Axes, title: str, caption: str) -> None:
    axes.set_title(title, loc="left", fontsize=10.5, fontweight="bold", pad=20)
    axes.text(0, 1.035, caption, transform=axes.transAxes, fontsize=8, color=MUTED)


def _end_labels(axes: Axes, labels: Sequence[tuple[float, str, str]]) -> None:
    """Names and last values at the ends of the lines, pushed apart where they would overlap."""
    gap, heights = 0.085, []
    ordered = sorted((label for label in labels if math.isfinite(label[0])), reverse=True)
    for value, _, _ in ordered:
        heights.append(min(value, heights[-1] - gap) if heights else min(value, 0.98))
    lift = max(0.0, 0.03 - heights[-1]) if heights else 0.0
    left, right = axes.get_xlim()
    axes.set_xlim(left, right + 0.3 * (right - left))
    for (value, name, color), height in zip(ordered, heights):
        weight = "bold" if name == "pass@1" else "normal"
        axes.text(right, height + lift, f"{name} {value:.2f}", color=color, va="center", fontsize=8, fontweight=weight)


def _smooth(values: np.ndarray) -> np.ndarray:
    """A Gaussian window of about a fortieth of the run; gaps are skipped, the ends are not pulled to zero."""
    width = len(values) / 40
    if width < 1:
        return np.asarray(values, np.float64)
    reach = np.arange(-math.ceil(3 * width), math.ceil(3 * width) + 1)
    kernel = np.exp(-0.5 * (reach / width) ** 2)
    known = np.isfinite(values)
    if not known.any():
        return np.full(len(values), np.nan)
    middle = slice(len(reach) // 2, len(reach) // 2 + len(values))
    weight = np.convolve(known.astype(np.float64), kernel)[middle]
    total = np.convolve(np.where(known, values, 0.0), kernel)[middle]
    return np.where(weight > 1e-6, total / np.maximum(weight, 1e-6), np.nan)


def headline(series: Mapping[str, Series]) -> str:
    """A run in a few words: what rose, how many steps, how long."""
    parts = []
    if "eval/pass@1" in series and len(series["eval/pass@1"].values) > 1:
        first, last = series["eval/pass@1"].values[[0, -1]]
        parts.append(f"pass@1 {first:.2f} → {last:.2f}")
    elif "reward" in series:
        start, end = ends(series["reward"])
        parts.append(f"reward {format_number(start)} → {format_number(end)}")
    train = [one.steps for name, one in series.items() if "/" not in name and len(one.steps)]
    if train:
        count = max(int(steps.max()) for steps in train) + 1
        parts.append(f"{count} step{'s' * (count != 1)}")
    if "seconds" in series:
        parts[-1] += f" in {format_seconds(float(np.nansum(series['seconds'].values)))}"
    return "  ·  ".join(parts)


def ends(one: Series) -> tuple[float, float]:
    """Means over the first and the last twentieth."""
    count = max(len(one.values) // 20, 1)
    values = [part[np.isfinite(part)] for part in (one.values[:count], one.values[-count:])]
    start, end = (float(part.mean()) if len(part) else math.nan for part in values)
    return start, end
