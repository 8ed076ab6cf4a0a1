"""Reg-GRPO as a method: the worked example, float64 loops on ragged batches, the plan, what is refused."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import methods
from grpo_jax.methods.reg_grpo import reg_grpo
from grpo_jax.types import Decisions, Prompt

REWARDS, RHO = [1, 0, 0.5, 0], np.array([0.3, -0.2, 0.1, 0.05])


def value(method, batch, new):
    run = jax.jit(jax.value_and_grad(lambda logps: method.objective(Decisions(logps=logps), batch, {}), has_aux=True))
    (loss, reported), gradient = run(jnp.asarray(new, jnp.float32))
    return float(loss), np.asarray(gradient), reported


def test_worked_example_of_the_first_update(make):
    """Whole sequences: each decision has the gradient of its sequence's log-ratio, whatever the length."""
    mask = np.arange(3) < np.array([3, 1, 2, 3])[:, None]
    batch = make.batch(REWARDS, old=np.zeros((4, 3)), mask=mask)
    loss, gradient, _ = value(reg_grpo(prompts=1, group_size=4, kl=0.0), batch, np.zeros((4, 3)))
    assert loss == pytest.approx(0.749687, abs=1e-6)
    slopes = np.array([-6.526549, 3.915929, -1.305310, 3.915929])
    np.testing.assert_allclose(gradient, mask * slopes[:, None], atol=2e-5)


def test_worked_example_off_policy(make):
    """The summed log-ratios are those of the example, split over two decisions; 1e-4 within the root, not beside it."""
    old = np.full((4, 2), -1.0)
    new = old + np.stack([RHO * 0.25, RHO * 0.75], 1)
    method = reg_grpo(prompts=1, group_size=4, kl=0.0, ratio_epsilon=1e-4)
    loss, gradient, reported = value(method, make.batch(REWARDS, old=old), new)
    assert loss == pytest.approx(0.198402, abs=3e-4)
    np.testing.assert_allclose(gradient[:, 0], [-0.737369, -0.787752, -0.249988, 1.775109], atol=3e-3)
    np.testing.assert_array_equal(gradient[:, 0], gradient[:, 1])
    np.testing.assert_allclose(reported["ratio"], np.exp(new - old), rtol=1e-6)


def test_kl_is_a_mean_over_completions_of_token_means(make):
    """Per-sequence k3 of 0.01, 0.02, 0 and 0.03 at 0.04 adds 0.0006."""
    kl = np.array([0.01, 0.02, 0.0, 0.03])
    d = np.array([0.0 if not k else _k3_inverse(k) for k in kl])
    ref = np.stack([-d, -d, np.full(4, np.nan)], 1)
    mask = np.array([[True, True, False]] * 4)
    batch = make.batch(REWARDS, old=np.zeros((4, 3)), ref=ref, mask=mask)
    with_kl, without = (value(reg_grpo(prompts=1, group_size=4, kl=k), batch, np.zeros((4, 3)))[0] for k in (0.04, 0.0))
    assert with_kl - without == pytest.approx(0.0006, abs=1e-6)
    assert reg_grpo(prompts=1, group_size=4).roles.keys() == {"reference"}
    assert reg_grpo(prompts=1, group_size=4, kl=0.0).roles == {}


def _k3_inverse(k):
    low, high = 0.0, 5.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if math.exp(-middle) - 1 + middle < k else (low, middle)
    return low


def by_loops(data, new, *, kl, epsilon, ratio_epsilon):
    rows = [i for i in range(len(new)) if data.weights[i] > 0]
    each = []
    for group in {g for g in data.groups if g >= 0}:
        compared = [i for i in range(len(new)) if data.groups[i] == group and not math.isnan(data.total[i])]
        members = [i for i in compared if data.weights[i] > 0]
        c, size = data.weights, sum(data.weights[i] for i in members)
        rewards = np.array([data.total[i] for i in compared])
        targets = {
            i: (data.total[i] - rewards.mean()) / (rewards.std(ddof=1) + epsilon) if np.ptp(rewards) else 0
            for i in members
        }
        if size < 3 or len(set(targets.values())) == 1:
            continue
        rho = {i: sum((new[i] - data.old[i])[data.mask[i]]) for i in members}
        mean = sum(c[i] * rho[i] for i in members) / size
        variance = sum(c[i] * (rho[i] - mean) ** 2 for i in members) / (size - 1)
        error = {i: (targets[i] - (rho[i] - mean) / math.sqrt(variance + ratio_epsilon**2)) ** 2 for i in members}
        each.append(sum(c[i] * error[i] for i in members) / size)
    said = [i for i in rows if data.mask[i].any()]
    d = new - data.ref
    k3 = {i: (np.exp(-d[i]) - 1 + d[i])[data.mask[i]].mean() for i in said}
    penalty = sum(data.weights[i] * k3[i] for i in said) / sum(data.weights[i] for i in said)
    return sum(each) / len(each) + kl * penalty


@pytest.mark.parametrize("seed", range(3))
def test_against_loops(make, seed):
    data = make.ragged(seed)
    options = {"kl": 0.3, "epsilon": 0.2, "ratio_epsilon": 0.5}
    method = methods.resolve("reg_grpo", options=options, settings=make.settings)
    loss, gradient, _ = value(method, data.batch(), data.new)
    assert loss == pytest.approx(by_loops(data, data.new, **options), rel=1e-5)
    for place in np.ndindex(data.new.shape):
        up, down = data.new.copy(), data.new.copy()
        up[place] += 1e-6
        down[place] -= 1e-6
        difference = (by_loops(data, up, **options) - by_loops(data, down, **options)) / 2e-6
        assert gradient[place] == pytest.approx(difference, abs=2e-5)
    assert not gradient[(data.weights == 0)[:, None] | ~data.mask].any() and np.abs(gradient).max() > 0.01


def test_its_advantages_are_those_of_grpo(make):
    batch, _ = reg_grpo(prompts=1, group_size=4, kl=0.0).advantage(make.batch(REWARDS), {}, None)
    np.testing.assert_allclose(batch.advantages[:, 0], [1.305310, -0.783186, 0.261062, -0.783186], atol=1e-6)


def test_one_round(make):
    method = reg_grpo(prompts=2, group_size=3)
    plan = method.plan(method.init(None), lambda state, n: [Prompt(i, "?") for i in range(n)], None)
    assert [(r.prompt.id, r.count) for r in next(plan)] == [(0, 3), (1, 3)]
    rows = make.rollout([0, 0, 0, 1, 1, 1], group_ids=[0, 0, 0, 1, 1, 1])
    with pytest.raises(StopIteration) as end:
        plan.send(rows)
    assert end.value.value == ({}, [rows])


@pytest.mark.parametrize(
    ("options", "group_size", "said"),
    [
        ({}, 2, "needs group_size 3 or more, got 2"),
        ({"ratio_epsilon": 0.0}, 4, "ratio_epsilon must be above 0, .* got 0.0"),
        ({"clip_low": 0.1}, 4, "'reg_grpo' has no option 'clip_low'"),
    ],
)
def test_refusals(make, options, group_size, said):
    with pytest.raises(ValueError, match=said):
        methods.resolve("reg_grpo", options=options, settings={**make.settings, "group_size": group_size})
