"""Memory and time of `losses.chunked_logps` against the plain way, value and gradient, at V = 32k and 152k.

    python benchmarks/logprobs.py [--kl] [--decisions 2048] [--features 256]

The plain way makes all logits [N, T, V] and lets JAX differentiate log-softmax. Memory is the compiler's account of
temporary buffers, without arguments and results. Times are medians of alternating runs in this process; compare the
ratio. The floor of the time is the matrix products: three of 2 N T E V FLOPs plainly, four with logits recomputed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from grpo_jax import losses


def plain(hidden, head, targets, reference=None):
    """All logits at once."""
    everything = jax.nn.log_softmax(hidden @ head)
    logps = jnp.take_along_axis(everything, targets[..., None], -1)[..., 0]
    more = {"entropy": -(jnp.exp(everything) * everything).sum(-1)}
    if reference is not None:
        against = jax.nn.log_softmax(reference[0] @ reference[1])
        more["kl"] = (jnp.exp(everything) * (everything - against)).sum(-1)
    return logps, more


def chunked(hidden, head, targets, reference=None):
    return losses.chunked_logps(hidden, head, targets, entropy=True, reference=reference)


def compiled(function: Callable, arrays: tuple) -> tuple[Callable, int]:
    """The program of value and gradient, and its temporary bytes."""

    def loss(hidden, head, targets, reference):
        logps, more = function(hidden, head, targets, reference)
        return logps.sum() + sum(0.01 * x.sum() for x in more.values())

    program = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*arrays).compile()
    return program, program.memory_analysis().temp_size_in_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decisions", type=int, default=2048, help="N T, in rows of 256")
    parser.add_argument("--features", type=int, default=256, help="E")
    parser.add_argument("--kl", action="store_true", help="also the KL to a second head")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    rows, features = options.decisions // 256, options.features
    print(f"{jax.devices()[0].device_kind}: N={rows}, T=256, E={features}, float32, entropy{' and KL' * options.kl}")
    for vocabulary in (32_000, 152_000):
        keys = jax.random.split(jax.random.key(0), 3)
        hidden = jax.random.normal(keys[0], (rows, 256, features))
        head = jax.random.normal(keys[1], (features, vocabulary)) / features**0.5
        targets = jax.random.randint(keys[2], (rows, 256), 0, vocabulary)
        arrays = (hidden, head, targets, (hidden[..., ::-1], head) if options.kl else None)
        programs = {"plain": compiled(plain, arrays), "chunked": compiled(chunked, arrays)}
        seconds: dict[str, list[float]] = {name: [] for name in programs}
        for _ in range(options.runs + 1):
            for name, (program, _) in programs.items():
                start = time.perf_counter()
                jax.block_until_ready(program(*arrays))
                seconds[name].append(time.perf_counter() - start)
        times = {name: statistics.median(values[1:]) for name, values in seconds.items()}
        values = [program(*arrays)[0] for program, _ in programs.values()]
        mib = {name: size / 2**20 for name, (_, size) in programs.items()}
        logits = rows * 256 * vocabulary * 4 / 2**20
        print(
            f"V={vocabulary}: temporary memory plain {mib['plain']:.0f} MiB, chunked {mib['chunked']:.0f} MiB "
            f"({mib['plain'] / mib['chunked']:.1f} x less; all logits once are {logits:.0f} MiB, a chunk's at most "
            f"{losses.logprobs.CHUNK_BYTES / 2**20:.0f}, the head's gradient {features * vocabulary * 4 / 2**20:.0f}); "
            f"time chunked / plain {times['chunked'] / times['plain']:.2f}; "
            f"values differ by {abs(values[0] / values[1] - 1):.1e}"
        )


if __name__ == "__main__":
    main()
