"""What a run writes down of every step, and what it says aloud."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from grpo_jax.training.inspection import describe_batch
from grpo_jax.training.instruments import Clock, CompileCounter, memory
from grpo_jax.training.metrics import Metrics
from grpo_jax.types import Batch, Prompt

Reports = Sequence[Mapping[str, Any]]


@dataclass
class Recorder:
    """Gathers the batches and updates of a step; `write` turns them into one record, and warnings into notes."""

    writer: Metrics
    note: Callable[[str], None]
    clock: Clock
    compiled: CompileCounter
    truncated_limit: float
    exact: bool  # the sampler's log-probs should be those of training
    prompt: Callable[[int], Prompt]
    decode: Callable[[Any], str]
    batches: list[tuple[Batch, Reports]] = field(default_factory=list)
    warned: set[str] = field(default_factory=set)

    def __call__(self, batch: Batch, reports: Reports) -> None:
        """A batch, and what each of its updates reported."""
        self.batches.append((batch, reports))

    def write(
        self,
        step: int,
        learning_rate: float,
        failures: list[str],
        *,
        groups: bool,
        settled: bool,
        times: dict[str, float] | None = None,
    ) -> dict[str, float]:
        """The record of the step. groups: write a sampled group too. settled: nothing should be compiled any more.
        times: the seconds of the step, where they are not those since the last record."""
        numbers: dict[str, float] = {}
        for batch, reports in self.batches:
            described, named = describe_batch(batch)
            names = {name for report in reports for name in report}
            updates = {name: float(np.mean([r[name] for r in reports if name in r])) for name in sorted(names)}
            prefix = "" if batch.role == "policy" else f"{batch.role}/"
            numbers |= {prefix + name: value for name, value in (described | updates).items()}
            self._warn(step, described | updates, named)
            if groups and not prefix:
                self.writer.samples(step, [self.group(batch)])
        if not self.batches:
            self.note(f"step {step}: the method trained on nothing")
        self.batches.clear()
        for failure in failures:
            self.note(f"step {step}: {failure}")
        compiled = self.compiled.lap()
        if settled and compiled.count:
            names = ", ".join(name.removeprefix("jit(").removesuffix(")") for name in compiled.names)
            why = "; ".join(compiled.causes) or "the same shapes, placed otherwise"
            self.note(f"step {step}: recompiled {names} in {compiled.seconds:.1f} s ({why})")
        times = self.clock.lap() if times is None else times
        tokens = numbers.get("length_mean", 0.0) * numbers.get("rows", 0.0)
        for name, section in (("tokens_sampled_per_s", "seconds/sample"), ("tokens_trained_per_s", "seconds/update")):
            if times.get(section):
                numbers[name] = tokens / times[section]
        numbers |= times | memory() | {"learning_rate": learning_rate, "compilations": float(compiled.count)}
        self.writer.log(step, numbers)
        return numbers

    def group(self, batch: Batch) -> dict[str, Any]:
        """The batch's first group that carries signal (or its first), for people."""
        names = ("group_ids", "prompt_ids", "completions", "lengths", "scores", "advantages")
        ids, prompts, completions, lengths, scores, advantages = jax.device_get([getattr(batch, n) for n in names])
        groups = np.unique(ids[ids >= 0])
        spread = [g for g in groups if np.ptp(np.nan_to_num(scores[ids == g]), axis=0).any()]
        rows = np.flatnonzero(ids == ([*spread, *groups, -1])[0])
        prompt = self.prompt(int(prompts[rows[0]]))
        return {
            "prompt": prompt.text,
            "prompt_id": prompt.id,
            "completions": [self.decode(completions[r][: lengths[r]]) for r in rows],
            "rewards": {channel: scores[rows, k].tolist() for k, channel in enumerate(batch.channels)},
            "advantages": advantages[rows, 0].tolist(),
            "lengths": lengths[rows].tolist(),
        }

    def _warn(self, step: int, described: Mapping[str, float], named: Mapping[str, list[int]]) -> None:
        """Say aloud what the record shows in every step, the first time that it happens."""
        warnings = {}
        if described.get("no_signal") == 1.0:
            ids = ", ".join(map(str, named["no_signal"][:4]))
            warnings["no_signal"] = f"no group carries signal: all completions of each prompt score alike ({ids}, …)"
        if described["truncated"] > self.truncated_limit:
            share = f"{described['truncated']:.0%}"
            warnings["truncated"] = f"{share} of the completions were cut off at sampling.max_new"
        if self.exact and described.get("gap_max"):
            warnings["gap_max"] = (
                f"model.exact is on, but log-probs of sampling and of training differ by {described['gap_max']:.1g}: "
                "on this backend arithmetic depends on shapes all the same"
            )
        for kind in warnings.keys() - self.warned:
            self.warned.add(kind)
            self.note(f"step {step}: {warnings[kind]} (said once; {kind} in metrics.jsonl has every step)")
