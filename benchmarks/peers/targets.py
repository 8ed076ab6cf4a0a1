"""What the results should show: each a figure of ours beside the best peer's, or a bound on its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from benchmarks.peers.schedule import speed

Lines = list[dict[str, Any]]


class Target(NamedTuple):
    """ours, theirs: a figure out of all results, None where it was not measured. `theirs` comes with the peer's name;
    without it the figure itself is bounded, with it the ratio ours / theirs. smaller: less is better."""

    work: str
    ours: Callable[[Lines], float | None]
    theirs: Callable[[Lines], tuple[str, float] | None] | None
    at_least: float
    aim: float
    smaller: bool = False


class Row(NamedTuple):
    work: str
    ours: float | None
    peer: str
    theirs: float | None
    judged: float | None  # the ratio, or the figure
    at_least: float
    aim: float
    verdict: str


def judge(target: Target, lines: Lines) -> Row:
    """Verdicts: "aim", "at least", "BELOW", or "not measured"."""
    ours = target.ours(lines)
    found = target.theirs(lines) if target.theirs else None
    peer, theirs = found or ("", None)
    judged = ours if target.theirs is None else _ratio(ours, theirs)
    reached = (lambda bound: judged <= bound) if target.smaller else (lambda bound: judged >= bound)
    if judged is None or math.isnan(judged):
        verdict = "not measured"
    else:
        verdict = "aim" if reached(target.aim) else "at least" if reached(target.at_least) else "BELOW"
    return Row(target.work, ours, peer, theirs, judged, target.at_least, target.aim, verdict)


def of(lines: Iterable[dict[str, Any]], label: str, *peers: str, **fields: Any) -> Lines:
    """The results with this label, of these peers (none named: all but ours), with these fields."""
    wanted = [x for x in lines if x["label"] == label and "error" not in x]
    wanted = [x for x in wanted if (x["peer"] in peers if peers else x["peer"] != "ours")]
    return [x for x in wanted if all(x.get(name) == value for name, value in fields.items())]


def fastest(lines: Lines) -> Lines:
    """Of every peer its best setting."""
    best: dict[str, dict[str, Any]] = {}
    for line in lines:
        if line["peer"] not in best or speed(line) > speed(best[line["peer"]]):
            best[line["peer"]] = line
    return list(best.values())


def ours(label: str, figure: str, *, at: int = 0, **fields: Any) -> Callable[[Lines], float | None]:
    """A figure of our `at`-th result with this label."""

    def read(lines: Lines) -> float | None:
        found = of(lines, label, "ours", **fields)
        return found[at].get(figure) if len(found) > at else None

    return read


def best(label: str, figure: str, *peers: str, smaller: bool = False) -> Callable[[Lines], tuple[str, float] | None]:
    """The best of the peers, each in the setting in which it is fastest."""

    def read(lines: Lines) -> tuple[str, float] | None:
        figures = [(x["peer"], x[figure]) for x in fastest(of(lines, label, *peers)) if x.get(figure) is not None]
        return (min if smaller else max)(figures, key=lambda pair: pair[1]) if figures else None

    return read


def vocabulary_cost(lines: Lines) -> float | None:
    """GiB that eight times the vocabulary adds to the peak."""
    small, wide = of(lines, "update, 5 passes", "ours"), of(lines, "vocabulary", "ours")
    return wide[0]["peak_gib"] - small[0]["peak_gib"] if small and wide else None


def later_compilations(lines: Lines) -> float | None:
    """After the first step."""
    found = of(lines, "recompile", "ours")
    return float(sum(found[0]["compilations"][1:])) if found else None


def against_itself(label: str, figure: str, other: str, **fields: Any) -> Callable[[Lines], float | None]:
    def read(lines: Lines) -> float | None:
        found = of(lines, label, "ours", **fields)
        return _ratio(found[0].get(figure), found[0].get(other)) if found else None

    return read


def _ratio(one: float | None, other: float | None) -> float | None:
    if one is None or other is None:
        return None
    return one / other if other else (0.0 if one == 0 else math.inf)


FIVE, FOUR, BF16, F32 = "update, 5 passes", "update, 4 passes", "bfloat16", "float32"
TARGETS = [
    Target("A, tokens/s", ours("sample A", "tokens_per_s"), best("sample A", "tokens_per_s"), 1.5, 3),
    Target("B, tokens/s", ours("sample B", "tokens_per_s"), best("sample B", "tokens_per_s"), 3, 5),
    Target(
        "B, peak memory, GiB",
        ours("sample B", "peak_gib"),
        best("sample B", "peak_gib", smaller=True),
        0.6,
        0.4,
        smaller=True,
    ),
    Target("update (5), tokens/s", ours(FIVE, "tokens_per_s"), best(FIVE, "tokens_per_s"), 1.5, 2.5),
    Target("update (5) against Tunix", ours(FIVE, "tokens_per_s"), best(FIVE, "tokens_per_s", "tunix"), 3, 3),
    Target("update (4), tokens/s", ours(FOUR, "tokens_per_s"), best(FOUR, "tokens_per_s"), 1.5, 2.5),
    Target(
        "update (5), peak memory, GiB", ours(FIVE, "peak_gib"), best(FIVE, "peak_gib", smaller=True), 0.5, 0.3, True
    ),
    Target("vocabulary 4k to 32k adds, GiB", vocabulary_cost, None, 0.5, 0.3, smaller=True),
    Target(
        "iteration, s",
        ours("iteration", "iteration_s", at=1),
        best("iteration", "iteration_s", smaller=True),
        1 / 2,
        1 / 3,
        smaller=True,
    ),
    Target(
        "first update, s, nothing compiled",
        ours("iteration", "first_update_s"),
        best("iteration", "first_update_s", smaller=True),
        0.8,
        0.5,
        smaller=True,
    ),
    Target(
        "first update, s, compiled before",
        ours("iteration", "first_update_s", at=1),
        best("iteration", "first_update_s", smaller=True),
        0.5,
        0.3,
        smaller=True,
    ),
    Target("compilations after the first step", later_compilations, None, 0, 0, smaller=True),
    Target("ragged against uniform, 64 rows", ours("ragged", "against_uniform"), None, 0.6, 0.8),
    Target("ragged against uniform, 256 rows", ours("ragged", "against_uniform", at=1), None, 0.6, 0.8),
    Target("ragged against uniform, 1,024 rows", ours("ragged", "against_uniform", at=2), None, 0.6, 0.8),
    Target("sampler-trainer gap, float32", ours("gap", "gap_max", dtype=F32), None, 2e-5, 0, smaller=True),
    Target(
        "the same, bfloat16, over the gap between shapes",
        against_itself("gap", "gap_max", "between_shapes_max", dtype=BF16),
        None,
        1,
        0,
        smaller=True,
    ),
    Target("gap with model.exact, float32", ours("gap", "gap_max", dtype=F32, at=1), None, 0, 0, smaller=True),
    Target("the same, bfloat16", ours("gap", "gap_max", dtype=BF16, at=1), None, 0, 0, smaller=True),
    Target("fused against unfused iterations/s", against_itself("fused", "fused_per_s", "unfused_per_s"), None, 1.5, 3),
]
