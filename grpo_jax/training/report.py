"""A run at a glance: one picture, and one self-contained HTML page with its sampled groups.

Everything is read from the run directory (`metrics.jsonl`, `samples.jsonl`, `config.yaml`), so it works on a run that
is still going, on another machine, and without an accelerator.
"""

from __future__ import annotations

import base64
import html
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grpo_jax.training.curves import as_series, ends, figure, headline, plot
from grpo_jax.training.metrics import Series, read_samples
from grpo_jax.training.progress import format_number, plain_text

__all__ = ["figure", "plot", "report"]

MOST_STEPS = 100  # steps whose groups are on the page, spread over the run
MOST_GROUPS = 8  # groups of one step
MOST_CHARACTERS = 6000  # of one completion
SUMMARY = {
    "eval/pass@1": "pass@1, held out",
    "eval/pass@8": "pass@8, held out",
    "eval/maj@8": "maj@8, held out",
    "eval/greedy": "greedy, held out",
    "reward": "reward",
    "no_signal": "groups without signal",
    "kl": "KL to the reference, nats per token",
    "entropy": "entropy, nats per token",
    "length_mean": "completion length, tokens",
    "length_max": "longest completion, tokens",
    "truncated": "truncated",
    "clip_low": "ratios clipped from below",
    "clip_high": "ratios clipped from above",
    "gap_mean": "sampler–trainer gap, mean",
    "gap_max": "sampler–trainer gap, largest",
    "gap_kl": "KL of the sampler to the trainer, nats per token",
    "grad_norm": "gradient norm",
    "seconds": "seconds per step",
    "tokens_sampled_per_s": "tokens sampled per second",
    "tokens_trained_per_s": "tokens trained per second",
    "memory_gib": "peak memory, GiB",
}


def report(directory: str | os.PathLike) -> tuple[Path, Path]:
    """Write `report.png` and `report.html` into a run directory and return their paths. The page holds the picture, the
    run's start and end in numbers, its configuration and its sampled groups by step; it loads nothing from elsewhere.

    Raises: FileNotFoundError if the directory holds no run, ValueError if it holds nothing to draw.
    """
    directory = Path(directory)
    series = as_series(directory)
    title = directory.resolve().name
    picture = plot(series, directory / "report.png", title=title)
    config = directory / "config.yaml"
    page = _PAGE.format(
        title=html.escape(title),
        headline=html.escape(headline(series)),
        picture=base64.b64encode(picture.read_bytes()).decode(),
        summary=_summary(series),
        groups=_groups(read_samples(directory)),
        config=_config(config.read_text(encoding="utf-8", errors="replace")) if config.is_file() else "",
    )
    path = directory / "report.html"
    path.write_text(page, encoding="utf-8")
    return picture, path


def _summary(series: Mapping[str, Series]) -> str:
    names = [name for name in SUMMARY if name in series]
    names += sorted(n for n in series if n.startswith(("reward/", "eval/pass@", "eval/maj@")) and n not in SUMMARY)
    rows = []
    for name in names:
        one = series[name]
        finite = one.values[np.isfinite(one.values)]
        if not len(finite):
            continue
        start, end = (one.values[0], one.values[-1]) if name.startswith("eval/") else ends(one)
        cells = [start, end, float(finite.min()), float(finite.max())]
        label = SUMMARY.get(name, name.removeprefix("eval/") + (", held out" if name.startswith("eval/") else ""))
        rows.append(
            f"<tr><th>{html.escape(label)}</th>"
            + "".join(f"<td>{format_number(cell)}</td>" for cell in cells)
            + "</tr>"
        )
    head = "<tr><th></th><th>start</th><th>end</th><th>lowest</th><th>highest</th></tr>"
    return f"<table class=numbers><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>"


def _config(text: str) -> str:
    return f"<details><summary><h2>Configuration</h2></summary><pre>{html.escape(_visible(text))}</pre></details>"


