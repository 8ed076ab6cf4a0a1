"""DisCO's scores, objective and constraint, DRPO's weights: worked examples, float64 loops, laws, divided groups."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from grpo_jax import losses, segments
from grpo_jax.losses import discriminative as of
from tests import laws

RIGHT = np.array([1, 0, 0, 1.0])
OLD = [[-0.25, -0.4, -0.5, 0], [-0.5, -0.35, 0, 0], [-0.9, -0.7, -0.8, -0.6], [-0.12, -0.3, -0.2, 0]]
MASK = np.arange(4) < np.array([3, 2, 4, 3])[:, None]
CASE_A = [[-0.2, -0.4, -0.6, 0], [-0.5, -0.3, 0, 0], OLD[2], [-0.1, -0.3, -0.2, 0]]
CASE_B = np.array(OLD) - np.array([[0.03], [0.01], [0.02], [0.02]])
SHORT = [[-0.2, -0.4, -0.6, 0], [-0.5, -0.3, 0, 0], OLD[2], [-0.1, 0, 0, 0]]
NOBODY = {"rewards": np.nan, "weights": np.nan, "shares": np.nan}


class Groups:
    """Groups of 6, 5, 3, 2 (right only), 1 and two rows in none, shuffled; a NaN reward, one that is neither 0 nor 1,
    weights of 0, 2 and 0.5."""

    def __init__(self, seed: int):
        draw = np.random.default_rng(seed)
        self.ids = draw.permutation(np.repeat([4, 7, 0, 2, 5, -1], [6, 5, 3, 2, 1, 2]))
        n = len(self.ids)
        self.rewards = draw.integers(0, 2, n).astype(float)
        for group in (4, 7, 0):
            self.rewards[np.flatnonzero(self.ids == group)[:2]] = [0, 1]
        self.rewards[self.ids == 2] = 1
        self.rewards[np.flatnonzero(self.ids == 4)[-1]] = np.nan
        self.rewards[np.flatnonzero(self.ids == 7)[-1]] = 0.5
        self.weights = draw.permutation(np.concatenate([[0.0, 2.0, 0.5], np.ones(n - 3)]))
        self.scores = draw.normal(-1, 0.7, n)
        self.preferences = draw.uniform(0, 1, n)

    def arrays(self, *names):
        return {name: getattr(self, name) for name in names} | {"group_ids": self.ids}


def shares_by_loops(data, lam):
    result = np.zeros(len(data.ids))
    for i, group in enumerate(data.ids):
        rows = [j for j in range(len(data.ids)) if data.ids[j] == group and data.rewards[j] == 1]
        if group >= 0 and i in rows:
            power = {j: data.weights[j] * math.exp(data.preferences[j] / lam) for j in rows}
            result[i] = power[i] / sum(power.values()) if sum(power.values()) else 0
    return result


def objective_by_loops(data, scores, tau, shares=None):
    counted = [i for i in range(len(data.ids)) if data.ids[i] >= 0 and data.weights[i] > 0]
    groups, total = {data.ids[i] for i in counted}, 0.0
    for group in groups:
        up, down = ([i for i in counted if data.ids[i] == group and data.rewards[i] == v] for v in (1, 0))
        if not up or not down:
            continue
        c = data.weights
        raised = sum((c[i] / c[up].sum() if shares is None else shares[i]) * scores[i] for i in up)
        if tau == math.inf:
            total += raised - sum(c[j] * scores[j] for j in down) / c[down].sum()
        else:
            mass = sum(c[j] * math.exp(scores[j] / tau) for j in down) / c[down].sum()
            total += raised - tau * math.log(mass)
    return -total / len(groups)


# ---- scores ----------------------------------------------------------------------------------------------------------


def test_scores_of_the_worked_example():
    np.testing.assert_allclose(jax.jit(of.mean_logp)(np.array(CASE_A), MASK), [-0.4, -0.4, -0.75, -0.2], rtol=1e-6)
    ratios = jax.jit(of.mean_ratio)(np.array(CASE_A), np.array(OLD), MASK)
    np.testing.assert_allclose(ratios, [0.985370, 1.025636, 1, 1.006734], atol=1e-6)


def scores_by_loops(new, old, mask, correct):
    result = np.zeros((3, len(mask)))
    for i in range(len(mask)):
        for t in np.flatnonzero(mask[i]):
            rho = math.exp(new[i, t] - old[i, t])
            clipped = min(rho, 1.3) if correct[i] else max(rho, 0.9)
            result[:, i] += np.array([new[i, t], rho, clipped]) / mask[i].sum()
    return result


@jax.jit
def all_scores(new, old, mask, correct):
    return jnp.stack(
        [
            of.mean_logp(new, mask),
            of.mean_ratio(new, old, mask),
            of.mean_clipped_ratio(new, old, mask, correct, low=0.1, high=0.3),
        ]
    )


def test_scores_against_loops(ragged, slope):
    correct = np.arange(len(ragged.mask)) % 2 == 0
    expected = scores_by_loops(ragged.logps, ragged.old_logps, ragged.mask, correct)
    np.testing.assert_allclose(
        all_scores(ragged.logps, ragged.old_logps, ragged.mask, correct), expected, rtol=1e-6, atol=1e-6
    )
    assert (expected[:, 0] == 0).all() and np.abs(expected[1] - expected[2]).max() > 0.01
    mix = np.random.default_rng(1).normal(size=expected.shape)

    @jax.jit
    def gradient(new, old):
        return jax.grad(lambda new: jnp.sum(mix * all_scores(new, old, ragged.mask, correct)))(jnp.asarray(new))

    differences = slope(
        lambda new: (mix * scores_by_loops(new, ragged.old_logps, ragged.mask, correct)).sum(), ragged.logps
    )
    np.testing.assert_allclose(gradient(ragged.logps, ragged.old_logps), differences, rtol=1e-4, atol=1e-5)
    hidden = lambda x, fill: np.where(ragged.mask, x, fill).astype(np.float32)  # noqa: E731
    for fill in (np.nan, np.inf, -np.inf):
        dirty = hidden(ragged.logps, fill), hidden(ragged.old_logps, -fill)
        np.testing.assert_array_equal(
            all_scores(*dirty, ragged.mask, correct), all_scores(*map(np.nan_to_num, dirty), ragged.mask, correct)
        )
        np.testing.assert_allclose(gradient(*dirty), differences, rtol=1e-4, atol=1e-5)


def test_scores_are_float32_whatever_they_are_made_of(ragged):
    half = jnp.asarray(ragged.logps, jnp.bfloat16)
    got = all_scores(half, half, ragged.mask, ragged.weights > 0)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got[0], of.mean_logp(half.astype(jnp.float32), ragged.mask))
    assert (got[1:, 1:] == 1).all()


@pytest.mark.parametrize("seed", range(3))
def test_grpo_is_the_objective_of_its_clipped_ratio(seed):
    """With 0/1 rewards, std over n and a mean over sequences: sqrt(p (1 - p)) times the difference of mean scores."""
    draw = np.random.default_rng(seed)
    old, correct = -draw.exponential(1.0, (8, 5)), np.arange(8) < 3
    new, mask = old + draw.normal(0, 0.4, old.shape), np.arange(5) < draw.integers(1, 6, 8)[:, None]
    spread = math.sqrt(3 / 8 * 5 / 8)
    advantages = np.where(correct, 5 / 8, -3 / 8) / spread

    def grpo(new):
        loss = losses.ppo_clip(losses.token_ratio(new, old), jnp.broadcast_to(advantages[:, None], new.shape))
        return losses.weighted_sum(loss, losses.sequence_mean(np.ones(8), mask))

    def disco(new):
        scores = of.mean_clipped_ratio(new, old, mask, correct)
        return spread * of.discriminative_loss(scores, correct, np.zeros(8, int), tau=math.inf)

    got, expected = (jax.jit(jax.value_and_grad(f))(jnp.asarray(new, jnp.float32)) for f in (disco, grpo))
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(got[1], expected[1], atol=1e-6)


# ---- the objective ---------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("score", "tau", "penalty", "estimator"))
def published(new, score="logL", tau=10.0, penalty=1e3, estimator="kl"):
    old = jnp.asarray(OLD)
    scores = of.mean_logp(new, MASK) if score == "logL" else of.mean_ratio(new, old, MASK)
    drift = of.forward_divergence(new, old, MASK, estimator=estimator)
    return of.discriminative_loss(scores, RIGHT, np.zeros(4, int), tau=tau) + of.kl_constraint(drift, penalty=penalty)


@pytest.mark.parametrize(
    ("new", "options", "expected"),
    [
        (CASE_A, {}, -0.273469),
        (CASE_A, {"tau": 0.5}, -0.244981),
        (CASE_A, {"score": "Lratio", "tau": 1.0}, 0.016848),
        (CASE_A, {"tau": math.inf}, -0.275000),
        (CASE_B, {"penalty": 0.0}, -0.281097),
        (CASE_B, {}, 0.150847),
        (CASE_B, {"score": "Lratio", "tau": 1.0}, 0.441759),
        (CASE_B, {"score": "Lratio", "tau": 1.0, "penalty": 0.0}, 0.009814),
        (CASE_B, {"estimator": "low_var_kl"}, -0.281065),
    ],
)
def test_disco_of_the_worked_example(new, options, expected):
    assert float(published(jnp.asarray(new), **options)) == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize(
    ("new", "slopes"),
    [(CASE_A, [-0.166667, 0.254375, 0.122813, -0.166667]), (CASE_B, [-1.894444, -1.473591, -1.604871, -1.894444])],
)
def test_disco_gradient_of_the_worked_example(new, slopes):
    np.testing.assert_allclose(jax.grad(published)(jnp.asarray(new)), MASK * np.array(slopes)[:, None], atol=2e-5)


def test_drpo_of_the_worked_example():
    lengths, mask = np.array([3, 2, 4, 1]), np.arange(4) < np.array([3, 2, 4, 1])[:, None]
    shares = of.preference_weights(1 - lengths / 4, RIGHT == 1, np.zeros(4, int), lam=0.5)
    np.testing.assert_allclose(shares, [0.268941, 0, 0, 0.731059], atol=1e-6)

    def loss(new):
        drift = of.forward_divergence(new, jnp.array(OLD), mask)
        scores = of.mean_logp(new, mask)
        return of.discriminative_loss(scores, RIGHT, np.zeros(4, int), tau=10.0, shares=shares) + of.kl_constraint(
            drift
        )

    value, gradient = jax.jit(jax.value_and_grad(loss))(jnp.array(SHORT))
    assert float(value) == pytest.approx(-0.392786, abs=1e-6)
    slopes = np.array([-0.089647, 0.254375, 0.122813, -0.731059])
    np.testing.assert_allclose(gradient, mask * slopes[:, None], atol=1e-6)
    equal = of.preference_weights(np.full(4, 0.25), RIGHT == 1, np.zeros(4, int), lam=0.1)
    np.testing.assert_array_equal(equal, [0.5, 0, 0, 0.5])


SLOPED = jax.jit(jax.value_and_grad(of.discriminative_loss))
PLAIN = jax.jit(jax.value_and_grad(functools.partial(of.discriminative_loss, tau=math.inf)))


def objective(*rows, tau, weights=None, shares=None):
    """Value and gradient; a finite temperature may be traced."""
    further = {"weights": weights, "shares": shares}
    return PLAIN(*rows, **further) if tau == math.inf else SLOPED(*rows, tau=tau, **further)


SHARES = jax.jit(of.preference_weights)
TAUS = [0.3, 10.0, 1e4, math.inf]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("lam", [None, 0.2])
def test_objective_against_loops(seed, tau, lam, slope):
    data = Groups(seed)
    shares = None if lam is None else shares_by_loops(data, lam)
    if lam is not None:
        got = SHARES(data.preferences, data.rewards == 1, data.ids, lam=lam, weights=data.weights)
        np.testing.assert_allclose(got, shares, rtol=1e-5, atol=1e-7)

    def loss(scores):
        return objective(scores, data.rewards, data.ids, tau=tau, weights=data.weights, shares=shares)

    value, gradient = loss(jnp.asarray(data.scores, jnp.float32))
    assert float(value) == pytest.approx(objective_by_loops(data, data.scores, tau, shares), rel=2e-6, abs=1e-6)
    expected = slope(lambda scores: objective_by_loops(data, scores, tau, shares), data.scores)
    np.testing.assert_allclose(gradient, expected, atol=2e-6)
    silent = (data.ids < 0) | (data.weights == 0) | ~np.isin(data.rewards, [0, 1]) | np.isin(data.ids, [2, 5])
    assert not np.asarray(gradient)[silent].any() and silent.sum() >= 6
    for fill in (np.nan, np.inf):
        dirty = loss(jnp.asarray(np.where(silent, fill, data.scores), jnp.float32))
        np.testing.assert_array_equal(dirty[0], value)
        np.testing.assert_array_equal(dirty[1], gradient)


def test_laws_of_rows():
    data = Groups(5)

    @jax.jit
    def all_three(scores, rewards, weights, group_ids):
        return {
            "soft": of.discriminative_loss(scores, rewards, group_ids, tau=0.5, weights=weights),
            "plain": of.discriminative_loss(scores, rewards, group_ids, tau=math.inf, weights=weights),
            "shares": of.preference_weights(scores, rewards == 1, group_ids, lam=0.5, weights=weights),
        }

    result = laws.rows(all_three, data.arrays("scores", "rewards", "weights"))
    assert abs(result["soft"]) > 0.05


def test_a_row_of_weight_c_is_c_rows():
    data = Groups(2)
    data.weights = np.where(np.arange(len(data.ids)) % 3 == 0, 2.0, 1.0)
    copies = np.repeat(np.arange(len(data.ids)), data.weights.astype(int))
    for tau in (0.4, math.inf):
        got, _ = objective(data.scores, data.rewards, data.ids, tau=tau, weights=data.weights)
        expected, _ = objective(data.scores[copies], data.rewards[copies], data.ids[copies], tau=tau)
        assert float(got) == pytest.approx(float(expected), rel=1e-5)


@given(st.floats(-50, 50), st.integers(0, 10))
@settings(max_examples=25, deadline=None)
def test_a_common_shift_of_the_scores_changes_nothing(shift, seed):
    data = Groups(seed)
    moved, still = (objective(s, data.rewards, data.ids, tau=0.7) for s in (data.scores + shift, data.scores))
    assert float(moved[0]) == pytest.approx(float(still[0]), abs=3e-5)
    np.testing.assert_allclose(moved[1], still[1], atol=1e-5)


@given(st.floats(0.05, 5), st.integers(0, 10))
@settings(max_examples=25, deadline=None)
def test_shares_are_positive_and_add_up_to_one(lam, seed):
    """Every right answer is pushed up, shorter ones more: the order of the shares is that of the preferences."""
    data = Groups(seed)
    right = (data.rewards == 1) & (data.ids >= 0)
    shares = np.asarray(SHARES(data.preferences, data.rewards == 1, data.ids, lam=lam))
    assert (shares[right] > 0).all() and not shares[~right].any()
    for group in set(data.ids[right]):
        here = right & (data.ids == group)
        assert shares[here].sum() == pytest.approx(1, rel=1e-5)
        np.testing.assert_array_equal(np.argsort(shares[here]), np.argsort(data.preferences[here]))


def test_a_small_temperature_looks_at_the_highest_wrong_score_only():
    s, ids = jnp.array([0.0, -1.0, -3.0, -2.0]), jnp.zeros(4, int)
    _, gradient = objective(s, jnp.array([1.0, 0, 0, 0]), ids, tau=1e-3)
    np.testing.assert_allclose(gradient, [-1, 1, 0, 0], atol=1e-6)


def test_right_rows_alone_or_wrong_rows_alone_teach_nothing():
    loss = functools.partial(objective, tau=1.0)
    scores, one = jnp.array([0.1, 0.2, 0.3]), np.zeros(3, int)
    for rewards in ([1, 1, 1.0], [0, 0, 0.0], [0.5, 1, 1], [np.nan, 0, 0]):
        value, gradient = loss(scores, np.array(rewards), one)
        assert float(value) == 0 and not np.asarray(gradient).any()
    assert float(loss(scores, np.array([1, 0, 0.0]), one - 1)[0]) == 0
    assert float(loss(scores, np.array([1, 0, 0.0]), one)[0]) != 0


# ---- the constraint --------------------------------------------------------------------------------------------------


def divergence_by_loops(new, old, mask, weights, estimator):
    total = mass = 0.0
    for i, t in zip(*np.nonzero(mask)):
        d = new[i, t] - old[i, t]
        total += weights[i] * (-d if estimator == "kl" else math.exp(d) - 1 - d)
        mass += weights[i]
    return total / mass


@pytest.mark.parametrize("estimator", of.DIVERGENCES)
def test_divergence_against_loops(ragged, slope, estimator):
    expected = functools.partial(
        divergence_by_loops, old=ragged.old_logps, mask=ragged.mask, weights=ragged.weights, estimator=estimator
    )

    @jax.jit
    @jax.value_and_grad
    def divergence(new, old):
        return of.forward_divergence(new, old, ragged.mask, estimator=estimator, weights=ragged.weights)

    for new, old in (
        (ragged.logps, ragged.old_logps),
        (ragged.garbage("logps"), ragged.garbage("old_logps", 1)),
    ):
        value, gradient = divergence(jnp.asarray(new, jnp.float32), jnp.asarray(old))
        assert float(value) == pytest.approx(expected(ragged.logps), rel=1e-5)
        np.testing.assert_allclose(gradient, slope(expected, ragged.logps), atol=1e-5)
    assert float(of.forward_divergence(ragged.logps, ragged.old_logps, ragged.mask & False, estimator=estimator)) == 0
    everyone = of.forward_divergence(ragged.logps, ragged.old_logps, ragged.mask, estimator=estimator)
    ones = np.ones_like(ragged.weights)
    assert float(everyone) == pytest.approx(
        divergence_by_loops(ragged.logps, ragged.old_logps, ragged.mask, ones, estimator), rel=1e-5
    )


def test_both_estimators_have_the_exact_value_and_gradient_on_average():
    """Over all decisions of the old policy, each with its probability."""
    old, new = (jax.nn.log_softmax(jnp.array(x)) for x in ([0.3, -0.5, 0.1, 0.9], [0.1, 0.4, -0.6, 0.2]))
    exact = lambda z: jnp.sum(jnp.exp(old) * (old - jax.nn.log_softmax(z)))  # noqa: E731
    for estimator in of.DIVERGENCES:

        def average(z, estimator=estimator):
            each = jax.vmap(
                lambda a, b: of.forward_divergence(a[None, None], b[None, None], jnp.ones((1, 1)), estimator=estimator)
            )(jax.nn.log_softmax(z), old)
            return jnp.sum(jnp.exp(old) * each)

        for got, expected in zip(*(jax.jit(jax.value_and_grad(f))(new) for f in (average, exact))):
            np.testing.assert_allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize("divergence", [-0.5, 0.0, 1e-4, 0.02, 3.0])
def test_constraint(divergence):
    excess = max(divergence - 1e-4, 0)
    for form, value, slope in (
        ("detached", 1e3 * excess * divergence, 1e3 * excess),
        ("squared", 1e3 * excess**2, 2e3 * excess),
    ):
        got = jax.value_and_grad(lambda d, form=form: of.kl_constraint(d, form=form))(jnp.asarray(divergence))
        np.testing.assert_allclose(got, (value, slope), rtol=1e-3, atol=1e-6)
    detached, squared = (jax.grad(lambda d, f=f: of.kl_constraint(d, form=f))(divergence) for f in of.CONSTRAINTS)
    assert float(squared) == pytest.approx(2 * float(detached), rel=1e-6)
    assert float(of.kl_constraint(jnp.asarray(0.3), budget=0.1, penalty=2.0)) == pytest.approx(2 * 0.2 * 0.3)


# ---- divided over devices --------------------------------------------------------------------------------------------


def test_groups_cut_over_devices_give_the_loss_and_gradient_of_one():
    """Scores are made where the rows are; the objective sees the scores of all devices, the constraint their mean."""
    draw = np.random.default_rng(0)
    n, t = 16, 5
    ids, rewards = draw.integers(-1, 4, n), draw.integers(0, 2, n).astype(np.float32)  # groups lie across devices
    old = -draw.exponential(1.0, (n, t)).astype(np.float32)
    new, mask = old + draw.normal(0, 0.3, old.shape).astype(np.float32), np.arange(t) < draw.integers(1, 6, n)[:, None]
    new[ids < 0] = np.nan  # padding rows
    mask = mask & (ids >= 0)[:, None]

    def whole(new, old, mask, rewards, ids, *, over=lambda function: function):
        loss = over(functools.partial(of.discriminative_loss, tau=0.5))(of.mean_logp(new, mask), rewards, ids)
        drift = over(functools.partial(of.forward_divergence, estimator="low_var_kl"))(new, old, mask)
        return loss + of.kl_constraint(drift)

    expected = jax.jit(jax.value_and_grad(whole))(new, old, mask, rewards, ids)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = PartitionSpec("data")
    divided = jax.shard_map(
        functools.partial(whole, over=functools.partial(segments.across, "data")),
        mesh=mesh,
        in_specs=rows,
        out_specs=PartitionSpec(),
    )
    got = jax.jit(jax.value_and_grad(divided))(new, old, mask, rewards, ids)
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-6)
    np.testing.assert_allclose(got[1], expected[1], atol=1e-6)
    assert np.isfinite(got[1]).all() and np.abs(got[1]).max() > 0.01


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: of.discriminative_loss(np.ones(2), np.ones(2), np.zeros(2, int), tau=0.0), "temperature above 0"),
        (
            lambda: of.discriminative_loss(np.ones((2, 3)), np.ones(2), np.zeros(2, int), tau=1.0),
            r"one entry per row is expected, got scores \[2, 3\] and rewards \[2\] for group_ids \[2\]",
        ),
        (
            lambda: of.discriminative_loss(np.ones(2), np.ones(2), np.zeros(2, int), tau=1.0, shares=np.ones(3)),
            r"shares must have one entry for each of the 2 rows, got shape \[3\]",
        ),
        (
            lambda: of.discriminative_loss(np.ones(2), np.ones(2), np.zeros(2, int), tau=1.0, weights=np.ones(1)),
            "weights must have one entry",
        ),
        (lambda: of.preference_weights(np.ones(2), np.ones(2), np.zeros(2, int), lam=-1.0), "lam .* above 0"),
        (lambda: of.preference_weights(np.ones(2), np.ones(3), np.zeros(2, int)), "correct must have one entry"),
        (lambda: of.forward_divergence(np.ones((1, 1)), np.ones((1, 1)), np.ones((1, 1)), estimator="k1"), "one of"),
        (lambda: of.kl_constraint(0.0, form="hinge"), r"one of \('detached', 'squared'\), got 'hinge'"),
        (lambda: of.mean_clipped_ratio(*[np.ones((1, 1))] * 3, np.ones(1), low=2.0), "low is the distance"),
        (lambda: of.mean_clipped_ratio(*[np.ones((1, 1))] * 3, np.ones(1), high=-1.0), "high is the distance"),
        (lambda: of.mean_logp(np.ones((1, 2)), np.ones((1, 3))), "one shape"),
    ],
)
def test_refusals(call, said):
    with pytest.raises(ValueError, match=said):
        call()
