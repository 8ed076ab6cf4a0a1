"""DRPO and DisCO as methods: the worked example, float64 loops on ragged batches, plans, what is refused."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import methods
from grpo_jax.methods.disco import disco
from grpo_jax.methods.drpo import drpo
from grpo_jax.types import Decisions, Prompt

OLD = [[-0.25, -0.4, -0.5, 0], [-0.5, -0.35, 0, 0], [-0.9, -0.7, -0.8, -0.6], [-0.12, 0, 0, 0]]
NEW = np.array([[-0.2, -0.4, -0.6, 0], [-0.5, -0.3, 0, 0], [-0.9, -0.7, -0.8, -0.6], [-0.1, 0, 0, 0]])
MASK = np.arange(4) < np.array([3, 2, 4, 1])[:, None]


def value(method, batch, new):
    """The scalar loss, its gradient, and what is reported."""
    run = jax.jit(jax.value_and_grad(lambda logps: method.objective(Decisions(logps=logps), batch, {}), has_aux=True))
    (loss, reported), gradient = run(jnp.asarray(new, jnp.float32))
    return float(loss), np.asarray(gradient), reported


def test_worked_example(make):
    method = drpo(prompts=1, group_size=4, max_new=4, lam=0.5)
    loss, gradient, reported = value(method, make.batch([1, 0, 0, 1], old=OLD, mask=MASK), NEW)
    assert loss == pytest.approx(-0.392786, abs=1e-6)  # the drift is below the budget
    slopes = np.array([-0.089647, 0.254375, 0.122813, -0.731059])
    np.testing.assert_allclose(gradient, MASK * slopes[:, None], atol=1e-6)
    assert float(reported["margin"][0, 0]) == pytest.approx(0.392786, abs=1e-6)
    assert method.group_size == 4 and method.roles == {}


def test_without_a_preference_it_is_disco(make):
    data = make.ragged(0, binary=True)
    plain, same = (
        value(m, data.batch(), data.new)
        for m in (disco(prompts=3, group_size=4), drpo(prompts=3, group_size=4, max_new=9, lam=math.inf))
    )
    assert plain[0] == pytest.approx(same[0], rel=1e-6)
    np.testing.assert_allclose(plain[1], same[1], atol=1e-6)
    pressed = value(drpo(prompts=3, group_size=4, max_new=9, lam=0.3), data.batch(), data.new)
    assert pressed[0] != pytest.approx(plain[0], rel=1e-3)


def by_loops(data, new, *, tau, lam, budget, penalty, excess=None):
    rows = [i for i in range(len(data.weights)) if data.weights[i] > 0]
    count = data.mask.sum(1)
    s = [sum(new[i][data.mask[i]]) / max(count[i], 1) for i in range(len(new))]
    c, total, groups = data.weights, 0.0, {data.groups[i] for i in rows if data.groups[i] >= 0}
    for group in groups:
        right, wrong = ([i for i in rows if data.groups[i] == group and data.total[i] == v] for v in (1, 0))
        if not right or not wrong:
            continue
        share = {i: c[i] * math.exp((1 - count[i] / 9) / lam) for i in right}
        total += sum(share[i] * s[i] for i in right) / sum(share.values())
        total -= tau * math.log(sum(c[j] * math.exp(s[j] / tau) for j in wrong) / sum(c[j] for j in wrong))
    tokens = sum(c[i] * count[i] for i in rows)
    drift = sum(c[i] * sum((data.old[i] - new[i])[data.mask[i]]) for i in rows) / tokens
    now = max(penalty * (drift - budget), 0) if excess is None else excess
    return -total / len(groups) + now * drift, now


@pytest.mark.parametrize("seed", range(3))
def test_against_loops(make, seed):
    """The length is that of the completion as it was drawn, a constant; rows without weight are silent."""
    data = make.ragged(seed, binary=True)
    options = {"tau": 0.7, "lam": 0.3, "budget": -0.5, "penalty": 2.0}
    method = methods.resolve("drpo", options=options, settings=make.settings)
    loss, gradient, _ = value(method, data.batch(), data.new)
    expected, excess = by_loops(data, data.new, **options)
    assert loss == pytest.approx(expected, rel=1e-5) and excess > 0
    formula = functools.partial(by_loops, data, **options, excess=excess)
    for place in np.ndindex(data.new.shape):
        up, down = data.new.copy(), data.new.copy()
        up[place] += 1e-6
        down[place] -= 1e-6
        difference = (formula(up)[0] - formula(down)[0]) / 2e-6
        assert gradient[place] == pytest.approx(difference, abs=1e-5)
    assert not gradient[(data.weights == 0)[:, None] | ~data.mask].any()


def test_no_right_completion_is_pushed_down(make):
    """However long: GRPO on the merged reward pushes the longest right one of three down."""
    rewards, lengths = np.array([1, 1, 1, 0, 0, 0.0]), np.array([1, 5, 9, 4, 4, 4])
    mask = np.arange(9) < lengths[:, None]
    batch = make.batch(rewards, old=np.zeros((6, 9)) - 1, mask=mask)
    _, gradient, _ = value(drpo(prompts=1, group_size=6, max_new=10), batch, np.zeros((6, 9)) - 1)
    assert (gradient[:3][mask[:3]] < 0).all() and (gradient[3:][mask[3:]] > 0).all()
    merged = np.where(rewards == 1, [0.9, 0.5, 0.1, 0, 0, 0], 0)
    grpo = methods.resolve("grpo", options={}, settings={"prompts": 1, "group_size": 6})
    scores = np.asarray(grpo.advantage(make.batch(merged), {}, None)[0].advantages)[:, 0]
    np.testing.assert_allclose(scores, [1.743431, 0.670550, -0.402330, *[-0.670550] * 3], atol=5e-6)


def test_one_round(make):
    method = drpo(prompts=2, group_size=3, max_new=9)
    plan = method.plan(method.init(None), lambda state, n: [Prompt(i, "?") for i in range(n)], None)
    asked = next(plan)
    assert [(r.prompt.id, r.count) for r in asked] == [(0, 3), (1, 3)]
    rows = make.rollout([0, 0, 0, 1, 1, 1], group_ids=[0, 0, 0, 1, 1, 1])
    with pytest.raises(StopIteration) as end:
        plan.send(rows)
    host, (trained,) = end.value.value
    assert trained is rows and host == {}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lam": 0.0}, "lam .* above 0 .*, got 0.0"),
        ({"tau": -1.0}, "tau is a temperature above 0"),
        ({"divergence": "k3"}, "divergence is one of"),
        ({"score": "Lratio"}, "'drpo' has no option 'score'"),
    ],
)
def test_refusals(make, options, said):
    with pytest.raises(ValueError, match=said):
        methods.resolve("drpo", options=options, settings=make.settings)
