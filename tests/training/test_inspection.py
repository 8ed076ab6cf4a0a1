"""Nothing fails silently: mistakes that only a mistake can make, named by prompt id, and the numbers of a step."""

import numpy as np
import pytest

from grpo_jax.training.inspection import (
    RolloutError,
    UpdateError,
    check_rollout,
    check_update,
    describe_batch,
    duplicates,
)
from grpo_jax.types import Prompt, Request

SIZES = (4, 3, 4, 2, 4, 4)


@pytest.fixture
def rows(toy):
    return toy.rollout()


@pytest.fixture
def requests():
    return [Request(Prompt(100 + i, "?"), count=n) for i, n in enumerate(SIZES)]


def changed(x, places, value):
    x = np.array(x)
    x[places] = value
    return x


def test_a_sound_rollout(rows, requests):
    check_rollout(rows, requests)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_log_probs_that_are_no_numbers(rows, requests, value):
    bad = rows.replace(sampler_logps=changed(rows.sampler_logps, ([5, 6, 12], 0), value))
    with pytest.raises(RolloutError, match=r"not finite for 3 rows, prompt ids 101, 103: .*overflowed"):
        check_rollout(bad, requests)
    padding = rows.replace(sampler_logps=np.where(np.arange(6) < rows.lengths[:, None], rows.sampler_logps, value))
    check_rollout(padding, requests)


def test_a_policy_of_nan_is_not_taken_for_given_decisions(rows, requests):
    """NaN also means that nothing was drawn; where something was asked for it cannot."""
    broken = np.full_like(rows.sampler_logps, np.nan)
    nothing = rows.replace(behavior_logps=broken, sampler_logps=broken, completion_mask=np.zeros(broken.shape, bool))
    with pytest.raises(RolloutError, match="21 rows, prompt ids 100, 101, 102, 103, 104, 105"):
        check_rollout(nothing, requests)
    given = [Request(r.prompt, count=r.count, prefix="gold", max_new=0, train_given=True) for r in requests]
    check_rollout(nothing, given)


def test_rows_that_were_not_asked_for(rows, requests):
    with pytest.raises(RolloutError, match="in their order: 21 rows of the prompts 101, 100"):
        check_rollout(rows, [requests[1], requests[0], *requests[2:]])
    with pytest.raises(RolloutError, match="got 21 of"):
        check_rollout(rows, requests[:-1])


def twins(rows, logp):
    """Rows 7 and 9 (prompt 102) are the same six tokens, each of this log-probability."""
    same = {"lengths": 6, "behavior_logps": logp / 6, "sampler_logps": -1.0, "completions": 3}
    return rows.replace(**{k: changed(getattr(rows, k), [7, 9], v) for k, v in same.items()})


def test_draws_that_agree_although_they_cannot(rows, requests):
    with pytest.raises(RolloutError, match=r"prompt 102 \(rows 7 and 9\) are the same 6 tokens.*log-probability -61"):
        check_rollout(twins(rows, -61.0), requests)


@pytest.mark.parametrize(
    "change",
    [
        {},  # likely enough
        {"sampled_under": (9, 3)},  # another context
        {"prompt_ids": (9, 99)},
        {"completions": ((9, 5), 4)},
        {"lengths": (9, 5)},
    ],
)
def test_draws_that_may_agree(rows, requests, change):
    improbable = twins(rows, -61.0 if change else -59.0)
    name, (place, value) = next(iter(change.items()), ("lengths", (9, 6)))
    improbable = improbable.replace(**{name: changed(getattr(improbable, name), place, value)})
    asked = [r.prompt.id for r in requests for _ in range(r.count)]
    asked = [Request(Prompt(99 if name == "prompt_ids" and i == 9 else p, "?")) for i, p in enumerate(asked)]
    check_rollout(improbable, asked)


def test_a_prefix_that_was_drawn_before_is_no_draw(rows, requests):
    """Branches from one long prefix may well end alike; its log-probability is not theirs."""
    prefix = (np.full(5, 3), np.full(5, -13.0))
    branches = [*requests[:2], Request(requests[2].prompt, count=4, prefix=prefix), *requests[3:]]
    alike = twins(rows, -78.0)
    check_rollout(alike, branches)
    with pytest.raises(RolloutError):
        check_rollout(alike, requests)