def _groups(samples: Sequence[Mapping[str, Any]]) -> str:
    if not samples:
        return ""
    by_step: dict[int, list[Mapping[str, Any]]] = {}
    for row in samples:
        by_step.setdefault(row["step"], []).append(row)
    steps = sorted(by_step)
    shown = [
        steps[i] for i in np.unique(np.linspace(0, len(steps) - 1, min(len(steps), MOST_STEPS)).round().astype(int))
    ]
    totals = [total for step in shown for row in by_step[step] for total in _totals(row) if math.isfinite(total)]
    low, high = (min(totals), max(totals)) if totals else (0.0, 0.0)
    sections = []
    for step in shown:
        rows = by_step[step][:MOST_GROUPS]
        body = "".join(_group(row, low, high) for row in rows)
        left = len(by_step[step]) - len(rows)
        body += f"<p class=quiet>{left} more groups of this step are in samples.jsonl.</p>" if left else ""
        sections.append(f'<section class=step data-step="{step}"><h3>Step {step}</h3>{body}</section>')
    options = "".join(f'<option value="{step}">{step}</option>' for step in shown)
    spread = f" ({len(shown)} of {len(steps)} steps with samples)" if len(shown) < len(steps) else ""
    scale = f"<span class=scale></span> reward {format_number(low)} to {format_number(high)}" if totals else ""
    return (
        f'<h2>Sampled groups</h2><p class=picker hidden><button id=previous aria-label="previous step">◀</button>'
        f"<label>step <select id=chosen>{options}</select></label>"
        f'<button id=next aria-label="next step">▶</button><input id=slider type=range min=0 max={len(shown) - 1} '
        f'aria-label="step"><span class=quiet>{spread}</span></p><p class=quiet>{scale}</p>{"".join(sections)}'
    )


def _group(row: Mapping[str, Any], low: float, high: float) -> str:
    channels, totals = row["rewards"], _totals(row)
    advantages, lengths = row.get("advantages"), row.get("lengths")
    largest = max((abs(a) for a in advantages or [] if math.isfinite(a)), default=0.0) or 1.0
    head = "".join(f"<th>{html.escape(str(name))}</th>" for name in channels)
    head += ("<th>advantage</th>" if advantages else "") + ("<th>length</th>" if lengths else "")
    lines = []
    for i, completion in enumerate(row["completions"]):
        text = plain_text(completion)
        cells = "".join(f"<td>{format_number(values[i])}</td>" for values in channels.values())
        if advantages:
            cells += f"<td class=advantage>{_bar(advantages[i], largest)}</td>"
        if lengths:
            cells += f"<td>{format_number(lengths[i])}</td>"
        if len(text) > MOST_CHARACTERS:
            text = f"{text[:MOST_CHARACTERS]}… ({len(text) - MOST_CHARACTERS} more characters)"
        color = _color(totals[i], low, high) if channels else "#eee"
        lines.append(f'<tr><td class=completion style="--c:{color}">{html.escape(_visible(text))}</td>{cells}</tr>')
    prompt = html.escape(_visible(plain_text(row["prompt"])))
    return (
        f"<article><div class=prompt>{prompt}</div><div class=wide><table><thead><tr><th>completion</th>{head}</tr>"
        f"</thead><tbody>{''.join(lines)}</tbody></table></div></article>"
    )


def _totals(row: Mapping[str, Any]) -> list[float]:
    """Sum of the channels that apply, for each completion; NaN where none does."""
    columns = list(row["rewards"].values())
    applying = [[v[i] for v in columns if math.isfinite(v[i])] for i in range(len(row["completions"]))]
    return [sum(values) if values else math.nan for values in applying]


def _color(reward: float, low: float, high: float) -> str:
    """Red for the lowest reward of the run, through sand, to green for the highest; grey for none."""
    if not math.isfinite(reward):
        return "#eeeeee"
    share = (reward - low) / (high - low) if high > low else 0.5
    return f"hsl({8 + 130 * share:.0f} 62% 52%)"


def _bar(advantage: float, largest: float) -> str:
    if not math.isfinite(advantage):
        return "–"
    side = "up" if advantage > 0 else "down"
    width = 50 * abs(advantage) / largest
    return f'<span class=bar><i class={side} style="width:{width:.1f}%"></i></span><b>{advantage:+.2f}</b>'


