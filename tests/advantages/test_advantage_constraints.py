"""FGRPO's combination and its multipliers: the worked example, float64 loops, missing verdicts, bounds."""

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.advantages.constraints import constrained, dual_init, dual_update

REWARDS, ONE = jnp.array([1.0, 0, 1, 0]), jnp.zeros(4, int)
SIGNALS = jnp.array([[1, 0.8], [1, 0.4], [0, 0.6], [0, 0.2]])
DUALS = jnp.array([0.2, 0.1])
compiled = jax.jit(constrained, static_argnames=("constraint_norm", "rescale"))


def test_worked_example():
    got = compiled(REWARDS, SIGNALS, ONE, DUALS)
    np.testing.assert_allclose(got, [1.155195, -0.731415, 0.731415, -1.155195], atol=2e-6)
    rescaled = compiled(REWARDS, SIGNALS, ONE, DUALS, rescale=True)
    np.testing.assert_allclose(rescaled, [0.888612, -0.562627, 0.562627, -0.888612], atol=2e-6)
    after = dual_update(DUALS, SIGNALS, ONE, targets=(0.95, 0.8))
    np.testing.assert_allclose(after, [0.2225, 0.115], atol=1e-6)


def test_an_unfaithful_group_is_seen_by_batch_statistics_only():
    consistency, groups = jnp.repeat(jnp.array([1.0, 0.0]), 4)[:, None], jnp.repeat(jnp.array([0, 1]), 4)
    none = jnp.zeros(8)
    got = compiled(none, consistency, groups, jnp.ones(1), constraint_norm="batch")
    np.testing.assert_allclose(got, [0.935239] * 4 + [-0.935239] * 4, atol=2e-6)
    assert not np.asarray(compiled(none, consistency, groups, jnp.ones(1))).any()


def z_scores(values, ids, epsilon=1e-4):
    result = np.zeros(len(values))
    for i in range(len(values)):
        mates = [values[j] for j in range(len(values)) if ids[j] == ids[i] and not np.isnan(values[j])]
        if ids[i] >= 0 and not np.isnan(values[i]) and len(mates) > 1 and max(mates) > min(mates):
            result[i] = (values[i] - np.mean(mates)) / (np.std(mates, ddof=1) + epsilon)
    return result


def oracle(rewards, signals, groups, duals, norm="group", rescale=False):
    ids = groups if norm == "group" else np.where(groups < 0, -1, 0)
    result = z_scores(rewards, groups) + sum(d * z_scores(s, ids) for d, s in zip(duals, signals.T))
    return result / (1 + sum(duals)) if rescale else result


def ragged(seed):
    draw = np.random.default_rng(seed)
    rows = {
        "rewards": draw.normal(size=27).round(2),
        "signals": draw.random((27, 3)).round(1),
        "group_ids": draw.integers(-1, 5, 27),
    }
    rows["rewards"][draw.random(27) < 0.15] = np.nan
    rows["signals"][draw.random((27, 3)) < 0.2] = np.nan
    rows["signals"][rows["group_ids"] == 1, 0] = 0.85
    return rows


@pytest.mark.parametrize(("norm", "rescale"), [("group", False), ("batch", True)])
@pytest.mark.parametrize("seed", [0, 1])
def test_against_float64(seed, norm, rescale):
    rows, duals = ragged(seed), np.array([0.7, 0.0, 1.3])
    form = {"constraint_norm": norm, "rescale": rescale}
    got = jax.jit(lambda **rows: constrained(**rows, duals=duals, **form))(**rows)
    np.testing.assert_allclose(got, oracle(*rows.values(), duals, norm, rescale), rtol=1e-5, atol=5e-6)


def test_rows_in_any_order_padding_and_mesh():
    laws.rows(lambda **rows: constrained(**rows, duals=jnp.array([0.7, 0, 1.3]), constraint_norm="batch"), ragged(0))


