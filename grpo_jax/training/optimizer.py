"""The optimizer of a run, put together from optax: clip, direction, decay, learning rate."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from grpo_jax.training.sections import OptimizerSection
from grpo_jax.types import PyTree


def optimizer(section: OptimizerSection, steps: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Gradients → updates, and the learning rate of each update.

    u = -lr(t) * (direction(clip(g)) + weight_decay * p for matrices p)

    Gradients are clipped by their global norm before anything else, and all of it is computed and kept in float32,
    whatever the dtype of the parameters. `steps` is the number of updates of the whole run.
    """
    options = {"b1": section.b1, "b2": section.b2, "eps": section.epsilon}
    given = {name: value for name, value in options.items() if value is not None}
    schedule = learning_rate(section, steps)
    parts = [
        optax.clip_by_global_norm(section.clip_norm) if section.clip_norm is not None else None,
        *_directions(section.name, given),
        optax.add_decayed_weights(section.weight_decay, decayed) if section.weight_decay else None,
        optax.scale_by_learning_rate(schedule),
    ]
    return _in_float32(optax.chain(*(part for part in parts if part is not None))), schedule


def learning_rate(section: OptimizerSection, steps: int) -> optax.Schedule:
    """Learning rate of update t = 0, 1, …, steps - 1.

    A rise peak * (t + 1) / warmup_steps (no update is wasted on a rate of 0), then the peak, or a line or half a
    cosine that reaches peak * final_fraction at t = steps.
    """
    peak, final, rise = section.learning_rate, section.learning_rate * section.final_fraction, section.warmup_steps
    remaining = max(steps - rise, 1)
    course = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, final, remaining),
        "cosine": lambda: optax.cosine_decay_schedule(peak, remaining, alpha=section.final_fraction),
    }[section.schedule]()
    if rise < 2:  # the first update of a rise of one is at the peak already
        return course if rise == 0 else optax.join_schedules([optax.constant_schedule(peak), course], [1])
    return optax.join_schedules([optax.linear_schedule(peak / rise, peak, rise - 1), course], [rise])


def decayed(params: PyTree) -> PyTree:
    """True for each parameter that weight decay acts on: matrices, not norms and biases.

    Told by name and rank, where the leading axis of everything under "layers" counts layers.
    """
    return jax.tree.map_with_path(lambda path, leaf: _is_matrix(_names(path), leaf), params)


def _directions(name: str, given: dict[str, float]) -> list[optax.GradientTransformation]:
    """What turns gradients into a direction of ascent, before decay and learning rate."""
    if name in ("adam", "adamw"):
        return [optax.scale_by_adam(**given)]
    if name == "lion":
        return [optax.scale_by_lion(**given)]
    if name == "sgd":
        return [optax.trace(given["b1"])] if "b1" in given else []
    if name == "adafactor":
        return [optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)]
    # 0.2 makes the size of its updates that of Adam's (arXiv 2502.16982), so that one learning rate serves both halves.
    beta = {"beta": given["b1"]} if "b1" in given else {}
    both = contrib.muon(1.0, **beta, consistent_rms=0.2, muon_weight_dimension_numbers=_muon_axes)
    return [both, optax.scale(-1.0)]


def _names(path: tuple[Any, ...]) -> list[str]:
    return [jax.tree_util.keystr((entry,), simple=True) for entry in path]


def _is_matrix(names: list[str], leaf: Any) -> bool:
    return leaf.ndim - ("layers" in names) >= 2 and not names[-1].endswith(("bias", "norm", "scale"))


def _muon_axes(params: PyTree) -> PyTree:
    """Input and output axes of every matrix that Muon orthogonalizes; None (Adam) for embeddings and vectors."""

    def axes(path: tuple[Any, ...], leaf: Any) -> contrib.MuonDimensionNumbers | None:
        names = _names(path)
        first = int("layers" in names)
        if not _is_matrix(names, leaf) or any(word in names[-1] for word in ("embed", "head")):
            return None
        # Attention's output projection joins heads and head size as input, the other projections as output.
        split = leaf.ndim - 1 if names[-1].startswith("out") else first + 1
        return contrib.MuonDimensionNumbers(tuple(range(first, split)), tuple(range(split, leaf.ndim)))

    return jax.tree.map_with_path(axes, params)


def _in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    def wide(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def init(params: PyTree) -> PyTree:
        return inner.init(wide(params))

    def update(updates: PyTree, state: PyTree, params: PyTree | None = None) -> tuple[PyTree, PyTree]:
        return inner.update(wide(updates), state, None if params is None else wide(params))

    return optax.GradientTransformation(init, update)
