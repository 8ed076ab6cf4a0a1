"""From requests to cells and back: contexts stored once, rows packed side by side under them. Host only, numpy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from grpo_jax.rewards.traced import numeric
from grpo_jax.sampling.decoding import Cells, Drawn
from grpo_jax.types import Contexts, Request, Rollout

OPTIONS = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "min_new": 0, "score": True}


class Rows(NamedTuple):
    """Every row that requests ask for, flat, before it is drawn."""

    contexts: Contexts
    sampled_under: np.ndarray
    trained_under: np.ndarray
    given: np.ndarray  # [N, T]
    given_logps: np.ndarray  # [N, T]; NaN = given, not drawn
    given_lengths: np.ndarray
    trains_given: np.ndarray
    budget: np.ndarray
    temperature: np.ndarray
    options: dict[str, np.ndarray]
    stops: np.ndarray  # [S, W]
    stops_apply: np.ndarray  # [N, S]
    prompt_ids: np.ndarray
    index: np.ndarray
    group_ids: np.ndarray
    columns: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.prompt_ids)

    def replace(self, **changed: Any) -> Rows:
        return Rows(**{**self._asdict(), **changed})

    def take(self, which: np.ndarray) -> Rows:
        """The rows of these numbers, without the dataset's columns."""
        shared = {"contexts": self.contexts, "stops": self.stops, "columns": {}}
        options = {name: values[which] for name, values in self.options.items()}
        rows = {name: getattr(self, name)[which] for name in self._fields if name not in (*shared, "options")}
        return Rows(**shared, **rows, options=options)

    @property
    def restricts(self) -> tuple[str, ...]:
        """The options by which any row is drawn from less than the whole distribution."""
        off = {name: OPTIONS[name] for name in ("top_k", "top_p", "min_p", "min_new")}
        return tuple(name for name, value in off.items() if (self.options[name] != value).any())


