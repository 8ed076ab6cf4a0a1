"""Applications made from a seed: wanted skills, own skills and a note on experience in, a decision and a score out.

"abc|abxy|senior:" -> '{"status":"SELECTED","score":80}'. Everything is synthetic, the label noisy by design. The point
is the form of the reward: four parts, and two tables of penalties for wrong decisions, a mild and a harsh one.
"""

from __future__ import annotations

import json

import numpy as np

from grpo_jax.types import Scored

NOTES = ("10 yrs", "senior", "5 yrs", "mid", "3 yrs", "junior", "1 yr", "none")
SELECTED = ("APPROVE", "CONSIDER", "STRONGLY_CONSIDER", "SELECTED")
GENTLE = {(True, True): 2.0, (False, True): -2.0, (False, False): 0.0}  # (said selected, truly so); else -1
HARSH = {(True, True): 2.0, (False, True): -5.0, (False, False): 0.0}  # else -2


def records(*, count: int = 2700, held_out: int = 300, noise: float = 0.05, seed: int = 0):
    """(train, held_out) rows. The true score is 60 for all the skills wanted and 4 for each year up to ten; from 50 on
    the application is selected, but for a share `noise` of labels that are the other way round."""
    draw, rows = np.random.default_rng(seed), []
    for _ in range(count + held_out):
        wanted = sorted(draw.choice(list("abcdef"), 3, replace=False))
        own = sorted({*draw.choice(wanted, draw.integers(4), replace=False), *draw.choice(list("uvwxyz"), 2)})
        note = str(draw.choice(NOTES))
        score = round((60 * len(set(wanted) & set(own)) / 3 + 4 * min(years(note), 10)) / 10) * 10
        selected = (score >= 50) != (draw.random() < noise)
        rows.append(
            {
                "prompt": f"{''.join(wanted)}|{''.join(own)}|{note}:",
                "status": "SELECTED" if selected else "REJECTED",
                "overall_score": score,
                "job_skills": "".join(wanted),
                "candidate_skills": "".join(own),
                "note": note,
            }
        )
    return rows[held_out:], rows[:held_out]


def answers(problems, *, count: int, noise: float = 0.3, seed: int = 0):
    """`count` completions to start from; with probability `noise` each the status is wrong, the score a random one."""
    draw, rows = np.random.default_rng(seed), []
    for place in draw.integers(len(problems), size=count).tolist():
        problem = problems[place]
        status, score = problem["status"], problem["overall_score"]
        if draw.random() < noise:
            status = "REJECTED" if status == "SELECTED" else "SELECTED"
        if draw.random() < noise:
            score = int(10 * draw.integers(11))
        rows.append({"prompt": problem["prompt"], "completion": f'{{"status":"{status}","score":{score}}}'})
    return rows


def gentle(prompts, completions, status, overall_score, job_skills, candidate_skills, note, **columns):
    """The four parts, with mild penalties: -2 for a missed candidate, -1 for one too many."""
    return _parts(completions, status, overall_score, job_skills, candidate_skills, note, GENTLE, -1.0)


def aggressive(prompts, completions, status, overall_score, job_skills, candidate_skills, note, **columns):
    """The four parts, with harsh penalties: -5 for a missed candidate, -2 for one too many."""
    return _parts(completions, status, overall_score, job_skills, candidate_skills, note, HARSH, -2.0)


def right(prompts, completions, status, **columns):
    """1 if the decision is the recorded one: to be measured, with weight 0."""
    said = [read(completion)[1] in SELECTED for completion in completions]
    return [float(says == (truth in SELECTED)) for says, truth in zip(said, status)]


def _parts(completions, status, overall_score, job_skills, candidate_skills, note, table, otherwise):
    parts = {"decision": [], "score": [], "skills": [], "experience": []}
    for completion, *record in zip(completions, status, overall_score, job_skills, candidate_skills, note):
        truth, true_score, wanted, own, experience = record
        score, decision = read(completion)
        known = decision in SELECTED or decision == "REJECTED"
        case = (decision in SELECTED, truth in SELECTED)
        parts["decision"].append(table.get(case, otherwise) if known else otherwise)
        parts["score"].append(0.0 if true_score is None else max(-1.0, 1 - abs(score - true_score) / 50))
        parts["skills"].append(matched(set(wanted), set(own)))
        parts["experience"].append(fitting(years(experience), score))
    return Scored(parts)


def read(completion: str) -> tuple[int, str]:
    """Score and status of the object from the first "{" to the last "}"; 0 and REJECTED if it cannot be read."""
    try:
        said = json.loads(completion[completion.index("{") : completion.rindex("}") + 1])
        if type(said["score"]) is not int:
            return 0, "REJECTED"
        return said["score"], str(said["status"]).upper()
    except (ValueError, KeyError, TypeError, RecursionError):
        return 0, "REJECTED"


def matched(wanted: set[str], own: set[str]) -> float:
    """1 from three quarters of the wanted skills on, 0 from two fifths on, else -1. The completion plays no part."""
    share = len(wanted & own) / len(wanted) if wanted and own else 0.0
    return 1.0 if share >= 0.75 else 0.0 if share >= 0.4 else -1.0


def years(note: str) -> int:
    """Years of experience by the first word that is found, as crude as it is: "15 months" has a 5 in it."""
    for words, number in ((("10", "senior"), 10), (("5", "mid"), 5), (("3",), 3), (("1", "junior"), 1)):
        if any(word in note for word in words):
            return number
    return 0


def fitting(experience: int, score: int) -> float:
    """Whether the score is one for so many years: 1, 0, or -1 where it is far off."""
    if (
        (experience >= 7 and score >= 75)
        or (3 <= experience <= 6 and 50 <= score < 80)
        or (experience <= 2 and score < 50)
    ):
        return 1.0
    return -1.0 if (score > 85 and experience <= 2) or (score < 40 and experience >= 5) else 0.0
