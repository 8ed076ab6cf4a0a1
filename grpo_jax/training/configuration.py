"""The configuration of a run: read from YAML and dotted overrides, written back, and explained key by key."""

from __future__ import annotations

import difflib
import functools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError

from grpo_jax.training.sections import Config

# A resumed run may train longer, and evaluate, save and log otherwise; the rest of its configuration stays.
KEPT = ("seed", "model", "data", "rewards", "method", "batch", "training", "sampling", "optimizer", "warmup")


class ConfigurationError(ValueError):
    """What is wrong with a configuration: the place, the dotted key, what was given and what is expected."""


class Row(NamedTuple):
    """A key, for people: its dotted name, type, default and meaning."""

    key: str
    type: str
    default: str
    meaning: str


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """The configuration of a YAML file, with `key.path=value` overrides on top (values are YAML, lists by position).

    A file with the key `base`, another file's path relative to it, goes on top of that one: mappings are merged key by
    key, but one that says anew what it is, by `name` or `source`, replaces the base's.

    Raises: ConfigurationError naming the file and line, or the override, with the dotted key, what was given, what is
    expected, and the nearest valid name.
    """
    values, places = _read_file(Path(path), ())
    for override in overrides:
        _override(values, places, override)
    return _validate(values, places, str(path))


def parse(values: Mapping[str, Any]) -> Config:
    """The configuration of nested plain values. Raises: ConfigurationError, as `load_config`."""
    return _validate(dict(values), {}, "configuration")


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML; `load_config` of it gives an equal one."""
    return yaml.dump(config.model_dump(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def check_same_run(before: Config, now: Config) -> None:
    """Raises: ValueError if a run that was begun with one configuration cannot go on with the other."""
    if changed := [key for key in KEPT if getattr(before, key) != getattr(now, key)]:
        raise ValueError(
            f"{now.directory} holds a run with another {', '.join(changed)}; a resumed run is the same run. "
            "Choose another name or directory, or the configuration that is saved there (config.yaml)"
        )


def describe() -> list[Row]:
    """Every key with its type, default and meaning, in order; sections come before their keys."""
    return list(_rows(_schema(), ""))


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars: 1e-3 is a number, and yes, no, on, off, 1:30 and dates are text."""


class _Dumper(yaml.SafeDumper):
    """Quotes whatever `_Loader` would not read as text."""


