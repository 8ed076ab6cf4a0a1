"""GRAO's three terms: the worked examples, float64 loops term by term, laws, garbage."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.losses.alignment import MEMBERS, alignment_coefficients, group_alignment
from tests import laws

SCORES, REFERENCE, ONE = np.array([-0.4, -0.9, -0.6, -1.1]), np.arange(4) == 3, np.zeros(4, int)
COEFFICIENTS = jax.jit(alignment_coefficients, static_argnames="members")
LOSS = jax.jit(jax.value_and_grad(group_alignment), static_argnames="members")


class Groups:
    """Groups with a reference each, one of them tied, one without a reference, one without outputs, rows in none."""

    def __init__(self, seed: int):
        draw = np.random.default_rng(seed)
        order = draw.permutation(20)
        self.ids = np.repeat([4, 1, 7, 0, 8, -1], [6, 5, 4, 2, 1, 2])[order]
        self.references = np.isin(np.arange(20), [0, 6, 11, 17])[order]
        n = len(self.ids)
        self.rewards = draw.integers(-1, 2, n).astype(float)
        self.rewards[self.references] = 0
        self.rewards[self.ids == 7] = 0  # all tie
        outputs = np.flatnonzero((self.ids == 4) & ~self.references)
        self.rewards[outputs] = [1, -1, 0.3, 0.7, np.nan]
        self.weights = np.ones(n)
        self.weights[outputs[:2]] = [2.0, 0.5]
        self.weights[np.flatnonzero((self.ids == 1) & ~self.references)[0]] = 0
        self.scores = draw.normal(-1, 0.5, n)


def terms_by_loops(data, scores, members, epsilon=1e-6, beta=0.5, lam=0.6):
    """The means over groups of the three terms, weight c as c rows."""
    total, groups = np.zeros(3), {g for g, w in zip(data.ids, data.weights) if g >= 0 and w > 0}
    for group in groups:
        rows = [
            i
            for i in range(len(scores))
            if data.ids[i] == group and data.weights[i] > 0 and not math.isnan(data.rewards[i])
        ]
        outputs, references = [i for i in rows if not data.references[i]], [i for i in rows if data.references[i]]
        if not outputs or not references:
            continue
        (y,), c = references, data.weights
        member = rows if members == "joint" else outputs
        mass = sum(c[i] for i in member)
        mean = sum(c[i] * data.rewards[i] for i in member) / mass
        deviation = math.sqrt(sum(c[i] * (data.rewards[i] - mean) ** 2 for i in member) / mass)
        if len({data.rewards[i] for i in member}) == 1:
            continue
        a = {i: (data.rewards[i] - mean) / (deviation + epsilon) for i in rows}
        size = sum(c[i] for i in outputs)
        total += [
            sum(c[i] * a[i] * scores[i] for i in outputs) / size,
            beta * a[y] * scores[y],
            lam * sum(c[i] * a[i] * (scores[i] - scores[y]) for i in outputs) / size,
        ]
    return total / len(groups)


@pytest.mark.parametrize(
    ("rewards", "members", "epsilon", "terms", "coefficients"),
    [
        ([-1, -1, 0, 0], "joint", 0.0, [0.233333, -0.55, -0.08], [-0.533333, -0.533333, 0.533333, 0.7]),
        ([-1, -1, 0, 0], "outputs", 0.0, [0.023570, -0.777817, 0.014142], [None, None, None, 0.707107]),
        ([1, 0, 1, 0], "joint", 1e-6, 0.716665, [None, None, None, -0.699999]),
        ([-1, -1, -1, 0], "joint", 1e-6, -0.748629, [-0.307919, -0.307919, -0.307919, 1.212433]),
    ],
)
def test_worked_examples(rewards, members, epsilon, terms, coefficients):
    value, gradient = LOSS(SCORES, np.array(rewards), ONE, REFERENCE, members=members, epsilon=epsilon)
    assert float(value) == pytest.approx(-np.sum(terms), abs=2e-6)
    each = COEFFICIENTS(np.array(rewards), ONE, REFERENCE, members=members, epsilon=epsilon)
    for got, slope, expected in zip(each, gradient, coefficients):
        assert float(slope) == pytest.approx(-float(got), abs=1e-7)
        assert expected is None or float(got) == pytest.approx(expected, abs=2e-6)
    if np.size(terms) == 3:  # one term at a time: beta and lambda 0, then each alone
        bare, imitating, apart = (
            LOSS(SCORES, np.array(rewards), ONE, REFERENCE, members=members, epsilon=epsilon, beta=b, lam=c)[0]
            for b, c in ((0.0, 0.0), (0.5, 0.0), (0.0, 0.6))
        )
        got = [-float(bare), float(bare - imitating), float(bare - apart)]
        np.testing.assert_allclose(got, terms, atol=2e-6)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("members", MEMBERS)
def test_against_loops(seed, members, slope):
    data = Groups(seed)
    rest = data.rewards, data.ids, data.references
    value, gradient = LOSS(data.scores, *rest, members=members, weights=data.weights, beta=0.4, lam=0.9)
    options = {"beta": 0.4, "lam": 0.9}
    expected = -terms_by_loops(data, data.scores, members, **options).sum()
    assert float(value) == pytest.approx(expected, rel=3e-6, abs=1e-6)
    differences = slope(lambda s: -terms_by_loops(data, s, members, **options).sum(), data.scores)
    np.testing.assert_allclose(gradient, differences, atol=2e-6)
    silent = np.isin(data.ids, [-1, 7, 0, 8]) | np.isnan(data.rewards) | (data.weights == 0)
    assert not np.asarray(gradient)[silent].any() and np.abs(gradient).max() > 0.05
    for fill in (np.nan, np.inf):
        dirty = np.where(silent, fill, data.scores)
        rewards = np.where((data.ids < 0) | (data.weights == 0), fill, data.rewards)
        again = LOSS(
            dirty, rewards, data.ids, data.references, members=members, weights=data.weights, beta=0.4, lam=0.9
        )
        np.testing.assert_array_equal(again[0], value)
        np.testing.assert_array_equal(again[1], gradient)


def test_laws_of_rows():
    data = Groups(4)

    @jax.jit
    def both(scores, rewards, references, weights, group_ids):
        rest = rewards, group_ids, references
        return alignment_coefficients(*rest, weights=weights), group_alignment(scores, *rest, weights=weights)

    names = ("scores", "rewards", "references", "weights")
    coefficients, loss = laws.rows(both, {n: getattr(data, n) for n in names} | {"group_ids": data.ids})
    assert abs(loss) > 0.01 and np.count_nonzero(coefficients) > 5


def test_a_row_of_weight_c_is_c_rows():
    data = Groups(1)
    data.weights = np.where((np.arange(20) % 3 == 0) & ~data.references, 2.0, 1.0)
    copies = np.repeat(np.arange(20), data.weights.astype(int))
    got, _ = LOSS(data.scores, data.rewards, data.ids, data.references, weights=data.weights)
    expected, _ = LOSS(data.scores[copies], data.rewards[copies], data.ids[copies], data.references[copies])
    assert float(got) == pytest.approx(float(expected), rel=1e-5)


@given(st.lists(st.sampled_from([-1.0, 0.0, 1.0]), min_size=3, max_size=3), st.floats(0, 2), st.floats(0, 2))
@settings(max_examples=25, deadline=None)
def test_joint_advantages_add_up_to_nothing(rewards, beta, lam):
    """So the reference's coefficient is (beta + lam / G) A_y, of the sign against that of the outputs' sum."""
    each = np.asarray(COEFFICIENTS(np.array([*rewards, 0.0]), ONE, REFERENCE, beta=beta, lam=lam))
    advantage_y = -each[:3].sum() * 3 / (1 + lam)
    assert each[3] == pytest.approx((beta + lam / 3) * advantage_y, abs=1e-5)
    if set(rewards) == {0.0}:
        assert not each.any()


def test_outputs_rewarded_alike_say_nothing_without_the_reference_among_them():
    """(R_y - mean) / epsilon would be a million; among all four, it is imitation."""
    rewards = np.array([-1.0, -1, -1, 0])
    assert not np.asarray(COEFFICIENTS(rewards, ONE, REFERENCE, members="outputs")).any()
    assert np.asarray(COEFFICIENTS(rewards, ONE, REFERENCE))[3] > 1


def test_coefficients_are_constants_and_bad_members_are_refused():
    gradient = jax.grad(lambda r: group_alignment(SCORES, r, ONE, REFERENCE))(jnp.array([1.0, 0, 1, 0]))
    assert not np.asarray(gradient).any()
    with pytest.raises(ValueError, match=r"one of \('joint', 'outputs'\), got 'all'"):
        group_alignment(SCORES, SCORES, ONE, REFERENCE, members="all")
    with pytest.raises(ValueError, match=r"references must have one entry for each of the 4 rows"):
        group_alignment(SCORES, SCORES, ONE, REFERENCE[:3])
    with pytest.raises(ValueError, match=r"got scores \[4, 1\] for group_ids \[4\]"):
        group_alignment(SCORES[:, None], SCORES, ONE, REFERENCE)
