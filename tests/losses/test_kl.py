"""Estimators of the divergence: values, gradients, and what both are in expectation, by enumeration."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import losses
from grpo_jax.losses import kl

FORMULAS = {
    "k1": lambda d: d,
    "k2": lambda d: d**2 / 2,
    "k3": lambda d: np.exp(-d) - 1 + d,
    "absolute": np.abs,
}


@pytest.mark.parametrize("name", FORMULAS)
def test_against_float64(name, ragged, slope):
    term, formula = getattr(kl, name), FORMULAS[name]
    np.testing.assert_allclose(
        jax.jit(term)(ragged.logps, ragged.ref_logps), formula(ragged.logps - ragged.ref_logps), rtol=1e-5, atol=1e-6
    )
    gradient = jax.grad(lambda lp: term(lp, ragged.ref_logps).sum())(jnp.float32(ragged.logps))
    expected = slope(lambda lp: formula(lp - ragged.ref_logps).sum(), ragged.logps)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)


def test_unbiased_is_the_value_of_k3_with_the_gradient_of_k2(ragged):
    logps, ref = jnp.float32(ragged.logps), jnp.float32(ragged.ref_logps)
    np.testing.assert_allclose(kl.unbiased(logps, ref), kl.k3(logps, ref), rtol=1e-6, atol=1e-7)
    gradients = [jax.grad(lambda lp, term=term: term(lp, ref).sum())(logps) for term in (kl.unbiased, kl.k2)]
    np.testing.assert_array_equal(*gradients)


@pytest.fixture
def policies():
    draw = np.random.default_rng(0)
    return jnp.float32(draw.normal(size=6)), jax.nn.log_softmax(jnp.float32(draw.normal(size=6)))


def divergence(a, b):
    return jnp.sum(jnp.exp(a) * (a - b))


@pytest.mark.parametrize(
    ("name", "value", "gradient_of"),
    [
        ("k1", divergence, lambda p, q: jnp.float32(0.0)),
        ("k2", None, divergence),
        ("k3", divergence, lambda p, q: divergence(q, p)),
        ("unbiased", divergence, divergence),
        ("absolute", None, lambda p, q: jnp.sum(jnp.abs(jnp.exp(p) - jnp.exp(q)))),
    ],
)
def test_expectations(name, value, gradient_of, policies):
    """The sum over all outcomes of probability times estimate is what the docstring says."""
    parameters, ref = policies
    logps = jax.nn.log_softmax(parameters)
    chance = jnp.exp(logps)

    def expected_loss(parameters):  # the sampling distribution is a constant of the loss, as in training
        return jnp.sum(chance * getattr(kl, name)(jax.nn.log_softmax(parameters), ref))

    if value is not None:
        assert float(expected_loss(parameters)) == pytest.approx(float(value(logps, ref)), rel=1e-5)
    exact = jax.grad(lambda parameters: gradient_of(jax.nn.log_softmax(parameters), ref))(parameters)
    np.testing.assert_allclose(jax.grad(expected_loss)(parameters), exact, atol=2e-6)


def test_small_differences_keep_their_digits():
    """exp(-d) - 1 + d computed as written loses all digits at d = 1e-4 in float32."""
    got = kl.k3(jnp.float32([1e-3, -1e-3]), jnp.zeros(2))
    np.testing.assert_allclose(got, np.expm1([-1e-3, 1e-3]) + np.array([1e-3, -1e-3]), rtol=2e-3)


def test_k3_is_finite_for_a_decision_that_the_policy_rules_out():
    value, gradient = jax.value_and_grad(lambda lp: kl.k3(lp, jnp.zeros(1)).sum())(jnp.array([-1e4]))
    assert np.isfinite(value)
    assert float(gradient[0]) == 0


def test_the_reference_gets_no_gradient(ragged):
    for name in [*FORMULAS, "unbiased"]:
        gradient = jax.grad(lambda ref, name=name: getattr(kl, name)(ragged.logps, ref).sum())(
            jnp.float32(ragged.ref_logps)
        )
        assert not np.asarray(gradient).any()


def test_corrected_is_the_reverse_kl_whatever_policy_drew(policies):
    """Value and gradient, enumerated under an older policy; without the ratio both are wrong."""
    parameters, ref = policies
    older = jax.nn.log_softmax(jnp.float32(np.random.default_rng(7).normal(size=6)))

    def drawn_from_older(parameters, term):
        logps = jax.nn.log_softmax(parameters)
        return jnp.sum(jnp.exp(older) * term(losses.token_ratio(logps, older), logps))

    def exact(parameters):
        return divergence(jax.nn.log_softmax(parameters), ref)

    value, gradient = jax.value_and_grad(drawn_from_older)(parameters, lambda r, lp: kl.corrected(r, lp, ref))
    assert float(value) == pytest.approx(float(exact(parameters)), rel=1e-5)
    np.testing.assert_allclose(gradient, jax.grad(exact)(parameters), atol=2e-6)
    plain = jax.grad(drawn_from_older)(parameters, lambda r, lp: kl.k3(lp, ref))
    assert np.abs(plain - jax.grad(exact)(parameters)).max() > 0.02


def test_corrected_against_float64(ragged, slope):
    def formula(logps):
        d = logps - ragged.ref_logps
        return np.exp(logps - ragged.old_logps) * (np.exp(-d) - 1 + d)

    def ours(logps):
        return kl.corrected(losses.token_ratio(logps, ragged.old_logps), logps, ragged.ref_logps)

    np.testing.assert_allclose(ours(ragged.logps), formula(ragged.logps), rtol=1e-5, atol=1e-6)
    gradient = jax.grad(lambda lp: ours(lp).sum())(jnp.float32(ragged.logps))
    np.testing.assert_allclose(gradient, slope(lambda lp: formula(lp).sum(), ragged.logps), rtol=1e-4, atol=1e-5)


def two_policies(shape, seed=0):
    draw = np.random.default_rng(seed)
    return tuple(x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in draw.normal(0, 1.5, (2, *shape)))


@pytest.mark.parametrize("name", ["reverse", "forward"])
def test_the_whole_vocabulary(name, slope):
    logps, ref = two_policies((3, 4, 5))
    logps[0, 0, 2] = ref[0, 0, 2] = -np.inf  # ruled out by both: nothing to it
    {"reverse": logps, "forward": ref}[name][1, 1, 3] = -np.inf  # and by the one that the mean is taken under

    def loop(logps):
        total = np.zeros(logps.shape[:-1])
        for place in np.ndindex(logps.shape):
            p, q = (logps[place], ref[place])[:: 1 if name == "reverse" else -1]
            total[place[:-1]] += np.exp(p) * (p - q) if p > -np.inf else 0
        return total

    term = getattr(kl, name)
    got = jax.jit(term)(logps, ref)
    np.testing.assert_allclose(got, loop(logps), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(term(jnp.asarray(logps, jnp.bfloat16), jnp.asarray(ref, jnp.bfloat16)), got, atol=0.05)
    gradient = jax.grad(lambda lp: term(lp, ref).sum())(jnp.float32(logps))
    finite = np.isfinite(logps)
    differences = slope(lambda lp: loop(np.where(finite, lp, -np.inf)).sum(), np.where(finite, logps, 0))
    np.testing.assert_allclose(gradient, np.where(finite, differences, 0), atol=1e-5)
    assert not np.asarray(jax.grad(lambda r: term(logps, r).sum())(jnp.float32(ref))).any()


def test_whole_vocabulary_is_what_the_estimators_estimate(policies):
    parameters, ref = policies
    logps = jax.nn.log_softmax(parameters)
    chance = jax.lax.stop_gradient(jnp.exp(logps))
    assert float(kl.reverse(logps, ref)) == pytest.approx(float(jnp.sum(chance * kl.k3(logps, ref))), rel=1e-5)
    for whole, estimate in ((kl.reverse, kl.k2), (kl.forward, kl.k3)):
        exact = jax.grad(lambda x, whole=whole: whole(jax.nn.log_softmax(x), ref))(parameters)
        expected = jax.grad(lambda x, e=estimate: jnp.sum(chance * e(jax.nn.log_softmax(x), ref)))(parameters)
        np.testing.assert_allclose(expected, exact, atol=2e-6)


@pytest.mark.parametrize("name", ["reverse", "forward"])
def test_what_is_not_comparable_is_seen_and_does_no_harm(name):
    """Ruled out by the other: infinite. NaN or +inf: NaN. Neither reaches the gradient."""
    logps, ref = (np.float32(x) for x in two_policies((4, 5), seed=1))
    {"reverse": ref, "forward": logps}[name][0, 1] = -np.inf
    logps[1, 0], ref[2, 4] = np.nan, np.inf
    got = np.asarray(getattr(kl, name)(logps, ref))
    assert got[0] == np.inf and np.isnan(got[1:3]).all() and np.isfinite(got[3])
    gradient = jax.grad(lambda lp: jnp.sum(jnp.where(np.arange(4) == 3, getattr(kl, name)(lp, ref), 0)))(
        jnp.asarray(logps)
    )
    assert np.isfinite(np.asarray(gradient)).all() and not np.asarray(gradient)[:3].any()
    with pytest.raises(ValueError, match=r"logps \[4, 5\], ref_logps \[4\]"):
        kl.reverse(logps, ref[:, 0])
