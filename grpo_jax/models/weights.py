"""Weights in from and out to Hugging Face model directories (safetensors)."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, SingleDeviceSharding
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from grpo_jax.models.config import ARCHITECTURES, TransformerConfig, differences, read_config, to_hf
from grpo_jax.models.sharding import shardings
from grpo_jax.models.transformer import abstract, logical_axes
from grpo_jax.processes import fetch
from grpo_jax.types import PyTree

SHARD_BYTES = 4 * 1024**3
INDEX = "model.safetensors.index.json"
STORED = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
# What a model directory holds besides configuration and weights, and what `export` carries over from `source`.
CARRIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
)


class Saveable(Protocol):
    """A tokenizer: it writes its files into a directory."""

    def save(self, path: Path) -> object: ...


class Stored(NamedTuple):
    """How a parameter lies in the file: its name there ("{}" is the layer's number), and how to get from ours
    (without the layers axis) to the file's: permute, then fold into `fold` dimensions from the left or the right."""

    name: str
    permutation: tuple[int, ...]
    folded: tuple[tuple[int, ...], ...]  # which of the permuted axes make up each axis of the file


_PLAIN1, _PLAIN2 = ((0,), ((0,),)), ((0, 1), ((0,), (1,)))
_MATRIX = ((1, 0), ((0,), (1,)))  # ours [in, out], the file's [out, in]
_INTO_HEADS = ((1, 2, 0), ((0, 1), (2,)))  # [E, H, D] → [H·D, E]
_FROM_HEADS = ((2, 0, 1), ((0,), (1, 2)))  # [H, D, E] → [E, H·D]
_HEADS = ((0, 1), ((0, 1),))  # [H, D] → [H·D]


def names(config: TransformerConfig) -> dict[tuple[str, ...], Stored]:
    """Parameter path → its place in the Hugging Face layout, for every parameter of the model."""
    attention, mlp = "model.layers.{}.self_attn.", "model.layers.{}.mlp."
    before_mlp = "pre_feedforward_layernorm" if config.post_norms else "post_attention_layernorm"
    table = {
        ("embedding",): Stored("model.embed_tokens.weight", *_PLAIN2),
        ("norm",): Stored("model.norm.weight", *_PLAIN1),
        ("unembedding",): Stored("lm_head.weight", *_MATRIX),
        ("layers", "attention_norm"): Stored("model.layers.{}.input_layernorm.weight", *_PLAIN1),
        ("layers", "attention_post_norm"): Stored("model.layers.{}.post_attention_layernorm.weight", *_PLAIN1),
        ("layers", "mlp_norm"): Stored("model.layers.{}." + before_mlp + ".weight", *_PLAIN1),
        ("layers", "mlp_post_norm"): Stored("model.layers.{}.post_feedforward_layernorm.weight", *_PLAIN1),
        ("layers", "attention", "output"): Stored(attention + "o_proj.weight", *_FROM_HEADS),
        ("layers", "attention", "output_bias"): Stored(attention + "o_proj.bias", *_PLAIN1),
        ("layers", "attention", "query_norm"): Stored(attention + "q_norm.weight", *_PLAIN1),
        ("layers", "attention", "key_norm"): Stored(attention + "k_norm.weight", *_PLAIN1),
    }
    for ours, theirs in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        table["layers", "attention", ours] = Stored(f"{attention}{theirs}.weight", *_INTO_HEADS)
        table["layers", "attention", ours + "_bias"] = Stored(f"{attention}{theirs}.bias", *_HEADS)
    for ours in ("gate", "up", "down"):
        table["layers", "mlp", ours] = Stored(f"{mlp}{ours}_proj.weight", *_MATRIX)
        table["layers", "mlp", ours + "_bias"] = Stored(f"{mlp}{ours}_proj.bias", *_PLAIN1)
    return {path: table[path] for path in _flat(abstract(config)[1])}


def load(
    path: str | Path, *, dtype: Any = jnp.float32, mesh: Mesh | None = None
) -> tuple[TransformerConfig, nnx.GraphDef, PyTree]:
    """A Hugging Face model directory as (config, graphdef, params), cast to `dtype` and laid out over `mesh`.

    Each device's part of each parameter is read from the files by itself; the host holds one parameter at a time.

    Raises: FileNotFoundError without config.json or weights; ValueError naming the architecture, file or tensor if it
    is not supported, truncated, missing, not expected, or of the wrong shape. All of it before anything is loaded.
    """
    path = Path(path)
    config = read_config(path)
    graphdef, shapes = abstract(config, dtype)
    files = _contents(path)
    table = names(config)
    wanted = {
        stored.name.format(layer): _stored_shape(stored, leaf.shape, layer)
        for (at, leaf), stored in ((item, table[item[0]]) for item in _flat(shapes).items())
        for layer in _layers(at, config)
    }
    _check(path, config, wanted, files)
    if mesh is None:
        places = {at: SingleDeviceSharding(jax.devices()[0]) for at in table}
    else:
        places = _flat(shardings(logical_axes(config), mesh), leaf=lambda x: not isinstance(x, dict))

    def read(at: tuple[str, ...], shape: tuple[int, ...]) -> jax.Array:
        stored, stacked = table[at], at[0] == "layers"
        done: dict[tuple, np.ndarray] = {}

        def piece(index: tuple[slice, ...]) -> np.ndarray:
            key = tuple(s.indices(size)[:2] for s, size in zip(index, shape))
            if key not in done:  # devices that hold the same part share one reading
                spans = key[1:] if stacked else key
                out = np.empty([stop - start for start, stop in key], dtype)
                for layer in range(*key[0]) if stacked else (None,):
                    name = stored.name.format(layer)
                    target = out[layer - key[0][0]] if stacked else out
                    target[...] = _read(files[name].file, name, stored, spans, shape[1:] if stacked else shape)
                done[key] = out
            return done[key]

        return jax.make_array_from_callback(shape, places[at], piece)

    params = {at: read(at, leaf.shape) for at, leaf in _flat(shapes).items()}
    return config, graphdef, _nested(params)


def export(
    path: str | Path,
    config: TransformerConfig,
    params: PyTree,
    *,
    source: str | Path | None = None,
    tokenizer: Saveable | None = None,
    dtype: Any = None,
) -> None:
    """Write a directory that `transformers` loads: config, generation config, safetensors, tokenizer.

    source: the Hugging Face directory the model came from; its config.json, generation config and tokenizer files are
    carried over. tokenizer: takes the place of the source's. dtype: of the stored weights (default: the parameters').
    Everything is written beside `path` and renamed at the end. Of several processes all must call it; the first writes.

    Raises: FileExistsError if `path` exists; ValueError if parameters do not fit the config, or it not the source.
    """
    path = Path(path)
    if path.exists() and jax.process_index() == 0:  # it may be there, and new, when another process comes to look
        raise FileExistsError(f"{path} exists already; export does not overwrite: give another path or remove it")
    flat, table = _flat(params), names(config)
    expected = _flat(abstract(config)[1])
    for at in sorted(flat.keys() | expected.keys()):
        if at not in flat or at not in expected or flat[at].shape != expected[at].shape:
            got, want = (f"shape {tree[at].shape}" if at in tree else "nothing" for tree in (flat, expected))
            raise ValueError(f"parameter {'.'.join(at)} does not fit the config: expected {want}, got {got}")
    dtype = np.dtype(dtype or flat["embedding",].dtype)
    if dtype.name not in STORED.values():
        raise ValueError(f"export writes {', '.join(STORED.values())}, got dtype {dtype.name}")
    raw = _raw_config(config, None if source is None else Path(source))
    raw |= {"dtype": dtype.name, "torch_dtype": dtype.name}

    tensors = [
        (stored.name.format(layer), at, layer, _stored_shape(stored, flat[at].shape, layer))
        for at, stored in table.items()
        for layer in _layers(at, config)
    ]
    tensors.sort(key=lambda entry: (-1 if entry[2] is None else entry[2], entry[0]))
    shards = _shards([(entry, dtype.itemsize * int(np.prod(entry[3]))) for entry in tensors])
    with _appearing(path) as directory:
        weight_map = {}
        for number, shard in enumerate(shards, 1):
            file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            held = {}
            for name, at, layer, _ in shard:
                held[name] = np.ascontiguousarray(_file_order(table[at], _fetch(flat[at], layer).astype(dtype)))
                weight_map[name] = file
            if directory is not None:
                save_file(held, directory / file, metadata={"format": "pt"})
        if directory is None:
            return
        if len(shards) > 1:
            size = sum(dtype.itemsize * int(np.prod(shape)) for *_, shape in tensors)
            _write_json(directory / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
        _write_json(directory / "config.json", raw)
        _write_beside(directory, raw, None if source is None else Path(source), tokenizer)


class _Entry(NamedTuple):
    file: Path
    shape: tuple[int, ...]


def _contents(path: Path) -> dict[str, _Entry]:
    """Tensor name → file and shape, for all safetensors files of the directory."""
    if (path / INDEX).is_file():
        try:
            mapped = json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path / INDEX} is not a safetensors index: {error!r}") from error
        files = sorted(set(mapped.values()))
    elif (path / "model.safetensors").is_file():
        mapped, files = None, ["model.safetensors"]
    else:
        raise FileNotFoundError(
            f"no model.safetensors and no {INDEX} in {path}; other formats are not read: save the model with "
            "transformers' save_pretrained"
        )
    found: dict[str, _Entry] = {}
    for file in files:
        with _opened(path / file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                if mapped is not None and mapped.get(name, file) != file:
                    raise ValueError(f"tensor {name} is in {path / file}, but {INDEX} says {mapped[name]}")
                piece = tensors.get_slice(name)
                if piece.get_dtype() not in STORED:
                    raise ValueError(f"tensor {name} in {path / file} has dtype {piece.get_dtype()}, which is not read")
                found[name] = _Entry(path / file, tuple(piece.get_shape()))
    for name in (mapped or {}).keys() - found.keys():
        raise ValueError(f"tensor {name} is not in {path / mapped[name]}, though {INDEX} says so")
    return found


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing, though {INDEX} names it")
    try:
        tensors = safe_open(file, framework="numpy")
    except SafetensorError as error:
        raise ValueError(f"{file} is truncated or not a safetensors file ({error}); copy it again") from error
    with tensors as opened:
        yield opened


def _check(path: Path, config: TransformerConfig, wanted: dict[str, tuple], files: dict[str, _Entry]) -> None:
    # buffers that old versions saved, and a second copy of tied embeddings, carry nothing
    spare = {name for name in files if name.endswith(".rotary_emb.inv_freq")}
    if config.tie_embeddings:
        spare.add("lm_head.weight")
    problems = [f"missing {name} {list(shape)}" for name, shape in wanted.items() if name not in files]
    problems += [
        f"not expected {name} {list(files[name].shape)}" for name in files if name not in wanted.keys() | spare
    ]
    problems += [
        f"{name} has shape {list(files[name].shape)}, expected {list(shape)}"
        for name, shape in wanted.items()
        if name in files and files[name].shape != shape
    ]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"the tensors in {path} do not fit its config.json: " + "; ".join(problems[:5]) + more)


def _read(file: Path, name: str, stored: Stored, spans: tuple, shape: tuple[int, ...]) -> np.ndarray:
    """The part of a tensor that `spans` cuts out of our layout, read alone from the file."""
    sizes, cuts = [shape[i] for i in stored.permutation], [spans[i] for i in stored.permutation]
    index, view = [], []
    for fold in stored.folded:
        inner = int(np.prod([sizes[i] for i in fold[1:]]))
        start, stop = cuts[fold[0]]  # only the outermost of folded axes is ever cut
        index.append(slice(start * inner, stop * inner))
        view += [stop - start, *(sizes[i] for i in fold[1:])]
    # opened for each tensor: the pages of a mapped file count as the process's memory until it is closed
    with _opened(file) as tensors:
        part = tensors.get_slice(name)[tuple(index)]
    return part.reshape(view).transpose(np.argsort(stored.permutation))


def _file_order(stored: Stored, x: np.ndarray) -> np.ndarray:
    x = x.transpose(stored.permutation)
    return x.reshape([int(np.prod([x.shape[i] for i in fold])) for fold in stored.folded])


def _stored_shape(stored: Stored, shape: tuple[int, ...], layer: int | None) -> tuple[int, ...]:
    shape = shape if layer is None else shape[1:]
    return tuple(int(np.prod([shape[stored.permutation[i]] for i in fold])) for fold in stored.folded)


def _layers(at: tuple[str, ...], config: TransformerConfig) -> Iterable[int | None]:
    return range(config.num_layers) if at[0] == "layers" else (None,)


def _fetch(x: Any, layer: int | None) -> np.ndarray:
    """One layer of a parameter (or all of it) on the host, wherever its parts are."""
    if not isinstance(x, jax.Array):
        return np.asarray(x if layer is None else x[layer])
    if layer is not None:
        x = jax.lax.dynamic_index_in_dim(x, np.int32(layer), keepdims=False)
    return np.asarray(fetch(x))


def _shards(sized: list[tuple[Any, int]]) -> list[list[Any]]:
    """Entries in order, cut where the next would pass SHARD_BYTES."""
    shards: list[list[Any]] = [[]]
    filled = 0
    for entry, size in sized:
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += size
    return shards


def _raw_config(config: TransformerConfig, source: Path | None) -> dict[str, Any]:
    if source is None:
        return to_hf(config)
    there = read_config(source)
    differ = differences(config, there)
    if differ:
        fields = (f"{key} {getattr(there, key)!r} there, {getattr(config, key)!r} here" for key in differ)
        raise ValueError(f"the model was not made from {source}: {'; '.join(fields)}")
    raw = json.loads((source / "config.json").read_text(encoding="utf-8"))
    # a config may be read without the class's name, but `transformers` chooses the class by it
    return {"architectures": [ARCHITECTURES[config.family]]} | raw


def _write_beside(directory: Path, raw: dict[str, Any], source: Path | None, tokenizer: Saveable | None) -> None:
    carried = [] if source is None else [source / name for name in CARRIED if (source / name).is_file()]
    for file in carried:
        if tokenizer is None or file.name == "generation_config.json":
            shutil.copyfile(file, directory / file.name)
    if tokenizer is not None:
        tokenizer.save(directory)
    if not (directory / "generation_config.json").exists():
        ids = {key: raw.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        _write_json(directory / "generation_config.json", {k: v for k, v in ids.items() if v is not None})


@contextlib.contextmanager
def _appearing(path: Path) -> Iterator[Path | None]:
    """A directory beside `path` that takes its name when all is written and goes away when not. None on all processes
    but the first."""
    directory = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.partial" if jax.process_index() == 0 else None
    try:
        if directory is not None:
            directory.mkdir(parents=True)
        yield directory
        if directory is not None:
            os.rename(directory, path)
    except BaseException:
        if directory is not None:
            shutil.rmtree(directory, ignore_errors=True)
        raise
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(f"export {path.name}")


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _flat(tree: PyTree, leaf: Callable[[Any], bool] | None = None) -> dict[tuple[str, ...], Any]:
    pairs = jax.tree_util.tree_flatten_with_path(tree, is_leaf=leaf)[0]
    return {tuple(key.key for key in path): value for path, value in pairs}


def _nested(flat: dict[tuple[str, ...], Any]) -> PyTree:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = value
    return tree