_SCALARS = {
    "bool": (r"(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    "int": (r"[-+]?(?:0|[1-9][0-9]*)$", "-+0123456789"),
    "float": (
        r"(?:[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        "-+.0123456789",
    ),
    "null": (r"(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    "merge": (r"<<$", "<"),
}
for _yaml in (_Loader, _Dumper):
    _yaml.yaml_implicit_resolvers = {}
    for _kind, (_pattern, _first) in _SCALARS.items():
        _yaml.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(_pattern), list(_first))

_Dumper.add_representer(tuple, _Dumper.represent_list)

_Key = tuple[str, ...]


def _read_file(file: Path, above: tuple[Path, ...]) -> tuple[dict[str, Any], dict[_Key, str]]:
    """The values of a file on top of those of its base, and the place of every key. above: files that lead here."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        found = sorted(p.name for p in file.parent.glob("*.y*ml")) if file.parent.is_dir() else []
        hint = f"; {file.parent} has {', '.join(found)}" if found else ""
        raise ConfigurationError(f"cannot read the configuration {file}: {error}{hint}") from error
    values, places = _read(text, str(file))
    if not isinstance(values, dict):
        raise ConfigurationError(f"{file} must hold keys and values, such as `steps: 100`; got {_given(values)}")
    if "base" not in values:
        return values, places
    base = values.pop("base")
    if not isinstance(base, str):
        raise ConfigurationError(f"{places[('base',)]}: base is {_given(base)}; expected the path of another file")
    above = (*above, file.resolve())
    if (file.parent / base).resolve() in above:
        raise ConfigurationError(f"{places[('base',)]}: base {base} leads back to this file")
    below, places_below = _read_file(file.parent / base, above)
    return _merge(below, values), {**places_below, **places}


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    def joined(low: Any, high: Any) -> Any:
        both = isinstance(low, dict) and isinstance(high, dict)
        return _merge(low, high) if both and not {"name", "source"} & high.keys() else high

    return {**below, **{key: joined(below.get(key), value) for key, value in above.items()}}


def _read(text: str, where: str) -> tuple[Any, dict[_Key, str]]:
    """The value of a YAML text, and the place of every key in it."""
    places: dict[_Key, str] = {}
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return {}, places
        _locate(node, (), where, places)
        return loader.construct_document(node), places
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{where} is not valid YAML: {error}") from error
    finally:
        loader.dispose()


def _locate(node: yaml.Node, key: _Key, where: str, places: dict[_Key, str]) -> None:
    if isinstance(node, yaml.SequenceNode):
        for position, item in enumerate(node.value):
            places[(*key, str(position))] = f"{where}:{item.start_mark.line + 1}"
            _locate(item, (*key, str(position)), where, places)
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for name, item in node.value:
            inner, place = (*key, str(name.value)), f"{where}:{name.start_mark.line + 1}"
            if name.value in seen:
                raise ConfigurationError(f"{place}: {'.'.join(inner)} is given twice; keep one")
            seen.add(name.value)
            places[inner] = place
            _locate(item, inner, where, places)


def _override(values: dict[str, Any], places: dict[_Key, str], text: str) -> None:
    """Set one `key.path=value` in place."""
    dotted, equals, given = text.partition("=")
    key = tuple(dotted.strip().split("."))
    if not equals or not all(key):
        raise ConfigurationError(f"override {text!r}: expected key.path=value, such as optimizer.learning_rate=1e-4")
    value = _read(given, f"override {text!r}")[0] if given.strip() else None
    container: Any = values
    for depth, name in enumerate(key):
        last = depth == len(key) - 1
        path = ".".join(key[:depth])
        if isinstance(container, dict):
            index: Any = name
            inner = container.get(name)
        elif isinstance(container, list) and name.isdecimal() and int(name) <= len(container):
            index = int(name)
            if index == len(container):
                container.append(None)
            inner = container[index]
        else:
            size = f"a list of {len(container)}" if isinstance(container, list) else _given(container)
            raise ConfigurationError(f"override {text!r}: {path} is {size}; there is no {name!r} in it")
        if not last and isinstance(inner, str) and key[: depth + 1] == ("method",):
            inner = {"name": inner}
        elif not last and isinstance(inner, str) and key[0] == "rewards":
            inner = {"function": inner}
        container[index] = value if last else ({} if inner is None else inner)
        container = container[index]
    for inner_key in [place for place in places if place[: len(key)] == key]:
        del places[inner_key]
    places[key] = f"override {text!r}"


def _validate(values: dict[str, Any], places: dict[_Key, str], where: str) -> Config:
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        found = [_explain(detail, places, where) for detail in error.errors()]
    # A list that is wrong inside is also reported as not being the other member of its union.
    lines = list(
        dict.fromkeys(line for key, line in found if not any(key != k and key == k[: len(key)] for k, _ in found))
    )
    raise ConfigurationError(lines[0] if len(lines) == 1 else "\n  ".join([f"{len(lines)} errors:", *lines])) from None


def _explain(detail: Any, places: dict[_Key, str], where: str) -> tuple[_Key, str]:
    """One validation error: its key, and a sentence."""
    schema: dict[str, Any] = _schema()
    key: _Key = ()
    for step in detail["loc"]:  # steps that are no key name the member of a union
        properties = _section(schema).get("properties", {})
        if step in properties:
            schema = properties[step]
        elif isinstance(step, int):
            schema = _list_item(schema)
        elif detail["type"] != "extra_forbidden" or step != detail["loc"][-1]:
            continue
        key = (*key, str(step))
    dotted, place = ".".join(key), _place(key, places, where)
    if detail["type"] == "value_error":
        return key, f"{place}: {dotted}{': ' if dotted else ''}{detail['ctx']['error']}"
    if detail["type"] == "extra_forbidden":
        return key, f"{place}: {dotted} is not a key; {_nearest(key, _section(schema).get('properties', {}))}"
    if detail["type"] == "missing":
        return key, f"{place}: {dotted} is missing: {schema['description']} ({_words(schema)})"
    return key, f"{place}: {dotted} is {_given(detail['input'])}; expected {_words(schema)}"


def _place(key: _Key, places: dict[_Key, str], where: str) -> str:
    """Where a key was given: its own place, else that of what is in it, else that of what it is in."""
    if key and key not in places:
        for inner, place in places.items():
            if inner[: len(key)] == key:
                return place
    return next((places[key[:n]] for n in range(len(key), 0, -1) if key[:n] in places), where)


def _nearest(key: _Key, siblings: Mapping[str, Any]) -> str:
    """The nearest valid name: among the keys of that section, else among all keys."""
    if near := difflib.get_close_matches(key[-1], siblings, n=1):
        return f"did you mean {'.'.join([*key[:-1], near[0]])}?"
    everywhere: dict[str, str] = {}
    for row in describe():
        everywhere.setdefault(row.key.rpartition(".")[2], row.key)
    if near := difflib.get_close_matches(key[-1], everywhere, n=1, cutoff=0.75):
        return f"did you mean {everywhere[near[0]]}?"
    return f"the keys of {'.'.join(key[:-1]) or 'a configuration'} are {', '.join(siblings)}"


@functools.cache
def _schema() -> dict[str, Any]:
    return Config.model_json_schema()


def _section(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The section that a key holds, also where it may be null; without properties if it holds none."""
    for option in schema.get("anyOf", [schema]):
        if "$ref" in option:
            return _schema()["$defs"][option["$ref"].rpartition("/")[2]]
    return schema


def _list_item(schema: Mapping[str, Any]) -> dict[str, Any]:
    return next((option["items"] for option in schema.get("anyOf", [schema]) if "items" in option), {})


def _rows(schema: Mapping[str, Any], prefix: str) -> Iterator[Row]:
    required = schema.get("required", ())
    for name, field in schema["properties"].items():
        section, item = _section(field), _section(_list_item(field))
        default = "required" if name in required else _yaml_text(field.get("default"))
        plain = "properties" in section and field.get("default") is not None
        yield Row(prefix + name, _words(field), "" if plain else default, field["description"])
        if "properties" in section:
            yield from _rows(section, f"{prefix}{name}.")
        elif "properties" in item:
            yield from _rows(item, f"{prefix}{name}.0.")
    if schema.get("additionalProperties") is True:
        yield Row(f"{prefix}*", "any", "", "options of the function, by name")


def _yaml_text(value: Any) -> str:
    return yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=10**6).removesuffix("\n...\n").strip()


