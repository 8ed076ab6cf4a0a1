"""TRL's GRPOTrainer, with transformers' generation.

    python -m benchmarks.peers.run_trl TASK [--opt micro=8] [--opt old=0] [--opt beta=0]

Its defaults that cost a CPU much are off: bfloat16 and gradient checkpointing.
"""

from __future__ import annotations

import time

from benchmarks.peers import measure

STARTED = measure.process_start()

import tempfile  # noqa: E402

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402

from benchmarks.peers import workload  # noqa: E402
from benchmarks.peers.workload import shape_of  # noqa: E402

IMPORTED = time.time()


def trainer(asked, shape, texts, *, steps=1, beta=0.0, micro=None, callbacks=None, full_length=False):
    micro = micro or shape.rows
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(prefix="bench_trl_"),
        use_cpu=asked.device == "cpu",
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=shape.rows // micro,
        num_generations=shape.group,
        max_completion_length=shape.new,
        generation_kwargs={"min_new_tokens": shape.new} if full_length else None,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        loss_type="grpo",
        scale_rewards="group",
        num_iterations=1,
        beta=beta,
        learning_rate=workload.LEARNING_RATE,
        lr_scheduler_type="constant",
        max_grad_norm=workload.CLIP_NORM,
        max_steps=steps,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_num_workers=0,
        seed=0,
    )
    path = workload.path(asked.model)
    return GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, asked.dtype)),
        processing_class=AutoTokenizer.from_pretrained(path),
        args=config,
        callbacks=callbacks,
        train_dataset=Dataset.from_dict({"prompt": texts}),
        reward_funcs=lambda completions, **columns: [workload.vowel_share(text) for text in completions],
    )


def sample(asked):
    """The trainer's own generation step."""
    shape = shape_of(asked.task, asked.opt)
    prompts = workload.prompts(asked.model, shape)
    it = trainer(asked, shape, [p["text"] for p in prompts], full_length=True)
    ids = [p["ids"] for p in prompts for _ in range(shape.group)]

    def once():
        completions, _ = it._generate_single_turn(ids, None, {}, shape.group)
        if {len(c) for c in completions} != {shape.new}:
            raise RuntimeError("TRL did not draw completions of full length")

    return measure.timed(once, asked.repetitions, shape.rows * shape.new) | {"shape": shape}


def update(asked):
    """The trainer's own log-probs and loss; old=0 is what it does by itself when on policy."""
    shape = shape_of("update", asked.opt)
    beta = float(asked.opt.get("beta", workload.BETA))
    separate, micro = asked.opt.get("old", "1") == "1", int(asked.opt.get("micro", shape.rows))
    texts = [p["text"] for p in workload.prompts(asked.model, shape)]
    it = trainer(asked, shape, texts, steps=10, beta=beta, micro=micro)
    prompts, completions, advantages = (torch.tensor(x) for x in workload.update_batch(asked.model, shape))
    prompts, completions = prompts.long(), completions.long()
    ids = torch.cat([prompts, completions], 1)
    it.create_optimizer()
    it.current_gradient_accumulation_steps = shape.rows // micro
    model = it.model.train()

    def log_probs(policy, rows):
        return it._get_per_token_logps_and_entropies(policy, rows, torch.ones_like(rows), shape.new)[0]

    def once():
        for start in range(0, shape.rows, micro):
            part = slice(start, start + micro)
            inputs = {
                "prompt_ids": prompts[part],
                "prompt_mask": torch.ones_like(prompts[part]),
                "completion_ids": completions[part],
                "completion_mask": torch.ones_like(completions[part]),
                "advantages": advantages[part],
                "num_items_in_batch": torch.tensor(completions.numel()),
            }
            with torch.no_grad():
                if separate:
                    inputs["old_per_token_logps"] = log_probs(model, ids[part])
                if beta:
                    inputs["ref_per_token_logps"] = log_probs(it.ref_model, ids[part])
            it.compute_loss(model, inputs).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), workload.CLIP_NORM)
        it.optimizer.step()
        it.optimizer.zero_grad(set_to_none=True)

    before = measure.peak_gib()
    numbers = measure.timed(once, asked.repetitions, ids.numel())
    return numbers | {"shape": shape, "passes": 3 + (beta > 0) + separate, "micro": micro, "before_gib": before}


def end_to_end(asked):
    shape, finished = shape_of("e2e", asked.opt), []

    class Mark(TrainerCallback):
        def on_step_end(self, *args, **options):
            finished.append(time.time())

    texts = [p["text"] for p in workload.prompts(asked.model, shape, count=workload.PROMPTS[128])]
    steps, micro = int(asked.opt.get("steps", workload.STEPS)), int(asked.opt.get("micro", shape.rows))
    trainer(asked, shape, texts, steps=steps, beta=workload.BETA, micro=micro, callbacks=[Mark()]).train()
    return measure.iterations(STARTED, IMPORTED, finished) | {"shape": shape}


TASKS = {"sampleA": sample, "sampleB": sample, "update": update, "e2e": end_to_end}


def main():
    asked = measure.arguments(list(TASKS), __doc__)
    numbers = TASKS[asked.task](asked)
    measure.report("trl", asked, {"versions": measure.versions("trl", "torch", "transformers"), **numbers})


if __name__ == "__main__":
    main()
