"""Whether a completion has the form that was asked for."""

from __future__ import annotations

import re
from collections.abc import Sequence

from grpo_jax.rewards.extraction import text_of
from grpo_jax.types import RewardFn


def tag_format(
    *, tags: Sequence[str] = ("think", "answer"), opened: bool = False, text_after: bool = False
) -> RewardFn:
    """1 if the completion is <think>...</think><answer>...</answer> and nothing else; else 0.

    `tags` are the sections, in order; each must be opened and closed exactly once, with only white space around them.
    `opened`: the prompt already ended with the first opening tag, so the completion begins inside that section.
    `text_after`: text may follow the last section.
    """
    if isinstance(tags, str) or not tags or any(not re.fullmatch(r"[\w.:-]+", tag) for tag in tags):
        raise ValueError(f"tags must be a list of names without brackets, such as ['think', 'answer']; got {tags!r}")
    if len(set(tags)) < len(tags):
        raise ValueError(f"each tag may appear once, got {list(tags)}")
    marks = [mark for tag in tags for mark in (f"<{tag}>", f"</{tag}>")]

    def well_formed(text: str) -> bool:
        text = marks[0] + text if opened else text
        if any(text.count(mark) != 1 for mark in marks):
            return False
        end = 0
        for number, mark in enumerate(marks):
            start = text.find(mark, end)
            if start < 0 or (number % 2 == 0 and text[end:start].strip()):
                return False
            end = start + len(mark)
        return text_after or not text[end:].strip()

    def reward(completions) -> list[float | None]:
        return [float(well_formed(text_of(completion))) for completion in completions]

    return reward


def regex_format(*, pattern: str, whole: bool = True) -> RewardFn:
    """1 if the completion matches the regular expression `pattern`; else 0.

    `whole`: all of the completion must match, otherwise a part is enough. A dot matches a line break too.
    """
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except (re.error, TypeError) as error:
        raise ValueError(f"pattern {pattern!r} is not a regular expression: {error}") from error
    match = compiled.fullmatch if whole else compiled.search

    def reward(completions) -> list[float | None]:
        return [float(match(text_of(completion)) is not None) for completion in completions]

    return reward
