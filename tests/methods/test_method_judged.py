"""What no reward applies to is no failure and no success, and options that make no sense are refused at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import methods
from grpo_jax.methods.grpo import judged, mixed

NAN = np.nan
SETTINGS = {"prompts": 2, "group_size": 4, "max_new": 9, "steps": 5}


def resolve(name, **options):
    return methods.resolve(name, options=options, settings=SETTINGS)


def group(make, scores):
    return make.rollout([0] * len(scores), scores=np.array(scores)[:, None])


@pytest.mark.parametrize(
    ("scores", "expected"),
    [([1, 1, 1, NAN], False), ([1, 0, NAN, NAN], True), ([NAN] * 4, False), ([-1, -1, -1, NAN], False), ([0, 1], True)],
)
def test_an_unjudged_row_does_not_make_a_group_mixed(make, scores, expected):
    rows = group(make, scores)
    assert mixed(rows) == expected
    np.testing.assert_array_equal(judged(rows), [s for s in scores if s == s])
    np.testing.assert_array_equal(rows.score(), scores)


def kept_by(make, name, scores):
    """How many groups a method trains on, of one that is scored so and then of mixed ones."""
    method, ids = resolve(name, max_rounds=1), iter(range(100))
    plan = method.plan(method.init(None), lambda state, n: [make_prompt(next(ids)) for _ in range(n)], None)
    ask = plan.send(None)
    n = len(ask)
    rows = make.rollout(np.repeat(range(n), 4), group_ids=np.repeat(range(n), 4))
    rows = plan.send(rows)
    table = np.array([scores] + [[1, 0, 0, 1]] * (n - 1), float).reshape(-1, 1)
    try:
        ask = plan.send(rows.replace(scores=table.astype(np.float32), channels=("exact",)))
        while True:  # guide: the hinted round
            ask = plan.send(ask if not isinstance(ask, list) else make.rollout([0] * 4))
    except StopIteration as end:
        return sum(len(r.groups()) for r in end.value[1])


def make_prompt(i):
    from grpo_jax.types import Prompt

    return Prompt(i, "?", {"hint": "h"})


@pytest.mark.parametrize("name", ["dapo", "unlikeliness", "ngrpo"])
def test_a_group_that_is_all_right_but_for_an_unjudged_row_is_not_kept(make, name):
    assert kept_by(make, name, [1, 1, 1, NAN]) == 1 and kept_by(make, name, [1, 0, 1, NAN]) == 2


@pytest.mark.parametrize("channels", [10, 20])
def test_a_sum_that_should_be_one_is_in_range(make, channels):
    """Ten channels of weight 0.1 add up to a little more than 1 in float32."""
    scores = np.repeat([[1.0], [0], [1], [0]], channels, axis=1)
    weights = (float(np.float32(1 / channels)),) * channels
    batch = make.batch(scores, groups=np.zeros(4, int), channel_weights=weights)
    advantages = np.asarray(resolve("bnpo").advantage(batch, {}, None)[0].advantages)
    assert np.isfinite(advantages).all() and (advantages[0] > 0).all()


def test_a_channel_out_of_its_range_is_not_passed_over(make):
    batch = make.batch([[1, -0.5], [0, 0], [1, -1], [0, 0]], groups=np.zeros(4, int), channel_weights=(1.0, 1.0))
    values = resolve("bnpo", decompose=True).advantage(batch, {}, None)[0].advantages
    assert np.isnan(values).all()


def test_units_of_ranks_that_were_skipped_stay_apart(make):
    """Tokens with two newlines each: the lines are 0, 2, 4, and more of them than tokens are left."""
    method = methods.resolve("rank_grpo", options={"newlines": {7: 2}, "length_bonus": 0.0}, settings=SETTINGS)
    names = tuple(f"hits/{k}" for k in range(8))
    batch = make.batch(np.zeros((2, 8)), groups=np.zeros(2, int), mask=np.ones((2, 4), bool))
    batch = batch.replace(completions=jnp.full((2, 4), 7), channels=names, channel_weights=(1.0,) * 8)
    units = np.asarray(jax.jit(lambda b: method.advantage(b, {}, None)[0].unit_ids)(batch))
    np.testing.assert_array_equal(units, [[0, 1, 2, 3]] * 2)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("knapsack_rl", {"clamp": -1.0}, "clamp, which must be above 0"),
        ("knapsack_rl", {"fewest": 0}, "fewest must be at least 1, got 0"),
        ("ngrpo", {"max_rounds": 0}, "max_rounds must be at least 1"),
        ("unlikeliness", {"max_rounds": 0}, "max_rounds must be at least 1"),
        ("dapo", {"max_rounds": 0}, "max_rounds must be at least 1"),
        ("guide_grpo", {"max_rounds": 0}, "max_rounds must be at least 1"),
        ("disco", {"penalty": -1.0}, "penalty must be at least 0"),
        ("drpo", {"penalty": -1.0}, "penalty must be at least 0"),
        ("spo", {"rho_min": 0.99, "rho_max": 0.5}, "between rho_min and rho_max"),
        ("spo", {"offline": -1}, "offline must be at least 0"),
        ("curriculum_grpo", {"budgets": [9, 0]}, r"budgets\[1\] must be at least 1, got 0"),
        ("curriculum_grpo", {"length_weight": -1.0}, "length_weight must be at least 0"),
        ("microcoder_grpo", {"diversity": 3.0}, "a diversity in"),
        ("microcoder_grpo", {"temperatures": [1.0, -1.0]}, "temperatures above 0"),
        ("gdpo", {"conditions": {"a": "b"}}, "a condition is"),
    ],
)
def test_options_that_make_no_sense(name, options, said):
    with pytest.raises(ValueError, match=said):
        resolve(name, **options)