def test_multipliers_of_zero_leave_the_task_alone():
    rows = ragged(0)
    got = constrained(**rows, duals=dual_init(3))
    np.testing.assert_allclose(got, z_scores(rows["rewards"], rows["group_ids"]), rtol=1e-5, atol=5e-6)
    assert dual_init(3).shape == (3,)


@pytest.mark.parametrize("seed", [0, 1])
def test_dual_step_against_float64(seed):
    rows, duals, targets = ragged(seed), np.array([1.0, 4.99, 0.5]), np.array([0.1, 0.95, 0.9])
    rows["signals"][:, 2] = np.nan
    expected = duals.copy()
    for k in range(2):
        given = [s for s, g in zip(rows["signals"][:, k], rows["group_ids"]) if g >= 0 and not np.isnan(s)]
        expected[k] = np.clip(duals[k] + 0.2 * (targets[k] - np.mean(given)), 0, 5)
    named = {"signals": rows["signals"], "group_ids": rows["group_ids"]}
    step = lambda **rows: list(dual_update(jnp.float32(duals), **rows, targets=targets, eta=0.2))  # noqa: E731
    np.testing.assert_allclose(laws.rows(step, named), expected, atol=2e-6)
    assert 0.5 < expected[0] < 0.95 and expected[1] == 5 and expected[2] == 0.5


LEVELS = st.integers(0, 1024).map(lambda n: n / 1024)  # the mean of three equal ones is then that level, not beside it


@jax.jit
def one_step(duals, signals, targets):
    return dual_update(duals, signals, jnp.arange(3), targets=targets)


@settings(max_examples=25, deadline=None)
@given(st.floats(0, 5), LEVELS, LEVELS)
def test_multipliers_rise_below_the_target_only(dual, level, target):
    signals = jnp.full((3, 1), level)
    after = float(one_step(jnp.array([dual]), signals, jnp.array([target]))[0])
    assert 0 <= after <= 5
    change = after - np.float32(dual)
    assert change == 0 or (change > 0) == (target > level)


def test_gradient_against_finite_differences():
    """Learned signals may be differentiated; garbage in rows of no group reaches nobody."""
    rows, duals = ragged(0), np.array([0.7, 0.2, 1.3])
    rewards, signals, groups = rows.values()
    pull = np.random.default_rng(0).normal(size=27)
    dirty = jnp.float32(np.where(groups[:, None] < 0, np.inf, signals))
    slope = jax.jit(jax.grad(lambda s: jnp.sum(pull * constrained(rewards, s, groups, duals))))(dirty)
    assert np.isfinite(slope).all()
    for i, k in np.ndindex(signals.shape):
        mates = signals[(groups == groups[i]) & ~np.isnan(signals[:, k]), k]
        if groups[i] < 0 or np.isnan(signals[i, k]) or len(mates) < 2 or np.ptp(mates) == 0:
            assert slope[i, k] == 0
            continue
        up, down = signals.copy(), signals.copy()
        up[i, k], down[i, k] = up[i, k] + 1e-5, down[i, k] - 1e-5
        moved = pull @ (oracle(rewards, up, groups, duals) - oracle(rewards, down, groups, duals)) / 2e-5
        np.testing.assert_allclose(slope[i, k], moved, rtol=2e-3, atol=5e-3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: constrained(REWARDS, SIGNALS[:3], ONE, DUALS), r"got \[3, 2\], \[4\] and \[2\]"),
        (lambda: constrained(REWARDS, SIGNALS, ONE, DUALS, constraint_norm="row"), r"\('group', 'batch'\), got 'row'"),
        (lambda: dual_update(DUALS, SIGNALS, ONE, targets=[0.5]), r"one target per multiplier, got \[1\] for \[2\]"),
        (lambda: dual_update(DUALS, SIGNALS, ONE, targets=[0.5, 1], eta=-1.0), "eta is not negative .* got -1.0"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
