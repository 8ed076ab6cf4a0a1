"""What must be equal on every process of a run, and the error that says where it is not."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import platform
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import grpo_jax
from grpo_jax import processes
from grpo_jax.processes import Disagreement
from grpo_jax.training.compilation import installed
from grpo_jax.types import Prompt, Request, Rollout

PACKAGES = ("jax", "jaxlib", "libtpu", "numpy", "flax", "optax", "orbax-checkpoint", "transformers", "safetensors")
VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_PLATFORMS", "PYTHONHASHSEED")
SETTINGS = ("jax_enable_x64", "jax_default_matmul_precision", "jax_threefry_partitionable", "jax_default_prng_impl")
PROBED = 1 << 16  # bytes at the start, the middle and the end of a file of weights
PROPAGATION = 10.0  # seconds that a network file system may take to show a new file
SHOWN = 8  # differences that an error lists


def check_alike(facts: Mapping[str, str]) -> None:
    """Raises: Disagreement, on every process, that lists which of these differ, and what each process says."""
    if processes.count() == 1:
        return
    said = [json.loads(text) for text in processes.exchange(json.dumps(dict(facts)), "the comparison at the start")]
    keys = dict.fromkeys(key for one in said for key in one)
    lines = [f"{key}: {_by_process([one.get(key, 'not there') for one in said])}" for key in keys]
    wrong = [line for key, line in zip(keys, lines) if len({one.get(key, "not there") for one in said}) > 1]
    if wrong:
        more = [f"and {len(wrong) - SHOWN} more"] if len(wrong) > SHOWN else []
        raise Disagreement(
            "the processes of a run are started alike, and these are not:\n  " + "\n  ".join(wrong[:SHOWN] + more)
        )


def check_shared(directory: Any) -> None:
    """Raises: Disagreement, on every process, where they do not see one and the same directory: each writes its part of
    a checkpoint into it."""
    if processes.count() == 1:
        return
    marker = directory / f"seen-{processes.exchange(uuid.uuid4().hex, 'a name for a file')[0]}"

    def write() -> None:
        directory.mkdir(parents=True, exist_ok=True)
        marker.write_text("a sign to the other processes\n")

    processes.run_by_first(write, "the directory of checkpoints")
    end = time.monotonic() + PROPAGATION
    while not (seen := marker.exists()) and time.monotonic() < end:
        time.sleep(0.2)
    blind = [i for i, said in enumerate(processes.exchange("yes" if seen else "", "the directory")) if not said]
    if processes.index() == 0:
        marker.unlink()
    if blind:
        raise Disagreement(
            f"{processes.name(blind[0])} does not see what process 0 writes into {directory}: checkpoints need a "
            "directory that all processes share, such as a network file system. Set directory= to a path on one"
        )


def of_configuration(values: Mapping[str, Any], functions: Iterable[Any] = ()) -> dict[str, str]:
    """Every key of the configuration, the code, and the versions of what computes. Looks for no devices."""
    facts = {"the code of grpo_jax": f"{grpo_jax.__version__}, {_of_folder(Path(grpo_jax.__file__).parent)}"}
    facts["Python"] = platform.python_version()
    facts |= {package: installed(package) for package in PACKAGES}
    facts |= {name: os.environ.get(name, "not set") for name in VARIABLES}
    facts |= {name: str(getattr(jax.config, name)) for name in SETTINGS}
    for key, value in _flat(values, ""):
        facts[key] = json.dumps(value)
        if isinstance(value, str) and (file := Path(value.partition(".py:")[0] + ".py")).is_file() and ".py:" in value:
            facts[f"the content of {file}"] = _short(file.read_bytes())
    for function in functions:
        name = getattr(function, "__qualname__", type(function).__name__)
        facts[f"the reward function {name}"] = _short(_source(function).encode())
    return facts


def of_data(prompts: Mapping[str, Sequence[Prompt]], *, model: str, kept_in: Path) -> dict[str, str]:
    """The prompts of each kind, the weights on disk, the devices, and the newest checkpoint."""
    facts = {what: f"{len(some)} prompts, {_of_prompts(some)}" for what, some in prompts.items()}
    facts["the devices of a process"] = f"{jax.local_device_count()} {jax.local_devices()[0].device_kind}"
    # Seen without Orbax, whose processes wait for each other: some may see a directory, and others none.
    kept = [int(path.name) for path in kept_in.iterdir() if path.name.isdecimal()] if kept_in.is_dir() else []
    facts[f"the newest checkpoint in {kept_in}"] = f"of step {max(kept)}" if kept else "none"
    facts["the weights of the model"] = _of_weights(Path(model))
    return facts


def described(ask: Sequence[Request] | Rollout | None) -> str:
    """What a plan asks for, or returns, in a few words and a digest of the whole."""
    if isinstance(ask, Rollout):
        return f"a rollout of {len(ask)} rows of the prompts {_some(ask.prompt_ids)}, {_digest(ask)}"
    if not ask:
        return "nothing"
    return f"{len(ask)} requests for the prompts {_some([r.prompt.id for r in ask])}, {_digest(list(ask))}"


def returned(end: tuple[Any, Sequence[Rollout]]) -> str:
    """What a plan ends with, likewise."""
    return f"{'; '.join(map(described, end[1])) or 'nothing'}, host state {_digest(end[0])}"


def _digest(value: Any) -> str:
    found = hashlib.blake2b(digest_size=6)
    for piece in _pieces(value):
        found.update(piece)
    return found.hexdigest()


def _pieces(value: Any) -> Iterator[bytes]:
    """Bytes that are equal for equal values, in any process."""
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        array = np.ascontiguousarray(value)
        yield f"{array.dtype}{array.shape}".encode()
        yield array.tobytes()
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield f"{key}:".encode()
            yield from _pieces(item)
    elif hasattr(value, "__dataclass_fields__"):
        names = [name for name in value.__dataclass_fields__ if name not in ("behavior_logps", "sampler_logps")]
        yield from _pieces({name: getattr(value, name) for name in names})  # log-probs come from the devices
    elif isinstance(value, (list, tuple)):
        yield f"[{len(value)}".encode()
        for item in value:
            yield from _pieces(item)
    elif value is None or isinstance(value, (bool, int, float, str, bytes)):
        yield repr(value).encode()
    else:  # its repr may hold an address
        yield type(value).__qualname__.encode()


def _some(ids: Iterable[int]) -> str:
    distinct = list(dict.fromkeys(int(i) for i in ids))
    return ", ".join(map(str, distinct[:4])) + (", …" if len(distinct) > 4 else "")


def _by_process(values: Sequence[str]) -> str:
    """Each value, and on which process it was found."""
    holders: dict[str, list[int]] = {}
    for i, value in enumerate(values):
        holders.setdefault(value, []).append(i)
    return "; ".join(
        f"{value} on {processes.name(who[0])}" + (f" and {len(who) - 1} more" if len(who) > 1 else "")
        for value, who in holders.items()
    )


def _flat(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for name, item in value.items():
            yield from _flat(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, (list, tuple)) and value:
        for i, item in enumerate(value):
            yield from _flat(item, f"{key}.{i}")
    else:
        yield key, value


def _of_prompts(prompts: Sequence[Prompt]) -> str:
    found = hashlib.blake2b(digest_size=6)
    for prompt in prompts:  # there may be a million of them
        found.update(json.dumps([*prompt], default=_digest).encode())
    return found.hexdigest()


def _of_folder(folder: Path) -> str:
    return _digest([(str(file.relative_to(folder)), file.read_bytes()) for file in sorted(folder.rglob("*.py"))])


def _of_weights(folder: Path) -> str:
    """Of the files of a model: their names and sizes, and a little of each."""
    facts: list[Any] = []
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")]):
        size = file.stat().st_size
        with file.open("rb") as opened:
            for place in (0, size // 2, max(0, size - PROBED)):
                opened.seek(place)
                facts += [file.name, size, opened.read(PROBED)]
    return _digest(facts)


def _source(function: Any) -> str:
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):  # typed into a shell, or no function
        return ""


def _short(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=6).hexdigest()
