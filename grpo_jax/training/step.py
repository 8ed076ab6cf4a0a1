"""One optimiser step: both forms of loss, micro-batches, and the numbers to look at.

A loss [N, T] is summed with weights that depend on data alone, so it may be cut into micro-batches anywhere. A scalar
loss sees the whole mini-batch: its cotangent with respect to the decisions is computed over the whole, and carried
backward micro-batch by micro-batch. Both are exact whatever the cut.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, Float, Int

from grpo_jax.losses import kl
from grpo_jax.training.mesh import by_rows
from grpo_jax.types import Batch, Contexts, Decisions, Method, PyTree

Evaluate = Callable[[PyTree, Batch], Decisions]


class Policy(NamedTuple):
    """Parameters and, if it is trained, the optimiser's state."""

    params: PyTree
    optimizer: PyTree = None


def begin(params: PyTree, optimizer: optax.GradientTransformation, mesh: Mesh) -> Policy:
    """A policy that is about to be trained. What the optimiser keeps of a parameter lies on the mesh as it does."""
    places = jax.tree.map(lambda x: x.sharding, moments(params, optimizer, mesh))
    return Policy(params, jax.jit(optimizer.init, out_shardings=places)(params))


def moments(params: PyTree, optimizer: optax.GradientTransformation, mesh: Mesh) -> PyTree:
    """What the optimiser keeps, in shapes and places; the parameters may be shapes too."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    places = {
        (tuple(map(str, path)), x.shape): x.sharding for path, x in jax.tree_util.tree_flatten_with_path(params)[0]
    }
    longest = max(len(path) for path, _ in places)

    def place(path: tuple, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        names = tuple(map(str, path))
        ends = (names[-n:] for n in range(longest, 0, -1))  # the state nests the parameters' tree, somewhere
        at: Sharding = next((places[end, x.shape] for end in ends if (end, x.shape) in places), everywhere)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at)

    return jax.tree_util.tree_map_with_path(place, jax.eval_shape(optimizer.init, params))


def rows_at(batch: Batch, under: Int[Array, " N"], order: Int[Array, "C G"]) -> Batch:
    """The rows of these cells, laid out in C runs under C contexts. Padding cells weigh nothing and are in no group."""
    flat, real = jnp.maximum(order.reshape(-1), 0), order.reshape(-1) >= 0
    context = under[jnp.maximum(order.max(axis=1), 0)]
    rows = jax.tree.map(lambda x: x[flat], batch.replace(contexts=None))
    here = jnp.repeat(jnp.arange(order.shape[0], dtype=jnp.int32), order.shape[1])
    return rows.replace(
        contexts=jax.tree.map(lambda x: x[context], batch.contexts),
        sampled_under=jnp.where(rows.sampled_under == rows.trained_under, here, -1),
        trained_under=here,
        lengths=jnp.where(real, rows.lengths, 0),
        completion_mask=rows.completion_mask & real[:, None],
        weights=jnp.where(real, rows.weights, 0.0),
        group_ids=jnp.where(real, rows.group_ids, -1),
        prompt_ids=jnp.where(real, rows.prompt_ids, -1),
    )


def evaluate_all(
    evaluate: Evaluate,
    params: PyTree,
    batch: Batch,
    under: Int[Array, " N"],
    order: Int[Array, "M C G"],
    count,
    mesh: Mesh,
) -> Decisions:
    """What a policy says of every row, micro-batch by micro-batch, in the order of the batch; 0 for rows in no cell."""

    @jax.jit  # traced once, for its shapes and in the loop
    def one(cells: Int[Array, "C G"]) -> Decisions:
        return evaluate(params, by_rows(rows_at(batch, under, cells), mesh))

    shapes = jax.eval_shape(one, order[0])
    n, cells = len(batch), order.shape[1] * order.shape[2]
    result = jax.tree.map(lambda x: jnp.zeros((n + 1, *x.shape[1:]), x.dtype), shapes)

    def sweep(i, result):
        place = jnp.where(order[i] < 0, n, order[i]).reshape(cells)
        return jax.tree.map(lambda whole, part: whole.at[place].set(part), result, one(order[i]))

    result = sweep(0, result) if order.shape[0] == 1 else jax.lax.fori_loop(0, count, sweep, result)
    return jax.tree.map(lambda x: x[:n], result)


def train_step(
    method: Method,
    evaluate: Evaluate,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    policy: Policy,
    batch: Batch,
    arrays: PyTree,
    order: Int[Array, "M C G"],
    count: Int[Array, ""],
    *,
    first: bool,
) -> tuple[Policy, dict[str, Array]]:
    """Gradient of the method's objective over one mini-batch, and one step of the optimiser with it.

    order, count: the cells of the mini-batch (`deal.lay_out` under `trained_under`). first: whether this is the first
    update since the batch was sampled; then rows trained under the context that they were sampled under take
    stop_gradient(new) as `old`, so that their ratio is exactly 1. Rows of weight 0 are as if they were not there, and
    no gradient flows through decisions that are not trained, whatever an objective makes of them.

    An update in which nothing weighs, or whose gradient is not finite, is not applied: the policy stays as it is.

    Returns the policy and scalars: loss, grad_norm, applied, and the means of what the objective reports.
    Raises: ValueError if the objective's loss or what it reports has a shape that cannot be.
    """
    context_of, evaluate = batch.trained_under, jax.jit(evaluate)  # traced once for all that it is asked
    order = jnp.where((order >= 0) & (batch.weights[jnp.maximum(order, 0)] > 0), order, -1)
    cut = _Cut(order.shape[0], order.shape[1] * order.shape[2], count)
    part = _whole(batch, order)
    weights = method.aggregate(part)

    def piece(i) -> Batch:
        return by_rows(rows_at(batch, context_of, order[i]), mesh)

    def objective(new: Decisions, rows: Batch) -> tuple[Array, dict[str, Array]]:
        return method.objective(_through_trained(new, rows), with_old(rows, new, first), arrays)

    if returns_scalar(method, evaluate, policy.params, batch, context_of, order[0], arrays):
        loss, new, reported, grads = _seen_whole(objective, evaluate, policy.params, part, piece, cut)
    else:
        loss, new, reported, grads = _cut_anywhere(objective, evaluate, policy.params, weights, piece, cut)
    norm = optax.global_norm(grads)
    apply = jnp.any(weights > 0) & jnp.isfinite(norm)
    updates, state = optimizer.update(grads, policy.optimizer, policy.params)
    stepped = Policy(optax.apply_updates(policy.params, updates), state)
    kept = jax.tree.map(lambda a, b: jnp.where(apply, a, b), stepped, policy)
    metrics = {
        "loss": loss,
        "grad_norm": norm,
        "applied": apply.astype(jnp.float32),
        **summarise(new, part, reported, first),
    }
    return kept, metrics


class _Cut(NamedTuple):
    """How a mini-batch is cut: micro-batches in shape, their rows, and how many of them hold any."""

    sweeps: int
    cells: int
    count: Int[Array, ""]

    def take(self, tree: PyTree, i) -> PyTree:
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, i * self.cells, self.cells), tree)

    def put(self, whole: PyTree, part: PyTree, i) -> PyTree:
        write = lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, i * self.cells, 0)  # noqa: E731
        return jax.tree.map(write, whole, part)

    def room(self, part: PyTree) -> PyTree:
        """Zeros for all rows, given the shapes of one micro-batch."""
        return jax.tree.map(lambda x: jnp.zeros((self.sweeps * self.cells, *x.shape[1:]), x.dtype), part)

    def loop(self, sweep: Callable[[Any, PyTree], PyTree], start: PyTree) -> PyTree:
        return sweep(0, start) if self.sweeps == 1 else jax.lax.fori_loop(0, self.count, sweep, start)


def _cut_anywhere(objective, evaluate: Evaluate, params: PyTree, weights: Float[Array, "R T"], piece, cut: _Cut):
    """A loss per decision: value and gradient add up over the micro-batches."""

    def one_pass(params: PyTree, i):
        rows, w = piece(i), cut.take(weights, i)
        new = evaluate(params, rows)
        loss, reported = objective(new, rows)
        return jnp.where(w > 0, w * loss, 0).sum(), (new, reported)

    gradient = jax.value_and_grad(one_pass, has_aux=True)
    if cut.sweeps == 1:
        (loss, (new, reported)), grads = gradient(params, 0)
        return loss, new, reported, grads

    def sweep(i, carry):
        total, grads, seen = carry
        (loss, part), more = gradient(params, i)
        return total + loss, jax.tree.map(jnp.add, grads, more), cut.put(seen, part, i)

    seen = cut.room(jax.eval_shape(lambda p: one_pass(p, 0)[1], params))
    start = jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params), seen
    loss, grads, (new, reported) = cut.loop(sweep, start)
    return loss, new, reported, grads


def _seen_whole(objective, evaluate: Evaluate, params: PyTree, part: Batch, piece, cut: _Cut):
    """A scalar loss: forward by micro-batches, its cotangent over the whole, backward by micro-batches with that."""
    forward = lambda i: evaluate(params, piece(i))  # noqa: E731
    room = cut.room(jax.eval_shape(forward, 0))
    decisions = cut.loop(lambda i, seen: cut.put(seen, forward(i), i), room)
    loss, pull, reported = jax.vjp(lambda new: objective(new, part), decisions, has_aux=True)
    (cotangent,) = pull(jnp.ones_like(loss))

    def backward(i, grads: PyTree) -> PyTree:
        rows = piece(i)
        _, pull = jax.vjp(lambda params: evaluate(params, rows), params)
        return jax.tree.map(jnp.add, grads, pull(cut.take(cotangent, i))[0])

    return loss, decisions, reported, cut.loop(backward, jax.tree.map(jnp.zeros_like, params))


def returns_scalar(method: Method, evaluate: Evaluate, params, batch: Batch, under, cells, arrays) -> bool:
    """Whether the method's objective is one number for the whole mini-batch, rather than one per decision."""

    def objective(params):
        rows = rows_at(batch, under, cells)
        new = evaluate(params, rows)
        return method.objective(new, with_old(rows, new, True), arrays)

    loss, reported = jax.eval_shape(objective, params)
    expected = (cells.size, batch.completions.shape[1])
    if loss.shape not in ((), expected):
        raise ValueError(f"an objective returns a scalar or one loss per decision {expected}, got shape {loss.shape}")
    if wrong := {name: x.shape for name, x in reported.items() if x.shape != expected}:
        raise ValueError(f"an objective reports one value per decision {expected}, got {wrong}")
    return loss.shape == ()