def test_duplicates(rows):
    assert duplicates(rows.replace(index=rows.index)) == pytest.approx(oracle_duplicates(rows))
    alike = twins(rows, -10.0)
    alike = alike.replace(completions=changed(alike.completions, (9, slice(None)), 3))
    assert duplicates(alike) == pytest.approx(oracle_duplicates(alike)) and duplicates(alike) > 0
    nobody = alike.replace(group_ids=np.full(len(alike), -1))
    assert duplicates(nobody) == 0.0


def oracle_duplicates(rows):
    seen = [(int(g), rows.completions[i, : rows.lengths[i]].tolist()) for i, g in enumerate(rows.group_ids)]
    return np.mean([seen.count(s) > 1 for s in seen])


def test_updates_that_would_destroy_the_policy():
    check_update({"loss": np.float32(0.3), "grad_norm": np.float32(2)}, step=4, update=1)
    for broken in ({"loss": np.nan, "grad_norm": 1.0}, {"loss": 0.0, "grad_norm": np.inf}):
        with pytest.raises(UpdateError, match="update 1 of step 4 has loss .* was not applied"):
            check_update(broken, step=4, update=1)


def test_the_numbers_of_a_step(toy):
    """Two prompts of three and two rows and a padding row, two channels, worked by hand."""
    rows = toy.rollout(sizes=(3, 2, 1), decisions=4)
    nan = np.nan
    scores = np.array([[1, 0.5], [0, nan], [0, 0], [1, 0.2], [1, 0.2], [9, 9]], np.float32)
    mask = np.ones((6, 4), bool)
    mask[2] = False
    batch = toy.batch(rows).replace(
        scores=scores,
        rewards=scores,
        channels=("exact", "length"),
        channel_weights=(1.0, 2.0),
        lengths=np.array([4, 2, 0, 3, 3, 0]),
        finished=np.array([False, True, True, True, False, False]),
        completions=np.array([[1, 2, 3, 4], [1, 2, 0, 0], [0] * 4, [1, 1, 1, 0], [1, 1, 1, 2], [0] * 4]),
        completion_mask=mask,
        prompt_ids=np.array([7, 7, 7, 3, 3, -1]),
        group_ids=np.array([0, 0, 0, 1, 1, -1]),
    )
    numbers, named = describe_batch(batch)
    totals = np.array([2.0, 0.0, 0.0, 1.4, 1.4])
    expected = {
        "reward": totals.mean(),
        "reward_std": totals.std(),
        "reward/exact": 3 / 5,
        "reward_std/exact": np.std([1, 0, 0, 1, 1]),
        "reward/length": 0.9 / 4,
        "reward_std/length": np.std([0.5, 0, 0.2, 0.2]),
        "no_signal": 1 / 2,
        "length_mean": 12 / 5,
        "length_max": 4,
        "truncated": 2 / 5,
        "empty": 1 / 5,
        "duplicates": 2 / 5,
        "rows": 5,
    }
    assert numbers.keys() == expected.keys()
    np.testing.assert_allclose([numbers[k] for k in expected], list(expected.values()), rtol=1e-6)
    assert named == {"no_signal": [3]}


def test_without_rewards_there_are_no_numbers_of_rewards(toy):
    rows = toy.rollout()
    empty = np.zeros((len(rows), 0), np.float32)
    numbers, named = describe_batch(
        toy.batch(rows).replace(scores=empty, rewards=empty, channels=(), channel_weights=())
    )
    assert not any(name.startswith(("reward", "no_signal")) for name in numbers) and named == {"no_signal": []}
    missing = np.full((len(rows), 1), np.nan, np.float32)
    numbers, named = describe_batch(toy.batch(rows).replace(scores=missing, rewards=missing))
    assert not any(name.startswith("reward") for name in numbers)
    assert numbers["no_signal"] == 1 and named["no_signal"], "rewards that never apply are no signal, and said so"