def bucket(n: int, *, least: int = 8, step: int = 256) -> int:
    """n rounded up to a power of two, or from `step` on to a multiple of it: the few sizes that get compiled."""
    size = least
    while size < min(n, step):
        size *= 2
    return size if n <= size else -(-n // step) * step


def expand(
    requests: Sequence[Request],
    *,
    encode: Callable[[object], np.ndarray],
    encode_text: Callable[[str], np.ndarray],
    stop_ids: Sequence[int],
    defaults: dict,
    numbers: Counter,
) -> Rows:
    """The rows of these requests, in order.

    encode turns a prompt (text or chat) into token ids, encode_text plain text. defaults: max_new, temperature, stop
    and OPTIONS, used where a request says nothing. numbers: rows so far per (role, prompt), moved on.
    Rows without a drawn decision are scored at temperature 1, unless their request names another.
    Raises: ValueError for an option that does not exist or is out of its range, a context without tokens, a stop
    without text, or a request without rows or decisions.
    """
    contexts: dict[bytes, int] = {}  # token ids and where they are stored, each once
    stops: dict[tuple[int, ...], int] = {(int(i),): k for k, i in enumerate(dict.fromkeys(stop_ids))}
    always = len(stops)

    def context(text) -> int:
        ids = np.asarray(text if isinstance(text, np.ndarray) else encode(text), np.int32)
        if not ids.size:
            raise ValueError("a context has no tokens: give a prompt that is not empty, or a tokenizer with a BOS")
        return contexts.setdefault(ids.tobytes(), len(contexts))

    def stop(text: str) -> int:
        ids = tuple(int(i) for i in encode_text(text))
        if not ids:
            raise ValueError(f"a stop has no tokens, got {text!r}: every completion ends with nothing")
        return stops.setdefault(ids, len(stops))

    def resolve(request: Request) -> tuple:
        options = _options(request, defaults)
        sampled = context(request.prompt.text if request.context is None else request.context)
        trained = sampled if request.train_context is None else context(request.train_context)
        given, given_logps = _prefix(request, encode_text, stop_ids)
        max_new = defaults["max_new"] if request.max_new is None else request.max_new
        if request.count < 1 or max_new < 0 or len(given) + max_new < 1:
            raise ValueError(
                f"a request of prompt {request.prompt.id} asks for nothing: count {request.count}, a prefix of "
                f"{len(given)} decisions and max_new {max_new}; give a count of at least 1, and a prefix or a max_new "
                f"above 0"
            )
        scored = max_new == 0 and np.isnan(given_logps).all()
        temperature = request.temperature
        if temperature is None:
            temperature = 1.0 if scored else defaults["temperature"]
        if not 0 <= temperature < np.inf:
            raise ValueError(f"temperature is 0 (greedy) or above, got {temperature}")
        ends = [stop(text) for text in (*defaults.get("stop", ()), *request.stop)]
        start = numbers[request.role, request.prompt.id]
        numbers[request.role, request.prompt.id] += request.count
        return sampled, trained, given, given_logps, max_new, temperature, options, ends, start

    sampled, trained, given, given_logps, max_new, temperature, options, ends, starts = zip(*map(resolve, requests))
    counts = [r.count for r in requests]
    lengths = np.array([len(x) for x in given], np.int32)
    budget = lengths + np.array(max_new, np.int32)
    width = int(budget.max())
    apply = np.zeros((len(requests), max(len(stops), 1)), bool)
    apply[:, :always] = True
    for i, which in enumerate(ends):
        apply[i, which] = True
    stored = [np.frombuffer(key, np.int32) for key in contexts]
    repeat = lambda values, dtype: np.repeat(np.asarray(list(values), dtype), counts, axis=0)  # noqa: E731
    return Rows(
        contexts=Contexts(tokens=_padded(stored), lengths=np.array([len(x) for x in stored], np.int32)),
        sampled_under=repeat(sampled, np.int32),
        trained_under=repeat(trained, np.int32),
        given=repeat(_padded(given, width=width), np.int32),
        given_logps=repeat(_padded(given_logps, width=width, fill=np.nan, dtype=np.float32), np.float32),
        given_lengths=repeat(lengths, np.int32),
        trains_given=repeat([r.train_given for r in requests], bool),
        budget=repeat(budget, np.int32),
        temperature=repeat(temperature, np.float32),
        options={k: repeat([o[k] for o in options], np.asarray(v).dtype) for k, v in OPTIONS.items()},
        stops=_padded([s[::-1] for s in stops] or [()], width=1, fill=-1)[:, ::-1],
        stops_apply=repeat(apply, bool),
        prompt_ids=repeat([r.prompt.id for r in requests], np.int32),
        index=np.concatenate([start + np.arange(n) for start, n in zip(starts, counts)]).astype(np.int32),
        group_ids=repeat(range(len(requests)), np.int32),
        columns=_numeric_columns(requests, counts),
    )


def _padded(sequences: Sequence[Sequence], *, width: int = 0, fill: float = 0, dtype: type = np.int32) -> np.ndarray:
    """Sequences as the rows of a table, left-aligned, as wide as the longest of them and at least `width`."""
    table = np.full((len(sequences), max(width, *map(len, sequences))), fill, dtype)
    for row, values in zip(table, sequences):
        row[: len(values)] = values
    return table


def _options(request: Request, defaults: dict) -> dict:
    """All OPTIONS of a request."""
    if unknown := sorted(set(request.options) - set(OPTIONS)):
        raise ValueError(f"a language model's requests take the options {sorted(OPTIONS)}, got {unknown}")
    options = {**OPTIONS, **{k: defaults[k] for k in OPTIONS if k in defaults}, **request.options}
    for name, (least, most) in {"top_k": (0, np.inf), "min_new": (0, np.inf), "min_p": (0, 1)}.items():
        if not least <= options[name] <= most:
            raise ValueError(f"{name} is {least} (off) {'to 1' if most == 1 else 'or more'}, got {options[name]}")
    if not 0 < options["top_p"] <= 1:
        raise ValueError(f"top_p is above 0, and 1 (off) at most, got {options['top_p']}")
    return options


def _prefix(request: Request, encode_text, stop_ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Decisions that are there already. A text is given, and as a whole completion it ends with the first stop."""
    if request.prefix is None:
        return np.zeros(0, np.int32), np.zeros(0, np.float32)
    if isinstance(request.prefix, str):
        ids = np.asarray(encode_text(request.prefix), np.int32)
        if request.max_new == 0 and stop_ids:
            ids = np.append(ids, np.int32(stop_ids[0]))
        return ids, np.full(len(ids), np.nan, np.float32)
    ids, logps = (np.asarray(x) for x in request.prefix)
    if ids.shape != logps.shape or ids.ndim != 1:
        raise ValueError(f"a prefix is token ids [t] and their log-probs [t], got shapes {ids.shape} and {logps.shape}")
    return ids.astype(np.int32), logps.astype(np.float32)


def _numeric_columns(requests: Sequence[Request], counts: Sequence[int]) -> dict[str, np.ndarray]:
    """The dataset columns that hold numbers, NaN where a row has none; the rest stays with the prompts."""
    columns = {}
    for name in dict.fromkeys(name for r in requests for name in r.prompt.columns):
        values = [r.prompt.columns.get(name) for r in requests]
        column = numeric(values)
        if column is not None and any(v is not None for v in values):
            columns[name] = np.repeat(column, counts)
    return columns


def pack(rows: Rows, *, width: int, slots: int) -> list[np.ndarray]:
    """Launches of the sampler: arrays [slots, width] of row numbers, -1 = padding; one context per slot."""
    table = side_by_side(rows.sampled_under, width=width, of=slots)
    return [table[i : i + slots] for i in range(0, len(table), slots)]


def side_by_side(owners: np.ndarray, *, width: int, of: int) -> np.ndarray:
    """A table [S, width] of row numbers: those of one owner in a run of slots, owners ascending, -1 where there is
    none. S is a multiple of `of`."""
    order, at = np.argsort(owners, kind="stable"), np.arange(len(owners))
    starts = np.diff(owners[order], prepend=-1) != 0
    within = at - np.maximum.accumulate(np.where(starts, at, 0))
    slots = np.cumsum(within % width == 0)
    table = np.full((-(-int(slots.max(initial=0)) // of) * of, width), -1)
    table[slots - 1, within % width] = order
    return table


def cells_of(rows: Rows, launch: np.ndarray, *, context_width: int, decisions: int) -> Cells:
    """The sampler's arguments for one launch. Padding cells have budget 0."""
    real, at = launch >= 0, np.maximum(launch, 0)
    under = np.where(real[:, 0], rows.sampled_under[at[:, 0]], 0)
    lengths = np.where(real[:, 0], rows.contexts.lengths[under], 1)
    tokens = rows.contexts.tokens[under]
    contexts = np.zeros((len(launch), context_width), np.int32)
    contexts[:, : tokens.shape[1]] = tokens[:, :context_width]
    given = np.zeros((*launch.shape, decisions), np.int32)
    given[..., : rows.given.shape[1]] = rows.given[at]
    cell = lambda values, padding: np.where(real, values[at], padding).astype(values.dtype)  # noqa: E731
    return Cells(
        contexts=contexts,
        context_lengths=lengths.astype(np.int32),
        given=given,
        given_lengths=cell(rows.given_lengths, 0),
        budget=cell(rows.budget, 0),
        minimum=cell(rows.options["min_new"] + rows.given_lengths, 0).astype(np.int32),
        temperature=cell(rows.temperature, 1),
        top_k=cell(rows.options["top_k"], 0).astype(np.int32),
        top_p=cell(rows.options["top_p"], 1).astype(np.float32),
        min_p=cell(rows.options["min_p"], 0).astype(np.float32),
        prompt_ids=cell(rows.prompt_ids, -1),
        index=cell(rows.index, 0),
        stops=rows.stops,
        stops_apply=rows.stops_apply[at] & real[..., None],
    )


def rollout_of(rows: Rows, drawn: Drawn | None, *, role: str) -> Rollout:
    """The finished rows. `drawn` holds them flat, in the order of `rows`; None: nothing was drawn or scored."""
    n, t = len(rows), rows.given.shape[1]
    column = np.arange(t)
    was_given = column < rows.given_lengths[:, None]
    if drawn is None:
        tokens, lengths, drawn_logps = rows.given, rows.given_lengths, np.nan
        finished = np.array([_ends(row[:k], rows.stops[a]) for row, k, a in zip(rows.given, lengths, rows.stops_apply)])
        sampler = np.full((n, t), np.nan, np.float32)
    else:
        tokens, lengths, finished, drawn_logps, sampler = (np.asarray(x) for x in drawn)
    exists = column < lengths[:, None]
    behavior = np.where(was_given, rows.given_logps, np.where(exists, drawn_logps, np.nan))
    chosen = exists & ~np.isnan(behavior)
    return Rollout(
        contexts=rows.contexts,
        sampled_under=rows.sampled_under,
        trained_under=rows.trained_under,
        completions=np.where(exists, tokens, 0).astype(np.int32),
        lengths=lengths.astype(np.int32),
        completion_mask=chosen | (exists & was_given & rows.trains_given[:, None]),
        behavior_logps=behavior.astype(np.float32),
        sampler_logps=sampler.astype(np.float32),
        finished=finished.astype(bool),
        temperature=np.where(rows.temperature > 0, rows.temperature, 1).astype(np.float32),
        prompt_ids=rows.prompt_ids,
        index=rows.index,
        group_ids=rows.group_ids,
        weights=np.ones(n, np.float32),
        update_ids=np.full(n, -1, np.int32),
        scores=np.zeros((n, 0), np.float32),
        columns=rows.columns,
        role=role,
    )


def _ends(tokens: np.ndarray, stops: np.ndarray) -> bool:
    wanted = [s[s >= 0] for s in stops]
    return any(len(s) and len(tokens) >= len(s) and (tokens[-len(s) :] == s).all() for s in wanted)
