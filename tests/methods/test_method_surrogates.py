"""CISPO, SAPO and GMPO against loops in float64 on ragged batches, and on numbers worked by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import losses
from grpo_jax.methods.cispo import cispo
from grpo_jax.methods.gmpo import gmpo
from grpo_jax.methods.sapo import sapo
from grpo_jax.types import Decisions

METHODS = {
    "cispo": (cispo, {"clip_low": 0.1, "clip_high": 0.3}),
    "sapo": (sapo, {"tau_positive": 2.0, "tau_negative": 3.0}),
    "gmpo": (gmpo, {"clip_low": 0.1, "clip_high": 0.3}),
}


def make_method(name, **options):
    factory, chosen = METHODS[name]
    return factory(prompts=3, group_size=4, **(options or chosen))


def z_scores(data):
    """(r - mean) / (std + 1e-6) among the rows of a group that have a reward."""
    result = np.zeros(len(data.total))
    for i, own in enumerate(data.total):
        group = [r for r, g in zip(data.total, data.groups) if g == data.groups[i] >= 0 and not np.isnan(r)]
        if data.groups[i] >= 0 and not np.isnan(own) and len(group) > 1 and np.ptp(group) > 0:
            result[i] = (own - np.mean(group)) / (np.std(group, ddof=1) + 1e-6)
    return result


def row_loss(name, a, logps, old, weight_at):
    """The loss of one completion's trained tokens: their sum for CISPO, their mean for the others."""
    gain = logps - old
    if name == "cispo":  # the weight is a constant: taken at the point of differentiation
        return sum(-np.clip(np.exp(d), 0.9, 1.3) * a * lp for d, lp in zip(weight_at - old, logps))
    if name == "sapo":
        tau = 2.0 if a > 0 else 3.0
        return np.mean([-a * 4 / tau / (1 + np.exp(-tau * (np.exp(d) - 1))) for d in gain])
    sign = np.sign(a)
    return -a * np.exp(np.mean([sign * min(sign * d, sign * np.clip(d, -0.1, 0.3)) for d in gain]))


def whole_loss(name, data, new, at):
    total = count = 0.0
    for i, weight in enumerate(data.weights):
        m = data.mask[i]
        if weight > 0 and m.any():
            total += weight * row_loss(name, data.advantage[i], new[i][m], data.old[i][m], at[i][m])
            count += weight * (m.sum() if name == "cispo" else 1)
    return total / count


def computed(method, batch, new):
    @jax.jit
    @jax.value_and_grad
    def loss(logps):
        each, _ = method.objective(Decisions(logps=logps), batch, {})
        return losses.weighted_sum(each, method.aggregate(batch))

    return loss(jnp.asarray(new, jnp.float32))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", METHODS)
def test_method(make, name, seed):
    data = make.ragged(seed)
    data.advantage = z_scores(data)
    method = make_method(name)
    batch, _ = jax.jit(lambda batch: method.advantage(batch, {}, None))(data.batch())
    np.testing.assert_allclose(batch.advantages, np.where(data.mask, data.advantage[:, None], 0), rtol=1e-4, atol=1e-5)
    loss, gradient = computed(method, batch, data.new)
    assert float(loss) == pytest.approx(whole_loss(name, data, data.new, data.new), rel=2e-5)
    expected = np.zeros_like(data.new)
    for place in np.ndindex(data.new.shape):
        up, down = data.new.copy(), data.new.copy()
        up[place], down[place] = up[place] + 1e-6, down[place] - 1e-6
        expected[place] = whole_loss(name, data, up, data.new) - whole_loss(name, data, down, data.new)
    expected /= 2e-6
    np.testing.assert_allclose(gradient, expected, atol=3e-5 * np.abs(expected).max())
    silent = (data.weights == 0)[:, None] | ~data.mask
    assert not np.asarray(gradient)[silent].any() and np.abs(expected).max() > 1e-3


OLD, NEW = [[-1, -0.5, -2], [-0.7, 0, 0]], [[-0.6, -0.9, -2.1], [-1.5, 0, 0]]
MASK = [[True, True, True], [True, False, False]]


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("cispo", {"clip_low": 0.2, "clip_high": 0.28}, 0.247040),
        ("cispo", {"clip_low": 1.0, "clip_high": 0.2}, 0.468865),
        ("sapo", {"tau_positive": 1.0}, 0.358882),
        ("gmpo", {"clip_low": 0.4}, 0.186712),
    ],
)
def test_worked_by_hand(make, name, options, expected):
    batch = make.batch([0, 0], old=OLD, mask=MASK)
    batch = batch.replace(advantages=jnp.where(batch.completion_mask, jnp.array([[1.0], [-2.0]]), 0))
    method = make_method(name, **options)
    assert float(computed(method, batch, NEW)[0]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_on_policy_all_three_have_the_gradient_of_reinforce(make, name):
    """Old policy = new policy: whatever bounds the ratio does not act yet."""
    batch = make.batch([0, 0], old=NEW, mask=MASK)
    batch = batch.replace(advantages=jnp.where(batch.completion_mask, jnp.array([[1.0], [-2.0]]), 0))
    method = make_method(name)
    gradient = computed(method, batch, NEW)[1]
    np.testing.assert_allclose(gradient, -batch.advantages * method.aggregate(batch), rtol=1e-5)


def test_what_is_reported(make):
    """Where a bound binds, in each method's own sense; the metrics of plain GRPO otherwise."""
    batch = make.batch([0, 0], old=OLD, mask=MASK)
    batch = batch.replace(advantages=jnp.where(batch.completion_mask, jnp.array([[1.0], [-2.0]]), 0))
    reported = {n: make_method(n).objective(Decisions(logps=jnp.array(NEW)), batch, {})[1] for n in METHODS}
    np.testing.assert_array_equal(reported["cispo"]["clip_high"], [[True, False, False], [False] * 3])
    np.testing.assert_array_equal(reported["cispo"]["clip_low"], [[False, True, False], [True, False, False]])
    np.testing.assert_array_equal(reported["gmpo"]["clip_high"], [[True, False, False], [False] * 3])
    np.testing.assert_array_equal(reported["gmpo"]["clip_low"], [[False] * 3, [True, False, False]])
    assert reported["sapo"].keys() == {"ratio"}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cispo", {"clip_high": -1.0}, "high .* got -1.0"),
        ("sapo", {"tau_positive": 0.0}, "tau_positive .* got 0.0"),
        ("gmpo", {"clip_low": -0.1}, "low .* got -0.1"),
    ],
)
def test_options_out_of_range(make, name, options, message):
    batch = make.batch([0], old=[[-1.0]], mask=[[True]]).replace(advantages=jnp.zeros((1, 1)))
    with pytest.raises(ValueError, match=message):
        make_method(name, **options).objective(Decisions(logps=jnp.zeros((1, 1))), batch, {})
