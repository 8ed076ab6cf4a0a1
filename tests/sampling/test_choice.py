"""The draw of one token against exact probabilities, and the restrictions against sorting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.sampling.choice import choose, restrict

GRID = 256


def softmax(logits):
    z = np.asarray(logits, np.float64)
    weights = np.exp(z - z.max())
    return weights / weights.sum()


def everywhere(logits, allowed=None):
    """The token at each point of a grid over both uniforms [GRID, GRID]."""
    ticks = (np.arange(GRID) + 0.5) / GRID
    uniforms = np.stack(np.meshgrid(ticks, ticks, indexing="ij"), axis=-1).reshape(-1, 2).astype(np.float32)
    column = lambda values: np.repeat(np.float32(values)[:, None], GRID * GRID, axis=1)  # noqa: E731
    options = {} if allowed is None else {"allowed": column(allowed)}
    return jax.jit(choose)(column(logits), uniforms, greedy=np.zeros(GRID * GRID, bool), **options)


@pytest.mark.parametrize("v", [2, 11, 64, 100])
def test_the_measure_of_a_token_is_its_probability(v):
    logits = np.random.default_rng(v).normal(size=v) * 2
    seen = np.bincount(np.asarray(everywhere(logits).token), minlength=v) / GRID**2
    np.testing.assert_allclose(seen, softmax(logits), atol=2.5 / GRID)
    np.testing.assert_allclose(seen.sum(), 1)


def test_what_may_not_be_drawn_never_is_and_log_probs_are_exact():
    logits = np.random.default_rng(0).normal(size=50) * 3
    allowed = np.where(np.arange(50) % 3 == 0, logits, -np.inf)
    got = everywhere(logits, allowed)
    token = np.asarray(got.token)
    assert (token % 3 == 0).all()
    np.testing.assert_allclose(got.behavior_logp, np.log(softmax(allowed)[token]), atol=2e-6)
    np.testing.assert_allclose(got.policy_logp, np.log(softmax(logits)[token]), atol=2e-6)


def test_the_ends_of_the_unit_interval_fall_on_tokens_with_mass():
    logits = np.full((4, 40), -np.inf, np.float32)
    logits[:, [7, 8, 33]] = [0.0, -40.0, 1.0]
    most = np.float32(1 - 2.0**-24)
    uniforms = np.array([[0, 0], [most, most], [0, most], [most, 0]], np.float32)
    got = choose(jnp.asarray(logits.T), jnp.asarray(uniforms), greedy=jnp.zeros(4, bool))
    assert set(np.asarray(got.token).tolist()) <= {7, 8, 33}
    assert np.isfinite(got.behavior_logp).all()


def test_greedy_takes_the_first_of_the_likeliest_and_reports_0():
    logits = np.array([[0.0, 3, 1, 3, -np.inf], [5, 5, 5, 5, 5]], np.float32)
    got = choose(jnp.asarray(logits.T), jnp.full((2, 2), 0.99), greedy=jnp.ones(2, bool))
    assert got.token.tolist() == [1, 0] and got.behavior_logp.tolist() == [0, 0]
    np.testing.assert_allclose(got.policy_logp, [np.log(softmax(logits[0])[1]), np.log(0.2)], atol=1e-6)


def test_tokens_rarer_than_float32_noise_can_be_drawn():
    """Gumbel noise of float32 uniforms ends near 16.6: a token 20 below the others could never win."""
    logits = np.zeros(64, np.float32)
    logits[-1] = -20
    share = np.exp(-20.0) / 8
    uniforms = np.array([[(7 + 0.5) / 8, 1 - share / 4], [(7 + 0.5) / 8, 1 - 4 * share - 2.0**-23]], np.float32)
    got = choose(jnp.broadcast_to(logits[:, None], (64, 2)), jnp.asarray(uniforms), greedy=jnp.zeros(2, bool))
    assert got.token.tolist() == [63, 62]


def sorted_out(logits, top_k=0, top_p=1.0, min_p=0.0):
    """Which tokens stay, by sorting in float64; ties of the last one kept stay."""
    order = np.argsort(-logits, kind="stable")
    kept = order[: top_k or len(order)]
    mass = softmax(logits[kept])
    before = np.cumsum(mass) - mass
    kept = kept[(before < top_p) | (np.arange(len(kept)) == 0)]
    kept = kept[logits[kept] >= logits.max() + np.log(min_p or 1e-300)]
    return logits >= logits[kept].min()


@pytest.mark.parametrize("seed", range(3))
def test_restrictions_are_those_of_sorting(seed):
    rng = np.random.default_rng(seed)
    n, v = 40, 57
    logits = (rng.normal(size=(n, v)) * rng.uniform(0.1, 6, (n, 1))).astype(np.float32)
    logits[::4] = np.round(logits[::4])  # ties, and zeros of both signs
    k, p = rng.integers(0, v + 20, n), rng.choice([1.0, 0.05, 0.5, 0.9, 0.99], n)
    m = rng.choice([0.0, 0.01, 0.3, 1.0], n)
    got = jax.jit(restrict)(logits.T, top_k=k, top_p=np.float32(p), min_p=np.float32(m)).T
    want = np.stack([sorted_out(*row) for row in zip(logits, k, p, m)])
    np.testing.assert_array_equal(np.asarray(got) > -np.inf, want)
    np.testing.assert_array_equal(np.asarray(got)[want], logits[want])


def test_nothing_asked_keeps_everything_and_the_forbidden_goes_first():
    logits = np.array([[2.0], [1], [0], [-1]], np.float32)
    keep = restrict(logits, top_k=np.array([0]), top_p=np.float32([1]), min_p=np.float32([0]))
    np.testing.assert_array_equal(keep, logits)
    without = restrict(logits, forbidden=np.array([[True], [False], [False], [False]]), top_k=np.array([2]))
    np.testing.assert_array_equal(without, [[-np.inf], [1], [0], [-np.inf]])


def test_long_runs_are_drawn_from_in_two_steps_with_the_same_measure(monkeypatch):
    monkeypatch.setattr("grpo_jax.sampling.choice.LONG", 8)
    logits = np.random.default_rng(0).normal(size=240) * 2  # sixteen runs of fifteen, each of four blocks
    got = everywhere(logits)
    seen = np.bincount(np.asarray(got.token), minlength=240) / GRID**2
    np.testing.assert_allclose(seen, softmax(logits), atol=2.5 / GRID)
    np.testing.assert_allclose(got.behavior_logp, np.log(softmax(logits)[np.asarray(got.token)]), atol=4e-6)
    best = choose(jnp.float32(logits)[:, None], jnp.full((1, 2), 0.9), greedy=jnp.ones(1, bool))
    assert best.token.tolist() == [logits.argmax()]
