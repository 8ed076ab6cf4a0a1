"""The tasks beside the configurations, and sources that are functions of one's own."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from grpo_jax.references import load_function
from grpo_jax.training.assemble import sources
from grpo_jax.training.configuration import load_config

ROOT = Path(__file__).parent.parent
WORKING = str(ROOT / "configs" / "tasks" / "working.py")


def working(name):
    return load_function(f"{WORKING}:{name}")


@pytest.mark.parametrize(
    ("completion", "answer", "form", "working_", "consistent", "stratum"),
    [
        ("[15,8]85", 1, 1, 1.0, 1, 2),
        ("[15..,8.]85", 1, 1, 1.0, 1, 2),
        ("[]85", 1, 1, 0.0, 0, 0),
        ("[15,7]85", 1, 1, 0.5, 0, 2),
        ("[14,7]74", 0, 1, 0.0, 1, 2),
        ("[15]85", 1, 1, 0.5, 0, 1),
        ("[15,8]8.5", 0, 0, 0.0, 0, 0),
        ("15,8]85", 1, 0, 0.0, 0, 0),
        ("", 0, 0, 0.0, 0, 0),
    ],
)
def test_rewards_of_the_working(completion, answer, form, working_, consistent, stratum):
    columns = {"answer": ["85"], "steps": ["15,8"]}
    said = [
        working(name)(["47+38="], [completion], **columns)[0] for name in ("answer", "form", "working", "consistent")
    ]
    assert said == [answer, form, working_, consistent]
    facts = working("facts")(["47+38="], [completion]).columns
    assert facts["stratum"] == [stratum] and facts["shown"] == [len(completion.split("]")[0])]


def test_demonstrations_of_the_working():
    train, held_out = working("problems")(seed=1)
    assert len(train) + len(held_out) == 8100 and not {r["prompt"] for r in train} & {r["prompt"] for r in held_out}
    columns = {name: [r[name] for r in train] for name in ("answer", "steps")}
    exact = working("demonstrations")(train, count=len(train), noise=0, without=0, seed=2)
    by_prompt = {r["prompt"]: r["completion"] for r in exact}
    completions = [by_prompt[r["prompt"]] for r in train]
    for name in ("answer", "form", "working", "consistent"):
        assert np.mean(working(name)(columns["answer"], completions, **columns)) == 1
    assert {len(re.findall(r"\.", c)) for c in completions} == set(range(9))
    rows = working("demonstrations")(train, count=8000, noise=0.2, without=0.5, seed=2)
    by_prompt = {r["prompt"]: r["answer"] for r in train}
    right = np.mean([r["completion"].rpartition("]")[2] == by_prompt[r["prompt"]] for r in rows])
    assert abs(np.mean([r["completion"].startswith("[]") for r in rows]) - 0.5) < 0.03
    assert 0.5 < right < 0.75  # 0.8 + 0.2 / 10 for each of two or three digits


def configured(tmp_path, *changes):
    (tmp_path / "mine.py").write_text(
        "def prompts(size, seed):\n"
        "    return [{'prompt': f'{seed}', 'answer': str(i)} for i in range(size)], [{'prompt': 'test'}]\n"
        "def teach(problems, *, count, word='yes'):\n"
        "    return [{**problems[0], 'completion': word}] * count\n"
    )
    file = tmp_path / "run.yaml"
    file.write_text(
        f"steps: 3\nseed: 7\nmodel: {{path: tiny}}\n"
        f"data: {{source: '{tmp_path}/mine.py:prompts', options: {{size: 4}}}}\n"
        f"warmup: {{source: '{tmp_path}/mine.py:teach', steps: 2, prompts: 3}}\n"
    )
    return load_config(file, changes)


def test_sources_of_ones_own(tmp_path):
    made = sources(configured(tmp_path))
    assert [r["answer"] for r in made.train] == list("0123") and made.train[0]["prompt"] == "7"  # the run's seed
    assert made.held_out == [{"prompt": "test"}]
    assert [r["completion"] for r in made.demonstrations] == ["yes"] * 6
    other = sources(
        configured(tmp_path, "evaluation.source=held.jsonl", "warmup.options.word=no", "data.options.seed=1")
    )
    assert other.held_out == "held.jsonl" and other.demonstrations[0]["completion"] == "no"
    assert other.train[0]["prompt"] == "1"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("data.options.sice=3", r"data.options: there is no option 'sice'; the options are seed, size"),
        ("warmup.options.wrd=x", r"warmup.options: there is no option 'wrd'; the options are count, problems, word"),
        ("data.source=nowhere.py:prompts", "there is no file 'nowhere.py'"),
    ],
)
def test_mistakes_in_sources(tmp_path, change, said):
    with pytest.raises(ValueError, match=said):
        sources(configured(tmp_path, change))
