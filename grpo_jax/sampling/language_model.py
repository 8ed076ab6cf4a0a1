"""Language models as a policy domain: requests in, rollouts out; and log-probs of a batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from grpo_jax.models import evaluate
from grpo_jax.models.folding import COLUMNS, FOLDS, columns_at_first
from grpo_jax.models.sharding import sharding, ways
from grpo_jax.processes import fetch, place
from grpo_jax.sampling import traced
from grpo_jax.sampling.compaction import can_fold
from grpo_jax.sampling.decoding import Cells, Drawn, draw, grids_of
from grpo_jax.sampling.requests import Rows, bucket, cells_of, expand, pack, rollout_of
from grpo_jax.sampling.unfinished import SoFar
from grpo_jax.sampling.weights import Arrangement, cast, prepared
from grpo_jax.types import Batch, Decisions, Domain, Key, Prompt, PyTree, Request, Rollout


class Launch(NamedTuple):
    """The size of a launch of the sampler, how many of them usual rows take, and its static options."""

    context_width: int
    decisions: int
    width: int
    slots: int
    usually: int
    options: dict[str, Any]

    def places(self, rows: Rows) -> list[np.ndarray]:
        """Which rows every launch draws."""
        return pack(rows, width=self.width, slots=self.slots)

    def cells(self, rows: Rows, places: np.ndarray) -> Cells:
        return cells_of(rows, places, context_width=self.context_width, decisions=self.decisions)


@dataclass(frozen=True)
class LanguageModel:
    """What sampling and evaluation of language models need to know besides the parameters.

    graphdefs: the model's structure by role ("policy" serves the roles that have none of their own).
    tokens: context and completion tokens that one launch of the sampler may hold on one device.
    cells: contexts per launch and rows per context that a run usually asks for; None: as each call asks.
    """

    graphdefs: Mapping[str, Any]
    tokenizer: Any
    mesh: Mesh
    max_prompt: int
    max_new: int
    tokens: int
    cells: tuple[int, int] | None = None
    temperature: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)  # top_k, top_p, min_p, min_new
    stop: tuple[str, ...] = ()
    compute_dtype: Any = None  # None: the parameters' own
    remat: bool | None = None
    arrangement: Arrangement = Arrangement()  # where the weights lie while completions are drawn

    def domain(self) -> Domain:
        return Domain(
            sample=self.sample,
            evaluate=self.evaluate,
            text=self.text,
            prepare=partial(traced.prepare, self),
            draw=partial(traced.draw_rows, self),
        )

    @property
    def shards(self) -> int:
        """Into how many parts the mesh cuts the sampler's contexts."""
        return ways("cells", self.mesh)

    def on_mesh(self) -> Any:
        """What a model's programs are traced in: it says where activations lie, and which kernels there are."""
        return jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh)

    def graphdef(self, role: str) -> Any:
        return self.graphdefs.get(role, self.graphdefs["policy"])

    def sample(
        self, params: Mapping[str, PyTree], requests: Sequence[Request], key: Key, numbers: Counter | None = None
    ) -> Rollout:
        """Draw every row that the requests ask for. Requests of one role; each request is a group of its own.

        A completion depends on (weights, key, prompt id, index) alone. Equal shapes are compiled once: contexts and
        completions are padded to a few sizes, and any number of requests streams through a fixed number of cells.
        Raises: ValueError if the requests are of several roles or ask for what cannot be.
        """
        roles = {r.role for r in requests}
        if len(roles) != 1:
            raise ValueError(f"one call of sample serves one role, got requests of {sorted(roles) or 'no role at all'}")
        (role,) = roles
        rows = self.rows_of(requests, Counter() if numbers is None else numbers)
        only_given = (rows.budget == rows.given_lengths).all()
        if only_given and not rows.options["score"].any():
            return rollout_of(rows, None, role=role)
        role_key, weights = traced.key_of(role, key), self.weights(params, role)
        so_far = SoFar(rows)
        for launch in self.launches(rows):
            which, places, cells = self._asked(so_far, launch)
            with self.on_mesh():  # all are dispatched before the first is read
                results = [draw(self.graphdef(role), weights, each, role_key, **launch.options) for each in cells]
            so_far = so_far.and_of(which, self._gather(results, places, rows.given.shape[1]))
        return rollout_of(rows, so_far.drawn, role=role)

    def traced_for(self, params: Mapping[str, PyTree], requests: Sequence[Request], key: Key) -> None:
        """Trace the sampler for such requests: Python does one thing at a time, so this comes before all that can wait.

        `sample` then finds it, and compiles it.
        """
        (role,) = {r.role for r in requests}
        rows = self.rows_of(requests, Counter())
        launch = self.launches(rows)[0]
        _, _, cells = self._asked(SoFar(rows), launch)
        role_key, weights = traced.key_of(role, key), self.weights(params, role)
        with self.on_mesh():
            draw.lower(self.graphdef(role), weights, next(cells), role_key, **launch.options)

    def launches(self, rows: Rows) -> list[Launch]:
        """The launches of the sampler that draw these rows, each as often as it takes.

        Where one does not hold all usual rows at full length, there is one that begins with a quarter of the columns,
        and the more rows: most finish early and make room for the others. A second goes on with what found none.
        """
        whole = self.launch(rows)
        decisions, has_given = whole.decisions, whole.options["has_given"]
        if has_given or decisions < FOLDS * COLUMNS or whole.usually == 1:
            return [whole]
        wide = [self.launch(rows, folds=FOLDS, multiple=n) for n in (FOLDS, 1)]
        with self.on_mesh():
            able = [x for x in wide if can_fold(grids_of(x.slots, x.width, decisions, x.context_width, self.shards))]
        best = min([*able, whole], key=lambda x: (x.usually, x.slots))
        return [whole] if best is whole else [best, self.launch(rows, has_given=True)]

    def launch(self, rows: Rows, *, has_given: bool = False, folds: int = 1, multiple: int = 1) -> Launch:
        """The sampler for rows like these, with room for all their columns or, folded, for a quarter."""
        context_width = max(bucket(self.max_prompt), bucket(rows.contexts.tokens.shape[1]))
        asked, has_given = rows.given.shape[1], has_given or bool(rows.given_lengths.any())
        decisions = self.max_new if asked <= self.max_new else bucket(asked)  # the next bucket for prefixes beyond it
        columns = columns_at_first(decisions, folds)
        size = self._cells(rows, context_width, columns, multiple=self.shards * multiple)
        options = {"restricts": rows.restricts, "has_given": has_given, "shards": self.shards, "folds": folds}
        return Launch(context_width, decisions, *size, options)

    def _asked(self, so_far: SoFar, launch: Launch) -> tuple[np.ndarray, list[np.ndarray], Iterator[Cells]]:
        """The rows that are left, their places among these in every launch, and its cells on the mesh.

        Where none is left, one launch of empty cells: a later call then finds the program compiled.
        """
        which = so_far.left()
        rows = so_far.asked(which if len(which) else np.zeros(1, int))
        places = launch.places(rows) if len(which) else [np.full((launch.slots, launch.width), -1)]
        return which, places, (self._place(launch.cells(rows, place)) for place in places)

    def weights(self, params: Mapping[str, PyTree], role: str) -> PyTree:
        """What a role's completions are drawn with."""
        return prepared(self.arrangement, self.compute_dtype)(params.get(role, params["policy"]))

    def rows_of(self, requests: Sequence[Request], numbers: Counter) -> Rows:
        """The rows that the requests ask for, before any is drawn."""
        return expand(
            requests,
            encode=self.tokenizer.encode_prompt,
            encode_text=self.tokenizer.encode,
            stop_ids=self.tokenizer.stop_ids,
            defaults={
                "max_new": self.max_new,
                "temperature": self.temperature,
                "stop": self.stop,
                **self.options,
            },
            numbers=numbers,
        )

    def evaluate(self, params: PyTree, batch: Batch, role: str, wants: Sequence[str] = ()) -> Decisions:
        """log-probs of a batch whose rows lie in equal runs under its contexts. In jit."""
        weights = cast(params, self.compute_dtype)
        with self.on_mesh():
            return evaluate(self.graphdef(role), weights, batch, wants=wants, remat=self.remat)

    def text(self, rollout: Rollout) -> list[str]:
        """Completions as text, without stop tokens and other specials."""
        return [self.tokenizer.decode(ids[:n]) for ids, n in zip(np.asarray(rollout.completions), rollout.lengths)]

    def prompt_length(self, prompt: Prompt) -> int:
        return len(self.tokenizer.encode_prompt(prompt.text))

    def _cells(self, rows: Rows, context_width: int, decisions: int, *, multiple: int) -> tuple[int, int, int]:
        """Rows per context and contexts per launch, and launches for as many rows as usual.

        The usual cells where there are any and the rows fill more than a quarter of them, so that whatever is asked for
        streams through one program; otherwise what is asked for, with less than a fifth of padding. Never more than the
        budget of tokens allows, and as many contexts as some multiple says.
        """
        counts = np.unique(rows.sampled_under, return_counts=True)[1]
        contexts, width = self.cells or (0, int(np.median(counts)))
        if counts.max() == 1:
            contexts, width = contexts * width, 1
        asked, width = width, max(1, min(width, (self.tokens - context_width) // decisions))
        per_launch = self.tokens // (context_width + width * decisions) * self.shards
        needed = int(sum(-(-n // width) for n in counts))
        if needed <= contexts / 4 or not contexts:
            step = max(1, 2 ** (needed.bit_length() - 3))
            usual = contexts = -(-needed // step) * step
        else:
            usual = contexts * -(-asked // width)
        slots = max(multiple, min(per_launch // multiple * multiple, -(-contexts // multiple) * multiple))
        return width, slots, -(-usual // slots)

    def _place(self, cells: Cells) -> Cells:
        if self.mesh.size == 1:
            return cells
        rows, everywhere = sharding("cells", self.mesh), sharding("", self.mesh)
        return Cells(*(place(x, everywhere if name == "stops" else rows) for name, x in cells._asdict().items()))

    def _gather(self, results: list[Drawn], launches: list[np.ndarray], width: int) -> Drawn:
        order = np.concatenate([launch.reshape(-1) for launch in launches])
        back = np.argsort(order, kind="stable")[(order < 0).sum() :]
        flat = []
        for parts in zip(*fetch(results)):
            values = np.concatenate([p.reshape(-1, *p.shape[2:]) for p in parts])[back]
            flat.append(values[:, :width] if values.ndim == 2 else values)
        return Drawn(*flat)
