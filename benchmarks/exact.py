"""Whether `model.exact` holds on this backend: log-probs of sampling and training to the bit, in all sorts of shapes.

    python -m benchmarks.exact [--json]

Completions of several prompts are drawn all at once and prompt by prompt, some behind given tokens, some by top-k.
Their log-probs are then computed as training does: all rows, one row, one prompt's rows with more padding, a
micro-batch at a time, under the gradient with recomputation and without, with the entropy and without. Counted are the
decisions that differ, beside those that do with ordinary arithmetic. Where there are more devices than one, so it is
once more on a mesh of all of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from grpo_jax.models import Rope, TransformerConfig, create, evaluate, logical_axes, shardings
from grpo_jax.sampling import LanguageModel, compaction
from grpo_jax.sampling.weights import cast
from grpo_jax.training.mesh import make_mesh
from grpo_jax.types import Prompt, Request, Rollout

SIZES = {"vocab_size": 1100, "hidden_size": 64, "intermediate_size": 160, "head_dim": 16, "initializer_range": 0.2}
MODELS = {
    "biases, tied": TransformerConfig(**SIZES, num_layers=4, num_heads=4, num_kv_heads=2),
    "norms of queries and keys": TransformerConfig(
        **SIZES, num_layers=3, num_heads=8, num_kv_heads=1, family="qwen3", query_key_norm=True, qkv_bias=False
    ),
    "windows, caps, two ropes": TransformerConfig(
        **SIZES,
        num_layers=2,
        num_heads=4,
        num_kv_heads=4,
        family="gemma2",
        qkv_bias=False,
        tie_embeddings=False,
        post_norms=True,
        norm_offset=True,
        scale_embedding=True,
        attention_softcap=20.0,
        final_softcap=15.0,
        activation="gelu_tanh",
        local_rope=Rope(theta=100.0),
        sliding_window=24,
        sliding_layers=(True, False),
    ),
}
PROMPTS, GROUP, NEW = (5, 33, 17, 40), 6, 70


class Ids:
    """Prompts that are token ids already."""

    stop_ids = (1099,)

    def encode_prompt(self, text: Any) -> np.ndarray:
        length = int(text)
        return np.random.default_rng(length).integers(0, 1099, length).astype(np.int32)

    encode = encode_prompt


compaction.FEWEST_DECISIONS = 16  # rows that are left are regrouped in completions as short as these, too


class Policy:
    """One model on one mesh, and what it says. Weights are float32, as in a run, and cast."""

    def __init__(self, config: TransformerConfig, dtype: Any, mesh: Mesh) -> None:
        self.graphdef, params = create(config, jax.random.key(0))
        self.params = jax.device_put(params, shardings(logical_axes(config), mesh))
        sizes = {"max_prompt": max(PROMPTS), "max_new": NEW, "tokens": 2**16}
        self.language = LanguageModel({"policy": self.graphdef}, Ids(), mesh, **sizes, compute_dtype=dtype)

    def draw(self, prompts: range) -> Rollout:
        given = np.arange(7, dtype=np.int32), np.full(7, np.nan, np.float32)
        some = {0: {}, 1: {"prefix": given}, 2: {"max_new": 21}, 3: {"options": {"top_k": 50}}}
        asked = [Request(Prompt(i, str(PROMPTS[i])), count=GROUP, **some[i]) for i in prompts]
        return self.language.sample({"policy": self.params}, asked, jax.random.key(1))

    def say(self, rows: Rollout, *, gradient: bool = False, **options: Any) -> np.ndarray:
        def logps(params: Any, rows: Rollout) -> tuple[jax.Array, jax.Array]:
            with self.language.on_mesh():
                said = evaluate(self.graphdef, cast(params, self.language.compute_dtype), rows, **options).logps
            return said.sum(), said

        program = jax.jit(jax.grad(logps, has_aux=True) if gradient else logps)
        return np.asarray(program(self.params, rows)[1])

    def in_turns(self, rows: Rollout) -> np.ndarray:
        """A prompt at a time, in a loop."""

        @jax.jit
        def all_of(params: Any, rows: Rollout) -> jax.Array:
            def one(i: jax.Array) -> jax.Array:
                cut = lambda x, n: jax.lax.dynamic_slice_in_dim(x, i * n, n)  # noqa: E731
                contexts = jax.tree.map(functools.partial(cut, n=1), rows.contexts)
                part = rows.replace(
                    contexts=contexts,
                    completions=cut(rows.completions, GROUP),
                    temperature=cut(rows.temperature, GROUP),
                )
                return self.language.evaluate(params, part, "policy", wants=("entropy",)).logps

            return jax.lax.map(one, jnp.arange(len(PROMPTS))).reshape(rows.completions.shape)

        return np.asarray(all_of(self.params, rows))


def ways(policy: Policy, rows: Rollout) -> Iterator[tuple[str, np.ndarray, Rollout]]:
    """Log-probs [n, t] as training computes them, each with the rollout's rows that they are of."""
    yield "gradient, entropy", policy.say(rows, gradient=True, wants=("entropy",)), rows
    yield "a micro-batch at a time", policy.in_turns(rows), rows
    yield "all rows", policy.say(rows), rows
    yield "gradient, recomputed", policy.say(rows, gradient=True, remat=True), rows
    row = rows.take([0])
    tight = row.replace(contexts=row.contexts.replace(tokens=row.contexts.tokens[:, : PROMPTS[0]]))
    yield "one row, no padding", policy.say(tight), row
    group = rows.take(np.arange(GROUP, 2 * GROUP))
    wide = group.replace(
        contexts=group.contexts.replace(tokens=np.pad(group.contexts.tokens, ((0, 0), (0, 37)))),
        completions=np.pad(group.completions, ((0, 0), (0, 50))),
    )
    yield "more padding", policy.say(wide)[:, : rows.completions.shape[1]], group


