"""The host half of a checkpoint: plain values, numpy arrays and rollouts, to JSON and npz and back, exactly.

No pickle: a checkpoint cannot run code when it is read, and the JSON half can be read by eye.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
from typing import Any

import jax
import numpy as np

from grpo_jax.types import Batch, Contexts, Decisions, Host, Prompt, Request, Rollout

_RECORDS: dict[str, Any] = {cls.__name__: cls for cls in (Contexts, Decisions, Rollout, Batch, Prompt, Request)}
_TAG = "$"


def encode(value: Host) -> tuple[str, bytes]:
    """A nest of plain values and arrays as (JSON text, npz bytes).

    Dictionaries with text keys, lists, tuples, None, bool, int, float (NaN and infinities too), text, numpy arrays and
    numpy scalars of any plain dtype (bfloat16 too), and the records of `grpo_jax.types` that live on the host.

    Raises: TypeError with the place of a value that has no exact form: other classes, keys that are not text, sets,
    JAX arrays (they belong to the array half), arrays of Python objects.
    """
    arrays: dict[str, np.ndarray] = {}
    document = json.dumps(_encode(value, "host", arrays), allow_nan=False, indent=1)
    archive = io.BytesIO()
    np.savez(archive, **arrays)  # type: ignore[arg-type]
    return document, archive.getvalue()


def decode(document: str, archive: bytes) -> Host:
    """The inverse of `encode`: the same values, types, dtypes and shapes."""
    with np.load(io.BytesIO(archive), allow_pickle=False) as arrays:
        return _decode(json.loads(document), arrays)


def _encode(value: Any, place: str, arrays: dict[str, np.ndarray]) -> Any:
    if isinstance(value, (np.ndarray, np.generic)):
        return _encode_array(value, place, arrays)
    kind = type(value)  # exact: a subclass (a named tuple, an enumeration) would come back as something else
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return value if math.isfinite(value) else {_TAG: "float", "value": repr(value)}
    if kind is list:
        return [_encode(item, f"{place}[{i}]", arrays) for i, item in enumerate(value)]
    if kind is tuple:
        return {_TAG: "tuple", "items": [_encode(item, f"{place}[{i}]", arrays) for i, item in enumerate(value)]}
    if kind is dict:
        for key in value:
            if type(key) is not str:
                raise TypeError(
                    f"{place} has the key {key!r} ({type(key).__name__}); keys of saved dictionaries must be text: "
                    f"use str(key), or a list of pairs"
                )
        items = {key: _encode(item, f"{place}[{key!r}]", arrays) for key, item in value.items()}
        return {_TAG: "dict", "items": list(items.items())} if _TAG in items else items
    if _RECORDS.get(kind.__name__) is kind:
        names = [f.name for f in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else kind._fields
        return {
            _TAG: kind.__name__,
            "fields": {name: _encode(getattr(value, name), f"{place}.{name}", arrays) for name in names},
        }
    if isinstance(value, jax.Array):
        raise TypeError(
            f"{place} is a JAX array; keep it in the array half of the state, or make it numpy with np.asarray"
        )
    raise TypeError(
        f"{place} is a {kind.__module__}.{kind.__qualname__}, which a checkpoint cannot hold; use dict, list, tuple, "
        f"None, bool, int, float, str, numpy arrays and {', '.join(_RECORDS)}"
    )


def _encode_array(value: np.ndarray | np.generic, place: str, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    array = np.asarray(value)
    extension = array.dtype.kind == "V" and array.dtype.names is None  # bfloat16 and the like, opaque to npz
    if array.dtype.hasobject or (extension and array.dtype.isbuiltin != 2):
        raise TypeError(f"{place} is an array of dtype {array.dtype}, which a checkpoint cannot hold")
    name = f"a{len(arrays)}"
    arrays[name] = array.view(f"u{array.dtype.itemsize}") if extension else array
    tagged = {_TAG: "array" if isinstance(value, np.ndarray) else "scalar", "name": name}
    return tagged | ({"dtype": array.dtype.name} if extension else {})


def _decode(value: Any, arrays: Any) -> Any:
    if isinstance(value, list):
        return [_decode(item, arrays) for item in value]
    if not isinstance(value, dict):
        return value
    tag = value.get(_TAG)
    if tag is None:
        return {key: _decode(item, arrays) for key, item in value.items()}
    if tag == "float":
        return float(value["value"])
    if tag == "tuple":
        return tuple(_decode(item, arrays) for item in value["items"])
    if tag == "dict":
        return {key: _decode(item, arrays) for key, item in value["items"]}
    if tag in ("array", "scalar"):
        array = arrays[value["name"]]
        array = array.view(np.dtype(value["dtype"])) if "dtype" in value else array
        return array if tag == "array" else array[()]
    return _RECORDS[tag](**{name: _decode(item, arrays) for name, item in value["fields"].items()})
