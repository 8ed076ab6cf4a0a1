"""transformers' `generate` and a GRPO update written by hand in torch: what one has with no framework at all.

python -m benchmarks.peers.run_torch TASK [--opt micro=8] [--opt old=0] [--opt beta=0]
"""

from __future__ import annotations

import time

from benchmarks.peers import measure

STARTED = measure.process_start()

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from benchmarks.peers import workload  # noqa: E402
from benchmarks.peers.workload import MODELS, shape_of  # noqa: E402

IMPORTED = time.time()


def load(asked):
    model = AutoModelForCausalLM.from_pretrained(workload.path(asked.model), dtype=getattr(torch, asked.dtype))
    return model.eval().to(_place(asked))


def generate(model, ids, new, **options):
    """Exactly `new` tokens, at temperature 1 from the whole vocabulary."""
    with torch.no_grad():
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            min_new_tokens=new,
            max_new_tokens=new,
            pad_token_id=workload.PAD_ID,
            **options,
        )


def log_probs(model, ids, new):
    logits = model(ids, logits_to_keep=new + 1).logits[:, :-1].float()
    return F.log_softmax(logits, -1).gather(2, ids[:, -new:, None]).squeeze(2)


def step(model, reference, optimizer, ids, advantages, *, new, micro, separate_old=True):
    """One update over micro-batches of `micro` rows."""
    for start in range(0, len(ids), micro):
        rows, adv = ids[start : start + micro], advantages[start : start + micro, None]
        with torch.no_grad():
            ref = None if reference is None else log_probs(reference, rows, new)
            old = log_probs(model, rows, new) if separate_old else None
        logps = log_probs(model, rows, new)
        ratio = torch.exp(logps - (logps.detach() if old is None else old))
        clipped = ratio.clamp(1 - workload.CLIP, 1 + workload.CLIP)
        loss = torch.maximum(-ratio * adv, -clipped * adv)
        if ref is not None:
            loss = loss + workload.BETA * (torch.exp(ref - logps) - (ref - logps) - 1)
        (loss.mean() * len(rows) / len(ids)).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), workload.CLIP_NORM)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def sample(asked):
    shape, model = shape_of(asked.task, asked.opt), load(asked)
    ids = torch.tensor([p["ids"] for p in workload.prompts(asked.model, shape)], device=_place(asked))
    ids = ids.repeat_interleave(shape.group, 0)

    def once():
        drawn = generate(model, ids, shape.new)
        _finish(asked)
        if drawn.shape[1] != shape.prompt + shape.new:
            raise RuntimeError(f"generate gave {tuple(drawn.shape)}")

    return measure.timed(once, asked.repetitions, shape.rows * shape.new) | {"shape": shape}


def update(asked):
    shape, model = shape_of(asked.task, asked.opt), load(asked)
    beta, separate = float(asked.opt.get("beta", asked.task == "update")), asked.opt.get("old", "1") == "1"
    separate = separate and asked.task == "update"
    micro = int(asked.opt.get("micro", shape.rows if asked.task == "update" else shape.group))
    prompts, completions, advantages = (torch.tensor(x) for x in workload.update_batch(asked.model, shape))
    ids = torch.cat([prompts, completions], 1).long().to(_place(asked))
    advantages, reference = advantages.to(_place(asked)), load(asked) if beta else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=workload.LEARNING_RATE)
    before = measure.peak_gib()

    def once():
        step(model, reference, optimizer, ids, advantages, new=shape.new, micro=micro, separate_old=separate)
        _finish(asked)

    numbers = measure.timed(once, asked.repetitions, ids.numel())
    return numbers | {"shape": shape, "passes": 3 + bool(beta) + separate, "micro": micro, "before_gib": before}


def gap(asked):
    """Between the logits that `generate` used and those of a plain forward. (bfloat16 is slow here: fewer rows.)"""
    small = {"group": "1", "new": "32"} if asked.dtype == "bfloat16" and asked.device == "cpu" else {}
    shape, model = shape_of("gap", small | asked.opt), load(asked)
    ids = torch.tensor([p["ids"] for p in workload.prompts(asked.model, shape)], device=_place(asked))
    ids = ids.repeat_interleave(shape.group, 0)
    drawn = generate(model, ids, shape.new, return_dict_in_generate=True, output_logits=True)
    tokens = drawn.sequences[:, shape.prompt :]
    sampler = F.log_softmax(torch.stack(drawn.logits, 1).float(), -1).gather(2, tokens[..., None]).squeeze(2)
    with torch.no_grad():
        difference = (sampler - log_probs(model, drawn.sequences, shape.new)).abs()
    return {"shape": shape, "gap_max": difference.max().item(), "gap_mean": difference.mean().item()}


def end_to_end(asked):
    shape, model, reference = shape_of("e2e", asked.opt), load(asked), load(asked)
    tokenizer = AutoTokenizer.from_pretrained(workload.path(asked.model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=workload.LEARNING_RATE)
    micro = int(asked.opt.get("micro", shape.rows))
    texts = [p["text"] for p in workload.prompts(asked.model, shape, count=workload.PROMPTS[128])]
    finished = []
    for i in range(int(asked.opt.get("steps", workload.STEPS))):
        batch = [texts[(i * shape.prompts + j) % len(texts)] for j in range(shape.prompts)]
        ids = tokenizer(batch, return_tensors="pt")["input_ids"].repeat_interleave(shape.group, 0).to(_place(asked))
        drawn = generate(model, ids, shape.new)
        completions = tokenizer.batch_decode(drawn[:, ids.shape[1] :], skip_special_tokens=True)
        rewards = torch.tensor([workload.vowel_share(text) for text in completions]).view(-1, shape.group)
        centred = rewards - rewards.mean(1, keepdim=True)
        advantages = (centred / (rewards.std(1, keepdim=True) + 1e-4)).flatten().to(_place(asked))
        step(model, reference, optimizer, drawn, advantages, new=shape.new, micro=micro)
        _finish(asked)
        finished.append(time.time())
    return measure.iterations(STARTED, IMPORTED, finished) | {"shape": shape}


def _place(asked):
    return "cuda" if asked.device == "gpu" else "cpu"


def _finish(asked):
    if asked.device == "gpu":
        torch.cuda.synchronize()


def _mfu(asked):
    from benchmarks.peers.floors import update_flops

    numbers = update(asked)
    needed = update_flops(MODELS[asked.model], numbers["shape"], passes=3)
    return numbers | {"model_flops_per_s": needed / numbers["median_s"]}


TASKS = {"sampleA": sample, "sampleB": sample, "update": update, "gap": gap, "e2e": end_to_end}
TASKS |= {"decode": sample, "mfu": _mfu}  # on a GPU


def main():
    asked = measure.arguments(list(TASKS), __doc__)
    numbers = TASKS[asked.task](asked)
    measure.report("torch", asked, {"versions": measure.versions("torch", "transformers"), **numbers})


if __name__ == "__main__":
    main()
