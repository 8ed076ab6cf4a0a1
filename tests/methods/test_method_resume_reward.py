"""Resume scoring: four weighted parts, and the two tables of its reward functions."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from grpo_jax import methods

PARTS = np.array([[2, 0.96, 1, 1], [-2, 0.0, 1, -1], [-2, -0.6, 1, -1], [2, 0.6, 1, 0]])


def load():
    path = Path(__file__).parents[2] / "configs/tasks/resumes.py"
    spec = importlib.util.spec_from_file_location("resumes", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


resumes = load()


def resolve(make, **options):
    return methods.resolve("resume_reward", options=options, settings=make.settings)


def shaped(method, batch):
    batch = batch.replace(rewards=method.reward(batch, {}, None))
    return method.advantage(batch, {}, None)[0]


def test_worked_example(make):
    method, names = resolve(make), ("decision", "score", "skills", "experience")
    batch = shaped(method, make.batch(PARTS, groups=np.zeros(4)).replace(channels=names))
    np.testing.assert_allclose(batch.rewards.sum(1), [1.392, -0.8, -0.92, 1.12], atol=1e-6)
    np.testing.assert_allclose(batch.advantages[:, 0], [0.972481, -0.812844, -0.910581, 0.750944], atol=2e-6)
    pair = shaped(method, make.batch(PARTS[:2], groups=np.zeros(2)).replace(channels=names))
    np.testing.assert_allclose(pair.advantages[:, 0], [0.707061, -0.707061], atol=2e-6)
    assert "reference" in method.roles


def named(*weights):
    return {f"channel {k}": w for k, w in enumerate(weights)}


def test_weights_are_brought_to_a_sum_of_one(make):
    batch = make.batch(PARTS, groups=np.zeros(4))
    one, other = (
        resolve(make, weights=named(*w)).reward(batch, {}, None) for w in ((0.4, 0.2, 0.2, 0.2), (4, 2, 2, 2))
    )
    np.testing.assert_allclose(one, other, atol=1e-7)
    only = resolve(make, weights={"channel 2": 1, "channel 1": 3}).reward(batch, {}, None)
    np.testing.assert_allclose(only, PARTS * [1, 0.75, 0.25, 1], atol=1e-7)  # by name; the others stay
    for weights in ((0, 0), (-1, 2), ()):
        with pytest.raises(ValueError, match="not negative, and not all 0, got"):
            resolve(make, weights=named(*weights))
    with pytest.raises(ValueError, match=r"gives 'decision'; the channels are \['channel 0', 'channel 1', 'channel 2'"):
        resolve(make).reward(batch, {}, None)


def test_advantages_on_ragged_groups(make):
    """A part that does not apply is left out of the sum; the rest is plain GRPO with epsilon 1e-4."""
    data, weights = make.ragged(0), np.array([0.75, 0.25])
    batch = shaped(resolve(make, weights=named(3, 1)), data.batch().replace(channel_weights=(1.0, 1.0)))
    total = np.nansum(data.rewards * weights, axis=1)
    for i, group in enumerate(data.groups):
        inside = [j for j in range(17) if data.groups[j] == group >= 0 and not np.isnan(data.rewards[j]).all()]
        expected = 0.0
        if i in inside and len(inside) > 1 and np.ptp(total[inside]):
            expected = (total[i] - total[inside].mean()) / (total[inside].std(ddof=1) + 1e-4)
        np.testing.assert_allclose(batch.advantages[i], np.where(data.mask[i], expected, 0), rtol=1e-4, atol=1e-5)


SENIOR = {
    "status": ["SELECTED"],
    "overall_score": [80],
    "job_skills": ["abcd"],
    "candidate_skills": ["abcd"],
    "note": ["senior"],
}


def parts(completion, table=None, **record):
    columns = {**SENIOR, **{name: [value] for name, value in record.items()}}
    return [v[0] for v in (table or resumes.gentle)(["?"], [completion], **columns).channels.values()]


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ('{"score":82,"status":"SELECTED"}', [2, 0.96, 1, 1]),
        ('{"score":30,"status":"REJECTED"}', [-2, 0.0, 1, -1]),
        ("no object", [-2, -0.6, 1, -1]),
        ('well: {"status":"strongly_consider","score":60} .', [2, 0.6, 1, 0]),
        ('{"status":"SELECTED","score":"82"}', [-2, -0.6, 1, -1]),  # no integer: all of it is unreadable
        ('{"status":"SELECTED"}', [-2, -0.6, 1, -1]),
        ('{"status":"MAYBE","score":82}', [-1, 0.96, 1, 1]),
    ],
)
def test_parts_of_a_senior_who_is_selected(completion, expected):
    np.testing.assert_allclose(parts(completion), expected)


def test_the_two_tables():
    yes, no = '{"score":50,"status":"SELECTED"}', '{"score":50,"status":"REJECTED"}'
    decisions = {}
    for table in (resumes.gentle, resumes.aggressive):
        truths = ("SELECTED", "REJECTED")
        decisions[table] = [parts(c, table, status=truth)[0] for truth in truths for c in (yes, no)]
    assert decisions[resumes.gentle] == [2, -2, -1, 0]
    assert decisions[resumes.aggressive] == [2, -5, -2, 0]


@pytest.mark.parametrize(
    ("job", "candidate", "expected"),
    [
        ("abcd", "abcz", 1),
        ("abcd", "abyz", 0),
        ("abcde", "abyz", 0),
        ("abcd", "axyz", -1),
        ("", "ab", -1),
        ("ab", "", -1),
    ],
)
def test_skills(job, candidate, expected):
    assert parts('{"score":50,"status":"SELECTED"}', job_skills=job, candidate_skills=candidate)[2] == expected


@pytest.mark.parametrize(
    ("note", "score", "expected"),
    [
        ("10 years", 75, 1),
        ("10 years", 74, 0),
        ("senior", 39, -1),
        ("mid level", 50, 1),
        ("mid level", 80, 0),
        ("5 years", 39, -1),
        ("3 years", 39, 0),
        ("3 years", 79, 1),
        ("junior", 49, 1),
        ("junior", 86, -1),
        ("junior", 85, 0),
        ("", 10, 1),
        ("15 months", 60, 1),  # "5" is looked for before "1"
    ],
)
def test_experience(note, score, expected):
    assert parts(f'{{"score":{score},"status":"SELECTED"}}', note=note)[3] == expected


def test_without_a_true_score():
    assert parts('{"score":82,"status":"SELECTED"}', overall_score=None)[1] == 0
    assert parts('{"score":0,"status":"REJECTED"}', overall_score=100)[1] == -1
