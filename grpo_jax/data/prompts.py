"""Pools of prompts: a dataset in a seeded order, epoch after epoch, that can be stopped and resumed anywhere."""

from __future__ import annotations

import string
import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from os import PathLike
from typing import Any

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from grpo_jax.data.rows import Row, read_rows
from grpo_jax.data.tokenizers import Tokenizer
from grpo_jax.types import Message, Prompt

SHOWN = 5  # bad rows that an error lists


class Pool:
    """A dataset as prompts: random access by id, and a stream in a seeded order that is reshuffled every epoch.

    The id of a prompt is its row's number in the dataset, from 0, and stays what it is when other rows are left out.
    `len(pool)` prompts make an epoch; iterating goes through them once, in the order of the rows. `rows` counts the
    dataset's rows (ids are below it) and `too_long` those left out because of `max_prompt`.
    """

    @classmethod
    def open(
        cls,
        source: Any,
        *,
        tokenizer: Tokenizer,
        seed: int = 0,
        max_prompt: int | None = None,
        prompt_column: str = "prompt",
        shuffle: bool = True,
        split: str | None = None,
        template: str | Sequence[Message] | None = None,
    ) -> Pool:
        """Read, check and order a dataset.

        `source`: a .jsonl or .parquet file, a list or a directory of them, a dataset that `datasets` saved or that is
        on the hub ("owner/name" or "owner/name:configuration"), or a list of dicts. A prompt is text or a list of
        messages with "role" and "content"; `template` makes it from columns instead ("Q: {question}", or messages
        like that; a literal brace is written twice). The other columns travel with the prompt; a column that a row
        lacks is None there. Prompts of more than `max_prompt` tokens are left out and counted.
        Raises: ValueError naming file and line of bad rows; if every prompt is too long, or there is none;
        FileNotFoundError, ImportError for the source.
        """
        if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
            raise ValueError(f"seed must be a whole number from 0, got {seed!r}")
        if max_prompt is not None and max_prompt < 1:
            raise ValueError(f"max_prompt is a number of tokens from 1, got {max_prompt}")
        fields = [] if template is None else _fields(template)
        prompts = _prompts(read_rows(source, split=split), template, fields, prompt_column)
        if not prompts:
            raise ValueError(f"there are no rows in {_name(source)}")
        for kind in (str, list):  # a chat without a template fails here rather than in the middle of a run
            if (first := next((p for p in prompts if isinstance(p.text, kind)), None)) is not None:
                tokenizer.encode_prompt(first.text)
        tokens, left_out = {}, {}
        if max_prompt is not None:
            for prompt in prompts:
                ids = _read_only(tokenizer.encode_prompt(prompt.text))
                if len(ids) > max_prompt:
                    left_out[prompt.id] = f"it has {len(ids)} tokens and max_prompt is {max_prompt}"
                else:
                    tokens[prompt.id] = ids
            if not tokens:
                raise ValueError(
                    f"all {len(prompts)} prompts of {_name(source)} are longer than max_prompt={max_prompt} tokens"
                )
        kept = [prompt for prompt in prompts if prompt.id not in left_out]
        return cls(kept, tokenizer=tokenizer, seed=int(seed), shuffle=shuffle, left_out=left_out, tokens=tokens)

    def __init__(
        self,
        prompts: Sequence[Prompt],
        *,
        tokenizer: Tokenizer,
        seed: int = 0,
        shuffle: bool = True,
        left_out: Mapping[int, str] | None = None,
        tokens: dict[int, ndarray] | None = None,
    ):
        self.tokenizer, self.seed, self.shuffle = tokenizer, seed, shuffle
        self._prompts = list(prompts)
        self._place = {prompt.id: place for place, prompt in enumerate(self._prompts)}
        self._left_out = dict(left_out or {})
        self._tokens = {} if tokens is None else tokens
        self._position = 0  # in the endless order, over all shards
        self._index, self._count = 0, 1
        self._drawn: tuple[int, ndarray] | None = None

    @property
    def rows(self) -> int:
        return len(self._prompts) + len(self._left_out)

    @property
    def too_long(self) -> int:
        return len(self._left_out)

    @property
    def epoch(self) -> int:
        """The epoch of the next prompt, from 0."""
        return (self._position + self._index) // len(self)

    def __len__(self) -> int:
        return len(self._prompts)

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self._prompts)

    def __getitem__(self, id: int) -> Prompt:
        """The prompt of a row. Raises: KeyError if the row was left out, IndexError if there is no such row."""
        place = self._place.get(id)
        if place is None:
            if id in self._left_out:
                raise KeyError(f"prompt {id} was left out: {self._left_out[id]}")
            raise IndexError(f"no prompt {id}: ids are the dataset's row numbers, 0 to {self.rows - 1}")
        return self._prompts[place]

    def __repr__(self) -> str:
        left_out = f", {self.too_long} too long" if self.too_long else ""
        shard = f", shard {self._index} of {self._count}" if self._count > 1 else ""
        return f"Pool({len(self)} prompts{left_out}{shard}, epoch {self.epoch})"

    def take(self, n: int) -> list[Prompt]:
        """The next n prompts in order, on into the next epochs."""
        if n < 0:
            raise ValueError(f"cannot take {n} prompts")
        epochs, places = np.divmod(self._position + self._index + self._count * np.arange(n), len(self))
        drawn: list[Prompt] = []
        for epoch in np.unique(epochs).tolist():
            order = self._order(epoch)
            drawn += [self._prompts[place] for place in order[places[epochs == epoch]].tolist()]
        self._position += self._count * n
        return drawn

    def shard(self, index: int, count: int) -> Pool:
        """Every count-th prompt of the order, from the index-th on: for one of `count` hosts that draw in step.

        All shards have the same `state()`, which a pool with another number of shards can restore.
        """
        if not 0 <= index < count:
            raise ValueError(f"expected a shard 0 to {count - 1} of {count}, got {index}")
        shard = Pool(
            self._prompts,
            tokenizer=self.tokenizer,
            seed=self.seed,
            shuffle=self.shuffle,
            left_out=self._left_out,
            tokens=self._tokens,
        )
        shard._position = self._position
        shard._index, shard._count = self._index + self._count * index, self._count * count
        return shard

    def state(self) -> dict[str, int | bool]:
        """Where the stream stands, as JSON values."""
        return {"position": int(self._position), **self._identity()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where `state()` was taken. Raises: ValueError for other prompts or another order."""
        for what, mine in self._identity().items():
            if state[what] != mine:
                raise ValueError(
                    f"the saved position belongs to a pool with {what}={state[what]}, this one has {what}={mine}: open "
                    f"the same prompts with the same seed, shuffle, template and max_prompt, or start a new run"
                )
        self._position = int(state["position"])

    def tokens(self, prompt: Prompt) -> Int[ndarray, " P"]:
        """Token ids of a prompt, kept for the next time (read-only)."""
        place = self._place.get(prompt.id)
        if place is None or prompt.text != self._prompts[place].text:  # a method may rewrite a prompt under its old id
            return _read_only(self.tokenizer.encode_prompt(prompt.text))
        if prompt.id not in self._tokens:
            self._tokens[prompt.id] = _read_only(self.tokenizer.encode_prompt(prompt.text))
        return self._tokens[prompt.id]

    def _identity(self) -> dict[str, int | bool]:
        return {"seed": self.seed, "shuffle": self.shuffle, "prompts": len(self), "fingerprint": self._fingerprint}

    @cached_property
    def _fingerprint(self) -> int:
        checksum = 0
        for prompt in self._prompts:
            checksum = zlib.crc32(repr((prompt.id, prompt.text)).encode(), checksum)
        return checksum

    def _order(self, epoch: int) -> ndarray:
        """Places of the epoch's prompts, a function of (seed, epoch).

        Grain's shuffle looks up one place at a time, 0.3 ms each among a hundred prompts and 5 ms among five: too slow
        for small steps. A dataset of Grain may still be a pool's source.
        """
        if not self.shuffle:
            return np.arange(len(self))
        if self._drawn is None or self._drawn[0] != epoch:
            # Sorting the raw bits, which NumPy promises to keep, gives the same order under every version of it.
            bits = np.random.PCG64([self.seed, epoch]).random_raw(len(self))
            self._drawn = epoch, np.argsort(bits, kind="stable")
        return self._drawn[1]


def _prompts(
    rows: Iterator[Row], template: str | Sequence[Message] | None, fields: list[str], prompt_column: str
) -> list[Prompt]:
    """One prompt per row. Raises: ValueError with the places of the bad rows."""
    prompts: list[Prompt] = []
    problems: list[str] = []
    names: dict[str, None] = {}
    text: Any
    for id, (place, columns, problem) in enumerate(rows):
        if problem is None:
            if template is None:
                text, problem = columns.get(prompt_column), _missing(columns, prompt_column)
                columns = {name: value for name, value in columns.items() if name != prompt_column}
            else:
                problem = next((p for field in fields if (p := _missing(columns, field, " of the template"))), None)
                text = None if problem else _fill(template, columns)
        problem = problem or _wrong_prompt(text)
        if problem is not None:
            problems.append(f"{place}: {problem}")
            continue
        names.update(dict.fromkeys(columns))
        prompts.append(Prompt(id, text if isinstance(text, str) else list(text), columns))
    if problems:
        more = f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        rows_are = "1 row is" if len(problems) == 1 else f"{len(problems)} rows are"
        raise ValueError(f"{rows_are} bad:\n  " + "\n  ".join(problems[:SHOWN]) + more)
    return [prompt._replace(columns={name: prompt.columns.get(name) for name in names}) for prompt in prompts]


def _missing(columns: Mapping[str, Any], name: str, of: str = "") -> str | None:
    if name not in columns:
        return f"no column {name!r}{of}; it has {list(columns)} (see prompt_column and template)"
    return f"column {name!r}{of} is null" if columns[name] is None else None


def _wrong_prompt(text: Any) -> str | None:
    """What keeps a value from being a prompt, or None."""
    if isinstance(text, str):
        if not text.strip():
            return "the prompt is empty"
        return None if _encodable(text) else "the prompt has half of a surrogate pair, which is not a character"
    if not isinstance(text, (list, tuple)):
        return f"the prompt is neither text nor a list of messages but {type(text).__name__}"
    if not text:
        return "the prompt is a list without messages"
    for number, message in enumerate(text):
        if not isinstance(message, Mapping):
            return (
                f"message {number} of the prompt is not a dict with 'role' and 'content' but {type(message).__name__}"
            )
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                return f"message {number} of the prompt has no text under {key!r}; it has {dict(message)}"
            if not _encodable(message[key]):
                return f"message {number} of the prompt has half of a surrogate pair, which is not a character"
    return None


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _fields(template: str | Sequence[Message]) -> list[str]:
    """The columns that a template names. Raises: ValueError for a template that names none, or not only columns."""
    if _wrong_prompt(template):
        raise ValueError(f"expected a template of text, or of messages with 'role' and 'content', got {template!r}")
    texts = [template] if isinstance(template, str) else [message["content"] for message in template]
    try:
        fields = [field for text in texts for _, field, _, _ in string.Formatter().parse(text) if field is not None]
    except ValueError as error:
        raise ValueError(f"template {template!r}: {error} (a literal brace is written {{{{ or }}}})") from error
    for field in fields:
        if not field or field.isdigit() or "." in field or "[" in field:
            raise ValueError(
                f"template {template!r}: {{{field}}} is not a column (a literal brace is written {{{{ or }}}})"
            )
    if not fields:
        raise ValueError(f"template {template!r} names no column: expected something like 'Question: {{question}}'")
    return list(dict.fromkeys(fields))


def _fill(template: str | Sequence[Message], columns: Mapping[str, Any]) -> str | list[Message]:
    if isinstance(template, str):
        return template.format_map(columns)
    return [{**message, "content": message["content"].format_map(columns)} for message in template]


def _name(source: Any) -> str:
    return repr(str(source)) if isinstance(source, (str, PathLike)) else "the given source"


def _read_only(ids: ndarray) -> ndarray:
    ids.flags.writeable = False
    return ids
