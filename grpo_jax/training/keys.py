"""Keys: every random draw is a function of the seed and of what it is for."""

from __future__ import annotations

import zlib

import jax

from grpo_jax.types import Key


def fold(key: int | Key, *names: int | str) -> Key:
    """A key for a purpose: the seed or a key, folded with a step, a role, a word. There is no other random state."""
    key = jax.random.key(key, impl="threefry2x32") if isinstance(key, int) else key
    for name in names:
        key = jax.random.fold_in(key, zlib.crc32(name.encode()) if isinstance(name, str) else name)
    return key
