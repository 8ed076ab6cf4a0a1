"""The arrays that flow: contexts, rollouts, batches, decisions.

Frozen pytree dataclasses. Symbols: N rows (completions), T decisions (tokens, for a language model), C contexts,
P context tokens, K reward channels. Everything is left-aligned; ids are int32, statistics float32, masks bool.
On the host the arrays are numpy, on the mesh they are JAX arrays; the types are the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

PyTree = Any
Key = Array
Host = Any  # JSON values, numpy arrays and Rollouts, nested in dicts and lists
Message = Mapping[str, str]
T = TypeVar("T")


@dataclass_transform(frozen_default=True, kw_only_default=True)
def _pytree(*static: str) -> Callable[[type[T]], type[T]]:
    """Make a class a frozen dataclass and a pytree; the named fields are static."""

    def register(cls: type[T]) -> type[T]:
        cls = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
        names = [field.name for field in dataclasses.fields(cls)]
        jax.tree_util.register_dataclass(
            cls,
            data_fields=[n for n in names if n not in static],
            meta_fields=[n for n in names if n in static],
        )
        return cls

    return register


class _Replace:
    def replace(self: T, **changes: Any) -> T:
        return dataclasses.replace(self, **changes)


@_pytree()
class Contexts(_Replace):
    """What completions are conditioned on, each stored once."""

    tokens: Int[Array, "C P"]
    lengths: Int[Array, " C"]  # 0 = padding
    extras: dict[str, Array] = dataclasses.field(default_factory=dict)  # [C, ...]: pixels, past frames, start latents


@_pytree()
class Decisions(_Replace):
    """What one policy says of every decision of a batch."""

    logps: Float[Array, "N T"]
    stats: dict[str, Array] = dataclasses.field(default_factory=dict)  # only what Method.wants: "entropy", ...


@_pytree("role", "channels", "channel_weights")
class Rollout(_Replace):
    """Rows of one policy: what sampling returns (on the host, numpy).

    Three facts, three arrays: `lengths` says which decisions exist and are attended to, `completion_mask` which are
    trained, NaN in `behavior_logps` which were not drawn by the policy. Two more: `group_ids` -1 is in no statistic,
    and `weights` says how much a row counts (0: no gradient; c: c times, in denominators too).
    """

    contexts: Contexts
    sampled_under: Int[Array, " N"]  # the context it was drawn under
    trained_under: Int[Array, " N"]  # the context of the gradient and of the reference
    completions: Int[Array, "N T"]
    lengths: Int[Array, " N"]  # stop token included
    completion_mask: Bool[Array, "N T"]
    behavior_logps: Float[Array, "N T"]  # under the distribution really drawn from; NaN where nothing was drawn
    sampler_logps: Float[Array, "N T"]  # the untruncated policy at `temperature`, for every existing decision
    finished: Bool[Array, " N"]  # ended by a stop, not by its budget
    temperature: Float[Array, " N"]  # old, new and reference are taken at it (1 for given and greedy rows)
    prompt_ids: Int[Array, " N"]  # row number in the dataset; -1 = padding row
    index: Int[Array, " N"]  # running number per (role, prompt) within the step
    group_ids: Int[Array, " N"]  # who is compared with whom, in [0, N); -1 = nobody
    weights: Float[Array, " N"]
    update_ids: Int[Array, " N"]  # which optimiser step, ascending; -1 = the trainer deals whole groups
    unit_ids: Int[Array, "N T"] | None = None  # which decisions share a ratio; None = each its own
    scores: Float[Array, "N K"]  # what the reward functions said; NaN = does not apply; K = 0: not asked yet
    columns: dict[str, Array] = dataclasses.field(default_factory=dict)  # numeric dataset columns, labels, spans
    role: str = "policy"
    channels: tuple[str, ...] = ()
    channel_weights: tuple[float, ...] = ()  # how much each channel counts when channels are added up

    def __len__(self) -> int:
        return self.prompt_ids.shape[0]

    @property
    def exists(self) -> Bool[Array, "N T"]:
        """Decisions that are part of the trajectory."""
        return jnp.arange(self.completions.shape[1]) < self.lengths[:, None]

    @property
    def injected(self) -> Bool[Array, " N"]:
        """Rows in which no trained decision was drawn by the policy."""
        return ~jnp.any(self.completion_mask & ~jnp.isnan(self.behavior_logps), axis=1)

    # The rest is for `plan`: host only, numpy.

    def score(self, channel: str | None = None) -> np.ndarray:
        """Scores of one channel, or the weighted sum over all that apply. [N]; NaN where nothing applies."""
        if channel is None:
            scores = np.asarray(self.scores)
            total = np.nansum(scores * np.asarray(self.channel_weights or 1.0), axis=1)
            return np.where(np.isnan(scores).all(axis=1), np.nan, total)
        if channel not in self.channels:
            raise KeyError(f"no reward channel {channel!r}; this rollout has {list(self.channels)}")
        return np.asarray(self.scores)[:, self.channels.index(channel)]

    def take(self, rows: Sequence[int] | np.ndarray) -> Rollout:
        """The rows of that order, or where a mask is True. Group ids are renumbered from 0; contexts that no row points
        to are dropped."""
        rows = np.asarray(rows)
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows.astype(np.int64)
        used, under = np.unique(
            np.concatenate([self.sampled_under[rows], self.trained_under[rows]]), return_inverse=True
        )
        n, contexts = len(rows), self.contexts
        pick = {
            f.name: jax.tree.map(lambda x: np.asarray(x)[rows], getattr(self, f.name))
            for f in dataclasses.fields(self)
            if f.name not in ("contexts", "sampled_under", "trained_under", "role", "channels", "channel_weights")
        }
        pick["group_ids"] = renumber(pick["group_ids"])
        return self.replace(
            **pick,
            contexts=jax.tree.map(lambda x: np.asarray(x)[used], contexts),
            sampled_under=under[:n].astype(np.int32),
            trained_under=under[n:].astype(np.int32),
        )

    def groups(self) -> list[Rollout]:
        """One rollout per group, in the order of their first rows; rows with group id -1 are in none."""
        ids = np.asarray(self.group_ids)
        order = dict.fromkeys(int(g) for g in ids if g >= 0)
        return [self.take(np.flatnonzero(ids == g)) for g in order]

    def rows(self) -> list[Rollout]:
        """One rollout of a single row per row."""
        return [self.take([i]) for i in range(len(self))]

    def of(self, prompt: Prompt | int) -> Rollout:
        """The rows of one prompt."""
        wanted = prompt if isinstance(prompt, (int, np.integer)) else prompt.id
        return self.take(np.flatnonzero(np.asarray(self.prompt_ids) == wanted))

    def with_columns(self, **columns: Any) -> Rollout:
        """Add columns: an array [N, ...], one number for all rows, or a dict from prompt id to value.

        Raises: ValueError for an array of another length, or a dict that lacks one of the prompts.
        """

        def spread(name: str, value: Any) -> np.ndarray:
            if isinstance(value, Mapping):
                if missing := sorted({int(p) for p in self.prompt_ids} - set(value)):
                    raise ValueError(f"column {name!r} has no value for the prompts {missing}")
                value = [value[int(p)] for p in self.prompt_ids]
            value = np.asarray(value)
            if value.ndim and len(value) != len(self):
                raise ValueError(f"column {name!r} needs one value for each of {len(self)} rows, got {len(value)}")
            return value if value.ndim else np.full(len(self), value)

        return self.replace(columns={**self.columns, **{k: spread(k, v) for k, v in columns.items()}})


@_pytree("role", "channels", "channel_weights")
class Batch(Rollout):
    """A rollout on the mesh, filled from top to bottom during an iteration."""

    old: Decisions | None = None  # the policy at the start of the update, under `sampled_under`
    ref: Decisions | None = None  # role "reference", under `trained_under`
    rewards: Float[Array, "N K"] | None = None
    advantages: Float[Array, "N T"] | None = None


def renumber(ids: np.ndarray) -> np.ndarray:
    """The same partition with ids 0, 1, 2, … in order of first appearance; -1 stays. Host only."""
    ids = np.asarray(ids)
    _, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
    negative = ids[first] < 0
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(np.where(negative, len(ids), first), kind="stable")] = np.arange(len(first))
    return np.where(ids < 0, -1, rank[inverse]).astype(np.int32)


def concat(*rollouts: Rollout) -> Rollout:
    """Rows of several rollouts of one role as one. Groups stay apart (`regroup` joins them); equal contexts are stored
    once; the decision axis and the context axis are padded to the longest. Host only.

    Raises: ValueError if there are none, or if their roles or channels differ; TypeError for a Batch.
    """
    if not rollouts:
        raise ValueError("concat needs at least one rollout, got none")
    if any(isinstance(r, Batch) for r in rollouts):
        raise TypeError("concat joins rollouts before they become batches, got a Batch")
    first = rollouts[0]
    for other in rollouts[1:]:
        for what in ("role", "channels"):
            if getattr(other, what) != getattr(first, what):
                given = f"{getattr(first, what)!r} and {getattr(other, what)!r}"
                raise ValueError(f"concat needs rollouts of the same {what}, got {given}")
    width = max(r.completions.shape[1] for r in rollouts)

    def joined(name: str) -> np.ndarray:
        return np.concatenate([np.asarray(getattr(r, name)) for r in rollouts])

    def widened(parts: Sequence[Any], fill: Any = 0) -> np.ndarray:
        return np.concatenate([_pad_axis(np.asarray(p), 1, width, fill) for p in parts])

    def column(name: str) -> np.ndarray:
        shape = next(np.asarray(r.columns[name]).shape[1:] for r in rollouts if name in r.columns)
        missing = lambda r: np.full((len(r), *shape), np.nan, np.float32)  # noqa: E731
        parts = [np.asarray(r.columns[name]) if name in r.columns else missing(r) for r in rollouts]
        per_decision = all(p.shape[1:2] == r.completions.shape[1:2] for p, r in zip(parts, rollouts))
        return widened(parts) if per_decision else np.concatenate(parts)

    contexts, (sampled, trained) = _join_contexts(rollouts)
    offsets = np.cumsum([0] + [len(r) for r in rollouts[:-1]])
    groups = [np.where(np.asarray(r.group_ids) < 0, -1, np.asarray(r.group_ids) + o) for r, o in zip(rollouts, offsets)]
    units = None
    if any(r.unit_ids is not None for r in rollouts):
        own = np.arange(width, dtype=np.int32)
        parts = [np.broadcast_to(own, (len(r), width)) if r.unit_ids is None else r.unit_ids for r in rollouts]
        units = widened(parts, -1)
    names = ("lengths", "finished", "temperature", "prompt_ids", "index", "weights", "update_ids", "scores")
    return first.replace(
        contexts=contexts,
        sampled_under=sampled,
        trained_under=trained,
        completions=widened([r.completions for r in rollouts]),
        completion_mask=widened([r.completion_mask for r in rollouts], False),
        behavior_logps=widened([r.behavior_logps for r in rollouts], np.nan),
        sampler_logps=widened([r.sampler_logps for r in rollouts]),
        group_ids=renumber(np.concatenate(groups)),
        unit_ids=units,
        columns={name: column(name) for name in dict.fromkeys(name for r in rollouts for name in r.columns)},
        **{name: joined(name) for name in names},
    )


def regroup(rollout: Rollout, *, by: str = "prompt_ids") -> Rollout:
    """Compare all rows with the same value of a field or column with each other. Host only.

    Raises: ValueError if there is no field or column [N] of that name.
    """
    ids = rollout.columns[by] if by in rollout.columns else getattr(rollout, by, None)
    if np.shape(ids) != (len(rollout),):
        raise ValueError(
            f"regroup needs a field or column with one value per row, and {by!r} is none; "
            f"columns: {sorted(rollout.columns)}"
        )
    return rollout.replace(group_ids=renumber(np.unique(np.asarray(ids), return_inverse=True)[1]))


def _pad_axis(x: np.ndarray, axis: int, size: int, fill: Any) -> np.ndarray:
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, size - x.shape[axis])
    return np.pad(x, pad, constant_values=fill)


def _join_contexts(rollouts: Sequence[Rollout]) -> tuple[Contexts, tuple[np.ndarray, np.ndarray]]:
    """All contexts once, and both pointers of every row into them."""
    width = max(r.contexts.tokens.shape[1] for r in rollouts)
    tokens = np.concatenate([_pad_axis(np.asarray(r.contexts.tokens), 1, width, 0) for r in rollouts])
    lengths = np.concatenate([np.asarray(r.contexts.lengths) for r in rollouts])
    offsets = np.cumsum([0] + [len(r.contexts.lengths) for r in rollouts[:-1]])
    sampled, trained = (
        np.concatenate([np.asarray(getattr(r, name)) + o for r, o in zip(rollouts, offsets)])
        for name in ("sampled_under", "trained_under")
    )
    names = rollouts[0].contexts.extras
    if names:  # contexts with more than tokens are not compared
        extras = {k: np.concatenate([np.asarray(r.contexts.extras[k]) for r in rollouts]) for k in names}
        contexts = Contexts(tokens=tokens, lengths=lengths, extras=extras)
        return contexts, (sampled.astype(np.int32), trained.astype(np.int32))
    keyed = np.concatenate([lengths[:, None], np.where(np.arange(width) < lengths[:, None], tokens, 0)], axis=1)
    _, first, inverse = np.unique(keyed, axis=0, return_index=True, return_inverse=True)
    order = np.argsort(first)
    place = np.argsort(order)[inverse.reshape(-1)]
    kept = first[order]
    return Contexts(tokens=tokens[kept], lengths=lengths[kept]), (
        place[sampled].astype(np.int32),
        place[trained].astype(np.int32),
    )


# ---------------------------------------------------------------------------------------------------------------------
# The host side


class Prompt(NamedTuple):
    """A row of the dataset: its number (stable across epochs and restarts), its text or chat, its other columns."""

    id: int
    text: str | Sequence[Message]
    columns: Mapping[str, Any] = {}


@dataclasses.dataclass(frozen=True)
class Request:
    """`count` rows for one prompt.

    `context` is what they are sampled under (default: the prompt), `train_context` what they are trained under
    (default: `context`). `prefix` holds decisions that are already there, with their behaviour log-probs (NaN = given,
    not drawn), or, as text, given ones; given decisions are trained only with `train_given`. `max_new` is how many are
    drawn after them (None: the configured budget; 0: nothing, the row is only injected or scored, and a text prefix
    is whole: the first stop token follows it). `temperature` None: the configured one; 1 where nothing was drawn.
    """

    prompt: Prompt
    count: int = 1
    role: str = "policy"
    context: str | Sequence[Message] | np.ndarray | None = None
    train_context: str | Sequence[Message] | np.ndarray | None = None
    prefix: str | tuple[np.ndarray, np.ndarray] | None = None
    train_given: bool = False
    max_new: int | None = None
    temperature: float | None = None
    stop: tuple[str, ...] = ()
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # top_k, top_p, min_p, min_new


Plan = Generator["list[Request] | Rollout", "Rollout", "tuple[Host, list[Rollout]]"]


class State(NamedTuple):
    """Where a method stands: `arrays` enter jit (fixed shapes), `host` stays outside. Both are checkpointed."""

    step: int
    arrays: PyTree
    host: Host


class Role(NamedTuple):
    """A further policy of a method: where it starts ("policy": a copy, or a path), whether it is trained, and whether
    it follows the policy: (rate, every) moves it by `rate` towards the policy every `every` steps."""

    start: str = "policy"
    train: bool = False
    follow: tuple[float, int] | None = None


class Scored(NamedTuple):
    """Several named channels, and columns for later seams, from one reward function."""

    channels: Mapping[str, Any]
    columns: Mapping[str, Any] = {}


RewardFn = Callable[..., "list[float | None] | Scored"]


class Method(NamedTuple):
    """The seams of an iteration. Plain GRPO answers them all; a method is `replace(grpo(...), plan=..., ...)`."""

    init: Callable[[Any], State]  # (pool): host, once; no sampling
    select: Callable[..., list[Prompt]]  # (state, pool, n, key): host; which prompts next
    plan: Callable[..., Plan]  # (state, draw, key): host, every process the same; draw(state, n) gives prompts
    reward: Callable[..., Array]  # (batch, arrays, key) -> rewards [N, K]; jit, global
    # (batch, arrays, key): jit, global; may edit weights, groups, masks, units
    advantage: Callable[..., tuple[Batch, PyTree]]
    # (new, batch, arrays) -> loss [N, T] or [], metrics [N, T]; jit, under grad
    objective: Callable[..., tuple[Array, dict[str, Array]]]
    aggregate: Callable[[Batch], Array]  # (batch) -> weights [N, T]; jit, data only, over one mini-batch
    roles: Mapping[str, Role] = {}
    rewards: tuple[RewardFn, ...] = ()
    wants: tuple[str, ...] = ()  # statistics of every decision that the seams read: "entropy"
    group_size: int = 1  # completions that `plan` usually asks for per prompt; only the sampler's shape depends on it

    def replace(self, **changes: Any) -> Method:
        return self._replace(**changes)


class Domain(NamedTuple):
    """A policy domain, for instance language models: two functions and nothing in the loop.
    sample(params by role, requests, key, numbers) -> Rollout, on the host. `numbers` counts the rows drawn so far in
    this step per (role, prompt); it is where `index` goes on.
    evaluate(params, batch, role, wants) -> Decisions, in jit. Rows lie in C equal runs, run c under context c:
    `batch.contexts` holds as many contexts as there are runs, so no key or value is ever gathered per row.
    text(rollout) -> what the reward functions read, one completion per row, on the host.
    For iterations as one program: prepare(requests, numbers) -> (rollout, launches), on the host, with nothing drawn;
    draw(params by role, batch, launches, key) -> the batch with its decisions, in jit, as `sample` draws them.
    """

    sample: Callable[..., Rollout]
    evaluate: Callable[..., Decisions]
    text: Callable[[Rollout], list[str]]
    prepare: Callable[..., tuple[Rollout, PyTree]] | None = None
    draw: Callable[..., Batch] | None = None