def with_old(rows: Batch, new: Decisions, first: bool) -> Batch:
    """`old` at the start of a step: the very same numbers as `new` where a row's two contexts are one."""
    now = jax.lax.stop_gradient(new)
    if rows.old is None:
        return rows.replace(old=now)
    if not first:
        return rows
    same = rows.sampled_under == rows.trained_under

    def choose(a, b):
        return jnp.where(same.reshape(-1, *[1] * (a.ndim - 1)), a, b)

    return rows.replace(old=jax.tree.map(choose, now, rows.old))


def _through_trained(new: Decisions, rows: Batch) -> Decisions:
    """The same values, with a gradient through trained decisions only: what lies under the mask may be NaN."""

    def quiet(x):
        return jnp.where(rows.completion_mask.reshape(*x.shape[:2], *[1] * (x.ndim - 2)), x, jax.lax.stop_gradient(x))

    return jax.tree.map(quiet, new)


def summarise(new: Decisions, rows: Batch, reported: dict[str, Array], first: bool) -> dict[str, Array]:
    """Means over trained decisions of what the objective reports; quantiles of "ratio"; the gap to the sampler."""
    trained = rows.completion_mask & (rows.weights > 0)[:, None]
    size = jnp.maximum(trained.sum(), 1)
    mean = lambda x, where=trained, n=size: jnp.where(where, x, 0).sum() / n  # noqa: E731
    metrics = {name: mean(x) for name, x in reported.items() if name != "ratio"}
    metrics |= {name: mean(x) for name, x in new.stats.items() if x.ndim == 2 and name not in metrics}
    if "ratio" in reported:
        ratio = jnp.where(trained, reported["ratio"], jnp.nan)
        low, high = jnp.nanquantile(ratio, jnp.array([0.01, 0.99]))
        metrics |= {"ratio_p01": low, "ratio_p99": high, "ratio_max": jnp.nanmax(ratio)}
    if first:
        same = (rows.sampled_under == rows.trained_under)[:, None]
        drawn = trained & same & ~jnp.isnan(rows.behavior_logps) & ~jnp.isnan(rows.sampler_logps)
        gap, size = jnp.where(drawn, jnp.abs(new.logps - rows.sampler_logps), 0), jnp.maximum(drawn.sum(), 1)
        metrics |= {"gap_max": gap.max(), "gap_mean": mean(gap, drawn, size)}
        metrics |= {"gap_kl": mean(kl.k3(rows.sampler_logps, new.logps), drawn, size)}  # KL(sampler || trainer)
    return metrics


def _whole(batch: Batch, order: Int[Array, "M C G"]) -> Batch:
    """All rows of the mini-batch in the order of its cells, with the group ids renumbered into its range."""
    sweeps, contexts, width = order.shape
    rows = rows_at(
        batch.replace(contexts=_no_contexts()), jnp.zeros_like(batch.trained_under), order.reshape(-1, width)
    )
    n = rows.group_ids.shape[0]
    # Ids lie in [0, N) of the whole batch, and a mini-batch may be shorter: number the groups by first appearance.
    ids = rows.group_ids
    known = jnp.unique(jnp.where(ids < 0, jnp.iinfo(jnp.int32).max, ids), size=n, fill_value=jnp.iinfo(jnp.int32).max)
    return rows.replace(group_ids=jnp.where(ids < 0, -1, jnp.searchsorted(known, ids)).astype(jnp.int32))


def _no_contexts() -> Contexts:
    return Contexts(tokens=jnp.zeros((1, 0), jnp.int32), lengths=jnp.zeros(1, jnp.int32))
