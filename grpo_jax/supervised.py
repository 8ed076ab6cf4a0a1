"""The supervised warm-up: the same iteration with the method `sft`, before the first rollout."""

from __future__ import annotations

from typing import Any

import numpy as np

from grpo_jax import methods
from grpo_jax.training import assemble
from grpo_jax.training.configuration import Config
from grpo_jax.training.loop import Run, iterate
from grpo_jax.training.metrics import Metrics
from grpo_jax.training.optimizer import optimizer
from grpo_jax.training.progress import Progress
from grpo_jax.training.step import begin
from grpo_jax.types import Domain, PyTree


def warm_up(
    config: Config, model: assemble.Model, domain: Domain, source: Any, writer: Metrics, *, console: bool
) -> PyTree:
    """The policy's parameters after `config.warmup.steps` updates on the completions of `source`.

    The model's own parameters are given up to it. Files are shuffled; rows that a function makes have an order.
    """
    section = config.warmup
    pool = assemble.open_pool(
        config, source, model.tokenizer, shuffle=not isinstance(source, list) or isinstance(source[0], str)
    )
    method = methods.resolve("sft", options={}, settings={"prompts": section.prompts})
    transform, _ = optimizer(section.optimizer, section.steps)
    seen: list[dict[str, float]] = []
    run = Run(
        method=method,
        domain=domain,
        pool=pool,
        verify=lambda prompts, rows, texts, step: rows.replace(
            channels=("none",), scores=np.ones((len(rows), 1), np.float32)
        ),
        optimizer=transform,
        mesh=model.mesh,
        layout=assemble.layout_of(config, model.mesh, group_size=1, prompts=section.prompts),
        policies={"policy": begin(model.params, transform, model.mesh)},
        state=method.init(pool),
        seed=config.seed,
        log=lambda batch, reports: seen.append(reports[0]),
    )
    with Progress(section.steps, "warm-up", enabled=console) as bar:
        for step in range(section.steps):
            iterate(run)
            numbers = {name: float(seen[-1][name]) for name in ("loss", "grad_norm", "entropy")}
            writer.log(step, numbers, kind="warmup")
            bar.update(step + 1, loss=numbers["loss"])
            seen.clear()
    return run.policies["policy"].params
