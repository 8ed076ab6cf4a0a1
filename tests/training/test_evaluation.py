"""pass@k against all subsets, majority vote, greedy; each number worked by hand."""

from itertools import combinations
from math import comb

import jax
import numpy as np
import pytest

from grpo_jax.training.evaluation import evaluate_prompts, majority, pass_at_k
from grpo_jax.types import Contexts, Domain, Prompt, Rollout


@pytest.mark.parametrize("samples", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_subsets_with_a_hit(samples):
    for k in range(1, samples + 1):
        brute = []
        for correct in range(samples + 1):
            marks = [True] * correct + [False] * (samples - correct)
            brute.append(np.mean([any(s) for s in combinations(marks, k)]))
        np.testing.assert_allclose(pass_at_k(samples, np.arange(samples + 1), k), brute, atol=1e-12)


def test_pass_at_k_of_many_samples():
    """Where the binomials overflow a float."""
    expected = 1 - comb(4900, 300) / comb(5000, 300)
    assert pass_at_k(5000, np.array([100]), 300)[0] == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("k", [0, -1, 5])
def test_more_draws_than_samples(k):
    with pytest.raises(ValueError, match=f"pass@{k} needs between 1 and 4 draws"):
        pass_at_k(4, np.array([1]), k)


@pytest.mark.parametrize(
    ("answers", "index"), [(["a"], 0), (["a", "b", "b"], 1), (["a", "b", "b", "a"], 0), (["c", "a", "b", "b", "a"], 1)]
)
def test_majority(answers, index):
    assert majority(answers) == index


WRITTEN = {  # four samples of each prompt, then the greedy answer
    10: ["4", " 4", "5", "6", "4"],
    11: ["1", "2", "2", "3", "2"],
    12: ["8", "8", "8", "8", "8"],
}
GOLD = {10: "4", 11: "1", 12: "8"}


class Scripted:
    """A domain that says what is written, and remembers what it was asked."""

    def sample(self, params, requests, key, numbers=None):
        self.requests, self.key = requests, key
        asked = [(r, i) for r in requests for i in range(r.count)]
        self.texts = [WRITTEN[r.prompt.id][4 if r.temperature == 0 else i] for r, i in asked]
        n = len(asked)
        floats, ids = np.zeros((n, 3), np.float32), np.arange(n, dtype=np.int32)
        return Rollout(
            contexts=Contexts(tokens=np.zeros((n, 1), np.int32), lengths=np.ones(n, np.int32)),
            sampled_under=ids,
            trained_under=ids,
            completions=floats.astype(np.int32),
            lengths=np.array([1 if r.temperature == 0 else 1 + i for r, i in asked], np.int32),
            completion_mask=floats == 0,
            behavior_logps=floats,
            sampler_logps=floats,
            finished=ids >= 0,
            temperature=np.ones(n, np.float32),
            prompt_ids=np.array([r.prompt.id for r, _ in asked], np.int32),
            index=np.array([i for _, i in asked], np.int32),
            group_ids=ids,
            weights=np.ones(n, np.float32),
            update_ids=np.full(n, -1, np.int32),
            scores=np.zeros((n, 0), np.float32),
        )

    def verify(self, prompts, rows, texts, step):
        exact = [float(t.strip() == GOLD[p.id]) for p, t in zip(prompts, texts)]
        scores = np.array([[e, np.nan if e else 0.5] for e in exact], np.float32)
        return rows.replace(scores=scores, channels=("exact", "style"), channel_weights=(1.0, 0.5))


def evaluated(**options):
    scripted = Scripted()
    domain = Domain(sample=scripted.sample, evaluate=None, text=lambda rows: scripted.texts)
    prompts = [Prompt(i, f"prompt {i}") for i in WRITTEN]
    key = jax.random.key(3)
    return scripted, evaluate_prompts(domain, {}, prompts, scripted.verify, key, samples=4, **options)


def test_the_numbers():
    scripted, evaluation = evaluated(k=(1, 2, 4))
    expected = {
        "pass@1": (2 / 4 + 1 / 4 + 1) / 3,
        "pass@2": ((1 - 1 / 6) + (1 - 3 / 6) + 1) / 3,
        "pass@4": 1.0,
        "maj@4": 2 / 3,  # "2" wins prompt 11, and is wrong
        "greedy": 2 / 3,
        "length_mean": 2.5,
        "reward": (7 * 1.0 + 5 * 0.25) / 12,
    }
    assert evaluation.numbers.keys() == expected.keys()
    np.testing.assert_allclose([evaluation.numbers[k] for k in expected], list(expected.values()), rtol=1e-6)
    assert [(r.count, r.temperature) for r in scripted.requests] == [(4, 1.0)] * 3 + [(1, 0.0)] * 3
    assert all(r.options == {"top_k": 0, "top_p": 1.0, "min_p": 0.0} for r in scripted.requests)
    rows = evaluation.predictions
    assert [r["kind"] for r in rows] == ["sample"] * 12 + ["greedy"] * 3
    wrong = {"correct": False, "scores": {"exact": 0.0, "style": 0.5}}
    told = {"prompt_id": 11, "prompt": "prompt 11", "completion": "2", "kind": "sample", "index": 1, "length": 2}
    assert rows[5] == told | wrong
    assert rows[0]["scores"] == {"exact": 1.0, "style": None}


def test_spaces_do_not_split_a_vote():
    _, evaluation = evaluated(k=(1,), greedy=False, extract=lambda text: text)
    assert evaluation.numbers["maj@4"] == 2 / 3 and "greedy" not in evaluation.numbers
    assert len(evaluation.predictions) == 12
    only_four = lambda text: text.strip() if text.strip() == "4" else "other"  # noqa: E731
    _, evaluation = evaluated(k=(1,), extract=only_four)
    assert evaluation.numbers["maj@4"] == 1.0


def test_another_channel():
    _, evaluation = evaluated(k=(1,), channel="style")
    assert evaluation.numbers["pass@1"] == 0.0
    with pytest.raises(KeyError, match="no reward channel 'speed'"):
        evaluated(k=(1,), channel="speed")


def test_a_k_that_cannot_be_is_refused_before_anything_is_sampled():
    domain = Domain(sample=None, evaluate=None, text=None)
    with pytest.raises(ValueError, match="pass@8 needs between 1 and 4 draws"):
        evaluate_prompts(domain, {}, [Prompt(0, "")], None, None, samples=4, k=(1, 8))
    with pytest.raises(ValueError, match="no prompts"):
        evaluate_prompts(domain, {}, [], None, None)
