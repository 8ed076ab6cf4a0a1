"""Answers compared as text and as numbers."""

from __future__ import annotations

import math
from typing import Any, Literal

from grpo_jax.rewards import extraction
from grpo_jax.types import RewardFn

_EXTRACTORS = {
    "marked": extraction.marked_answer,
    "boxed": extraction.boxed,
    "hashes": extraction.after_hashes,
    "tag": extraction.in_tag,
}


def exact_match(
    *, column: str = "answer", extract: Literal["whole", "marked", "boxed", "hashes", "tag"] = "whole"
) -> RewardFn:
    r"""1 if the completion's answer is the right one, character by character; else 0.

    `column` holds the right answer (text or number), or a list of acceptable ones; None: the reward does not apply.
    `extract` says where the completion's answer stands: "whole" (all of it), "boxed" (\boxed{...}), "hashes"
    (after ####), "tag" (<answer>...</answer>) or "marked" (any of these). Where the right answer has the mark too, as
    in GSM8K, it is taken from there. Outer white space does not count.
    """
    if extract not in ("whole", *_EXTRACTORS):
        raise ValueError(f"extract must be one of {['whole', *_EXTRACTORS]}, got {extract!r}")
    find = _EXTRACTORS.get(extract, str)

    def right(answer: Any, completion: Any) -> bool:
        found, wanted = find(extraction.text_of(completion)), find(str(answer))
        return found is not None and found.strip() == (str(answer) if wanted is None else wanted).strip()

    return _compare_with(column, right)


def numeric_match(*, column: str = "answer", tolerance: float = 1e-6) -> RewardFn:
    r"""1 if the completion's number is the right one, up to a relative error of `tolerance`; else 0.

    The number is the last one in the answer that the completion marks (<answer>, \boxed, ####), or without a mark the
    last one at all; 1,234, $5, 3/4, \frac{3}{4}, 50% are understood. 50% agrees with 50%, 50 and 0.5. `column` holds
    the right number, text with it, or a list of acceptable ones. An answer without a number: does not apply.
    """
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance is a relative error and lies in [0, 1), got {tolerance}")

    def number(text: str) -> tuple[float, bool] | None:
        marked = extraction.marked_answer(text)
        return extraction.last_number(text if marked is None else marked)

    def right(answer: Any, completion: Any) -> bool | None:
        wanted = number(answer if isinstance(answer, str) else repr(float(answer)))
        found = number(extraction.text_of(completion))
        if wanted is None:
            return None
        if found is None:
            return False
        scales = (1.0,) if wanted[1] == found[1] else (1.0, 100.0)
        (low, _), (high, _) = (wanted, found) if found[1] else (found, wanted)
        return any(math.isclose(low * scale, high, rel_tol=tolerance, abs_tol=1e-12) for scale in scales)

    return _compare_with(column, right)


def _compare_with(column: str, right) -> RewardFn:
    """A reward function that asks `right(answer, completion)` for each acceptable answer in the column."""

    def reward(completions, **columns) -> list[float | None]:
        scores = []
        for accepted, completion in zip(columns[column], completions, strict=True):
            answers = [] if accepted is None else accepted if isinstance(accepted, list | tuple) else [accepted]
            verdicts = [right(answer, completion) for answer in answers]
            known = [verdict for verdict in verdicts if verdict is not None]
            scores.append(float(any(known)) if known else None)
        return scores

    reward.needs = (column,)  # type: ignore[attr-defined]
    return reward
