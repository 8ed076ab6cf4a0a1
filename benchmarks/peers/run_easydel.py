"""EasyDeL: its compiled `generate`, and its GRPOTrainer.

    python -m benchmarks.peers.run_easydel TASK

It has no pass of its own for the old policy, so its update is 4 passes of 5. Its sampler returns no log-probs.
"""

from __future__ import annotations

import time

from benchmarks.peers import measure

STARTED = measure.process_start()

import tempfile  # noqa: E402

import easydel as ed  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import AutoTokenizer, GenerationConfig  # noqa: E402

from benchmarks.peers import workload  # noqa: E402
from benchmarks.peers.workload import MODELS, shape_of  # noqa: E402

IMPORTED = time.time()
compiled: list[float] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: compiled.append(seconds) if event.endswith("backend_compile_duration") else None
)


def load(asked, shape):
    dtype, longest = jnp.dtype(asked.dtype), shape.prompt + shape.new
    return ed.AutoEasyDeLModelForCausalLM.from_pretrained(
        str(workload.path(asked.model)),
        dtype=dtype,
        param_dtype=dtype,
        auto_shard_model=True,
        sharding_axis_dims=(1, -1, 1, 1, 1),
        config_kwargs=ed.EasyDeLBaseConfigDict(
            freq_max_position_embeddings=longest,
            mask_max_position_embeddings=longest,
            attn_mechanism=ed.AttentionMechanisms.AUTO,
            attn_dtype=dtype,
            gradient_checkpointing=ed.EasyDeLGradientCheckPointers.NONE,
        ),
    )


def trainer(asked, shape, texts, *, steps):
    config = ed.GRPOConfig(
        save_directory=tempfile.mkdtemp(prefix="bench_easydel_"),
        num_train_epochs=1,
        max_training_steps=steps,
        total_batch_size=shape.prompts,
        gradient_accumulation_steps=1,
        num_return_sequences=shape.group,
        max_prompt_length=shape.prompt,
        max_completion_length=shape.new,
        max_length=shape.prompt + shape.new,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        generation_temperature=1.0,
        generation_top_p=1.0,
        generation_top_k=0,
        use_esurge_generation=False,
        generation_interval=None,
        skip_apply_chat_template=True,
        shuffle_train_dataset=False,
        loss_type="grpo",
        beta=workload.BETA,
        learning_rate=workload.LEARNING_RATE,
        warmup_steps=0,
        clip_grad=workload.CLIP_NORM,
        save_steps=10**6,
        do_last_save=False,
        use_wandb=False,
        log_steps=1,
        report_steps=1,
        progress_bar_type="json",
    )
    return ed.GRPOTrainer(
        arguments=config,
        model=load(asked, shape),
        processing_class=AutoTokenizer.from_pretrained(workload.path(asked.model), padding_side="left"),
        train_dataset=Dataset.from_dict({"prompt": texts}),
        reward_funcs=lambda prompts, completions, **columns: [workload.vowel_share(str(c)) for c in completions],
    )


def sample(asked):
    shape = shape_of(asked.task, asked.opt)
    model, never = load(asked, shape), MODELS[asked.model].vocabulary + 7  # an end that cannot be drawn
    ids = np.array([p["ids"] for p in workload.prompts(asked.model, shape)], np.int32)
    ids = jnp.asarray(ids.repeat(shape.group, axis=0))
    config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        min_new_tokens=shape.new,
        max_new_tokens=shape.new,
        pad_token_id=workload.PAD_ID,
        eos_token_id=never,
    )

    def once():
        with model.mesh:
            drawn = model.generate(ids, attention_mask=jnp.ones_like(ids), generation_config=config)
        jax.block_until_ready(drawn.sequences)
        if drawn.sequences.shape != (shape.rows, shape.prompt + shape.new):
            raise RuntimeError(f"generate gave {drawn.sequences.shape}")

    return measure.timed(once, asked.repetitions, shape.rows * shape.new) | {"shape": shape}


def update(asked):
    """The trainer's own reference pass and compiled train step."""
    from easydel.trainers.training_utils import normalize_generation_model_kwargs

    shape = shape_of("update", asked.opt)
    it = trainer(asked, shape, [p["text"] for p in workload.prompts(asked.model, shape)], steps=10)
    prompts, completions, advantages = map(jnp.asarray, workload.update_batch(asked.model, shape))
    ids, state = jnp.concatenate([prompts, completions], 1), it.model_state
    contexts = prompts[:: shape.group]

    def once():
        nonlocal state
        with it.model.mesh:
            ref = it.compute_refmodel_logps(
                it.ref_state.graphstate,
                it.ref_state.graphother,
                ids,
                jnp.ones_like(ids),
                normalize_generation_model_kwargs(None),
            )
            batch = {
                "prompt_ids": contexts,
                "prompt_mask": jnp.ones_like(contexts),
                "completion_ids": completions,
                "completion_mask": jnp.ones_like(completions),
                "ref_per_token_logps": ref,
                "advantages": advantages,
                "num_items_in_batch": jnp.asarray(completions.size),
            }
            state, _ = it.sharded_training_step_function(state, batch, *it._train_shared_fn_static_args)
            jax.block_until_ready(jax.tree.leaves(state.graphstate))

    before = measure.peak_gib()
    return measure.timed(once, asked.repetitions, ids.size) | {"shape": shape, "passes": 4, "before_gib": before}


def end_to_end(asked):
    shape, finished, counts = shape_of("e2e", asked.opt), [], []
    texts = [p["text"] for p in workload.prompts(asked.model, shape, count=workload.PROMPTS[128])]
    it = trainer(asked, shape, texts, steps=int(asked.opt.get("steps", workload.STEPS)))
    original = it.on_step_end

    def marked(state, *args, **options):
        result = original(state, *args, **options)
        jax.block_until_ready(jax.tree.leaves(state.graphstate))
        finished.append(time.time())
        counts.append(len(compiled))
        return result

    it.on_step_end = marked
    it.train()
    by_step = [b - a for a, b in zip([0, *counts], counts)]
    return measure.iterations(STARTED, IMPORTED, finished) | {"shape": shape, "compilations": by_step}


TASKS = {"sampleA": sample, "sampleB": sample, "update": update, "e2e": end_to_end}


def main():
    asked = measure.arguments(list(TASKS), __doc__)
    numbers = TASKS[asked.task](asked)
    measure.report("easydel", asked, {"versions": measure.versions("easydel", "jax", "flax"), **numbers})


if __name__ == "__main__":
    main()