def _words(schema: Mapping[str, Any]) -> str:
    """A type in words: "number above 0, or null"."""
    if "anyOf" in schema:
        return ", or ".join(_words(option) for option in schema["anyOf"])
    if "const" in schema:
        return str(schema["const"])
    if "enum" in schema:
        return f"one of {', '.join(schema['enum'])}"
    if "properties" in _section(schema):
        return "section"
    names = {
        "integer": "whole number",
        "number": "number",
        "string": "text",
        "boolean": "true or false",
        "null": "null",
    }
    kind = schema.get("type")
    if kind == "array":
        return (
            f"list of {_words(schema['items'])}s"
            if _words(schema["items"]) == "section"
            else f"list of {_words(schema['items'])}"
        )
    bounds = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    limits = [f"{word} {schema[bound]:.10g}" for bound, word in bounds.items() if bound in schema]
    return f"{names.get(str(kind), 'mapping')} {' and '.join(limits)}".strip()


def _given(value: Any) -> str:
    """A value as YAML and what it is: `"fast" (text)`."""
    kinds = {bool: "true or false", int: "whole number", float: "number", str: "text", list: "list", dict: "mapping"}
    kind = kinds.get(type(value), type(value).__name__)
    shown = f'"{value}"' if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else repr(value)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return "null" if value is None else f"{shown} ({kind})"
