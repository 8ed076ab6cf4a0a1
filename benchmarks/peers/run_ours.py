"""grpo_jax, through its public interface.

    python -m benchmarks.peers.run_ours TASK [--opt old=1] [--opt KEY.OF.THE.CONFIGURATION=VALUE]

update: without old=1, the old policy's log-probs are those of the pass that is differentiated, as in any run of ours.
"""

from __future__ import annotations

import time

from benchmarks.peers import measure

STARTED = measure.process_start()

import statistics  # noqa: E402
from argparse import Namespace  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import jax  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks import fused as steps  # noqa: E402
from benchmarks.peers import accelerator, limits, ours, workload  # noqa: E402
from benchmarks.peers.workload import shape_of  # noqa: E402
from grpo_jax import Experiment  # noqa: E402
from grpo_jax.losses import kl  # noqa: E402
from grpo_jax.training.batches import put  # noqa: E402
from grpo_jax.training.loop import iterate  # noqa: E402
from grpo_jax.types import Request, Rollout  # noqa: E402

IMPORTED = time.time()
CONFIGS = Path(__file__).parents[2] / "configs"


def sample(asked: Namespace) -> dict[str, Any]:
    """Groups of completions of full length, fresh noise in each call."""
    shape = shape_of(asked.task, asked.opt)
    draw = drawer(asked, shape)
    lengths = np.full(shape.rows, shape.new)
    return measure.timed(lambda: draw(lengths), asked.repetitions, shape.rows * shape.new) | {"shape": shape}


def drawer(asked: Namespace, shape: workload.Shape) -> Callable[[np.ndarray], Rollout]:
    """A function that draws rows of the lengths [N] that it is given, in the order of the prompts."""
    run = ours.experiment(asked, shape)
    language, params, calls = ours.unending(run), {"policy": run.model.params}, iter(range(10**6))
    prompts = ours.prompts_of(run, shape.prompts)

    def draw(lengths: np.ndarray) -> Rollout:
        if (lengths == lengths[0]).all():
            requests = [Request(p, count=shape.group, max_new=int(lengths[0])) for p in prompts]
        else:
            owners = [p for p in prompts for _ in range(shape.group)]
            requests = [Request(p, max_new=int(n)) for p, n in zip(owners, lengths)]
        rows = language.sample(params, requests, jax.random.key(next(calls)))
        if not np.array_equal(rows.lengths, lengths):
            raise RuntimeError("the sampler did not draw the lengths that it was asked for")
        return rows

    return draw


def update(asked: Namespace) -> dict[str, Any]:
    """Reference, (old,) forward, backward and AdamW on rows that are there already: an iteration without sampling."""
    shape, beta = shape_of("update", asked.opt), float(asked.opt.get("beta", workload.BETA))
    separate = asked.opt.get("old") == "1"
    rows = ours.fixed_rows(asked.model, shape)
    method = ours.on_fixed_rows(rows, shape, beta=beta, separate_old=separate)
    run = ours.experiment(asked, shape, method=method).begin()
    before = measure.peak_gib()

    def once() -> None:
        iterate(run)
        jax.block_until_ready(run.params)

    numbers = measure.timed(once, asked.repetitions, shape.rows * (shape.prompt + shape.new))
    passes = 3 + (beta > 0) + separate
    return numbers | {"shape": shape, "passes": passes, "before_gib": before, "layout": list(run.layout)}


def end_to_end(asked: Namespace) -> dict[str, Any]:
    """`Experiment.train` as anyone would call it."""
    shape = shape_of("e2e", asked.opt)
    texts = [p["text"] for p in workload.prompts(asked.model, shape, count=workload.PROMPTS[128])]
    run = ours.experiment(asked, shape, texts)
    run.train(quiet=True)
    records = ours.trained_records(run)
    return measure.iterations(STARTED, IMPORTED, [r["time"] for r in records]) | {
        "shape": shape,
        "compilations": [int(r["compilations"]) for r in records],
        "sections": {k: v for k, v in records[-1].items() if k.startswith("seconds/")},
    }


