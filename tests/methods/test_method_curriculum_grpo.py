"""Curriculum GRPO: the budget in the prompt and in the reward, its normaliser, and both of its ratios."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_method_transcriptions import clip, computed, k3, slopes

from grpo_jax import methods
from grpo_jax.types import Prompt, Rollout, State


def resolve(**options):
    return methods.resolve("curriculum_grpo", options=options, settings={"prompts": 2, "group_size": 3, "max_new": 400})


class Drive:
    """Answers a plan with rows of given lengths, two channels of scores and, if asked for, a column."""

    def __init__(self, make, lengths, scores, columns=None, prompts=("one {1}", "two")):
        self.make, self.lengths, self.scores = make, np.asarray(lengths), np.asarray(scores, np.float32)
        self.columns, self.prompts = columns or {}, [Prompt(i, text) for i, text in enumerate(prompts)]
        self.asked = []

    def __call__(self, method, step):
        plan, answer = method.plan(State(step, {}, {}), lambda state, n: self.prompts[:n], None), None
        while True:
            try:
                ask = plan.send(answer)
            except StopIteration as end:
                host, (rows,) = end.value
                assert host == {}
                return rows
            if isinstance(ask, Rollout):
                answer = ask.replace(
                    scores=self.scores,
                    channels=("answer", "form"),
                    channel_weights=(0.3, 0.1),
                    columns={**ask.columns, **self.columns},
                )
            else:
                self.asked = ask
                ids = [r.prompt.id for r in ask for _ in range(r.count)]
                groups = [g for g, r in enumerate(ask) for _ in range(r.count)]
                answer = self.make.rollout(ids, group_ids=groups).replace(lengths=self.lengths)


LENGTHS = [50, 100, 150, 250, 0, 80]
SCORES = np.stack([[1, 1, 0, 1, 0, 0], [1, 1, 1, 0, 0.5, 1]], axis=1)


def test_worked_example(make):
    """Both groups are one here; a budget of 100."""
    rows = Drive(make, LENGTHS, SCORES)(resolve(budgets=[100]), 7)
    assert rows.channels == ("answer", "form", "budgeted_length") and rows.channel_weights == (0.3, 0.1, 0.6)
    np.testing.assert_allclose(rows.scores[:, 2], [0.5, 1, 0.5, 0, 0, 0.8], atol=1e-6)
    np.testing.assert_allclose(rows.score(), [0.7, 1, 0.4, 0.3, 0.05, 0.58], atol=1e-6)
    assert rows.columns["budget"].tolist() == [100] * 6
    batch = make.batch(rows.scores, channel_weights=rows.channel_weights)
    batch, _ = resolve().advantage(batch, {}, None)
    expected = [0.644797, 1.636792, -0.347198, -0.677863, -1.504526, 0.247999]
    np.testing.assert_allclose(batch.advantages[:, 0], expected, atol=2e-6)
    band = Drive(make, LENGTHS, SCORES)(resolve(budgets=[100], shape="band", length_weight=0.5), 7)
    np.testing.assert_allclose(band.scores[:, 2], [1, 1, 0.5, 0, 1, 1], atol=1e-6)
    assert band.channel_weights[2] == 0.5


@pytest.mark.parametrize(("step", "budget"), [(0, 256), (149, 256), (150, 179), (300, 125), (450, 87), (5000, 1)])
def test_prompt_and_reward_know_the_same_budget(make, step, budget):
    """The paper's schedule; the text is the user's, braces in a prompt stay."""
    drive = Drive(make, [budget] * 6, SCORES)
    rows = drive(resolve(template="{prompt} [{budget}]"), step)
    assert [r.context for r in drive.asked] == [f"one {{1}} [{budget}]", f"two [{budget}]"]
    assert [r.count for r in drive.asked] == [3, 3]
    np.testing.assert_array_equal(rows.scores[:, 2], 1)


def test_budget_in_a_chat(make):
    chat = [{"role": "system", "content": "Think."}, {"role": "user", "content": "1+1?"}]
    drive = Drive(make, LENGTHS[:3], SCORES[:3], prompts=[chat])
    drive(resolve(first=9, factor=0.5, interval=2), 3)
    assert drive.asked[0].context == [chat[0], {"role": "user", "content": "1+1?\n\nThink within 4 tokens.\n"}]


def test_the_length_of_a_part(make):
    drive = Drive(make, LENGTHS, SCORES, columns={"shown": np.array([5, 10, 15, 20, 25, 0])})
    rows = drive(resolve(budgets=[10], length_column="shown"), 0)
    np.testing.assert_allclose(rows.scores[:, 2], [0.5, 1, 0.5, 0, 0, 0], atol=1e-6)
    with pytest.raises(ValueError, match=r"reads lengths from the column 'span', but there are \['budget', 'shown'\]"):
        drive(resolve(budgets=[10], length_column="span"), 0)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_against_loops(make, ratio, seed):
    data = make.ragged(seed)
    expected = np.zeros(len(data.groups))
    for i in np.flatnonzero(~np.isnan(data.total)):
        same = [r for r, g in zip(data.total, data.groups) if g == data.groups[i] >= 0 and not np.isnan(r)]
        if len(same) > 1:
            expected[i] = (data.total[i] - np.mean(same)) / np.sqrt(np.var(same) + 1e-8) if np.ptp(same) else 0
    method = resolve(ratio=ratio, clip_low=0.1, clip_high=0.3, kl=0.2)
    batch, _ = jax.jit(lambda batch: method.advantage(batch, {}, None))(data.batch())
    np.testing.assert_allclose(batch.advantages, np.where(data.mask, expected[:, None], 0), rtol=1e-4, atol=1e-5)
    assert np.abs(expected).max() > 0.3

    def loss(new):
        value = 0.0
        rows = [i for i in range(len(expected)) if data.mask[i].any()]
        for i in rows:
            m = data.mask[i]
            gain = (new[i] - data.old[i])[m]
            rho = np.exp(gain) if ratio == "token" else np.full(m.sum(), np.exp(gain.sum()))
            each = [clip(r, expected[i], 0.1, 0.3) for r in rho] + 0.2 * k3(new[i][m], data.ref[i][m])
            value += data.weights[i] * each.mean()
        return value / data.weights[rows].sum()

    value, gradient = computed(method, batch, data.new)
    differences = slopes(loss, data.new)
    assert float(value) == pytest.approx(loss(data.new), rel=2e-5, abs=1e-6)
    np.testing.assert_allclose(gradient, differences, atol=3e-5 * np.abs(differences).max())
    assert not np.asarray(gradient)[~data.mask].any()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"shape": "plateau"}, r"one of \('triangle', 'band'\) .* got 'plateau' and 'token'"),
        ({"ratio": "turn"}, r"one of \('token', 'sequence'\), got 'triangle' and 'turn'"),
        ({"factor": 1.0}, "a factor between 0 and 1"),
        ({"interval": 0}, "an interval above 0"),
    ],
)
def test_what_is_refused(make, options, said):
    with pytest.raises(ValueError, match=said):
        Drive(make, LENGTHS, SCORES)(resolve(**options), 0)


def test_rows_without_reward_have_no_advantage(make):
    batch = make.batch([1.0, 0.0, np.nan, 3.0], groups=[0, 0, 0, 1])
    batch, _ = resolve().advantage(batch, {}, None)
    np.testing.assert_allclose(batch.advantages[:, 0], [1, -1, 0, 0], atol=1e-6)
    assert bool(jnp.isfinite(batch.advantages).all())
