"""What this machine does at best: large matrix products and long reads, in JAX and in numpy's BLAS."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

SQUARE = 2048
# [tokens, hidden] x [hidden, feed-forward] as in the workload's update and in a step of its decoding
SHAPES = {"update": (16384, 256, 1024), "decode": (64, 256, 1024)}
READ = 2**28  # bytes


def measured(asked: Namespace | None = None) -> dict[str, Any]:
    """GFLOP/s and GB/s, the better of JAX and numpy being `gflops` and `gbs`."""
    product = jax.jit(lambda a, b: a @ b)
    long = np.ones(READ // 4, np.float32)
    total = jax.jit(jnp.sum)
    on_device = jnp.asarray(long)
    numbers = {
        "jax_gflops": product_gflops(lambda a, b: product(a, b).block_until_ready(), jnp.asarray, (SQUARE,) * 3),
        "numpy_gflops": product_gflops(np.matmul, np.asarray, (SQUARE,) * 3),
        "jax_gbs": READ / best(lambda: total(on_device).block_until_ready()) / 1e9,
        "numpy_gbs": READ / best(long.sum) / 1e9,
    }
    for name, sizes in SHAPES.items():
        run = lambda a, b: product(a, b).block_until_ready()  # noqa: E731
        numbers[f"jax_{name}_gflops"] = product_gflops(run, jnp.asarray, sizes)
        numbers[f"numpy_{name}_gflops"] = product_gflops(np.matmul, np.asarray, sizes)
    return numbers | {
        "gflops": max(numbers["jax_gflops"], numbers["numpy_gflops"]),
        "gbs": max(numbers["jax_gbs"], numbers["numpy_gbs"]),
    }


def product_gflops(multiply: Callable, array: Callable, sizes: tuple[int, int, int]) -> float:
    m, k, n = sizes
    a, b = array(np.ones((m, k), np.float32)), array(np.ones((k, n), np.float32))
    return 2 * m * k * n / best(lambda: multiply(a, b)) / 1e9


def best(call: Callable[[], Any], *, seconds: float = 1.0) -> float:
    """The shortest of the calls that fit into `seconds`, after one that is not counted."""
    call()
    fastest, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        fastest = min(fastest, time.perf_counter() - start)
    return fastest
