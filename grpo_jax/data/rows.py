"""Rows of a dataset, with the place where each was found, from files, the `datasets` library, or memory."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

SUFFIXES = (".jsonl", ".parquet")
SPLITS = ("train", "training", "test", "validation", "valid", "val", "dev", "eval")


class Row(NamedTuple):
    """One row: where it was found, its columns, or what is wrong with it."""

    place: str
    columns: Mapping[str, Any]
    problem: str | None = None


def read_rows(source: Any, *, split: str | None = None) -> Iterator[Row]:
    """The rows of `source` in their order (files in the order of their names); a bad row says so instead of raising.

    `source`: a .jsonl or .parquet file, a list of them, a directory of them or one that `datasets` saved, a dataset
    on the hub ("owner/name", "owner/name:configuration"), or anything in memory that has a length and yields dicts by
    number: a list, a Grain MapDataset, a `datasets.Dataset`.
    Raises: FileNotFoundError, ImportError (the library that a format needs), ValueError (which split, no such format).
    """
    if isinstance(source, (str, PathLike)):
        return _named(source, split)
    if isinstance(source, Sequence) and len(source) > 0 and all(isinstance(item, (str, PathLike)) for item in source):
        missing = [str(item) for item in source if not Path(item).expanduser().is_file()]
        if missing:
            raise FileNotFoundError(
                f"no such file: {missing[0]!r}. A list of strings names files; prompts in memory are a list of dicts "
                f"such as {{'prompt': 'What is 1+1?'}}"
            )
        return _files(sorted(Path(item).expanduser() for item in source), split)
    if isinstance(source, Mapping) or not (hasattr(source, "__len__") and hasattr(source, "__getitem__")):
        raise ValueError(
            f"expected a file, a list of files, a directory, a dataset's name, or a list of dicts, "
            f"got {type(source).__name__}"
        )
    if split is not None:
        raise ValueError(f"split={split!r} chooses among files or named datasets, but the prompts are in memory")
    if len(source) >= 2**40:
        raise ValueError("the source is endless: leave out repeat(), a pool goes through its epochs by itself")
    return _in_memory(source, "prompts")


def _named(source: str | PathLike, split: str | None) -> Iterator[Row]:
    path, name = Path(source).expanduser(), str(source)
    if path.is_file():
        return _files([path], split)
    if path.is_dir():
        if any((path / mark).is_file() for mark in ("dataset_dict.json", "state.json")):
            return _in_memory(_choose(_datasets(name).load_from_disk(str(path)), split, name), name)
        files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
        if not files:
            raise FileNotFoundError(f"directory {name!r} holds no {' or '.join(SUFFIXES)} file and no saved dataset")
        return _files(files, split)
    hub = re.fullmatch(r"([\w.-]+(?:/[\w.-]+)?)(?::([\w.-]+))?", name)
    if not hub or path.suffix in SUFFIXES or name.startswith("."):
        raise FileNotFoundError(f"no such file or directory: {name!r}")
    library = _datasets(name)
    try:
        dataset = library.load_dataset(*filter(None, hub.groups()), split=split)
    except Exception as error:  # the library has dozens of its own kinds
        raise ValueError(
            f"{name!r} is not a file or directory here, and the Hugging Face hub answers: {error}"
        ) from error
    return _in_memory(_choose(dataset, None, name), name)


def _files(files: Sequence[Path], split: str | None) -> Iterator[Row]:
    for file in files:
        if file.suffix not in SUFFIXES:
            raise ValueError(f"cannot read {str(file)!r}: expected a file that ends in {' or '.join(SUFFIXES)}")
    splits = sorted({name for file in files if (name := _split_of(file))})
    if split is not None:
        files = [file for file in files if _split_of(file) == split or _stem(file) == split]
        if not files:
            raise ValueError(f"no file of split {split!r}; the splits that the files are named after: {splits}")
    elif len(splits) > 1:
        raise ValueError(f"the files are of several splits, {splits}: choose one with split={splits[0]!r}")
    return (row for file in files for row in (_jsonl(file) if file.suffix == ".jsonl" else _parquet(file)))


def _stem(file: Path) -> str:
    return re.sub(r"[-_.]\d+(-of-\d+)?$", "", file.stem)


def _split_of(file: Path) -> str | None:
    """The split that a file's name, or the name of its directory, stands for."""
    return next((name for name in (_stem(file), file.parent.name) if name in SPLITS), None)


def _jsonl(file: Path) -> Iterator[Row]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            place = f"{file}, line {number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if not text.strip():
                    continue
                columns = json.loads(text)
            except UnicodeDecodeError as error:
                yield Row(place, {}, f"is not UTF-8 (byte {error.start + 1})")
            except json.JSONDecodeError as error:
                yield Row(place, {}, f"is not JSON ({error.msg} at column {error.colno})")
            else:
                yield _checked(place, columns)


def _parquet(file: Path) -> Iterator[Row]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError as error:
        raise ImportError("Parquet files need pyarrow: pip install 'grpo_jax[datasets]'") from error
    number = 0
    try:
        with parquet.ParquetFile(file) as table:
            for batch in table.iter_batches():
                for columns in batch.to_pylist():
                    yield Row(f"{file}, row {number}", columns)
                    number += 1
    except ArrowInvalid as error:
        raise ValueError(f"cannot read {str(file)!r} as Parquet: {error}") from error


def _in_memory(rows: Any, name: str) -> Iterator[Row]:
    return (_checked(f"{name}[{number}]", rows[number]) for number in range(len(rows)))


def _checked(place: str, columns: Any) -> Row:
    if isinstance(columns, Mapping):
        return Row(place, columns)
    return Row(place, {}, f"is not a table row: expected column names with values, got {type(columns).__name__}")


def _datasets(name: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"{name!r} is not a {' or '.join(SUFFIXES)} file here; to read it as a dataset of the Hugging Face "
            f"library: pip install 'grpo_jax[datasets]'"
        ) from error
    return datasets


def _choose(dataset: Any, split: str | None, name: str) -> Any:
    """One split of what `datasets` loaded."""
    if not isinstance(dataset, Mapping):
        if split is not None:
            raise ValueError(f"dataset {name!r} has no splits, but split={split!r} was asked for")
        return dataset
    if split is None and len(dataset) > 1:
        raise ValueError(f"dataset {name!r} has the splits {list(dataset)}: choose one with split=")
    if split is not None and split not in dataset:
        raise ValueError(f"dataset {name!r} has no split {split!r}; it has {list(dataset)}")
    return dataset[split] if split is not None else next(iter(dataset.values()))
