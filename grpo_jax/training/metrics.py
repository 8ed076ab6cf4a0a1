"""Where the numbers of a run go.

A run directory holds `metrics.jsonl` (one JSON object per record: step, kind, time, then the values), `samples.jsonl`
(one sampled group per line) and, with TensorBoard on, `tensorboard/`. Both files can be read while the run is going.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import IO, Any, NamedTuple

import jax
import numpy as np

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
RESERVED = ("step", "kind", "time")
KEPT_OPEN = 30.0  # seconds; a bucket mounted as a directory shows, and keeps, what was written only once it is closed


class Series(NamedTuple):
    """One metric over a run."""

    steps: np.ndarray  # int64 [S]
    values: np.ndarray  # float64 [S], NaN where the value was not finite


class Metrics:
    """Writes a run's numbers to JSONL, to TensorBoard event files and, when asked, to Weights & Biases.

    `step` counts from 0: the record of the first update has step 0, an evaluation after n updates has step n. With
    `resume_step=k` what a run continued at k writes again is removed first: training records and samples of steps >= k,
    evaluations of steps > k. Other kinds (a warm-up) count their own steps and stay. Only process 0 of a multi-host
    run writes.

    Args:
        directory: of the run; made if it is not there.
        console: True prints one line per record; a function gets that line instead (`Progress.note`).
        tensorboard: write event files under `directory/tensorboard`.
        wandb: name of a Weights & Biases project, None for no such logging.
        run_config: shown beside the curves in TensorBoard and W&B.
        resume_step: the step that the run continues at.
    Raises:
        FileExistsError: the directory holds records already and `resume_step` was not given.
        ImportError: `wandb` was asked for and is not installed. (Without tensorboardX there is a warning.)
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        console: bool | Callable[[str], None] = False,
        tensorboard: bool = True,
        wandb: str | None = None,
        run_config: Mapping[str, Any] | None = None,
        resume_step: int | None = None,
    ) -> None:
        self.directory = Path(directory)
        self._files: dict[str, IO[str]] = {}
        self._closed_at = time.monotonic()
        self._tensorboard = self._wandb = None
        self._print = print if console is True else console or None
        self._writes = jax.process_index() == 0
        if not self._writes:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        _prepare(self.directory, resume_step)
        if tensorboard:
            self._tensorboard = _open_tensorboard(self.directory, run_config, resume_step)
        if wandb:
            self._wandb = _open_wandb(wandb, self.directory, run_config, resume_step)

    def log(self, step: int, values: Mapping[str, float], *, kind: str = "train") -> None:
        """Append one record. Values are scalars (Python, numpy or JAX); NaN and infinities are stored as null.

        Raises: ValueError for a value that is not a number or a name that the record itself uses.
        """
        numbers = {name: _scalar(name, value) for name, value in values.items()}
        if not self._writes:
            return
        record = {"step": int(step), "kind": kind, "time": round(time.time(), 3)}
        self._append(METRICS_FILE, record | {name: _finite(value) for name, value in numbers.items()})
        tags = {f"{kind}/{name}": value for name, value in numbers.items()}
        if self._tensorboard:
            self._tensorboard(int(step), tags)
        if self._wandb:
            self._wandb.log({"step": int(step)} | tags)
        if self._print:
            body = "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())
            self._print(f"{kind} {int(step)}  {body}")

    def samples(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append sampled groups. A row has `prompt` (text or chat), `completions` [G] and any of `rewards`
        ({channel: [G]}), `advantages` [G], `lengths` [G]; further entries are kept as they are.

        Raises: ValueError if a row lacks prompt or completions, or a list has another length than completions.
        """
        rows = [_checked_group(row) for row in rows]
        if self._writes:
            for row in rows:
                self._append(SAMPLES_FILE, {"step": int(step)} | row)

    def close(self) -> None:
        """Write out and close everything. Also done at the end of a `with` block."""
        self._close_files()
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()
        self._tensorboard = self._wandb = None
        self._writes = False

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        if name not in self._files:
            # Decoding sampled bytes may leave lone surrogates; escaped, they are valid JSON.
            self._files[name] = (self.directory / name).open("a", encoding="utf-8", errors="backslashreplace")
        self._files[name].write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
        self._files[name].flush()
        if time.monotonic() - self._closed_at >= KEPT_OPEN:
            self._close_files()

    def _close_files(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()
        self._closed_at = time.monotonic()


def read_metrics(directory: str | os.PathLike) -> dict[str, Series]:
    """All metrics of a run as {name: (steps, values)}, in the order of the file. Names of kind "train" are bare
    ("reward"), those of other kinds carry it ("eval/pass@1"). Of two records of one step the later one counts.

    Raises: FileNotFoundError if the directory holds no run; ValueError for a damaged line (a half-written last line,
    left by a kill, is skipped).
    """
    path = Path(directory) / METRICS_FILE
    if not path.is_file():
        held = "does not exist" if not Path(directory).exists() else f"has no {METRICS_FILE}"
        raise FileNotFoundError(
            f"no run in {str(directory)!r}: it {held}. Give the directory that a training run wrote its metrics to."
        )
    columns: dict[str, dict[int, float]] = {}
    for record in _read(path):
        prefix = "" if record["kind"] == "train" else f"{record['kind']}/"
        for name, value in record.items():
            if name not in RESERVED:
                columns.setdefault(prefix + name, {})[record["step"]] = math.nan if value is None else value
    return {name: Series(np.array(list(c), np.int64), np.array(list(c.values()), float)) for name, c in columns.items()}


def read_samples(directory: str | os.PathLike) -> list[dict[str, Any]]:
    """The sampled groups of a run in the order of the file, [] if none were kept; null rewards are NaN."""
    path = Path(directory) / SAMPLES_FILE
    rows = list(_read(path)) if path.is_file() else []
    for row in rows:
        row["rewards"] = {channel: _with_nan(values) for channel, values in row.get("rewards", {}).items()}
        if "advantages" in row:
            row["advantages"] = _with_nan(row["advantages"])
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Files and backends


def _scalar(name: str, value: Any) -> float:
    if name in RESERVED:
        raise ValueError(f"metric name {name!r} is used by the record itself ({', '.join(RESERVED)}): choose another")
    array = np.asarray(value)
    if array.size != 1 or array.dtype.kind in "OUSc":
        what = f"shape {array.shape}" if array.size != 1 else f"{type(value).__name__} {value!r}"
        raise ValueError(f"metric {name!r} must be one number, got {what}: log its mean, or one metric per entry")
    return float(array.reshape(()))


def _finite(value: float) -> float | int | None:
    if not math.isfinite(value):
        return None
    return int(value) if value.is_integer() and abs(value) < 2**53 else value


def _checked_group(row: Mapping[str, Any]) -> dict[str, Any]:
    missing = [name for name in ("prompt", "completions") if name not in row]
    if missing:
        raise ValueError(f"a sampled group needs prompt and completions, {' and '.join(missing)} not in {sorted(row)}")
    count = len(row["completions"])
    rewards = row.get("rewards", {})
    if not isinstance(rewards, Mapping):
        raise ValueError(f"rewards of a sampled group are {{channel: values}}, got {type(rewards).__name__}")
    lists = {f"rewards[{channel!r}]": values for channel, values in rewards.items()}
    lists |= {name: row[name] for name in ("advantages", "lengths") if name in row}
    for name, values in lists.items():
        if np.shape(values) != (count,):
            raise ValueError(f"{name} has shape {np.shape(values)}, but the sampled group has {count} completions")
    return _plain(row)


def _plain(value: Any) -> Any:
    """Arrays as lists, numpy scalars as Python's, NaN and infinities as None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        return _plain(np.asarray(value).tolist())
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _with_nan(values: Iterable[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


def _read(path: Path) -> Iterator[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                raise ValueError("no step")
        except ValueError:
            if number == len(lines):  # no newline after it: the process was killed while it wrote
                return
            raise ValueError(f"{path}, line {number} is not a record of a run: {line[:80]!r}") from None
        yield {"kind": "train"} | record


def _prepare(directory: Path, resume_step: int | None) -> None:
    """Remove what a resumed run will write again."""
    paths = [path for path in (directory / METRICS_FILE, directory / SAMPLES_FILE) if path.is_file()]
    if resume_step is None:
        last = max((record["step"] for path in paths for record in _read(path)), default=None)
        if last is not None:
            raise FileExistsError(
                f"{str(directory)!r} holds a run with records up to step {last}. Give resume_step to continue it "
                "(0: from the start), or choose another directory."
            )
        resume_step = 0
    # The evaluation of step k was made of the very state that the run goes on from, so it stays.
    ends = {"train": resume_step, "eval": resume_step + 1}
    for path in paths:
        kept = [record for record in _read(path) if record["step"] < ends.get(record["kind"], math.inf)]
        if path.name == SAMPLES_FILE:
            kept = [{name: value for name, value in record.items() if name != "kind"} for record in kept]
        partial = path.with_suffix(".partial")  # replaced in one move: a kill here loses nothing
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept)
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")
        os.replace(partial, path)


class _TensorBoard:
    """One event per record: a scalar at a time costs fifteen times as much."""

    def __init__(self, directory: Path, run_config: Mapping[str, Any] | None, resume_step: int | None) -> None:
        proto = importlib.import_module("tensorboardX.proto.event_pb2")
        summary = importlib.import_module("tensorboardX.summary")
        self._writer = importlib.import_module("tensorboardX").FileWriter(str(directory), flush_secs=10)
        self._summary = summary.Summary
        if resume_step is not None:  # TensorBoard then drops what it read of these steps
            start = proto.SessionLog(status=proto.SessionLog.START)
            self._writer.add_event(proto.Event(session_log=start), step=resume_step)
        if run_config is not None:
            text = json.dumps(run_config, indent=2, default=str)
            self._writer.add_summary(summary.text("config", "    " + text.replace("\n", "\n    ")), 0)

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        scalars = [self._summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._writer.add_summary(self._summary(value=scalars), step)

    def close(self) -> None:
        self._writer.close()


def _open_tensorboard(
    directory: Path, run_config: Mapping[str, Any] | None, resume_step: int | None
) -> _TensorBoard | None:
    try:
        return _TensorBoard(directory / "tensorboard", run_config, resume_step)
    except ImportError:
        warnings.warn(
            "no TensorBoard files are written: tensorboardX is not installed. "
            "pip install tensorboardX, or set metrics.tensorboard=false.",
            stacklevel=3,
        )
        return None


def _open_wandb(
    project: str, directory: Path, run_config: Mapping[str, Any] | None, resume_step: int | None
) -> ModuleType:
    try:
        wandb = importlib.import_module("wandb")
    except ImportError:
        raise ImportError(
            f"W&B project {project!r} was asked for, but wandb is not installed: pip install 'grpo_jax[wandb]', "
            "or leave wandb unset."
        ) from None
    identity = directory / "wandb_run_id"  # a resumed run goes on in the same W&B run
    if not (resume_step and identity.is_file()):
        identity.write_text(uuid.uuid4().hex[:8] + "\n")
    return wandb.init(
        project=project,
        name=directory.resolve().name,
        dir=str(directory),
        config=dict(run_config) if run_config is not None else None,
        id=identity.read_text().strip(),
        resume="allow",
    )
