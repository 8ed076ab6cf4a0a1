"""Mathematical equivalence, judged by math-verify in processes of their own."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
from typing import Any

from grpo_jax.rewards import extraction
from grpo_jax.rewards.comparison import Comparisons, Outcome
from grpo_jax.types import RewardFn

_LATEX_WITHIN_TEXT = re.compile(r"\$|\\\(|\\\[|\\begin\{(?:equation|align|displaymath)")
_comparisons: list[Comparisons] = []  # one for the process, made by the first use


def mathematical_equivalence(
    *, column: str = "answer", time_limit: float = 3.0, processes: int | None = None
) -> RewardFn:
    r"""1 if the completion's answer is mathematically the right one (\frac{1}{2}, 0.5 and 1/2 are the same); else 0.

    The answer is what the completion marks by <answer>, \boxed or "####", else what math-verify finds last. `column`
    holds the right one as LaTeX or plain text, possibly marked, or a list of acceptable ones. None, and what
    math-verify cannot parse: the reward does not apply. An expression that takes longer than `time_limit` seconds, or
    that brings its process down, counts as wrong, with a warning in the log. `processes`: how many judge at the same
    time (default: the cores, at most 8).
    """
    if importlib.util.find_spec("math_verify") is None:
        raise ModuleNotFoundError('mathematical equivalence needs math-verify: pip install "grpo_jax[math]"')
    if not 0 < time_limit < float("inf"):
        raise ValueError(f"time_limit must be a positive number of seconds, got {time_limit}")
    if processes is not None and processes < 1:
        raise ValueError(f"processes must be at least 1, got {processes}")
    processes = processes or min(8, os.cpu_count() or 1)

    def reward(completions, **columns) -> list[float | None]:
        wanted = [_acceptable(answers) for answers in columns[column]]
        given = [_answer_of(extraction.text_of(completion)) for completion in completions]
        pairs = [(answer, text) for answers, text in zip(wanted, given, strict=True) for answer in answers]
        different = list(dict.fromkeys(pairs))
        if not _comparisons:
            _comparisons.append(Comparisons())
        outcomes = dict(zip(different, _comparisons[0].judge(different, time_limit=time_limit, processes=processes)))
        _warn_of(outcomes)
        return [_score([outcomes[answer, text] for answer in answers]) for answers, text in zip(wanted, given)]

    reward.needs = (column,)  # type: ignore[attr-defined]
    return reward


def _acceptable(answers: Any) -> list[str]:
    answers = [] if answers is None else answers if isinstance(answers, list | tuple) else [answers]
    return [_as_latex(str(answer)) for answer in answers]


def _as_latex(answer: str) -> str:
    """A right answer, written so that math-verify reads all of it: bare, it would read the 2 of 2\\pi."""
    marked = extraction.marked_answer(answer)
    answer = answer.strip() if marked is None else marked
    return answer if _LATEX_WITHIN_TEXT.search(answer) else rf"\boxed{{{answer}}}"


def _answer_of(text: str) -> str:
    tagged = extraction.in_tag(text)
    text = text if tagged is None else tagged
    if extraction.boxed(text) is not None:  # math-verify looks for boxes first, and joins several to a set
        return text
    hashes = extraction.after_hashes(text)
    if hashes is None and tagged is None:
        return text
    return _as_latex(text if hashes is None else hashes)


def _score(outcomes: list[Outcome]) -> float | None:
    if not any(outcome is not Outcome.NOT_MATHEMATICS for outcome in outcomes):
        return None
    return float(Outcome.EQUAL in outcomes)


def _warn_of(outcomes: dict[tuple[str, str], Outcome]) -> None:
    for kind, what in ((Outcome.TOO_SLOW, "took too long"), (Outcome.CRASHED, "brought their process down")):
        pairs = [pair for pair, outcome in outcomes.items() if outcome is kind]
        if pairs:
            (answer, text) = pairs[0]
            logging.getLogger(__name__).warning(
                "mathematical equivalence: %d of %d comparisons %s and count as wrong; the first: %s with ...%s",
                *(len(pairs), len(outcomes), what, answer[:100], text[-100:]),
            )
