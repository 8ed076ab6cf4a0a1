"""Run demonstrations and print their tables."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import time

import numpy as np

import benchmarks.demonstrations as demonstrations
from benchmarks.demonstrations import Row

TOOLS = ("bandit", "scratch")


def main() -> None:
    known = sorted(m.name for m in pkgutil.iter_modules(demonstrations.__path__) if m.name not in (*TOOLS, "__main__"))
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demonstrations", description=demonstrations.__doc__)
    parser.add_argument("names", nargs="*", metavar="METHOD", help=f"default: all of {', '.join(known)}")
    parser.add_argument("--seeds", type=int, default=8, help="independent repetitions (default: 8)")
    options = parser.parse_args()
    if unknown := sorted(set(options.names) - set(known)):
        parser.error(f"there is no demonstration {unknown[0]!r}; there are {', '.join(known)}")
    for name in options.names or known:
        module, start = importlib.import_module(f"benchmarks.demonstrations.{name}"), time.perf_counter()
        rows = module.demonstrate(options.seeds)
        print(f"\n{name}: {module.CLAIM}  [{time.perf_counter() - start:.0f} s, {options.seeds} seeds]")
        print(table(name, rows), flush=True)


def table(name: str, rows: list[Row]) -> str:
    """mean +- standard error over seeds of both, the paper's expectation, and whether it came out."""
    lines = [("metric", "baseline", name, "paper", "came out")]
    for row in rows:
        baseline = f"{_number(row.plain)} ({row.baseline})"
        lines.append((row.metric, baseline, _number(row.method), row.expected or "-", came_out(row)))
    widths = [max(len(line[i]) for line in lines) for i in range(5)]
    return "\n".join(
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines
    )


def came_out(row: Row) -> str:
    """Whether the means stand to each other as expected: "yes", "NO", or "tie" where two standard errors of their
    difference do not tell them apart though the paper does."""
    plain, method = np.asarray(row.plain, float), np.asarray(row.method, float)
    difference, error = method.mean() - plain.mean(), np.hypot(_error(plain), _error(method))
    seen = "=" if abs(difference) <= max(2 * error, 1e-9) else ">" if difference > 0 else "<"
    if not row.expected:
        return ""
    return "yes" if seen == row.expected else "tie" if seen == "=" else "NO"


def _error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values))) if values.size > 1 else 0.0


def _number(values) -> str:
    values = np.asarray(values, float)
    return f"{values.mean():.4g}" + (f" +- {_error(values):.2g}" if values.size > 1 else "")


if __name__ == "__main__":
    main()
