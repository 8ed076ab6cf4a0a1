"""google-tunix: its vanilla sampler, and RLCluster with GRPOLearner.

python -m benchmarks.peers.run_tunix TASK [--opt micro=8] [--opt old=0] [--opt beta=0]
"""

from __future__ import annotations

import time

from benchmarks.peers import measure

STARTED = measure.process_start()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from flax import nnx  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402
from tunix.generate.sampler import CacheConfig, Sampler  # noqa: E402
from tunix.models.qwen2 import model as qwen2  # noqa: E402
from tunix.models.qwen2 import params as qwen2_params  # noqa: E402
from tunix.rl import common  # noqa: E402
from tunix.rl import rl_cluster as clusters  # noqa: E402
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner, TrainExample  # noqa: E402
from tunix.rl.rollout.base_rollout import RolloutConfig  # noqa: E402

from benchmarks.peers import workload  # noqa: E402
from benchmarks.peers.workload import EOS_ID, MODELS, PAD_ID, shape_of  # noqa: E402

IMPORTED = time.time()
compiled: list[float] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: compiled.append(seconds) if event.endswith("backend_compile_duration") else None
)


class Stack:
    """The model of a task, its configuration written out by hand: there is no way from config.json to it."""

    def __init__(self, asked):
        sizes = MODELS[asked.model]
        self.dtype = jnp.dtype(asked.dtype)
        self.path = workload.path(asked.model)
        self.tokenizer = AutoTokenizer.from_pretrained(self.path)
        self.mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
        self.never = sizes.vocabulary + 7  # an end of sequence that cannot be drawn
        self.config = qwen2.ModelConfig(
            num_layers=sizes.layers,
            vocab_size=sizes.vocabulary,
            embed_dim=sizes.hidden,
            hidden_dim=sizes.mlp,
            num_heads=sizes.heads,
            head_dim=sizes.head_dim,
            num_kv_heads=sizes.kv_heads,
            rope_theta=10_000,
            norm_eps=1e-6,
            use_tied_embedding=True,
            dtype=self.dtype,
            param_dtype=self.dtype,
        )

    def load(self):
        with self.mesh:
            return qwen2_params.create_model_from_safe_tensors(str(self.path), self.config, self.mesh, dtype=self.dtype)

    def drawer(self, model, shape, texts):
        cache = CacheConfig(
            cache_size=shape.prompt + shape.new,
            num_layers=self.config.num_layers,
            num_kv_heads=self.config.num_kv_heads,
            head_dim=self.config.head_dim,
        )
        sampler = Sampler(model, self.tokenizer, cache)

        def draw(seed, **options):
            with self.mesh:
                return sampler(
                    texts,
                    max_generation_steps=shape.new,
                    max_prompt_length=shape.prompt,
                    temperature=1.0,
                    top_p=1.0,
                    eos_tokens=[self.never],
                    seed=seed,  # without one, every call draws the same
                    **options,
                )

        return draw

    def learner(self, shape, *, beta, steps, micro):
        """micro: prompts in a micro-batch."""
        training = clusters.RLTrainingConfig(
            actor_optimizer=optax.chain(
                optax.clip_by_global_norm(workload.CLIP_NORM), optax.adamw(workload.LEARNING_RATE)
            ),
            eval_every_n_steps=10**9,
            max_steps=steps,
            mini_batch_size=shape.prompts,
            train_micro_batch_size=micro,
            rollout_micro_batch_size=shape.prompts,
            compute_logps_micro_batch_size=micro,
        )
        rollout = RolloutConfig(
            max_tokens_to_generate=shape.new,
            max_prompt_length=shape.prompt,
            kv_cache_size=shape.prompt + shape.new,
            temperature=1.0,
            top_p=1.0,
            top_k=None,
            eos_tokens=None,
        )
        cluster = clusters.RLCluster(
            actor=self.load(),
            reference=self.load() if beta else None,
            tokenizer=self.tokenizer,
            cluster_config=clusters.ClusterConfig(
                role_to_mesh=dict.fromkeys(
                    (clusters.Role.ACTOR, clusters.Role.REFERENCE, clusters.Role.ROLLOUT), self.mesh
                ),
                rollout_engine="vanilla",
                offload_to_cpu=False,
                training_config=training,
                rollout_config=rollout,
            ),
        )
        learner = GRPOLearner(
            rl_cluster=cluster,
            algo_config=GRPOConfig(num_generations=shape.group, num_iterations=1, beta=beta, epsilon=workload.CLIP),
            reward_fns=lambda prompts, completions, **columns: [workload.vowel_share(c) for c in completions],
        )
        return cluster, learner


