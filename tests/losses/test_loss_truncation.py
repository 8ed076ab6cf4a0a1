"""Which truncated completions the update leaves out."""

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from grpo_jax.losses import without_truncated
from grpo_jax.losses.truncation import conditionally_masked, repeats


def test_worked_by_hand():
    """Six completions with a budget of 8: the second is masked; the others fail one condition each."""
    lengths = np.array([5, 8, 8, 8, 3, 8])
    plausible, repeated = np.array([1, 1, 1, 0, 0, 1]), np.array([0, 0, 0, 0, 0, 1])
    uniforms = np.array([0.5, 0.05, 0.15, 0.02, 0.01, 0.03])
    masked = jax.jit(conditionally_masked)(lengths == 8, plausible, repeated, uniforms)
    np.testing.assert_array_equal(masked, [0, 1, 0, 0, 0, 0])
    z = np.array([1.290992, -0.645496, 1.290992, -0.645496, -0.645496, -0.645496])
    advantages = np.where(masked, 0, z)
    np.testing.assert_allclose(advantages, [1.290992, 0, 1.290992, -0.645496, -0.645496, -0.645496])
    ratio = np.exp([0.1, 0.3, -0.3, 0.05, -0.25, 0])
    terms = np.minimum(ratio * advantages, np.clip(ratio, 0.8, 1.28) * advantages)
    assert terms.mean() == pytest.approx(0.090446, abs=1e-6)


def test_never_and_always():
    draw = np.random.default_rng(0)
    truncated, uniforms = draw.random(50) < 0.5, draw.random(50)
    yes, no = np.ones(50, bool), np.zeros(50, bool)
    assert not np.asarray(conditionally_masked(truncated, yes, no, uniforms, probability=0)).any()
    every = conditionally_masked(truncated, yes, no, uniforms, probability=1)
    mask = np.ones((50, 2), bool)
    np.testing.assert_array_equal(mask & ~np.asarray(every)[:, None], without_truncated(mask, ~truncated))
    share = conditionally_masked(np.ones(5000, bool), np.ones(5000), np.zeros(5000), draw.random(5000), probability=0.3)
    assert float(share.mean()) == pytest.approx(0.3, abs=0.03)


def test_laws():
    draw = np.random.default_rng(1)
    arrays = {name: draw.random(13) < 0.7 for name in ("truncated", "plausible", "repeated")}
    arrays["uniforms"] = draw.random(13)
    laws.rows(lambda **a: conditionally_masked(**a, probability=0.5), arrays, ids=(), half=None)
    tokens, lengths = draw.integers(0, 2, (13, 9)), draw.integers(0, 10, 13)
    got = laws.rows(
        lambda tokens, lengths: repeats(tokens, lengths, window=2), {"tokens": tokens, "lengths": lengths}, ids=()
    )
    assert got.any() and not got.all()


def loop(tokens, length, window):
    row = list(tokens[:length])
    return length >= 2 * window and row[-window:] == row[-2 * window : -window]


@settings(max_examples=25, deadline=None)
@given(some.integers(0, 2**31), some.integers(1, 4))
def test_repeats_against_a_loop(seed, window):
    draw = np.random.default_rng(seed)
    tokens, lengths = draw.integers(0, 2, (12, 9)), draw.integers(0, 10, 12)
    got = repeats(jnp.asarray(tokens), jnp.asarray(lengths), window=window)
    np.testing.assert_array_equal(got, [loop(t, n, window) for t, n in zip(tokens, lengths)])


def test_repeats_reads_only_the_end():
    tokens = np.array([[7, 1, 2, 3, 1, 2, 3, 0, 0], [1, 2, 3, 1, 2, 3, 9, 0, 0], [1, 2, 3, 1, 2, 0, 0, 0, 0]])
    np.testing.assert_array_equal(repeats(tokens, np.array([7, 7, 5]), window=3), [True, False, False])
    np.testing.assert_array_equal(repeats(tokens, np.array([7, 6, 5]), window=3), [True, True, False])
    assert not np.asarray(repeats(tokens, np.array([9, 9, 9]))).any()  # shorter than twice 128


def test_what_does_not_fit():
    ones = jnp.ones(3)
    with pytest.raises(ValueError, match="one entry per row"):
        conditionally_masked(ones, ones, ones, jnp.ones(2))
    with pytest.raises(ValueError, match="one entry per row"):
        conditionally_masked(*[jnp.ones((3, 2))] * 4)
    with pytest.raises(ValueError, match="got 1.5"):
        conditionally_masked(ones, ones, ones, ones, probability=1.5)
    with pytest.raises(ValueError, match=r"\[3, 4\] and \[2\]"):
        repeats(jnp.ones((3, 4), int), jnp.ones(2, int))
    with pytest.raises(ValueError, match="got 0"):
        repeats(jnp.ones((3, 4), int), jnp.ones(3, int), window=0)
