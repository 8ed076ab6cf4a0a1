"""What the methods ask for, round by round, against a scripted sampler and scorer."""

import numpy as np
import pytest

from grpo_jax import methods
from grpo_jax.types import Prompt, Request, Rollout, State


class Script:
    """Drives a plan: answers requests with rows, and a rollout with the scores that are written for it.

    written: (prompt id, hinted) -> scores of its group; requests hinted by a context get True.
    """

    def __init__(self, make, written, prompts=range(100), columns=None, weight=1.0):
        self.make, self.written, self.weight = make, written, weight
        self.prompts = iter([Prompt(i, f"prompt {i}", (columns or {}).get(i, {"hint": f"hint {i}"})) for i in prompts])
        self.asked, self.scored, self.draws = [], [], []

    def draw(self, state, n):
        self.draws.append(n)
        return [next(self.prompts) for _ in range(n)]

    def __call__(self, method, state=None):
        plan, answer = method.plan(state or method.init(None), self.draw, None), None
        while True:
            try:
                ask = plan.send(answer)
            except StopIteration as end:
                return end.value
            answer = self.score(ask) if isinstance(ask, Rollout) else self.sample(ask)

    def sample(self, requests):
        self.asked.append(requests)
        rows = [(r, g) for g, r in enumerate(requests) for _ in range(r.count)]
        hinted = [int(r.context is not None) for r, _ in rows]
        return self.make.rollout(
            [r.prompt.id for r, _ in rows],
            group_ids=[g for _, g in rows],
            contexts=[(2 * r.prompt.id + h, 2 * r.prompt.id) for (r, _), h in zip(rows, hinted)],
            columns={"hinted": np.array(hinted)},
        )

    def score(self, rows):
        self.scored.append(rows)
        scores = np.zeros(len(rows), np.float32)
        for prompt in set(rows.prompt_ids.tolist()):
            mine = rows.prompt_ids == prompt
            scores[mine] = self.written[prompt, bool(rows.columns["hinted"][mine][0])]
        return rows.replace(scores=scores[:, None], channels=("exact",), channel_weights=(self.weight,))


def resolve(name, **options):
    return methods.resolve(name, options=options, settings={"prompts": 2, "group_size": 2, "max_new": 4})


def trained(rollouts):
    (rows,) = rollouts
    return rows.prompt_ids.tolist()


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "gspo", "disco"])
def test_one_round(make, name):
    script = Script(make, {(0, False): [0, 1], (1, False): [0, 0]})
    host, rollouts = script(resolve(name))
    assert [[(r.prompt.id, r.count, r.context) for r in asked] for asked in script.asked] == [
        [(0, 2, None), (1, 2, None)]
    ]
    assert trained(rollouts) == [0, 0, 1, 1] and host == {}
    assert resolve(name).group_size == 2


def test_mc_grpo_asks_for_one_more(make):
    script = Script(make, {(0, False): [0, 1, 1], (1, False): [0, 0, 0]})
    method = resolve("mc_grpo")
    _, rollouts = script(method)
    assert [r.count for r in script.asked[0]] == [3, 3] and method.group_size == 3
    assert trained(rollouts) == [0, 0, 0, 1, 1, 1]
    with pytest.raises(ValueError, match="group_size 3 must be even"):
        methods.resolve("mc_grpo", options={}, settings={"prompts": 2, "group_size": 3})
    with pytest.raises(ValueError, match=r"scale is one of \('mad', 'std', 'none'\), got 'range'"):
        resolve("mc_grpo", scale="range")


# ---- DAPO ----------------------------------------------------------------------------------------------------------


def test_dapo_draws_until_enough_groups_carry_signal(make):
    written = {(0, False): [1, 1], (1, False): [0, 1], (2, False): [0, 0], (3, False): [1, 0], (4, False): [0, 1]}
    script = Script(make, {**written, (5, False): [0, 1]})
    _, rollouts = script(resolve("dapo"))
    assert trained(rollouts) == [1, 1, 3, 3] and script.draws == [2, 2] and len(script.scored) == 2


def test_dapo_keeps_no_more_than_the_batch(make):
    written = {(i, False): [0, i % 2] for i in range(8)} | {(2, False): [0, 1]}
    script = Script(make, written)
    _, rollouts = script(resolve("dapo"))
    assert trained(rollouts) == [1, 1, 2, 2]  # 3 is left over


def test_dapo_trains_on_what_it_has_after_its_rounds(make):
    script = Script(make, {(i, False): [0, float(i == 3)] for i in range(100)})
    _, rollouts = script(resolve("dapo", max_rounds=3))
    assert trained(rollouts) == [3, 3] and script.draws == [2, 2, 2]
    script = Script(make, {(i, False): [1, 1] for i in range(100)})
    assert script(resolve("dapo", max_rounds=3)) == ({}, [])


def test_equal_scores_carry_no_signal_whatever_their_rounding(make):
    """Seven times 0.1 at a weight of 0.3 has a standard deviation of 3e-18."""
    scores = np.full(7, 0.1, np.float32)
    assert (scores[:, None] * np.asarray((0.3,))).sum(1).std() > 0
    method = methods.resolve("dapo", options={"max_rounds": 1}, settings={"prompts": 1, "group_size": 7, "max_new": 4})
    assert Script(make, {(0, False): scores}, weight=0.3)(method)[1] == []


# ---- Guide-GRPO ------------------------------------------------------------------------------------------------------


