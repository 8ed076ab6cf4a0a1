"""Outcome and rubric in one reward: worked examples of paper and code, float64 loops, laws."""

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest

from grpo_jax.advantages import group_z_score
from grpo_jax.advantages.mixing import rubric_mixed

OUTCOMES, RUBRICS = np.array([1, 1, 0, 0, 1, 0.0]), np.array([0.75, 0.25, 0.5, 0, 0.5, 0.25])
ONE = np.zeros(6, int)


@pytest.mark.parametrize(
    ("relative", "rewards", "advantages"),
    [
        (True, [1, 0.8, 0, 0, 0.9, 0], [1.106658, 0.704237, -0.905447, -0.905447, 0.905447, -0.905447]),
        (False, [0.925, 0.775, 0, 0, 0.85, 0], [1.068432, 0.747903, -0.908167, -0.908167, 0.908167, -0.908167]),
    ],
    ids=["paper", "code"],
)
def test_worked_example(relative, rewards, advantages):
    got = rubric_mixed(OUTCOMES, RUBRICS, ONE, relative=relative)
    np.testing.assert_allclose(got, rewards, atol=1e-6)
    np.testing.assert_allclose(group_z_score(got, ONE), advantages, atol=2e-6)


def by_hand(outcomes, rubrics, groups, alpha=0.3, to="correct", relative=True):
    result = np.zeros(len(groups))
    rubrics = np.where(np.isnan(rubrics), 0, rubrics)
    for i, group in enumerate(groups):
        if np.isnan(outcomes[i]):
            result[i] = np.nan
            continue
        if group < 0:
            continue
        best = max(rubrics[j] for j in range(len(groups)) if groups[j] == group and not np.isnan(outcomes[j]))
        share = (rubrics[i] / best if best > 0 else 0) if relative else rubrics[i]
        right = outcomes[i] > 0
        if to == "correct":
            result[i] = outcomes[i] * ((1 - alpha) + alpha * share)
        elif to == "all":
            result[i] = (1 - alpha) * outcomes[i] + alpha * share
        else:
            result[i] = outcomes[i] if right else alpha * share
    return result


@pytest.fixture(params=[0, 1])
def ragged(request):
    draw = np.random.default_rng(request.param)
    groups = draw.permutation(np.repeat([0, 1, 2, 7, -1], [6, 5, 1, 9, 4]))
    outcomes, rubrics = draw.integers(0, 2, 25).astype(float), draw.random(25).round(2)
    outcomes[draw.random(25) < 0.12] = np.nan
    rubrics[draw.random(25) < 0.12] = np.nan
    rubrics[groups == 1] = 0  # nobody has anything
    return outcomes, rubrics, groups


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("to", ["correct", "all", "wrong"])
def test_against_float64(ragged, to, relative):
    got = rubric_mixed(*ragged, alpha=0.4, to=to, relative=relative)
    np.testing.assert_allclose(got, by_hand(*ragged, alpha=0.4, to=to, relative=relative), rtol=1e-6, atol=1e-7)
    assert got.dtype == jnp.float32


@pytest.mark.parametrize("ragged", [0], indirect=True)
@pytest.mark.parametrize("to", ["correct", "all", "wrong"])
def test_laws(ragged, to):
    arrays = dict(zip(("outcomes", "rubrics", "group_ids"), ragged))
    got = laws.rows(jax.jit(lambda **a: jnp.nan_to_num(rubric_mixed(**a, to=to), nan=-1.0)), arrays)
    assert (got == -1).any() and (got > 0).any()


def test_gradient(ragged):
    outcomes, rubrics, groups = ragged
    pull = np.where(np.isnan(outcomes), 0, np.random.default_rng(2).normal(size=25))

    def total(rubrics):
        mixed = rubric_mixed(outcomes, rubrics, groups, to="all")
        return jnp.where(np.isnan(outcomes), 0, pull * mixed).sum()

    gradient = jax.grad(total)(jnp.float32(rubrics))
    for i in range(25):
        if np.isnan(rubrics[i]) or groups[i] == 1:  # at 0 the share jumps
            continue
        up, down = rubrics.copy(), rubrics.copy()
        up[i] += 1e-6
        down[i] -= 1e-6
        slope = np.nansum(pull * (by_hand(outcomes, up, groups, to="all") - by_hand(outcomes, down, groups, to="all")))
        np.testing.assert_allclose(gradient[i], slope / 2e-6, rtol=1e-3, atol=1e-4)
    assert np.isfinite(gradient).all()


def test_who_is_paid():
    """Only right answers by default; the best rubric of the group counts whoever has it; its scale does not."""
    assert not np.asarray(rubric_mixed(np.zeros(6), RUBRICS, ONE)).any()
    lowered = rubric_mixed(OUTCOMES, np.where(np.arange(6) == 3, 1.0, RUBRICS), ONE)  # a wrong one with everything
    assert float(lowered[0]) == pytest.approx(0.7 + 0.3 * 0.75)
    np.testing.assert_allclose(rubric_mixed(OUTCOMES, RUBRICS / 5, ONE), [1, 0.8, 0, 0, 0.9, 0], atol=1e-6)
    np.testing.assert_allclose(rubric_mixed(OUTCOMES, RUBRICS, ONE, alpha=0.0), OUTCOMES)
    equal = rubric_mixed(np.ones(7), np.full(7, 0.5), np.zeros(7, int), relative=False)  # 0.85 each
    assert not np.asarray(group_z_score(equal, np.zeros(7, int))).any()


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"in \[0, 1\], got 1.3"):
        rubric_mixed(OUTCOMES, RUBRICS, ONE, alpha=1.3)
    with pytest.raises(ValueError, match=r"\('correct', 'wrong', 'all'\), got 'right'"):
        rubric_mixed(OUTCOMES, RUBRICS, ONE, to="right")
    with pytest.raises(ValueError, match=r"got \[6\] and \[5\]"):
        rubric_mixed(OUTCOMES, RUBRICS[:5], ONE)
