"""Checkpoints of a run: sharded arrays and host state in one atomic, asynchronous Orbax save."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from grpo_jax.training import host_state
from grpo_jax.types import Host, PyTree


class CheckpointError(ValueError):
    """A checkpoint that is not there, is from another model, or would be overwritten."""


class Checkpoints:
    """The checkpoints of one directory, each holding `arrays` (a pytree) and `host` (see `host_state`).

    `keep` is how many of the newest stay, `keep_best` how many of those with the highest metric stay besides. A save
    becomes visible only when it is whole: one that was cut short is never listed, and the next save removes its
    remains. Reading writes nothing, so a running directory can be read by others.

    On several hosts every process makes the same calls; each writes its own shards, the first the host state.
    """

    def __init__(self, directory: str | os.PathLike[str], *, keep: int = 2, keep_best: int = 1):
        if keep < 1 or keep_best < 0:
            raise CheckpointError(f"keep must be at least 1 and keep_best at least 0, got {keep} and {keep_best}")
        path = os.fspath(directory)
        self.directory = epath.Path(path if "://" in path else os.path.abspath(path))
        self._preserve = _Preserve(keep, keep_best)
        self._writes = False
        self._manager = self._open()

    def save(self, step: int, arrays: PyTree, host: Host, *, metric: float | None = None, wait: bool = False) -> None:
        """Save a step. Returns when everything is copied, so buffers may be donated; the writing goes on behind.

        Args: `arrays`, a nest of dicts, tuples and named tuples with arrays at the leaves; `host`, plain values,
        numpy arrays and rollouts; `metric`, higher is better, ranks the step for `best` and `keep_best`; `wait`
        returns when the step is on disk.

        Raises: CheckpointError if the step or a later one is there already (nothing is ever overwritten) or the metric
        is not a finite number; TypeError if `host` or `arrays` hold what cannot be saved. A failure of the writing
        itself is raised by the next `save`, `wait` or `close`.
        """
        if metric is not None and not math.isfinite(metric):
            raise CheckpointError(f"the metric of step {step} must be a finite number or None, got {metric}")
        tree = _nest({names: leaf for names, leaf in _leaves(arrays) if _savable(names, leaf).size})
        encoded = host_state.encode(host)
        if not self._writes:
            self._manager.close()
            self._writes = True
            self._manager = self._open()
        latest = self.latest()
        if latest is not None and step <= latest:
            raise CheckpointError(
                f"cannot save step {step}: {self.directory} holds step {latest} already, and a save never overwrites "
                f"or goes back; resume from step {latest}, or use another directory"
            )
        self._manager.save(
            step,
            args=ocp.args.Composite(arrays=ocp.args.PyTreeSave(tree), host=_HostSave(*encoded)),
            metrics={"metric": None if metric is None else float(metric)},
            force=True,
        )
        if wait:
            self.wait()

    def restore(self, step: int, like: PyTree, *, partial: bool = False) -> tuple[PyTree, Host]:
        """The arrays and the host state of a step: (arrays with the structure and shardings of `like`, host).

        `like` has a jax.ShapeDtypeStruct (or an array) wherever an array is wanted; its sharding says where the array
        goes, whatever mesh it was saved from. With `partial`, `like` may be a part of what was saved, such as the
        parameters without the optimizer's state.

        Raises: CheckpointError if there is no such step, or if its arrays are not those of `like`: the names, shapes
        and dtypes that differ are listed.
        """
        self._require(step)
        wanted = {names: _abstract(leaf) for names, leaf in _leaves(like)}
        filled = {names: leaf for names, leaf in wanted.items() if leaf.size}  # Orbax holds no array without elements
        self._compare(step, filled, partial)
        tree = _nest(filled)
        loaded = self._manager.restore(
            step,
            args=ocp.args.Composite(
                arrays=ocp.args.PyTreeRestore(
                    tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree), partial_restore=partial
                ),
                host=_HostRestore(),
            ),
        )
        found = dict(_leaves(loaded["arrays"]))
        leaves = [
            found[names] if names in found else jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
            for names, leaf in wanted.items()
        ]
        return jax.tree.unflatten(jax.tree.structure(like), leaves), loaded["host"]

    def host(self, step: int) -> Host:
        """The host state of a step alone, such as the configuration that says which arrays to expect."""
        self._require(step)
        return self._manager.restore(step, args=ocp.args.Composite(host=_HostRestore()))["host"]

    def shapes(self, step: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Dotted name, shape and dtype of every array of a step that has elements; nothing is loaded."""
        self._require(step)
        saved = self._manager.item_metadata(step)["arrays"]
        tree = getattr(saved, "tree", saved)
        return {".".join(names): jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for names, leaf in _leaves(tree)}

    def steps(self) -> list[int]:
        """The steps that can be restored, ascending; one that is being written counts."""
        if not self._writes:
            self._manager.reload()
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        """The newest step, None if there is none."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The step with the highest metric, the newest of equals; None if no step has a metric."""
        self.wait()
        ranked = [(metric, step) for step in self.steps() if (metric := self._metric(step)) is not None]
        return max(ranked)[1] if ranked else None

    def wait(self) -> None:
        """Return when every save is on disk; raises what went wrong in writing."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait, and free the threads."""
        self.wait()
        self._manager.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(
            self.directory,
            item_handlers={"arrays": ocp.PyTreeCheckpointHandler(), "host": _HostHandler()},
            options=ocp.CheckpointManagerOptions(
                create=self._writes,
                cleanup_tmp_directories=self._writes,
                best_fn=_metric_of,
                preservation_policy=self._preserve,
            ),
        )

    def _metric(self, step: int) -> float | None:
        metrics = self._manager.metrics(step)
        return None if metrics is None else metrics["metric"]

    def _require(self, step: int) -> None:
        self.wait()
        steps = self.steps()
        if step not in steps:
            what = f"holds the steps {steps}" if steps else "holds no finished checkpoint"
            raise CheckpointError(f"there is no checkpoint of step {step}: {self.directory} {what}")

    def _compare(self, step: int, wanted: dict[tuple[str, ...], jax.ShapeDtypeStruct], partial: bool) -> None:
        saved = self.shapes(step)
        expected = {".".join(names): leaf for names, leaf in wanted.items()}
        wrong = [
            f"{name}: saved {_describe(saved[name])}, expected {_describe(leaf)}"
            for name, leaf in expected.items()
            if name in saved and (saved[name].shape, saved[name].dtype) != (leaf.shape, leaf.dtype)
        ]
        wrong += [
            f"{name}: not in the checkpoint, expected {_describe(expected[name])}"
            for name in expected
            if name not in saved
        ]
        if not partial:
            wrong += [f"{name}: saved {_describe(saved[name])}, not expected" for name in saved if name not in expected]
        if wrong:
            shown = "\n  ".join(wrong[:8] + ([f"and {len(wrong) - 8} more"] if len(wrong) > 8 else []))
            raise CheckpointError(
                f"the checkpoint of step {step} in {self.directory} is from another model, optimizer or method:\n"
                f"  {shown}"
            )