def _visible(text: str) -> str:
    """Control characters, which a policy may sample, as escapes; they are not allowed in a page."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #1f2937;
 max-width: 1180px; margin: 0 auto; padding: 24px 20px 80px }}
h1 {{ font-size: 26px; margin: 0 }} h2 {{ font-size: 19px; margin: 36px 0 8px }}
h3 {{ font-size: 15px; margin: 18px 0 8px }}
img {{ width: 100%; height: auto; border: 1px solid #e5e7eb; border-radius: 8px; margin-top: 16px }}
.quiet, .lead {{ color: #6b7280 }} .lead {{ font-size: 17px; margin: 2px 0 0 }}
table {{ border-collapse: collapse }} th {{ font-weight: 500; color: #6b7280; text-align: right }}
th:first-child {{ text-align: left }}
td {{ text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }}
.numbers th, .numbers td {{ padding: 4px 16px 4px 0; border-bottom: 1px solid #eef0f3 }}
.numbers tbody th {{ color: inherit }} .numbers thead th {{ font-size: 13px }}
article {{ border: 1px solid #e5e7eb; border-radius: 8px; margin: 0 0 14px; overflow: hidden }}
.prompt {{ padding: 10px 14px; background: #f6f7f9; font: 600 14px/1.45 ui-monospace, monospace; white-space: pre-wrap;
 overflow-wrap: anywhere; max-height: 16em; overflow-y: auto }}
.wide {{ overflow-x: auto; padding: 4px 14px 10px }} article table {{ width: 100% }}
article th, article td {{ padding: 5px 10px; vertical-align: top; font-size: 13px }}
article tbody td {{ border-top: 2px solid #fff }}
.completion {{ text-align: left; white-space: pre-wrap; overflow-wrap: anywhere; width: 99%; min-width: 260px;
 font: 13px/1.45 ui-monospace, monospace; border-left: 5px solid var(--c);
 background: color-mix(in srgb, var(--c) 13%, white) }}
article th:first-child {{ padding-left: 0 }}
.advantage b {{ display: inline-block; min-width: 3.4em; font-weight: 500 }}
.bar {{ display: inline-block; position: relative; width: 90px; height: 9px; background: #f1f3f5; border-radius: 2px }}
.bar i {{ position: absolute; top: 0; bottom: 0 }} .bar .up {{ left: 50%; background: #2f9e6e }}
.bar .down {{ right: 50%; background: #cf5a4f }} .bar::after {{ content: ""; position: absolute; left: 50%; top: -2px;
 bottom: -2px; border-left: 1px solid #9ca3af }}
.scale {{ display: inline-block; width: 90px; height: 9px; border-radius: 2px; vertical-align: baseline;
 background: linear-gradient(90deg, hsl(8 62% 52%), hsl(73 62% 52%), hsl(138 62% 52%)) }}
.picker:not([hidden]) {{ display: flex; gap: 10px; align-items: center }} .picker input {{ flex: 1 }}
.picker button, .picker select {{ font: inherit; padding: 2px 8px; border: 1px solid #d1d5db; border-radius: 6px;
 background: #fff }}
summary h2 {{ display: inline-block; cursor: pointer }}
pre {{ background: #f6f7f9; padding: 14px; border-radius: 8px; overflow: auto; font-size: 13px }}
</style></head><body>
<h1>{title}</h1><p class=lead>{headline}</p>
<img alt="curves of the run" src="data:image/png;base64,{picture}">
<h2>Start and end</h2>{summary}
<p class=quiet>Start and end are means over the first and the last twentieth of the steps; held out: the first and the
last evaluation.</p>
{groups}
{config}
<script>
const sections = [...document.querySelectorAll("section.step")];
if (sections.length) {{
  const chosen = document.getElementById("chosen"), slider = document.getElementById("slider");
  const show = place => {{
    place = Math.max(0, Math.min(sections.length - 1, place));
    sections.forEach((section, i) => section.hidden = i !== place);
    chosen.selectedIndex = place; slider.value = place;
  }};
  chosen.onchange = () => show(chosen.selectedIndex);
  slider.oninput = () => show(+slider.value);
  document.getElementById("previous").onclick = () => show(chosen.selectedIndex - 1);
  document.getElementById("next").onclick = () => show(chosen.selectedIndex + 1);
  document.querySelector(".picker").hidden = false;
  show(sections.length - 1);
}}
</script></body></html>
"""
