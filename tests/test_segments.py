"""Segmented statistics against float64 loops: ragged, masked, in any order, on any mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from grpo_jax import segments


def rank_oracle(inside, ties):
    if ties == "first":
        return np.argsort(np.argsort(inside, kind="stable"), kind="stable")
    below = [np.sum(inside < x) for x in inside]
    return below if ties == "min" else [b + (np.sum(inside == x) - 1) / 2 for b, x in zip(below, inside)]


# Each gets the values of a segment's rows and says one number for the segment, or one per row.
ORACLES = {
    "total": np.sum,
    "mean": np.mean,
    "variance0": np.var,
    "variance1": lambda x: x.var(ddof=1) if len(x) > 1 else 0.0,
    "std0": np.std,
    "std1": lambda x: x.std(ddof=1) if len(x) > 1 else 0.0,
    "lower_median": lambda x: np.sort(x)[(len(x) - 1) // 2],
    "median": np.median,
    "median_absolute_deviation": lambda x: (lambda d: np.sort(d)[(len(x) - 1) // 2])(
        np.abs(x - np.sort(x)[(len(x) - 1) // 2])
    ),
    "minimum": np.min,
    "maximum": np.max,
    "log_mean_exp": lambda x: np.log(np.mean(np.exp(x))),
}
FUNCTIONS = {name: getattr(segments, name.rstrip("01")) for name in ORACLES}


def call(name, values, ids, where=None):
    options = {"ddof": int(name[-1])} if name[-1] in "01" else {}
    return FUNCTIONS[name](values, ids, where, **options)


@pytest.fixture(params=[0, 1])
def ragged(request):
    """Segments of 1 to many rows in any order with ties, rows in none, and rows left out."""
    draw = np.random.default_rng(request.param)
    ids = draw.choice([-1, 0, 1, 2, 7, 8, 23], 24, p=[0.15, 0.3, 0.2, 0.15, 0.1, 0.05, 0.05])
    values = np.where(draw.random(24) < 0.4, draw.integers(-1, 2, 24), draw.normal(0, 1.5, 24))
    return values, ids, draw.random(24) < 0.75


def by_segment(oracle, values, ids, where, empty=0.0):
    """One value per row: the oracle of its segment's rows that count."""
    result = np.zeros(len(ids))
    for i in np.flatnonzero(ids >= 0):
        members = values[(ids == ids[i]) & where]
        result[i] = oracle(members) if len(members) else empty
    return result


