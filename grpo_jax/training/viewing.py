"""Looking at a run: held-out numbers, a group of completions, curves, and the policy as a directory of its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from grpo_jax import models, processes
from grpo_jax.advantages import group_z_score
from grpo_jax.rewards.extraction import marked_answer
from grpo_jax.training import assemble, progress
from grpo_jax.training.configuration import Config
from grpo_jax.training.evaluation import Evaluation, evaluate_prompts
from grpo_jax.training.keys import fold
from grpo_jax.training.loop import Run
from grpo_jax.training.report import figure
from grpo_jax.training.step import Policy
from grpo_jax.types import Domain, Prompt, Request, Rollout

if TYPE_CHECKING:
    from grpo_jax.training.checkpoints import Checkpoints


class Viewed:
    """What can be seen of a policy, trained or not. Of several processes all make the same calls."""

    config: Config
    directory: Path
    checkpoints: Checkpoints
    model: assemble.Model
    domain: Domain
    pool: Any
    held_out: list[Prompt]
    verify: Callable[..., Rollout]
    run: Run | None

    @processes.together()
    def evaluate(self, prompts: Sequence[Prompt] | None = None) -> Evaluation:
        """Held-out numbers of the current policy: greedy, pass@1, unbiased pass@k, maj@k."""
        section = self.config.evaluation
        prompts = self.held_out if prompts is None else prompts
        if not prompts:
            raise ValueError("there are no held-out prompts: set evaluation.source")
        return evaluate_prompts(
            self.domain,
            self._params(),
            prompts,
            self.verify,
            fold(self.config.seed, "evaluation"),
            samples=section.samples,
            k=section.k,
            greedy=section.greedy,
            channel=section.channel,
            extract=lambda text: marked_answer(text) or text.strip(),
            step=self.run.state.step if self.run else 0,
        )

    @processes.together()
    def sample(
        self,
        prompt: Prompt | str | Sequence[Mapping[str, str]],
        *,
        count: int | None = None,
        seed: int = 0,
        **options: Any,
    ) -> Rollout:
        """A group of completions of the current policy; `language.text(rollout)` is their text."""
        prompt = prompt if isinstance(prompt, Prompt) else Prompt(0, prompt)
        temperature = options.pop("temperature", None)
        asked = [
            Request(
                prompt,
                count=self.config.batch.group_size if count is None else count,
                temperature=temperature,
                options=options,
            )
        ]
        return self.domain.sample(self._params(), asked, fold(seed, "sample"))

    def group(self, prompt: Prompt | None = None) -> None:
        """Print a group of completions with their rewards and advantages."""
        prompt = prompt or (self.held_out or list(self.pool))[0]
        rows = self.sample(prompt)
        texts = self.domain.text(rows)
        rows = self.verify([prompt] * len(rows), rows, texts, self.run.state.step if self.run else 0)
        advantages = np.asarray(group_z_score(rows.score(), rows.group_ids))
        if processes.index() == 0:
            scores = {c: rows.score(c).tolist() for c in rows.channels}
            progress.group_table(prompt.text, texts, scores, advantages.tolist())

    def plot(self) -> Any:
        """The run's curves, as a matplotlib figure."""
        return figure(self.directory)

    @processes.together()
    def export(self, path: str | os.PathLike) -> None:
        """Write the current policy as a Hugging Face directory."""
        source = self.config.model.path if Path(self.config.model.path).is_dir() else None
        models.export(path, self.model.config, self._params()["policy"], source=source, tokenizer=self.model.tokenizer)

    @processes.together()
    def restore_params(self, step: int | None = None) -> int:
        """Only the policy's parameters from a checkpoint (default: the best, else the newest), for looking at it."""
        kept = (step, self.checkpoints.best(), self.checkpoints.latest())
        step = next((s for s in kept if s is not None), None)
        if step is None:
            raise FileNotFoundError(f"there is no checkpoint in {self.checkpoints.directory}: train first")
        arrays, _ = self.checkpoints.restore(step, {"policies": {"policy": Policy(self.model.params)}}, partial=True)
        self.model, self.run = self.model._replace(params=arrays["policies"]["policy"].params), None
        return step

    def _params(self) -> dict[str, Any]:
        return self.run.params if self.run else {"policy": self.model.params}
