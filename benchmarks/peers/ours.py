"""Our library as a user drives it: an Experiment on the workload, rows to update on, a sampler that never stops."""

from __future__ import annotations

import atexit
import dataclasses
import json
import shutil
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import yaml

from benchmarks.peers import workload
from benchmarks.peers.workload import Shape
from grpo_jax import Experiment, advantages
from grpo_jax.methods.grpo import grpo
from grpo_jax.sampling import LanguageModel
from grpo_jax.training.assemble import SAMPLING_TOKENS
from grpo_jax.training.configuration import load_config
from grpo_jax.types import Contexts, Method, Prompt, Rollout


def scratch() -> str:
    """A directory for a run that nobody keeps: it goes away with the process."""
    directory = tempfile.mkdtemp(prefix="grpo_jax_bench_")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


def vowels(prompts, completions, **columns) -> list[float]:
    return [workload.vowel_share(text) for text in completions]


def experiment(
    asked: Namespace,
    shape: Shape,
    texts: list[str] | None = None,
    *,
    method: Method | None = None,
    beta: float = workload.BETA,
    changes: dict[str, Any] | None = None,
) -> Experiment:
    """A run of this shape. A micro-batch is one group, or what it takes for all prompts to be sampled in one launch.

    changes: dotted keys of the configuration; those among the runner's options (`--opt sampling.stop=[a]`) come on top.
    """
    texts = [p["text"] for p in workload.prompts(asked.model, shape)] if texts is None else texts
    directory = scratch()
    config: dict[str, Any] = {
        "directory": directory,
        "steps": workload.STEPS,
        "model": {"path": str(workload.path(asked.model)), "dtype": asked.dtype},
        "data": {"source": "memory", "max_prompt": shape.prompt, "shuffle": False},
        "batch": {
            "prompts": shape.prompts,
            "group_size": shape.group,
            "tokens_per_device": -(-shape.prompts // SAMPLING_TOKENS) * (shape.prompt + shape.group * shape.new),
        },
        "sampling": {"max_new": shape.new},
        "method": {"name": "grpo", "kl": beta},
        "optimizer": {"learning_rate": workload.LEARNING_RATE, "clip_norm": workload.CLIP_NORM},
        "metrics": {"console": False},
    }
    for key, value in (changes or {}).items():
        _set(config, key, value)
    file = Path(directory) / "bench.yaml"
    file.write_text(yaml.safe_dump(config))
    given = [f"{key}={value}" for key, value in asked.opt.items() if "." in key or key in ("steps", "seed")]
    prompts = [{"prompt": text} for text in texts]
    return Experiment(load_config(file, given), prompts=prompts, reward_functions=[vowels], method=method)


def unending(run: Experiment) -> LanguageModel:
    """The run's sampler, for completions that end with their budget only."""
    return dataclasses.replace(run.language, tokenizer=_Unending(run.model.tokenizer))


def prompts_of(run: Experiment, count: int) -> list[Prompt]:
    return list(run.pool)[:count]


def fixed_rows(model: str, shape: Shape) -> Rollout:
    """The workload's update batch as a scored rollout; its scores are the advantages."""
    ids, completions, given = workload.update_batch(model, shape)
    rows, (n, t) = np.arange(shape.rows, dtype=np.int32), completions.shape
    under = rows // shape.group
    return Rollout(
        contexts=Contexts(tokens=ids[:: shape.group], lengths=np.full(shape.prompts, shape.prompt, np.int32)),
        sampled_under=under,
        trained_under=under,
        completions=completions,
        lengths=np.full(n, t, np.int32),
        completion_mask=np.ones((n, t), bool),
        behavior_logps=np.zeros((n, t), np.float32),
        sampler_logps=np.zeros((n, t), np.float32),
        finished=np.ones(n, bool),
        temperature=np.ones(n, np.float32),
        prompt_ids=under,
        index=rows % shape.group,
        group_ids=under,
        weights=np.ones(n, np.float32),
        update_ids=np.full(n, -1, np.int32),
        scores=given[:, None],
        channels=("given",),
    )


def on_fixed_rows(rows: Rollout, shape: Shape, *, beta: float, separate_old: bool) -> Method:
    """Plain GRPO that trains on these rows in every step, with their scores as advantages.

    separate_old: its advantages ask for the old policy's log-probs, so that they get a pass of their own.
    """

    def plan(state, draw, key):
        return state.host, [rows]
        yield  # a plan is a generator; this one asks for nothing

    def advantage(batch, arrays, key):
        given = advantages.per_decision(batch.rewards[:, 0], batch.completion_mask)
        if separate_old:
            given = jnp.where(jnp.isfinite(batch.old.logps), given, 0.0)
        return batch.replace(advantages=given), arrays

    plain = grpo(
        prompts=shape.prompts, group_size=shape.group, clip_low=workload.CLIP, clip_high=workload.CLIP, kl=beta
    )
    return plain.replace(plan=plan, advantage=advantage)


def trained_records(run: Experiment) -> list[dict]:
    """What the run wrote down of every step: `time` is when its update had landed."""
    lines = (Path(run.config.directory) / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == "train"]


@dataclasses.dataclass(frozen=True)
class _Unending:
    tokenizer: Any
    stop_ids: tuple[int, ...] = ()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


def _set(config: dict[str, Any], key: str, value: Any) -> None:
    *sections, name = key.split(".")
    for section in sections:
        config = config.setdefault(section, {})
    config[name] = value