def recompile(asked: Namespace) -> dict[str, Any]:
    """Prompts of any lengths, completions that stop anywhere: what is compiled in each of six steps."""
    shape = shape_of("recompile", asked.opt)
    whole = [p["text"] for p in workload.prompts(asked.model, shape, count=workload.PROMPTS[128])]
    lengths = np.random.default_rng(0).integers(1, shape.prompt + 1, len(whole))
    texts = [workload.cut(text, int(n)) for text, n in zip(whole, lengths)]
    stops = sorted({" " + word for text in whole for word in text.split()})[:80]
    run = ours.experiment(asked, shape, texts, changes={"steps": 6, "sampling.stop": stops})
    run.train(quiet=True)
    records = ours.trained_records(run)
    return {
        "shape": shape,
        "compilations": [int(r["compilations"]) for r in records],
        "length_mean": [r["length_mean"] for r in records],
    }


def ragged(asked: Namespace) -> dict[str, Any]:
    """Tokens per second of log-normal lengths, and by turns of as many tokens in as many rows of one length (in a run
    set up for that length)."""
    shape = shape_of("ragged", asked.opt)
    lengths = workload.ragged_lengths(shape.rows, shape.new)
    tokens = int(lengths.sum())
    even = workload.even_lengths(lengths)
    draw, draw_even = drawer(asked, shape), drawer(asked, shape._replace(new=int(even.max())))
    calls = (lambda: draw(lengths)), (lambda: draw_even(even))
    uneven, uniform = measure.by_turns(calls, asked.repetitions, tokens)
    return uneven | {
        "shape": shape,
        "uniform_tokens_per_s": uniform["tokens_per_s"],
        "against_uniform": uneven["tokens_per_s"] / uniform["tokens_per_s"],
        "mean_over_longest": float(lengths.mean() / lengths.max()),
    }


def gap(asked: Namespace) -> dict[str, Any]:
    """max |sampler - trainer| of the log-probs of all rows drawn, and the same between shapes of the trainer's own
    micro-batch: a group, a single row, all groups at once. Also KL(sampler || trainer)."""
    shape = shape_of("gap", asked.opt)
    run = ours.experiment(asked, shape)
    prompts = ours.prompts_of(run, shape.prompts)
    requests = [Request(p, count=shape.group) for p in prompts]
    rows = ours.unending(run).sample({"policy": run.model.params}, requests, jax.random.key(1))
    grouped = trainer_logps(run, rows)
    sizes = shape.prompt + shape.new, shape.prompts * (shape.prompt + shape.group * shape.new)
    others = [ours.experiment(asked, shape, changes={"batch.tokens_per_device": size}) for size in sizes]
    between = np.abs(np.stack([trainer_logps(other, rows) for other in others]) - grouped)
    difference = np.abs(rows.sampler_logps - grouped)
    special = np.isin(rows.completions, [workload.PAD_ID, workload.EOS_ID]).any(axis=1)
    return {
        "shape": shape,
        "gap_max": float(difference.max()),
        "gap_mean": float(difference.mean()),
        "gap_kl": float(np.mean(kl.k3(rows.sampler_logps, grouped))),
        "between_shapes_max": float(between.max()),
        "between_shapes_mean": float(between.mean()),
        "rows_with_pad_or_eos": int(special.sum()),
        "mean_logp": float(grouped.mean()),
    }


def trainer_logps(run: Experiment, rows: Rollout) -> np.ndarray:
    """The log-probs [N, T] that the run's own pass over its micro-batches gives."""
    state = run.begin()
    batch = state.compiled.with_old(put(rows, state.layout, state.mesh, updates=state.updates))
    return np.asarray(batch.old.logps)[: len(rows)]


def fused(asked: Namespace) -> dict[str, Any]:
    """Steps per second of the quickstart task with a reward in JAX: as one program, and part by part, by turns."""
    found = steps.rates(str(CONFIGS / "quickstart_fused.yaml"), [])
    return {
        "fused_per_s": statistics.median(found["fused"]),
        "unfused_per_s": statistics.median(found["part by part"]),
    }


TASKS = {
    "limits": limits.measured,
    "sampleA": sample,
    "sampleB": sample,
    "update": update,
    "e2e": end_to_end,
    "recompile": recompile,
    "ragged": ragged,
    "gap": gap,
    "fused": fused,
    "decode": accelerator.decode,
    "mfu": accelerator.mfu,
}


def main() -> None:
    asked = measure.arguments(list(TASKS), __doc__)
    if asked.device == "cpu":
        jax.config.update("jax_platforms", "cpu")
    numbers = TASKS[asked.task](asked)
    measure.report("ours", asked, {"versions": measure.versions("jax", "flax"), **numbers})


if __name__ == "__main__":
    main()
