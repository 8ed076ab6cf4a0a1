"""Unlikeliness: the worked example, what is asked for and trained on, and loops in float64 on ragged batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import losses, methods
from grpo_jax.types import Decisions, Prompt, Rollout


def resolve(**options):
    return methods.resolve("unlikeliness", options=options, settings={"prompts": 2, "group_size": 4})


def test_worked_example(make):
    """Mean log-probs -0.2, -0.9, -0.5, -0.4, of rows of different lengths."""
    mask = [[True, True], [True, False], [True, True], [True, False]]
    old = [[-0.1, -0.3], [-0.9, np.nan], [-0.4, -0.6], [-0.4, np.inf]]
    batch = make.batch([1, 1, 0, 1], groups=[0] * 4, old=old, mask=mask)
    for options, expected in [
        ({}, [0.309304, 0.721709, -1.477785, 0.446772]),
        ({"form": "paper"}, [0.294883, 0.737208, -1.474416, 0.442325]),
        ({"penalty": 0.0}, [0.499999, 0.499999, -1.499997, 0.499999]),
    ]:
        shaped, _ = resolve(**options).advantage(batch, {}, None)
        np.testing.assert_allclose(shaped.advantages, np.where(mask, np.array(expected)[:, None], 0), atol=2e-6)


def advantages(data, penalty):
    likelihood = [old[m].mean() if m.any() else np.nan for old, m in zip(data.old, data.mask)]
    rows, earned = range(len(data.total)), data.total.copy()
    group = lambda i: [j for j in rows if data.groups[j] == data.groups[i] >= 0 and not np.isnan(data.total[j])]  # noqa: E731
    for i in rows:
        ranked = [j for j in group(i) if not np.isnan(likelihood[j])]
        if i in ranked:
            earned[i] *= 1 - penalty * sum(likelihood[j] < likelihood[i] for j in ranked) / len(ranked)
    result = np.zeros(len(rows))
    for i in rows:
        peers = earned[group(i)]
        if i in group(i) and len(peers) > 1 and np.ptp(peers) > 0:
            result[i] = (earned[i] - peers.mean()) / (peers.std(ddof=1) + 1e-6)
    return result


@pytest.mark.parametrize("seed", [0, 1])
def test_against_float64(make, seed):
    data = make.ragged(seed, binary=True)
    method = resolve(penalty=0.4)
    a = advantages(data, 0.4)
    shaped, _ = jax.jit(lambda batch: method.advantage(batch, {}, None))(data.batch())
    np.testing.assert_allclose(shaped.advantages, np.where(data.mask, a[:, None], 0), rtol=1e-4, atol=1e-5)
    assert len(set(np.abs(a).round(3))) > 6

    def expected(new):
        ratio, d = np.exp(new - data.old), new - data.ref
        clipped = np.maximum(-a[:, None] * ratio, -a[:, None] * np.clip(ratio, 0.8, 1.2))
        counted = data.weights[:, None] * data.mask
        return (counted * (clipped + 0.1 * (np.exp(-d) - 1 + d))).sum() / counted.sum()

    @jax.jit
    @jax.value_and_grad
    def loss(logps):
        each, _ = method.objective(Decisions(logps=logps), shaped, {})
        return losses.weighted_sum(each, method.aggregate(shaped))

    value, gradient = loss(jnp.float32(data.new))
    assert float(value) == pytest.approx(expected(data.new), rel=2e-5)
    differences = np.zeros_like(data.new)
    for place in np.ndindex(data.new.shape):
        up, down = data.new.copy(), data.new.copy()
        up[place] += 1e-6
        down[place] -= 1e-6
        differences[place] = (expected(up) - expected(down)) / 2e-6
    np.testing.assert_allclose(gradient, differences, atol=3e-5 * np.abs(differences).max())


def drive(make, method, written):
    """(prompts of every round, what is trained) for a plan whose k-th prompt scores written[k]."""
    numbers, asked, answer = iter(range(100)), [], None
    plan = method.plan(method.init(None), lambda state, n: [Prompt(next(numbers), "") for _ in range(n)], None)
    while True:
        try:
            ask = plan.send(answer)
        except StopIteration as end:
            return asked, end.value[1]
        if isinstance(ask, Rollout):
            scores = np.concatenate([written[i] for i in dict.fromkeys(ask.prompt_ids.tolist())])
            answer = ask.replace(scores=np.float32(scores)[:, None], channels=("exact",), channel_weights=(1.0,))
        else:
            asked.append([r.prompt.id for r in ask])
            ids = np.repeat([r.prompt.id for r in ask], [r.count for r in ask])
            answer = make.rollout(ids, group_ids=np.repeat(range(len(ask)), [r.count for r in ask]))


def test_rounds_until_the_buffer_is_full(make):
    mixed, wrong, right = [1, 0, 0, 1], [0] * 4, [1] * 4
    method = resolve(buffer=10)
    asked, (rows,) = drive(make, method, [mixed, right, wrong, mixed, mixed, mixed])
    assert asked == [[0, 1], [2, 3], [4, 5]]  # 4, 8, 16 completions that can be compared
    assert rows.prompt_ids.tolist() == [0] * 4 + [3] * 4 + [4] * 4 + [5] * 4 and len(rows.groups()) == 4


def test_it_trains_on_what_it_has_after_its_rounds(make):
    asked, (rows,) = drive(make, resolve(max_rounds=2), [[0] * 4, [1, 0, 0, 0], [1] * 4, [0] * 4])
    assert len(asked) == 2 and rows.prompt_ids.tolist() == [1] * 4
    assert drive(make, resolve(max_rounds=1), [[0] * 4, [1] * 4])[1] == []


def test_messages():
    with pytest.raises(ValueError, match=r"lies in \[0, 1\], got 2"):
        resolve(penalty=2)
    with pytest.raises(ValueError, match=r"one of \('code', 'paper'\)"):
        resolve(form="bonus")