def test_guide_grpo_asks_dead_prompts_again_with_a_hint(make):
    """0 fails and the hint helps, 1 is solved, 2 is mixed, 3 fails with the hint too: 0 (hinted) and 2 train."""
    written = {(0, False): [0, 0], (0, True): [0, 1], (1, False): [1, 1], (2, False): [0, 1], (3, False): [0, 0]}
    script = Script(make, {**written, (3, True): [0, 0]})
    host, rollouts = script(resolve("guide_grpo"))
    assert [[r.prompt.id for r in asked] for asked in script.asked] == [[0, 1], [0], [2, 3], [3]]
    (hinted,) = script.asked[1]
    assert hinted.count == 2 and hinted.train_context == "prompt 0"
    assert hinted.context == "prompt 0\n\nHint: hint 0\n"
    assert trained(rollouts) == [0, 0, 2, 2] and host == {"surplus": []}
    (rows,) = rollouts
    assert (rows.sampled_under != rows.trained_under).tolist() == [True, True, False, False]


def test_guide_grpo_carries_surplus_groups_to_the_next_step(make):
    written = {(i, h): [0, 1] for i in range(4) for h in (False, True)} | {(0, False): [0, 0]}
    method = methods.resolve("guide_grpo", options={}, settings={"prompts": 3, "group_size": 2})
    script = Script(make, {**written, **{(i, False): [0, 1] for i in range(4, 9)}, (5, False): [1, 1]})
    state = method.init(None)
    assert state == State(0, {}, {"surplus": []})
    host, rollouts = script(method, state)
    assert trained(rollouts) == [1, 1, 2, 2, 0, 0] and host == {"surplus": []}
    host, rollouts = script(method, State(1, {}, host))  # 3, 4 of the second draw; 6, 7, 8 of the third
    assert trained(rollouts) == [3, 3, 4, 4, 6, 6]
    assert [g.prompt_ids.tolist() for g in host["surplus"]] == [[7, 7], [8, 8]]
    script.written |= {(i, False): [0, 1] for i in range(9, 12)}
    host, rollouts = script(method, State(2, {}, host))
    assert trained(rollouts) == [7, 7, 8, 8, 9, 9] and script.draws == [3] * 4
    full = State(3, {}, {"surplus": [*host["surplus"], *rollouts[0].groups()]})
    asked = len(script.asked)
    host, rollouts = script(method, full)
    assert len(script.asked) == asked  # enough was kept: nothing is sampled
    assert trained(rollouts) == [10, 10, 11, 11, 7, 7] and [g.prompt_ids[0] for g in host["surplus"]] == [8, 9]


def test_guide_grpo_gives_up_after_its_rounds(make):
    written = {(i, h): [0, 0] for i in range(40) for h in (False, True)}
    script = Script(make, written)
    assert script(resolve("guide_grpo", max_rounds=2)) == ({"surplus": []}, [])
    assert [len(a) for a in script.asked] == [2, 2, 2, 2]
    script = Script(make, written | {(1, True): [1, 0]})
    host, rollouts = script(resolve("guide_grpo", max_rounds=2))
    assert trained(rollouts) == [1, 1]


def test_guide_grpo_asks_nothing_again_where_nothing_failed(make):
    script = Script(make, {(0, False): [1, 1], (1, False): [0, 1], (2, False): [1, 1], (3, False): [1, 0]})
    _, rollouts = script(resolve("guide_grpo"))
    assert [len(a) for a in script.asked] == [2, 2] and trained(rollouts) == [1, 1, 3, 3]


def test_guide_grpo_by_how_much_is_solvable(make):
    """Within [0.25, 0.75] a group is kept, at 0.25 and below it is asked again."""
    written = {(0, False): [0.5, 0.25], (1, False): [0.4, 0.0], (1, True): [1, 0.75], (2, False): [0.25, 0.25]}
    script = Script(make, {**written, (2, True): [1, 1], (3, False): [0.75, 0.75]})
    method = methods.resolve(
        "guide_grpo", options={"solvable": 0.25, "max_rounds": 1}, settings={"prompts": 4, "group_size": 2}
    )
    _, rollouts = script(method)
    assert trained(rollouts) == [0, 0, 2, 2, 3, 3] and [r.prompt.id for r in script.asked[1]] == [1, 2]


def test_guide_grpo_hints_in_a_chat(make):
    """The last message takes the hint; a prompt with braces stays as it is."""
    chat = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "What is {x}?"}]
    script = Script(make, {(0, False): [0, 0], (0, True): [0, 1]})
    script.prompts = iter([Prompt(0, chat, {"clue": "{12}"})])
    options = {"hint_column": "clue", "hint": "{prompt} ({hint})", "max_rounds": 1}
    script(methods.resolve("guide_grpo", options=options, settings={"prompts": 1, "group_size": 2}))
    assert script.asked[1][0].context == [chat[0], {"role": "user", "content": "What is {x}? ({12})"}]
    assert script.asked[1][0].train_context == chat


def test_guide_grpo_without_a_hint(make):
    script = Script(make, {(0, False): [0, 0], (1, False): [0, 1]}, columns={0: {"answer": "3"}})
    with pytest.raises(ValueError, match=r"from the column 'hint', but prompt 0 has \['answer'\]"):
        script(resolve("guide_grpo"))


# ---- supervised ------------------------------------------------------------------------------------------------------


def test_sft_injects_its_completions(make):
    columns = {i: {"completion": f"text {i}"} for i in range(2)}
    script = Script(make, {}, columns=columns)
    _, rollouts = script(resolve("sft"))
    ((first, second),) = script.asked
    assert first == Request(
        Prompt(0, "prompt 0", columns[0]), prefix="text 0", max_new=0, train_given=True, options={"score": False}
    )
    assert second.prefix == "text 1" and script.scored == [] and trained(rollouts) == [0, 1]
    with pytest.raises(ValueError, match=r"from the column 'answer', but prompt 0 has \['completion'\]"):
        Script(make, {}, columns=columns)(resolve("sft", completion_column="answer"))
