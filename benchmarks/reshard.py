"""A rollout with weights gathered once against one that gathers them in every decode step, on eight virtual devices.

    python -m benchmarks.reshard [--new 64] [--repeats 5]

Every device is a share of this machine's cores, and its network this machine's memory: what counts is the ratio. A
decode step of the one waits for no weights; of the other for all of them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.models import TransformerConfig, create
from grpo_jax.models.sharding import sharding, ways
from grpo_jax.sampling.decoding import Cells, draw
from grpo_jax.sampling.weights import arrange, prepared
from grpo_jax.training.mesh import make_mesh

CONFIG = TransformerConfig(
    vocab_size=4096, hidden_size=256, intermediate_size=1024, num_layers=6, num_heads=8, num_kv_heads=2, head_dim=32
)
ROWS, PROMPT = 4, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--new", type=int, default=64, help="tokens per completion")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    print("| mesh | weights | ms to bring them | ms per rollout | of the other |\n" + "|---" * 5 + "|")
    for name, sizes in {"fsdp 8": {"data": 1, "fsdp": 8}, "fsdp 4, tensor 2": {"fsdp": 4, "tensor": 2}}.items():
        ready = {wanted: rollout(make_mesh(**sizes), wanted, options.new) for wanted in ("divided", "gathered")}
        times: dict[str, list[tuple[float, float]]] = {wanted: [] for wanted in ready}
        for _ in range(options.repeats):  # side by side
            for wanted, run in ready.items():
                times[wanted].append(run())
        middle = {wanted: [1e3 * statistics.median(x) for x in zip(*seen)] for wanted, seen in times.items()}
        for wanted, (bring, whole) in middle.items():
            share = whole / middle["divided"][1]
            print(f"| {name} | {wanted} | {bring:.1f} | {whole:.0f} | {share:.2f} |", flush=True)


def rollout(mesh, wanted: str, new: int):
    """A function that draws all rows and says how long the weights took, and all."""
    arrangement = arrange(CONFIG, mesh, jnp.float32, wanted=wanted)
    graphdef, params = create(CONFIG, jax.random.key(0))
    params, bring = jax.device_put(params, arrangement.from_), prepared(arrangement, jnp.float32)
    c, lie = ways("cells", mesh), sharding("cells", mesh)
    full = lambda value, *shape: jax.device_put(np.full(shape, value), lie)  # noqa: E731
    rows = dict.fromkeys(("given_lengths", "minimum", "top_k"), full(np.int32(0), c, ROWS))
    rows |= dict.fromkeys(("temperature", "top_p"), full(np.float32(1), c, ROWS))
    cells = Cells(
        contexts=full(np.int32(7), c, PROMPT),
        context_lengths=full(np.int32(PROMPT), c),
        given=full(np.int32(0), c, ROWS, new),
        budget=full(np.int32(new), c, ROWS),
        min_p=full(np.float32(0), c, ROWS),
        prompt_ids=jax.device_put(np.repeat(np.arange(c, dtype=np.int32)[:, None], ROWS, 1), lie),
        index=jax.device_put(np.tile(np.arange(ROWS, dtype=np.int32), (c, 1)), lie),
        stops=jax.device_put(np.full((1, 1), CONFIG.vocab_size, np.int32), sharding("", mesh)),
        stops_apply=full(False, c, ROWS, 1),
        **rows,
    )

    def run() -> tuple[float, float]:
        begun = time.perf_counter()
        weights = jax.block_until_ready(bring(params))
        there = time.perf_counter()
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            drawn = draw(graphdef, weights, cells, jax.random.key(1), restricts=(), has_given=False, shards=c)
        jax.block_until_ready(drawn)
        return there - begun, time.perf_counter() - begun

    run()
    return run


if __name__ == "__main__":
    main()