@pytest.mark.parametrize("name", ORACLES)
def test_one_number_per_segment(name, ragged):
    values, ids, where = ragged
    run = jax.jit(lambda *a: call(name, *a))
    everyone = np.ones(len(ids), bool)
    for counts in (everyone, where):
        expected = by_segment(ORACLES[name], values, ids, counts)
        np.testing.assert_allclose(run(values, ids, counts), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(call(name, values, ids), run(values, ids, everyone))
    garbage = np.where(where, values, np.random.default_rng(0).choice([np.nan, np.inf, -np.inf], 24))
    np.testing.assert_array_equal(run(garbage, ids, where), run(values, ids, where))


@pytest.mark.parametrize("name", ORACLES)
def test_rows_in_no_segment_get_outside(name, ragged):
    values, ids, where = ragged
    options = {"ddof": int(name[-1])} if name[-1] in "01" else {}
    got = FUNCTIONS[name](values, ids, where, outside=-7.0, **options)
    expected = by_segment(ORACLES[name], values, ids, where)
    has_rows = np.array([((ids == i) & where).any() for i in ids]) & (ids >= 0)
    np.testing.assert_allclose(np.asarray(got)[has_rows], expected[has_rows], rtol=1e-5, atol=1e-6)
    assert (np.asarray(got)[ids < 0] == -7).all()


@pytest.mark.parametrize("ties", ["first", "average", "min"])
def test_rank(ties, ragged):
    values, ids, where = ragged
    expected = np.full(24, -1.0)
    for segment in set(ids[ids >= 0]):
        rows = np.flatnonzero((ids == segment) & where)
        expected[rows] = rank_oracle(values[rows], ties)
    garbage = np.where(where, values, np.nan)
    got = jax.jit(lambda *a: segments.rank(*a, ties=ties, outside=-1.0))(garbage, ids, where)
    np.testing.assert_array_equal(got, expected)


def test_rank_knows_its_words():
    with pytest.raises(ValueError, match="'dense'"):
        segments.rank(jnp.ones(3), jnp.zeros(3, jnp.int32), ties="dense")


def test_leave_one_out_mean(ragged):
    values, ids, where = ragged
    expected = np.full(24, -7.0)
    for i in np.flatnonzero(ids >= 0):
        others = values[(ids == ids[i]) & where & (np.arange(24) != i)]
        expected[i] = others.mean() if len(others) else -7.0
    garbage = np.where(where, values, np.nan)
    got = jax.jit(lambda *a: segments.leave_one_out_mean(*a, outside=-7.0))(garbage, ids, where)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("inside_root", [False, True])
@pytest.mark.parametrize("ddof", [0, 1])
def test_z_score(ddof, inside_root, ragged):
    values, ids, where = ragged
    epsilon, expected = 1e-2, np.zeros(24)
    for segment in set(ids[ids >= 0]):
        rows = np.flatnonzero((ids == segment) & where)
        if len(rows) < 2 or np.ptp(values[rows]) == 0:
            continue
        variance = values[rows].var(ddof=ddof)
        scale = np.sqrt(variance + epsilon) if inside_root else np.sqrt(variance) + epsilon
        expected[rows] = (values[rows] - values[rows].mean()) / scale
    garbage = np.where(where, values, np.nan)
    run = jax.jit(lambda *a: segments.z_score(*a, ddof=ddof, epsilon=epsilon, inside_root=inside_root))
    np.testing.assert_allclose(run(garbage, ids, where), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [0.85, 1 / 3, -1e-7, 12345.678])
def test_equal_values_have_exactly_no_spread(value):
    """Summing and dividing gives 0.85 back with an error that a small standard deviation turns into 0.4."""
    sizes = (1, 7, 64, 1000)
    values, ids = jnp.full(sum(sizes), value, jnp.float32), jnp.asarray(np.repeat(range(4), sizes))
    np.testing.assert_array_equal(segments.mean(values, ids), values)
    for statistic in (segments.variance, segments.std, segments.median_absolute_deviation):
        assert not np.asarray(statistic(values, ids)).any()
    assert not np.asarray(segments.z_score(values, ids, epsilon=0.0)).any()
    np.testing.assert_array_equal(segments.leave_one_out_mean(values, ids)[1:], values[1:])


def test_spread_far_from_zero():
    """Sums of squares minus the square of the sum would leave nothing of a spread of 1 at 4,096."""
    values = np.float32([4096, 4097, 4098, 4096.5])
    got = segments.variance(values, jnp.zeros(4, jnp.int32), ddof=1)
    np.testing.assert_allclose(got, np.full(4, np.float64(values).var(ddof=1)), rtol=1e-5)


def test_counting(ragged):
    _, ids, where = ragged
    expected = [np.sum((ids == i) & where) if i >= 0 else 0 for i in ids]
    np.testing.assert_array_equal(segments.count(ids, where), expected)
    np.testing.assert_array_equal(segments.has(where, ids), np.array(expected) > 0)
    assert float(segments.number(ids, where)) == len(set(ids[(ids >= 0) & where]))
    assert float(segments.number(ids)) == len(set(ids[ids >= 0]))
    assert float(segments.number(np.full(3, -1))) == 0


def test_first(ragged):
    _, ids, where = ragged
    expected = np.zeros(24, bool)
    for segment in set(ids[ids >= 0]):
        rows = np.flatnonzero((ids == segment) & where)
        expected[rows[:1]] = True
    np.testing.assert_array_equal(jax.jit(segments.first)(where, ids), expected)


def test_join():
    """Rows agree in the joined id exactly where they agree in every key."""
    draw = np.random.default_rng(0)
    keys = [draw.integers(-1, 4, 40), draw.choice([-1, 0, 5, 1_000_000, 2**31 - 1], 40), draw.integers(0, 2, 40)]
    got = np.asarray(jax.jit(segments.join)(*keys))
    assert got.max() < 40
    alone = np.any([key < 0 for key in keys], axis=0)
    assert alone.any()
    np.testing.assert_array_equal(got == -1, alone)
    rows = np.flatnonzero(~alone)
    for i in rows:
        for j in rows:
            assert (got[i] == got[j]) == all(key[i] == key[j] for key in keys)
    single = np.asarray(segments.join(keys[1]))
    assert len(set(single)) == len(set(keys[1]))
    assert single.min() == -1
    assert single.max() < 40


STATISTICS = {
    **{name: lambda v, i, w, name=name: call(name, v, i, w) for name in ORACLES},
    "leave_one_out_mean": lambda v, i, w: segments.leave_one_out_mean(v, i, w),
    "z_score": lambda v, i, w: segments.z_score(v, i, w),
    "rank": lambda v, i, w: segments.rank(v, i, w, ties="average"),
}


@pytest.mark.parametrize("name", STATISTICS)
def test_order_padding_names_and_dtype(name, ragged):
    values, ids, where = ragged
    function = STATISTICS[name]
    base = np.asarray(function(values, ids, where))
    assert base.dtype == np.float32
    order = np.random.default_rng(9).permutation(24)
    np.testing.assert_allclose(function(values[order], ids[order], where[order]), base[order], rtol=1e-5, atol=1e-6)
    padded = function(
        np.append(values, np.full(8, np.nan)), np.append(ids, np.full(8, -1)), np.append(where, [True] * 8)
    )
    np.testing.assert_allclose(padded[:24], base, rtol=1e-6, atol=1e-6)
    renamed = np.where(ids < 0, -1, 23 - ids)
    np.testing.assert_allclose(function(values, renamed, where), base, rtol=1e-6, atol=1e-6)
    halves = jnp.asarray(values, jnp.bfloat16)
    in_float32 = function(halves.astype(jnp.float32), ids, where)
    got = function(halves, ids, where)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, in_float32, rtol=1e-6, atol=1e-6)