def compared(config: TransformerConfig, dtype: Any) -> dict[str, int]:
    """Decisions in all, and how many differ from those drawn all at once on the first device, by where they do."""
    found: dict[str, int] = {}
    meshes = [make_mesh(devices=jax.devices()[:1])]
    if jax.device_count() > 1:
        meshes.append(make_mesh(fsdp=jax.device_count() // 2, tensor=2))

    def count(where: str, differ: np.ndarray) -> None:
        found[where] = found.get(where, 0) + int(differ.sum())

    policies = [Policy(config, dtype, mesh) for mesh in meshes]
    rows = policies[0].draw(range(len(PROMPTS)))
    found["decisions"] = int(rows.lengths.sum())
    for n, policy in enumerate(policies):
        where, draws = (f", mesh of {meshes[n].size}", 0) if n else ("", len(PROMPTS))
        drawn = [("drawn again", policy.draw(range(len(PROMPTS))), rows)]
        for i in range(draws):
            alone = rows.take(np.arange(i * GROUP, (i + 1) * GROUP))
            drawn.append(("drawn alone", policy.draw(range(i, i + 1)), alone))
        for label, one, other in drawn:
            exists, t = np.asarray(other.exists), one.completions.shape[1]
            for name in ("completions", "sampler_logps", "behavior_logps"):
                differ = getattr(one, name) != getattr(other, name)[:, :t]
                count(label + where, differ & ~np.isnan(other.behavior_logps[:, :t]) & exists[:, :t])
        for label, said, of in itertools.islice(ways(policy, rows), 2 if n else None):
            count(label + where, (said != of.sampler_logps) & np.asarray(of.exists))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one line of JSON for each model")
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS), metavar="NAME")
    options = parser.parse_args()
    devices = jax.devices()
    if not options.json:
        print(f"{len(devices)} {devices[0].device_kind}: decisions that differ, of exact and of ordinary arithmetic")
    for name in options.models:
        for dtype in (jnp.float32, jnp.bfloat16):
            exact, plain = (compared(dataclasses.replace(MODELS[name], exact=exact), dtype) for exact in (True, False))
            jax.clear_caches()  # an operating system has only so many pieces of memory for one process's programs
            if options.json:
                print(json.dumps({"model": name, "dtype": dtype.__name__, "exact": exact, "plain": plain}), flush=True)
                continue
            print(f"\n{name}, {dtype.__name__}: {exact.pop('decisions')} decisions", flush=True)
            for where, differ in exact.items():
                print(f"  {where:<40}{differ:>8}{plain[where]:>8}")


if __name__ == "__main__":
    main()
