"""Estimators of the divergence: values, gradients, and what both are in expectation, by enumeration."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