def test_vmap_and_shard_map(ragged):
    values, ids, where = (jnp.asarray(x) for x in ragged)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = PartitionSpec("data")

    def everything(values, ids, where):
        return jnp.stack([function(values, ids, where) for function in STATISTICS.values()], axis=-1)

    def local(*arrays):
        whole = everything(*(jax.lax.all_gather(x, "data", tiled=True) for x in arrays))
        return jax.lax.dynamic_slice_in_dim(whole, 3 * jax.lax.axis_index("data"), 3)

    expected = jax.jit(everything)(values, ids, where)
    mapped = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=rows, out_specs=rows))(values, ids, where)
    np.testing.assert_allclose(mapped, expected, rtol=1e-6, atol=1e-6)
    stacked = (jnp.stack([x, x[::-1]]) for x in (values, ids, where))
    together = jax.jit(jax.vmap(everything))(*stacked)
    np.testing.assert_allclose(together[0], expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(together[1], everything(values[::-1], ids[::-1], where[::-1]), rtol=1e-5, atol=1e-6)


SMOOTH = ("total", "mean", "variance0", "variance1", "std1", "minimum", "median", "log_mean_exp")
SMOOTH += ("leave_one_out_mean", "z_score")
IDS = np.array([0, 1, 0, 1, 1, -1, 0, 2, 3, 3, 0])
WHERE = np.array([1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 0], bool)


def pulled(name):
    """A scalar of the statistic of segments 0 to 3: ragged, a pair, a single row, equal values."""
    pull = np.random.default_rng(4).normal(size=11)
    return jax.jit(lambda v: jnp.sum(jnp.where(IDS < 0, 0, pull * STATISTICS[name](v, IDS, WHERE))))


def distinct():
    values = np.random.default_rng(5).permutation(11) / 2.0
    values[8:10] = 0.85
    return values


@pytest.mark.parametrize("name", SMOOTH)
def test_gradients(name):
    values, run = distinct(), pulled(name)
    gradient = np.asarray(jax.jit(jax.grad(run))(jnp.float32(values)))
    step = 2e-2
    for i in np.flatnonzero((IDS >= 0) & (IDS != 3)):
        up, down = values.copy(), values.copy()
        up[i] += step
        down[i] -= step
        np.testing.assert_allclose(gradient[i], (run(up) - run(down)) / (2 * step), atol=3e-3)
    assert np.isfinite(gradient).all()
    assert not gradient[~WHERE | (IDS < 0)].any()


@pytest.mark.parametrize("name", SMOOTH)
def test_nan_in_rows_left_out_spares_the_gradient(name):
    gradient = jax.jit(jax.grad(pulled(name)))
    garbage = np.where(WHERE & (IDS >= 0), distinct(), np.nan)
    np.testing.assert_array_equal(gradient(jnp.float32(garbage)), gradient(jnp.float32(distinct())))
