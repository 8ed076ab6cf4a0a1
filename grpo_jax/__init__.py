"""Reinforcement fine-tuning of language models (GRPO and its family) in JAX.

`grpo_jax.losses` and `grpo_jax.advantages` are pure functions for any trainer and import nothing heavy; `Experiment`
is the whole run; `load`, `sample_groups` and `evaluate` are the pieces between them.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_WHERE = {
    "Experiment": "grpo_jax.experiment",
    "load": "grpo_jax.pieces",
    "sample_groups": "grpo_jax.pieces",
    "evaluate": "grpo_jax.pieces",
    "train_step": "grpo_jax.pieces",
}
__all__ = [*_WHERE]


def __getattr__(name: str) -> Any:
    """Heavy parts are imported when they are used."""
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'grpo_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_WHERE])
