"""Segmented statistics against float64 loops: ragged, masked, in any order, on any mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

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


def call(name, values, ids, where=None, **options):
    options |= {"ddof": int(name[-1])} if name[-1] in "01" else {}
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


def outside_is(outside):
    return jax.jit(lambda v, i, w: {name: call(name, v, i, w, outside=outside) for name in ORACLES})


def test_one_number_per_segment(ragged):
    values, ids, where = ragged
    run, everyone = outside_is(0.0), np.ones(len(ids), bool)
    for counts in (everyone, where):
        for name, got in run(values, ids, counts).items():
            expected = by_segment(ORACLES[name], values, ids, counts)
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6, err_msg=name)
    every = run(values, ids, everyone)
    without = jax.jit(lambda v, i: {name: call(name, v, i) for name in ORACLES})(values, ids)
    for name, got in without.items():
        np.testing.assert_array_equal(got, every[name], err_msg=name)
    garbage, clean = np.random.default_rng(0).choice([np.nan, np.inf, -np.inf], 24), run(values, ids, where)
    for name, got in run(np.where(where, values, garbage), ids, where).items():
        np.testing.assert_array_equal(got, clean[name], err_msg=name)


def test_rows_in_no_segment_get_outside(ragged):
    values, ids, where = ragged
    has_rows = np.array([((ids == i) & where).any() for i in ids]) & (ids >= 0)
    for name, got in outside_is(-7.0)(values, ids, where).items():
        expected = by_segment(ORACLES[name], values, ids, where)
        np.testing.assert_allclose(np.asarray(got)[has_rows], expected[has_rows], rtol=1e-5, atol=1e-6, err_msg=name)
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


@pytest.mark.parametrize(("ties", "expected"), [("first", [0, 1, 2]), ("average", [1, 1, 1]), ("min", [0, 0, 0])])
def test_rank_where_all_are_tied(ties, expected):
    np.testing.assert_array_equal(segments.rank(jnp.full(3, 0.5), jnp.zeros(3, jnp.int32), ties=ties), expected)


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


def test_spread_next_to_a_large_mean():
    """At 1e6 float32 knows sixteenths: the mean of two neighbours rounds to one of them, their distances need not."""
    values = np.float32([1e6, 1e6 + 0.0625, 1e6 + 0.25, 5.0])
    ids, exact = np.array([0, 0, 0, 1]), np.float64(values[:3])
    np.testing.assert_allclose(segments.std(values, ids, ddof=1)[:3], exact.std(ddof=1), rtol=1e-6)
    np.testing.assert_allclose(segments.centered(values, ids)[:3], exact - exact.mean(), rtol=1e-6)
    expected = (exact - exact.mean()) / exact.std(ddof=1)
    np.testing.assert_allclose(segments.z_score(values, ids, epsilon=0.0)[:3], expected, rtol=1e-6)


@pytest.mark.parametrize("magnitude", [1e-30, 1e-20, 1e20, 1e30])
@pytest.mark.parametrize("inside_root", [False, True])
def test_squares_neither_vanish_nor_overflow(magnitude, inside_root):
    exact = np.array([1.0, 2, 4, -3, 0.5])
    ids, values = np.zeros(5, int), np.float32(exact * magnitude)
    got = segments.z_score(values, ids, epsilon=0.0, inside_root=inside_root)
    np.testing.assert_allclose(got, (exact - exact.mean()) / exact.std(ddof=1), rtol=1e-5)
    np.testing.assert_allclose(segments.std(values, ids), np.full(5, exact.std() * magnitude), rtol=1e-5)
    gradient = jax.grad(lambda v: segments.std(v, ids)[0])(values)
    np.testing.assert_allclose(gradient, (exact - exact.mean()) / (5 * exact.std()), rtol=1e-5)


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int32, np.uint32, bool])
def test_whole_numbers_of_every_kind(kind, ragged):
    _, ids, where = ragged
    values = np.random.default_rng(3).integers(0, 2 if kind is bool else 9, 24).astype(kind)
    expected = everything(values.astype(np.float32), ids, where)
    for name, got in everything(jnp.asarray(values), ids, where).items():
        np.testing.assert_array_equal(got, expected[name], err_msg=name)


def test_no_rows_and_rows_in_no_segment():
    """An empty batch, a batch of padding only, and one row."""
    for name, empty in everything(jnp.zeros(0), jnp.zeros(0, jnp.int32), jnp.zeros(0, bool)).items():
        assert empty.shape == (0,) and empty.dtype == jnp.float32, name
    for name, nobody in everything(jnp.full(3, jnp.nan), jnp.full(3, -1), jnp.ones(3, bool)).items():
        np.testing.assert_array_equal(nobody, np.zeros(3), err_msg=name)
    for name, left_out in everything(jnp.full(3, jnp.inf), jnp.zeros(3, jnp.int32), jnp.zeros(3, bool)).items():
        np.testing.assert_array_equal(left_out, np.zeros(3), err_msg=name)
    for name, one in everything(jnp.full(3, 5.0), jnp.array([0, -1, -1]), jnp.ones(3, bool)).items():
        itself = name in ("total", "mean", "lower_median", "median", "minimum", "maximum", "log_mean_exp")
        np.testing.assert_array_equal(one, [5.0 if itself else 0.0, 0, 0], err_msg=name)
    nothing = jnp.zeros(0, jnp.int32)
    assert segments.join(nothing, nothing).shape == segments.first(nothing == 0, nothing).shape == (0,)


def test_what_is_in_the_segment_stays_in_the_segment():
    """A NaN or an infinite value that counts spoils its own segment only."""
    ids, everyone, rest = np.repeat([0, 1, -1], [3, 3, 18]), np.ones(24, bool), [0, 1, 1] + [0] * 18
    alone = everything(np.float32([1, 2, 3, *rest]), ids, everyone)
    for bad in (np.nan, np.inf, -np.inf):
        for name, got in everything(np.float32([1, bad, 3, *rest]), ids, everyone).items():
            np.testing.assert_array_equal(got[3:], alone[name][3:], err_msg=name)


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
    "centered": lambda v, i, w: segments.centered(v, i, w),
    "leave_one_out_mean": lambda v, i, w: segments.leave_one_out_mean(v, i, w),
    "z_score": lambda v, i, w: segments.z_score(v, i, w),
    "z_score_inside": lambda v, i, w: segments.z_score(v, i, w, epsilon=1e-2, inside_root=True),
    "rank": lambda v, i, w: segments.rank(v, i, w, ties="average"),
}
# All at once: one program per shape.
everything = jax.jit(lambda *arrays: {name: function(*arrays) for name, function in STATISTICS.items()})
PICKS = ("minimum", "maximum", "lower_median", "median", "median_absolute_deviation", "rank")


def test_bfloat16(ragged):
    """Numbers of half the digits are read exactly, and what comes of them has all of its digits."""
    values, ids, where = ragged
    halves = jnp.asarray(values, jnp.bfloat16)
    in_float32 = everything(halves.astype(jnp.float32), ids, where)
    for name, got in everything(halves, ids, where).items():
        assert got.dtype == jnp.float32, name
        np.testing.assert_allclose(got, in_float32[name], rtol=1e-6, atol=1e-6, err_msg=name)


def test_vmap(ragged):
    values, ids, where = (jnp.asarray(x) for x in ragged)
    together = jax.jit(jax.vmap(everything))(*(jnp.stack([x, x[::-1]]) for x in (values, ids, where)))
    for i, expected in enumerate([everything(values, ids, where), everything(values[::-1], ids[::-1], where[::-1])]):
        for name, got in together.items():
            np.testing.assert_allclose(got[i], expected[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_the_order_of_rows_matters_only_by_rounding():
    """Picks to the bit, means of 0s and 1s too, everything else within a few roundings of the spread."""
    draw = np.random.default_rng(2)
    n = 512
    ids, where, order = draw.choice([0, 1, 2, 400], n), draw.random(n) < 0.8, draw.permutation(n)
    for binary in (True, False):
        values = draw.integers(0, 2, n) if binary else np.float32(1000 + draw.normal(0, 1, n))
        shuffled = everything(values[order], ids[order], where[order])
        for name, base in everything(values, ids, where).items():
            got, base = shuffled[name], np.asarray(base)
            if name in PICKS or (binary and name in ("total", "mean", "centered", "leave_one_out_mean")):
                np.testing.assert_array_equal(got, base[order], err_msg=name)
            else:
                scale = {"total": 1e6, "mean": 1e3, "leave_one_out_mean": 1e3, "log_mean_exp": 1e3}.get(name, 1)
                np.testing.assert_allclose(got, base[order], rtol=0, atol=2e-6 * scale, err_msg=name)


def test_rows_on_a_mesh():
    """Rows divided over devices, by `across` within shard_map to the bit, by shardings under jit to rounding."""
    draw = np.random.default_rng(6)
    arrays = draw.normal(size=48).astype(np.float32), draw.choice([-1, 0, 3, 9, 40], 48), draw.random(48) < 0.8

    def stacked(values, ids, where):
        return jnp.stack(list(everything(values, ids, where).values()), axis=-1), segments.number(ids, where)

    rows, number = jax.jit(stacked)(*arrays)
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    split = PartitionSpec(("data", "fsdp"))
    local = segments.across(("data", "fsdp"), stacked)
    mapped = jax.shard_map(local, mesh=mesh, in_specs=split, out_specs=(split, PartitionSpec()))
    got, size = jax.jit(mapped)(*arrays)
    np.testing.assert_array_equal(got, rows)
    assert float(size) == float(number) == 4
    sharding = NamedSharding(mesh, split)
    placed = [jax.device_put(x, sharding) for x in arrays]
    got, size = jax.jit(stacked, out_shardings=(sharding, None))(*placed)
    np.testing.assert_allclose(got, rows, rtol=1e-6, atol=1e-6)
    assert float(size) == 4

    def pull(values):
        names = ("std1", "z_score", "median", "leave_one_out_mean")
        return sum(jnp.sum(jnp.sin(jnp.arange(48)) * STATISTICS[name](values, *arrays[1:])) for name in names)

    gradient = jax.jit(jax.grad(pull))
    np.testing.assert_allclose(gradient(placed[0]), gradient(arrays[0]), rtol=1e-4, atol=1e-5)


ROWS = st.integers(0, 2**32 - 1).map(np.random.default_rng)


def drawn(draw, n=24):
    """Values on a grid of quarters, so that many tie; any of the ids, some rows left out."""
    return draw.integers(-8, 9, n) / 4, draw.integers(-1, n, n) // draw.integers(1, n), draw.random(n) < 0.8


@given(ROWS)
@settings(deadline=None, max_examples=15)
def test_order_names_and_padding(draw):
    values, ids, where = drawn(draw)
    order, names, padding = draw.permutation(24), draw.permutation(24), draw.choice(24, 8, replace=False)
    renamed = np.where(ids < 0, -1, names[ids])
    base = everything(values, ids, where)
    for name, got in everything(values[order], renamed[order], where[order]).items():
        np.testing.assert_allclose(got, np.asarray(base[name])[order], rtol=1e-5, atol=2e-6, err_msg=name)
    kept = np.setdiff1d(np.arange(24), padding)
    values[padding], ids[padding] = np.nan, -1  # as if they were not there
    alone = everything(values[kept], np.asarray(segments.join(ids[kept])), where[kept])
    for name, got in everything(values, ids, where).items():
        np.testing.assert_allclose(np.asarray(got)[kept], alone[name], rtol=1e-5, atol=2e-6, err_msg=name)


@given(ROWS, st.floats(-50, 50), st.floats(0.01, 100))
@settings(deadline=None, max_examples=15)
def test_shift_and_scale(draw, shift, scale):
    """Locations move and grow with the values, spreads only grow, z-scores and ranks do neither."""
    values, ids, where = drawn(draw)
    size = np.asarray(segments.count(ids, where))
    degree = {"z_score": 0, "rank": 0, "variance0": 2, "variance1": 2}
    moves = {"mean": 1, "lower_median": 1, "median": 1, "minimum": 1, "maximum": 1, "leave_one_out_mean": 1}
    before, after = everything(values, ids, where), everything(values * scale + shift, ids, where)
    for name in set(STATISTICS) - {"log_mean_exp", "z_score_inside"}:
        base, got = np.asarray(before[name]), np.asarray(after[name])
        moved = moves.get(name, size if name == "total" else 0) * shift
        some = (size > 0) if name != "leave_one_out_mean" else size - (where & (ids >= 0)) > 0
        expected = np.where(some & (ids >= 0), base * scale ** degree.get(name, 1) + moved, 0)
        if name == "z_score":  # by epsilon, which does not grow
            np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-3)
        else:
            bound = 1e-5 * max(1, scale) ** degree.get(name, 1) + 1e-4 * abs(shift) * 0.1
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=bound, err_msg=name)


@given(ROWS, st.sampled_from([1, 2, 3, 4, 6, 8, 12, 24]))
@settings(deadline=None, max_examples=15)
def test_equal_segments_equal_the_dense_computation(draw, groups):
    values = draw.normal(size=(groups, 24 // groups))
    ids, everyone = np.repeat(draw.permutation(24)[:groups], 24 // groups), np.ones(24, bool)
    middle = np.sort(values)[:, (24 // groups - 1) // 2, None]
    away = np.sort(np.abs(values - middle))[:, (24 // groups - 1) // 2, None]
    mean = values.mean(1, keepdims=True)
    dense = {
        "total": values.sum(1, keepdims=True),
        "mean": mean,
        "std0": values.std(1, keepdims=True),
        "median": np.median(values, 1, keepdims=True),
        "lower_median": middle,
        "median_absolute_deviation": away,
        "centered": values - mean,
        "rank": values.argsort(1).argsort(1),
    }
    if groups < 24:
        dense["z_score"] = (values - mean) / (values.std(1, ddof=1, keepdims=True) + 1e-6)
        dense["leave_one_out_mean"] = values - (values - mean) * values.shape[1] / (values.shape[1] - 1)
    got = everything(values.reshape(-1), ids, everyone)
    for name, expected in dense.items():
        np.testing.assert_allclose(got[name], np.broadcast_to(expected, values.shape).reshape(-1), rtol=1e-4, atol=3e-6)


SMOOTH = ("total", "mean", "variance0", "variance1", "std1", "minimum", "median", "log_mean_exp")
SMOOTH += ("maximum", "lower_median", "median_absolute_deviation", "std0")
SMOOTH += ("leave_one_out_mean", "centered", "z_score", "z_score_inside")
IDS = np.array([0, 1, 0, 1, 1, -1, 0, 2, 3, 3, 0])
WHERE = np.array([1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 0], bool)


@jax.jit
def pulled(values):
    """A scalar of each statistic of segments 0 to 3: ragged, a pair, a single row, equal values."""
    pull = jnp.where(IDS < 0, 0, np.random.default_rng(4).normal(size=11))
    return {name: jnp.sum(jnp.where(IDS < 0, 0, pull * STATISTICS[name](values, IDS, WHERE))) for name in SMOOTH}


slopes = jax.jit(jax.jacrev(pulled))


def distinct():
    values = np.random.default_rng(5).permutation(11) / 2.0
    values[8:10] = 0.85
    return values


def test_gradients():
    values, step = distinct(), 2e-2
    found = {name: np.asarray(gradient) for name, gradient in slopes(jnp.float32(values)).items()}
    for i in np.flatnonzero((IDS >= 0) & (IDS != 3)):
        up, down = values.copy(), values.copy()
        up[i] += step
        down[i] -= step
        above, below = pulled(up), pulled(down)
        for name, gradient in found.items():
            slope = (above[name] - below[name]) / (2 * step)
            np.testing.assert_allclose(gradient[i], slope, atol=3e-3, err_msg=name)
    for name, gradient in found.items():
        assert np.isfinite(gradient).all(), name
        assert not gradient[~WHERE | (IDS < 0)].any(), name


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf])
def test_garbage_in_rows_left_out_spares_the_gradient(garbage):
    clean = slopes(jnp.float32(distinct()))
    for name, gradient in slopes(jnp.float32(np.where(WHERE & (IDS >= 0), distinct(), garbage))).items():
        np.testing.assert_array_equal(gradient, clean[name], err_msg=name)