def sample(asked):
    shape, stack = shape_of(asked.task, asked.opt), Stack(asked)
    draw, seeds = stack.drawer(stack.load(), shape, _texts(asked, shape)), iter(range(10**6))

    def once():
        drawn = draw(next(seeds))
        if {len(t) for t in drawn.tokens} != {shape.new} or drawn.padded_prompt_tokens.shape[1] != shape.prompt:
            raise RuntimeError("Tunix did not draw completions of full length under prompts of the asked length")

    return measure.timed(once, asked.repetitions, shape.rows * shape.new) | {"shape": shape}


def update(asked):
    """The cluster's own log-probs and actor update; old=0 is what it does by itself when on policy."""
    shape, stack = shape_of("update", asked.opt), Stack(asked)
    beta = float(asked.opt.get("beta", workload.BETA))
    separate, micro = asked.opt.get("old", "1") == "1", int(asked.opt.get("micro", shape.rows))
    cluster, _ = stack.learner(shape, beta=beta, steps=10**6, micro=max(1, micro // shape.group))
    prompts, completions, advantages = map(jnp.asarray, workload.update_batch(asked.model, shape))

    def once():
        ref = cluster.get_ref_per_token_logps(prompts, completions, PAD_ID, EOS_ID, micro) if beta else None
        old = cluster.get_old_per_token_logps(prompts, completions, micro) if separate else None
        for start in range(0, shape.rows, micro):
            part = slice(start, start + micro)
            example = TrainExample(
                prompt_ids=prompts[part],
                prompt_mask=prompts[part] != PAD_ID,
                completion_ids=completions[part],
                completion_mask=jnp.ones_like(completions[part], bool),
                advantages=advantages[part],
                ref_per_token_logps=None if ref is None else ref[part],
                old_per_token_logps=None if old is None else old[part],
            )
            cluster.update_actor([example], None)
        _finish(cluster)

    before = measure.peak_gib()
    numbers = measure.timed(once, asked.repetitions, shape.rows * (shape.prompt + shape.new))
    return numbers | {"shape": shape, "passes": 3 + (beta > 0) + separate, "micro": micro, "before_gib": before}


def gap(asked):
    """Over all rows, and over those without a pad or stop id: the trainer masks these ids wherever they stand."""
    shape, stack = shape_of("gap", asked.opt), Stack(asked)
    model = stack.load()
    drawn = stack.drawer(model, shape, _texts(asked, shape))(1, return_logprobs=True)
    tokens = np.array(drawn.tokens)
    with stack.mesh:
        structure, state = nnx.split(model)
        trainer = common.compute_per_token_logps(
            structure, state, jnp.asarray(drawn.padded_prompt_tokens), jnp.asarray(tokens), PAD_ID, EOS_ID
        )
    difference = np.abs(np.array(drawn.logprobs, np.float32) - np.asarray(trainer, np.float32))
    clean = ~np.isin(tokens, [PAD_ID, EOS_ID]).any(axis=1)
    return {
        "shape": shape,
        "gap_max": float(difference.max()),
        "gap_mean": float(difference.mean()),
        "gap_max_clean_rows": float(difference[clean].max()),
        "rows_with_pad_or_eos": int((~clean).sum()),
    }


def end_to_end(asked):
    shape, stack = shape_of("e2e", asked.opt), Stack(asked)
    steps, micro = int(asked.opt.get("steps", workload.STEPS)), int(asked.opt.get("micro", shape.rows))
    cluster, learner = stack.learner(shape, beta=workload.BETA, steps=steps, micro=max(1, micro // shape.group))
    finished, counts, original = [], [], cluster.update_actor

    def marked(*args, **options):
        original(*args, **options)
        _finish(cluster)
        finished.append(time.time())
        counts.append(len(compiled))

    cluster.update_actor = marked
    texts = _texts(asked, shape, each=1, count=workload.PROMPTS[128])
    batches = [
        # an array: a list of texts breaks its tokenizer
        {"prompts": np.array([texts[(i * shape.prompts + j) % len(texts)] for j in range(shape.prompts)])}
        for i in range(steps)
    ]
    with stack.mesh:
        learner.train(batches)
    return measure.iterations(STARTED, IMPORTED, finished) | {"shape": shape, "compilations": _by_step(counts)}


def _texts(asked, shape, *, each=None, count=None):
    prompts = workload.prompts(asked.model, shape, count=count)
    return [p["text"] for p in prompts for _ in range(shape.group if each is None else each)]


def _finish(cluster):
    jax.block_until_ready(jax.tree.leaves(nnx.state(cluster.actor_trainer.model)))


def _by_step(counts):
    return [b - a for a, b in zip([0, *counts], counts)]


TASKS = {"sampleA": sample, "sampleB": sample, "update": update, "gap": gap, "e2e": end_to_end}


def main():
    asked = measure.arguments(list(TASKS), __doc__)
    if asked.device == "cpu":
        jax.config.update("jax_platforms", "cpu")
    numbers = TASKS[asked.task](asked)
    measure.report("tunix", asked, {"versions": measure.versions("google-tunix", "jax", "flax"), **numbers})


if __name__ == "__main__":
    main()
