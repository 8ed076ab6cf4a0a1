"""Time and memory of one update: the reference's pass, then forward, backward and AdamW.

    python -m benchmarks.update [--contexts 1] [--vocabulary 4096] [--runs 5]

64 sequences of 128 + 128 tokens, 8 under each prompt, a Qwen2 of 8.7M parameters, float32; `--contexts` prompts in a
micro-batch. FLOPs are those of the matrix products and attention scores that must be computed (causal, prompts once),
three passes for the update and one for the reference, so the rate it prints falls with whatever is computed twice.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from functools import partial
from typing import Any

import jax
import numpy as np
import optax

from grpo_jax.methods.grpo import grpo
from grpo_jax.models import TransformerConfig, create, evaluate
from grpo_jax.training.mesh import make_mesh, replicate
from grpo_jax.training.step import begin, evaluate_all, train_step
from grpo_jax.types import Batch, Contexts

C, G, P, T = 8, 8, 128, 128


def model(vocabulary: int) -> TransformerConfig:
    return TransformerConfig(
        family="qwen2",
        query_key_norm=False,
        qkv_bias=True,
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=1024,
        num_layers=8,
        num_heads=8,
        num_kv_heads=2,
        head_dim=32,
        initializer_range=0.08,
    )


def batch() -> Batch:
    rng, n = np.random.default_rng(0), C * G
    groups = np.repeat(np.arange(C, dtype=np.int32), G)
    return Batch(
        contexts=Contexts(tokens=rng.integers(3, 4096, (C, P)).astype(np.int32), lengths=np.full(C, P, np.int32)),
        sampled_under=groups,
        trained_under=groups,
        completions=rng.integers(3, 4096, (n, T)).astype(np.int32),
        lengths=np.full(n, T, np.int32),
        completion_mask=np.ones((n, T), bool),
        behavior_logps=np.zeros((n, T), np.float32),
        sampler_logps=np.zeros((n, T), np.float32),
        finished=np.ones(n, bool),
        temperature=np.ones(n, np.float32),
        prompt_ids=groups,
        index=np.tile(np.arange(G, dtype=np.int32), C),
        group_ids=groups,
        weights=np.ones(n, np.float32),
        update_ids=np.full(n, -1, np.int32),
        scores=np.zeros((n, 1), np.float32),
        columns={},
        role="policy",
        advantages=np.repeat(rng.standard_normal((n, 1)).astype(np.float32), T, 1),
    )


def flops(config: TransformerConfig) -> float:
    """Of one forward pass of all contexts and rows."""
    heads = config.hidden_size * config.head_dim * (2 * config.num_heads + 2 * config.num_kv_heads)
    tokens = C * (P + G * T)
    scores = C * (P * P / 2 + G * T * (P + T / 2)) * config.num_heads * config.head_dim * 2
    layer = tokens * (heads + 3 * config.hidden_size * config.intermediate_size) + scores
    return 2.0 * (config.num_layers * layer + C * G * T * config.hidden_size * config.vocab_size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, default=1, choices=(1, 2, 4, 8), help="prompts in a micro-batch")
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    config, mesh = model(options.vocabulary), make_mesh(devices=jax.devices()[:1])
    graphdef, params = create(config, jax.random.key(0))
    says, method = partial(evaluate, graphdef), grpo(prompts=C, group_size=G, kl=0.04)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-6))
    order = np.arange(C * G, dtype=np.int32).reshape(-1, options.contexts, G)
    cells = order, np.int32(len(order))
    rows, reference = replicate(batch(), mesh), jax.tree.map(lambda x: x.copy(), params)
    policy: Any = begin(params, optimizer, mesh)
    look = jax.jit(lambda params, rows, *cells: evaluate_all(says, params, rows, rows.trained_under, *cells, mesh))
    step = jax.jit(
        lambda policy, rows, *cells: train_step(method, says, optimizer, mesh, policy, rows, (), *cells, first=True),
        donate_argnums=0,
    )
    seconds: list[tuple[float, float]] = []
    for _ in range(options.runs + 1):
        start = time.perf_counter()
        said = jax.block_until_ready(look(reference, rows, *cells))
        middle = time.perf_counter()
        policy, metrics = jax.block_until_ready(step(policy, rows.replace(ref=said), *cells))
        seconds.append((middle - start, time.perf_counter() - middle))
    first, second = (statistics.median(x) for x in zip(*seconds[1:]))
    peak, work = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, flops(config)
    print(
        f"{C * G * (P + T) / (first + second):.0f} tokens/s; first call {sum(seconds[0]):.1f} s; "
        f"reference {first:.2f} s ({work / first / 1e9:.0f} GFLOP/s), "
        f"update {second:.2f} s ({3 * work / second / 1e9:.0f} GFLOP/s); "
        f"peak memory {peak:.2f} GiB; loss {metrics['loss']:.5f}"
    )


if __name__ == "__main__":
    main()
