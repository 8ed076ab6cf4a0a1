"""NGRPO: worked examples, float64 loops, asymmetric bounds, and which groups are replaced by further prompts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import methods
from grpo_jax.types import Decisions, Prompt, Rollout, State


def resolve(**options):
    return methods.resolve("ngrpo", options=options, settings={"prompts": 2, "group_size": 2, "max_new": 9})


def shaped(method, batch):
    return np.asarray(jax.jit(lambda batch: method.advantage(batch, {}, None)[0].advantages)(batch))


def test_worked_examples(make):
    rewards = [0, 0, 0, 0, 1, 0, 0, 0, 1, 1, 1, 0, 1, 1, 1, 1]
    expected = [-0.447213] * 4 + [1.095443] + [-0.730295] * 3 + [0.447213] * 3 + [-1.788850] + [0] * 4
    got = shaped(resolve(), make.batch(rewards, groups=np.repeat(range(4), 4)))
    np.testing.assert_allclose(got[:, 0], expected, atol=2e-6)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("r_max", "n_v"), [(4.0, 1), (2.5, 3)])
def test_against_float64(make, seed, r_max, n_v):
    data, expected = make.ragged(seed), np.zeros(17)
    for i in range(17):
        rows = [j for j in range(17) if data.groups[j] == data.groups[i] >= 0 and not np.isnan(data.total[j])]
        if i in rows and len(rows) > 1:
            inside = np.append(data.total[rows], [r_max] * n_v)
            expected[i] = (data.total[i] - inside.mean()) / (inside.std(ddof=1) + 0.1)
    got = shaped(resolve(r_max=r_max, n_v=n_v, epsilon=0.1), data.batch())
    np.testing.assert_allclose(got, np.where(data.mask, expected[:, None], 0), rtol=1e-4, atol=1e-5)
    assert np.abs(expected).max() > 0.3


@pytest.mark.parametrize(("advantage", "expected"), [(1, [-0.80, -0.86, -1.22, -1.24]), (-1, [0.84, 0.86, 1.22, 1.30])])
def test_bounds(make, advantage, expected):
    batch = make.batch([0], old=np.zeros((1, 4)), mask=np.ones((1, 4), bool))
    batch = batch.replace(advantages=jnp.full((1, 4), float(advantage)))
    new = Decisions(logps=jnp.log(jnp.array([[0.80, 0.86, 1.22, 1.30]])))
    np.testing.assert_allclose(resolve().objective(new, batch, {})[0][0], expected, atol=1e-6)


class Script:
    """Answers a plan's requests with groups that score as written, prompt by prompt from 0 on."""

    def __init__(self, make, written):
        self.make, self.written, self.prompts, self.asked = make, written, iter(range(100)), []

    def __call__(self, method, state):
        plan, answer = (
            method.plan(state, lambda state, n: [Prompt(next(self.prompts), "") for _ in range(n)], None),
            None,
        )
        while True:
            try:
                ask = plan.send(answer)
            except StopIteration as end:
                return end.value
            if isinstance(ask, Rollout):
                scores = np.concatenate([self.written[p] for p in dict.fromkeys(ask.prompt_ids.tolist())])
                answer = ask.replace(scores=np.float32(scores)[:, None], channels=("exact",), channel_weights=(0.7,))
            else:
                self.asked.append([r.prompt.id for r in ask])
                ids = np.repeat(self.asked[-1], 2)
                answer = self.make.rollout(ids, group_ids=np.unique(ids, return_inverse=True)[1])


def test_groups_that_are_all_right_make_room_and_surplus_opens_the_next_step(make):
    script = Script(make, [[1, 1], [0, 0], [1, 0], [0, 1], [1, 1], [1, 1], [0, 0], [1, 1]])
    method = resolve(r_max=0.7)
    state = method.init(None)
    assert state == State(0, {}, {"surplus": []})
    host, (rows,) = script(method, state)
    assert script.asked == [[0, 1], [2, 3]] and rows.prompt_ids.tolist() == [1, 1, 2, 2]  # 1: all wrong, kept
    assert [g.prompt_ids.tolist() for g in host["surplus"]] == [[3, 3]]
    host, (rows,) = script(method, State(1, {}, host))
    assert script.asked[2:] == [[4, 5], [6, 7]] and rows.prompt_ids.tolist() == [3, 3, 6, 6]
    assert host == {"surplus": []}


def test_a_step_trains_on_what_it_has_after_its_rounds(make):
    script = Script(make, [[1, 1], [0, 1], [1, 1], [1, 1], [1, 1], [1, 1], [1, 1], [1, 1]])
    method = resolve(r_max=0.7, max_rounds=2)
    host, (rows,) = script(method, method.init(None))
    assert rows.prompt_ids.tolist() == [1, 1] and host == {"surplus": []} and len(script.asked) == 2
    assert script(method, State(1, {}, host)) == ({"surplus": []}, [])