@dataclasses.dataclass(frozen=True)
class _Preserve:
    """The newest `keep` and, of those with a metric, the `keep_best` highest."""

    keep: int
    keep_best: int

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        del context
        steps = [info.step for info in checkpoints]
        ranked = sorted((_metric_of(i.metrics), i.step) for i in checkpoints if _metric_of(i.metrics) > -math.inf)
        kept = {*steps[-self.keep :], *(step for _, step in ranked[max(len(ranked) - self.keep_best, 0) :])}
        return [step in kept for step in steps]


def _metric_of(metrics: Any) -> float:
    return -math.inf if metrics is None or metrics["metric"] is None else metrics["metric"]


class _HostHandler(ocp.CheckpointHandler):
    """Writes `host.json` and `host.npz`, by the first process."""

    def save(self, directory: epath.Path, args: _HostSave) -> None:
        if jax.process_index() == 0:
            (directory / "host.json").write_text(args.document)
            (directory / "host.npz").write_bytes(args.archive)

    def restore(self, directory: epath.Path, args: _HostRestore | None = None) -> Host:
        del args
        return host_state.decode((directory / "host.json").read_text(), (directory / "host.npz").read_bytes())


@ocp.args.register_with_handler(_HostHandler, for_save=True)
@dataclasses.dataclass
class _HostSave(ocp.args.CheckpointArgs):
    document: str
    archive: bytes


@ocp.args.register_with_handler(_HostHandler, for_restore=True)
@dataclasses.dataclass
class _HostRestore(ocp.args.CheckpointArgs):
    pass


def _leaves(tree: PyTree) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every leaf with the names on its way: dictionary keys, fields, positions."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield tuple(jax.tree_util.keystr((entry,), simple=True) for entry in path), leaf


def _nest(leaves: dict[tuple[str, ...], Any]) -> dict[str, Any]:
    """Nested dictionaries, so that what is on disk does not depend on the Python classes of the tree."""
    tree: dict[str, Any] = {}
    for names, leaf in leaves.items():
        if not names:
            raise TypeError("the arrays of a checkpoint must be a tree with names, such as a dict; got a single array")
        branch = tree
        for name in names[:-1]:
            branch = branch.setdefault(name, {})
        branch[names[-1]] = leaf
    return tree


def _savable(names: tuple[str, ...], leaf: Any) -> jax.Array | np.ndarray:
    if isinstance(leaf, (jax.Array, np.ndarray)):
        return leaf
    raise TypeError(
        f"{'.'.join(names)} is a {type(leaf).__name__}; the arrays of a checkpoint are JAX or numpy arrays, other "
        f"values belong to the host state"
    )


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _describe(leaf: jax.ShapeDtypeStruct) -> str:
    return f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"
