"""TempSamp-R1's map and anchor: the worked example, float64, monotone and continuous, gradients."""

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.advantages.asymmetry import anchored, asymmetric
from grpo_jax.advantages.group import group_z_score

OVERLAP, FORM, ONE = jnp.array([0.2, 0.5, 0.85, 1.0]), jnp.array([1.0, 0, 1, 1]), jnp.zeros(4, int)
LAST = jnp.array([False, False, False, True])


def test_worked_example():
    shaped = asymmetric(OVERLAP)
    np.testing.assert_allclose(shaped, [0.321546, 0.596390, 0.800488, 0.801823], atol=1e-6)
    np.testing.assert_allclose(group_z_score(shaped, ONE), [-1.357884, -0.1482, 0.750103, 0.755981], atol=2e-5)
    both = group_z_score(shaped + 0.1 * FORM, ONE)
    np.testing.assert_allclose(both, [-1.194175, -0.457727, 0.823139, 0.828763], atol=2e-5)
    np.testing.assert_allclose(asymmetric(jnp.array([0.0, 1.0])), [0.086764, 0.801823], atol=1e-6)


def test_anchor_of_the_worked_example():
    got = anchored(OVERLAP, ONE, LAST)
    np.testing.assert_allclose(got, [-0.973396, -0.051231, 1.024628, 1.229553], atol=1e-5)


def formula(r, tau=0.8, one=0.01, two=1.0):
    if r >= tau:
        return tau + one * np.log(1 + r - tau)
    return tau - (np.exp(two * (tau - r)) - 1) / (np.exp(two) - 1)


@pytest.mark.parametrize("options", [{}, {"threshold": 0.5, "compression": 0.1, "expansion": 3.0}])
def test_map_against_float64(options):
    draw = np.random.default_rng(0)
    rewards = np.append(draw.random(30), [0, 0.5, 0.8, 1, np.nan])
    shaped = lambda rewards: asymmetric(rewards, **options)  # noqa: E731
    got = jax.jit(shaped)(rewards) if options else laws.rows(shaped, {"rewards": rewards}, ids=())
    expected = [formula(r, *(options or {"tau": 0.8, "one": 0.01, "two": 1.0}).values()) for r in rewards]
    np.testing.assert_allclose(got, expected, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.floats(0, 1), st.floats(1e-3, 1), st.floats(0.1, 0.9))
def test_map_is_increasing_and_continuous(low, step, threshold):
    values = asymmetric(jnp.array([low, low + step, threshold - 1e-6, threshold]), threshold=threshold)
    assert values[1] > values[0] and abs(float(values[3] - values[2])) < 1e-5
    assert float(values[3]) == pytest.approx(threshold, abs=1e-6)


def test_gradient_of_the_map():
    rewards = jnp.array([0.0, 0.3, 0.79, 0.81, 1.0, jnp.nan, jnp.inf, -jnp.inf])
    slope = jax.jit(jax.vmap(jax.grad(lambda r: asymmetric(r[None])[0])))(rewards)
    for r, got in zip(rewards[:5], slope):
        moved = (formula(float(r) + 1e-6) - formula(float(r) - 1e-6)) / 2e-6
        assert float(got) == pytest.approx(moved, rel=1e-4)
    clean = jax.jit(jax.grad(lambda r: jnp.sum(jnp.where(jnp.arange(8) < 5, asymmetric(r), 0))))(rewards)
    assert (clean[:5] > 0).all() and not clean[5:].any()


def oracle(rewards, groups, injected, kappa):
    result = np.zeros(len(rewards))
    for i in range(len(rewards)):
        group = [j for j in range(len(rewards)) if groups[j] == groups[i] >= 0 and not np.isnan(rewards[j])]
        drawn = np.array([rewards[j] for j in group if not injected[j]])
        if i not in group or len(drawn) < 2 or np.ptp(drawn) == 0:
            continue
        z = (drawn - drawn.mean()) / (drawn.std(ddof=1) + 1e-6)
        result[i] = kappa * z.max() if injected[i] else (rewards[i] - drawn.mean()) / (drawn.std(ddof=1) + 1e-6)
    return result


@pytest.mark.parametrize("seed", [0, 1])
def test_anchor_against_float64(seed):
    draw = np.random.default_rng(seed)
    rows = {
        "rewards": draw.random(30).round(2),
        "group_ids": draw.integers(-1, 6, 30),
        "injected": draw.random(30) < 0.2,
    }
    rows["rewards"][draw.random(30) < 0.15] = np.nan
    rows["rewards"][rows["group_ids"] == 2] = 0.85
    expected = oracle(*rows.values(), 1.5)
    above = lambda **named: anchored(**named, kappa=1.5)  # noqa: E731
    got = jax.jit(above)(**rows) if seed else laws.rows(above, rows, half=0.1)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    here = rows["injected"] & (expected != 0)
    assert here.any()
    pull = draw.normal(size=30)
    others = rows["group_ids"], rows["injected"]
    slope = jax.jit(jax.grad(lambda r: jnp.sum(pull * anchored(r, *others, kappa=1.5))))(jnp.float32(rows["rewards"]))
    assert np.isfinite(slope).all() and not np.asarray(slope)[np.isnan(rows["rewards"]) | rows["injected"]].any()


def test_errors():
    with pytest.raises(ValueError, match="compression must be above 0, .* got 0"):
        asymmetric(OVERLAP, compression=0)
    with pytest.raises(ValueError, match=r"injected must have one value per row, got \[3\] for \[4\]"):
        anchored(OVERLAP, ONE, LAST[:3])
