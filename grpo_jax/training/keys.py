"""Keys: every random draw is a function of the seed and of what it is for."""

from __future__ import annotations

import functools
import zlib

import jax
import numpy as np

from grpo_jax.types import Key


def fold(key: int | Key, *names: int | str) -> Key:
    """A key for a purpose: the seed or a key, folded with a step, a role, a word. There is no other random state."""
    words = [np.uint32(zlib.crc32(x.encode()) if isinstance(x, str) else x) if _plain(x) else x for x in names]
    return _fold(_seeded(key) if isinstance(key, int) else key, *words)


def _plain(name: object) -> bool:
    return isinstance(name, (str, int, np.integer))


@functools.cache
def _seeded(seed: int) -> Key:
    with jax.ensure_compile_time_eval():  # a key that is kept must not belong to a program that is being traced
        return jax.random.key(seed, impl="threefry2x32")


@jax.jit
def _fold(key: Key, *words: jax.Array) -> Key:
    for word in words:  # one dispatch for all of them: each by itself takes the host half a millisecond
        key = jax.random.fold_in(key, word)
    return key
