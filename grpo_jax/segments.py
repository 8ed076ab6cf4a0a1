"""Statistics over segments of rows: masked, ragged, `[N] -> [N]`.

A segment is the set of rows with the same id. Ids lie in [0, N), so no segment count is passed; a row with id -1
belongs to no segment, enters no statistic, and gets `outside`; an id of N or more is a mistake, and gives NaN (`join`
makes ids in range of any numbers). Every function returns one value per row: the statistic
of the row's segment. `where` leaves rows out of the statistic; they still receive their segment's value. Statistics
are float32; NaN in a row that is left out does no harm. `join` brings any ids, of one key or several, into [0, N).

Means and spreads are sums of distances from the segment's minimum: their rounding is relative to the segment's spread,
not to its distance from zero, and by that rounding alone they depend on the order of the rows. However n values are
ordered, padded or divided, their statistics agree within about n * 6e-8 of the spread (of the sum of magnitudes, for
`total`), and the mean to the bit where distances are whole numbers, as between rewards of 0 and 1. What picks a value
(minimum, maximum, medians, rank) is always the same to the bit.

All of them work under `jit`, `vmap` and `grad`, and with `across` on rows that `shard_map` divides over a mesh.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Values = Float[Array, "N"]
Ids = Int[Array, "N"]
Where = Bool[Array, "N"] | None


def count(ids: Ids, where: Where = None) -> Values:
    """Number of rows in the segment; 0 outside."""
    return _back(_sum(jnp.ones(ids.shape, jnp.float32), ids, _inside(ids, where)), ids, 0.0)


def number(ids: Ids, where: Where = None) -> Float[Array, ""]:
    """How many segments have at least one row."""
    return jnp.sum(_sum(jnp.ones(ids.shape, jnp.float32), ids, _inside(ids, where)) > 0).astype(jnp.float32)


def has(condition: Bool[Array, "N"], ids: Ids) -> Bool[Array, "N"]:
    """Whether the condition holds for any row of the segment; False outside."""
    return count(ids, condition) > 0


def total(values: Values, ids: Ids, where: Where = None, *, outside: float = 0.0) -> Values:
    """sum_{j in segment} x_j"""
    return _back(_sum(values, ids, _inside(ids, where)), ids, outside)


def mean(values: Values, ids: Ids, where: Where = None, *, outside: float = 0.0) -> Values:
    """(1/n) sum_j x_j, exact for a segment whose values are all equal; 0 where no row counts.

    The mean is taken of the differences from the segment's minimum, so that equal values give themselves back and not
    a rounded neighbour (0.85 summed seven times and divided by seven is not 0.85 in float32).
    """
    inside = _inside(ids, where)
    low, shifted = _from_minimum(values, ids, inside)
    return jnp.where(ids < 0, outside, low + _share(shifted, ids, inside))


def centered(values: Values, ids: Ids, where: Where = None) -> Values:
    """x - mean, exactly 0 for a segment of equal values; 0 outside and for rows left out.

    More than the difference of the two: next to 1e6, a mean rounds to the nearest sixteenth, this does not.
    """
    inside = _inside(ids, where)
    _, shifted = _from_minimum(values, ids, inside)
    return jnp.where(inside, shifted - _share(shifted, ids, inside), 0)


def variance(values: Values, ids: Ids, where: Where = None, *, ddof: int = 0, outside: float = 0.0) -> Values:
    """sum_j (x_j - mean)^2 / (n - ddof); 0 for n <= ddof, and exactly 0 if all values are equal."""
    size = count(ids, where)
    squares = total(centered(values, ids, where) ** 2, ids, where)
    return jnp.where(ids < 0, outside, jnp.where(size > ddof, squares / jnp.maximum(size - ddof, 1), 0))


def std(values: Values, ids: Ids, where: Where = None, *, ddof: int = 0, outside: float = 0.0) -> Values:
    """Square root of the variance, with gradient 0 where it is 0.

    The squares are taken in units of the largest deviation: values of 1e-25 or 1e25 neither vanish nor overflow.
    """
    deviation = centered(values, ids, where)
    unit = jax.lax.stop_gradient(maximum(jnp.abs(deviation), ids, where))
    unit = jnp.where(unit > 0, unit, 1)
    size = count(ids, where)
    var = total((deviation / unit) ** 2, ids, where) / jnp.maximum(size - ddof, 1)
    some = (var > 0) & (size > ddof)
    spread = jnp.where(some, unit * jnp.sqrt(jnp.where(some, var, 1)), jnp.where(jnp.isnan(var), var, 0))
    return jnp.where(ids < 0, outside, spread)


def z_score(
    values: Values, ids: Ids, where: Where = None, *, ddof: int = 1, epsilon: float = 1e-6, inside_root: bool = False
) -> Values:
    """(x - mean) / (std + epsilon), or (x - mean) / sqrt(variance + epsilon) with `inside_root`.

    Exactly 0 for a segment of one row or of equal values, for rows outside, and for rows left out by `where`.
    Raises: ValueError for epsilon < 0.
    """
    if isinstance(epsilon, (int, float)) and not epsilon >= 0:
        raise ValueError(f"epsilon is added to a spread and is not negative, got {epsilon}")
    scale = std(values, ids, where, ddof=ddof)
    scale = jnp.hypot(scale, jnp.sqrt(epsilon)) if inside_root else scale + epsilon
    spread = ~(maximum(values, ids, where) <= minimum(values, ids, where))  # a NaN that counts stays to be seen
    return jnp.where(spread, centered(values, ids, where) / jnp.where(spread, scale, 1), 0)


def minimum(values: Values, ids: Ids, where: Where = None, *, outside: float = 0.0) -> Values:
    """min_j x_j"""
    return _back(_low(values, ids, _inside(ids, where)), ids, outside)


def maximum(values: Values, ids: Ids, where: Where = None, *, outside: float = 0.0) -> Values:
    """max_j x_j"""
    return _back(-_low(-_float(values), ids, _inside(ids, where)), ids, outside)


def leave_one_out_mean(values: Values, ids: Ids, where: Where = None, *, outside: float = 0.0) -> Values:
    """Mean of the other rows of the segment, mean_{j != i} x_j; `outside` where there is no other row."""
    # By the distance from the mean, rather than a sum less one term: equal values give themselves back exactly.
    others = count(ids, where) - _inside(ids, where)
    without = mean(values, ids, where) - centered(values, ids, where) / jnp.maximum(others, 1)
    return jnp.where((others > 0) & (ids >= 0), without, outside)


def rank(values: Values, ids: Ids, where: Where = None, *, ties: str = "first", outside: float = 0.0) -> Values:
    """Place in ascending order within the segment, from 0.

    ties: "first" by row number (a permutation of 0..n-1), "average" the mean place of the tied rows, "min" the lowest.
    Rows left out by `where` get `outside`.
    """
    inside = _inside(ids, where)
    order, start, _ = _sorted(values, ids, inside)
    place = _unsort(order, jnp.arange(ids.shape[0]) - start)
    if ties == "first":
        return jnp.where(inside, place.astype(jnp.float32), outside)
    if ties not in ("average", "min"):
        raise ValueError(f'ties must be "first", "average" or "min", got {ties!r}')
    slots = ids[order], jnp.where(inside, values, 0)[order], inside[order]
    new = jnp.any(jnp.stack([s != jnp.roll(s, 1) for s in slots]), axis=0).at[:1].set(True)
    run = jnp.cumsum(new) - 1  # runs of equal values within a segment
    here = place[order].astype(jnp.float32)
    if ties == "min":
        tied = jax.ops.segment_min(here, run, ids.shape[0])
    else:
        size = jax.ops.segment_sum(jnp.ones_like(here), run, ids.shape[0])
        tied = jax.ops.segment_sum(here, run, ids.shape[0]) / jnp.maximum(size, 1)
    return jnp.where(inside, _unsort(order, tied[run]), outside)


def lower_median(values: Values, ids: Ids, where: Where = None, *, outside: float = 0.0) -> Values:
    """The value at place floor((n - 1) / 2) in ascending order: a value that some row has."""
    return _quantile_at(values, ids, where, outside, lambda n: ((n - 1) // 2,))


def median(values: Values, ids: Ids, where: Where = None, *, outside: float = 0.0) -> Values:
    """The true median: the mean of the two middle values when n is even."""
    return _quantile_at(values, ids, where, outside, lambda n: ((n - 1) // 2, n // 2))


def median_absolute_deviation(values: Values, ids: Ids, where: Where = None, *, outside: float = 0.0) -> Values:
    """lower_median(|x - lower_median(x)|)"""
    return lower_median(jnp.abs(values - lower_median(values, ids, where)), ids, where, outside=outside)


def first(condition: Bool[Array, "N"], ids: Ids) -> Bool[Array, "N"]:
    """True for the first row of each segment, by row number, for which the condition holds."""
    inside = _inside(ids, condition)
    rows = jnp.arange(ids.shape[0])
    earliest = jax.ops.segment_min(jnp.where(inside, rows, ids.shape[0]), _slot(ids), ids.shape[0])
    return inside & (rows == earliest[_slot(ids)])


def log_mean_exp(values: Values, ids: Ids, where: Where = None, *, outside: float = 0.0) -> Values:
    """log (1/n) sum_j exp(x_j), with gradients that are finite for any mask; `outside` where no row counts."""
    inside = _inside(ids, where)
    size = _sum(jnp.ones(ids.shape, jnp.float32), ids, inside)
    values = _float(values)
    high = jax.lax.stop_gradient(-_low(-values, ids, inside))
    powers = jnp.exp(jnp.where(inside, values - high[_slot(ids)], 0))
    mass = jnp.where(size > 0, _sum(powers, ids, inside) / jnp.maximum(size, 1), 1)
    return _back(jnp.where(size > 0, high + jnp.log(mass), outside), ids, outside)


def join(*keys: Ids) -> Ids:
    """One id for rows that agree in every key, in [0, N); -1 where any key is negative. Keys: any int32 values."""
    ids, alone = jnp.zeros_like(keys[0]), jnp.zeros(keys[0].shape, bool)
    n = ids.shape[0]
    for key in keys:
        alone |= key < 0
        order = jnp.lexsort((key, ids))
        a, b = ids[order], key[order]
        new = jnp.concatenate([jnp.zeros(1, bool), (a[1:] != a[:-1]) | (b[1:] != b[:-1])])
        ids = jnp.zeros(n, jnp.int32).at[order].set(jnp.cumsum(new).astype(jnp.int32))
    return jnp.where(alone, -1, ids)


def across(axis_name: str | tuple[str, ...], function: Callable) -> Callable:
    """`function` for use inside `shard_map`, where rows are divided over mesh axes: it sees the rows of all devices.

    Arrays among the arguments are gathered along their first axis; of results with N rows each device gets its own
    back, and a scalar, which all devices compute alike, comes back replicated, with the right gradient (under
    shard_map's default, check_vma=True). Close over arrays that have no rows, such as weights [K]. Ids are global: in
    [0, N) over all devices. The numbers are those of one device, bit for bit: every device computes the whole.

        shard_map(across("data", group_z_score), mesh=mesh, in_specs=P("data"), out_specs=P("data"))(rewards, group_ids)
    """

    @functools.wraps(function)
    def over_all_rows(*arguments, **named):
        local = [len(x) for x in jax.tree.leaves((arguments, named)) if jnp.ndim(x)]
        gather = lambda x: jax.lax.all_gather(x, axis_name, tiled=True) if jnp.ndim(x) else x  # noqa: E731
        results = function(*jax.tree.map(gather, arguments), **jax.tree.map(gather, named))
        start = jax.lax.axis_index(axis_name) * local[0]

        def own(x: Array) -> Array:
            return jax.lax.dynamic_slice_in_dim(x, start, local[0]) if jnp.ndim(x) else jax.lax.pmean(x, axis_name)

        return jax.tree.map(own, results)

    return over_all_rows


def _inside(ids: Ids, where: Where) -> Bool[Array, "N"]:
    return ids >= 0 if where is None else (ids >= 0) & where


def _slot(ids: Ids) -> Ids:
    return jnp.maximum(ids, 0)


def _float(values: Values) -> Values:
    return jnp.asarray(values).astype(jnp.float32)


def _sum(values: Values, ids: Ids, inside: Bool[Array, "N"]) -> Values:
    """Sum per segment, indexed by id."""
    values = jnp.where(inside, values, 0).astype(jnp.float32)
    return jax.ops.segment_sum(values, _slot(ids), ids.shape[0])


def _low(values: Values, ids: Ids, inside: Bool[Array, "N"]) -> Values:
    """Minimum per segment, indexed by id; 0 where no row counts."""
    values = jnp.where(inside, values, jnp.inf).astype(jnp.float32)
    low = jax.ops.segment_min(values, _slot(ids), ids.shape[0])
    size = jax.ops.segment_sum(inside.astype(jnp.int32), _slot(ids), ids.shape[0])
    return jnp.where(size > 0, low, 0)


def _from_minimum(values: Values, ids: Ids, inside: Bool[Array, "N"]) -> tuple[Values, Values]:
    """The segment's minimum, per row and without gradient, and each row's distance from it, 0 for rows not inside."""
    low = jax.lax.stop_gradient(_low(values, ids, inside))[_slot(ids)]
    return low, jnp.where(inside, _float(values) - low, 0)


def _share(values: Values, ids: Ids, inside: Bool[Array, "N"]) -> Values:
    """Sum per segment over its number of rows, per row."""
    size = _sum(jnp.ones(ids.shape, jnp.float32), ids, inside)
    return _back(_sum(values, ids, inside) / jnp.maximum(size, 1), ids, 0.0)


def _back(per_segment: Values, ids: Ids, outside: float) -> Values:
    """Each row's segment's value; NaN for an id that is none, N or above."""
    return jnp.where(ids < 0, outside, jnp.where(ids < len(ids), per_segment[_slot(ids)], jnp.nan))


def _sorted(values: Values, ids: Ids, inside: Bool[Array, "N"]) -> tuple[Ids, Ids, Ids]:
    """Rows by (segment, value, row), those outside last; for each place where its segment starts; sizes by id."""
    n = ids.shape[0]
    slot = jnp.where(inside, ids, n)
    order = jnp.lexsort((jnp.where(inside, values, 0), slot))
    size = jax.ops.segment_sum(inside.astype(jnp.int32), slot, n + 1)
    start = jnp.cumsum(size) - size
    return order, start[slot[order]], size


def _unsort(order: Ids, values: Array) -> Array:
    return jnp.zeros_like(values).at[order].set(values)


def _quantile_at(values: Values, ids: Ids, where: Where, outside: float, places) -> Values:
    inside = _inside(ids, where)
    order, _, size = _sorted(values, ids, inside)
    size = size[: ids.shape[0]]
    start = jnp.cumsum(size) - size
    ordered = jnp.where(inside, values, 0).astype(jnp.float32)[order]
    picked = [ordered[jnp.clip(start + place, 0, ids.shape[0] - 1)] for place in places(size)]
    middle = picked[0] if len(picked) == 1 else picked[0] + (picked[1] - picked[0]) / 2
    return _back(jnp.where(size > 0, middle, 0), ids, outside)
