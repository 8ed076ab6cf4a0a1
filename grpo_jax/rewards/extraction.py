"""Finding the answer in a text: \\boxed{...}, "#### 42", <answer>...</answer>, the last number."""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

_UNITS_OF_SPACING = re.compile(r"\{,\}|\\[,!;:]|(?<=\d)[\u00a0\u2009\u202f](?=\d{3})")
_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
# Possessive repetitions keep it linear in the text, whatever the text.
_NUMBER = re.compile(
    r"""(?<![A-Za-z0-9_.^])(?<!\^\{)        # not the inside of a word, of a number or of an exponent
    (?P<sign>(?<![\d)\]}])(?<![\d)\]}]\ )[-+])?\s?(?:\\?[$€£]\s?(?P<inner_sign>-)?)?
    (?:\\[dt]?frac\s?\{\s?(?P<over>-?\d++(?:\.\d++)?)\s?\}\s?\{\s?(?P<under>\d++(?:\.\d++)?)\s?\}
      |(?:(?P<whole>\d++)\ )?(?P<numerator>\d++)\s?/\s?(?P<denominator>\d++)(?!\.\d)
      |(?P<decimal>\d{1,3}(?:,\d{3}(?!\d))++(?:\.\d++)?|\d++(?:\.\d++)?|\.\d++)(?P<exponent>[eE][-+]?\d{1,3}(?!\d))?)
    (?P<percent>\s?\\?%)?""",
    re.VERBOSE,
)


def text_of(completion: str | Sequence[Mapping[str, Any]]) -> str:
    """The text of a completion: itself, or what the last assistant message of a chat says."""
    if isinstance(completion, str):
        return completion
    said = [message for message in completion if message.get("role", "assistant") == "assistant"]
    content = said[-1].get("content") if said else None
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.get("text", "") for part in content)


def boxed(text: str) -> str | None:
    r"""What the last \boxed{...} (or \fbox{...}) of the text holds, braces balanced; None without a complete one."""
    open_braces: list[int | None] = []  # for a box where its content begins, for another brace None
    last = None
    for token in _BRACES.finditer(text):
        if token[0] == "}":
            start = open_braces.pop() if open_braces else None
            if start is not None and (last is None or start > last[0]):
                last = (start, token.start())
        elif token[0].endswith("{") and token[0] != r"\{":  # \{ is the brace of a set
            open_braces.append(None if token[0] == "{" else token.end())
    return text[slice(*last)].strip() if last else None


def after_hashes(text: str) -> str | None:
    """What stands on the line after the last "####", as in the GSM8K data; None without one."""
    _, found, rest = text.rpartition("####")
    answer = rest.strip().partition("\n")[0].strip()
    return answer or None if found else None


def in_tag(text: str, tag: str = "answer") -> str | None:
    """What the last complete <tag>...</tag> holds; None without one."""
    before, found, _ = text.rpartition(f"</{tag}>")
    _, opened, content = before.rpartition(f"<{tag}>")
    return content.strip() if found and opened else None


def marked_answer(text: str) -> str | None:
    r"""The answer that the text marks as such: by <answer>, else by \boxed, else by "####"; None without a mark.

    Marks may be nested: <answer>\boxed{7}</answer> gives 7.
    """
    tagged = in_tag(text)
    inner = text if tagged is None else tagged
    for extract in (boxed, after_hashes):
        if (answer := extract(inner)) is not None:
            return answer
    return tagged


def last_number(text: str) -> tuple[float, bool] | None:
    r"""The last number of a text, and whether it is a percentage; None without a number.

    Understands 1,234.5, -$5, 3/4, 1 1/2, \frac{3}{4}, 2.5e-3, .5, 50%, and the Unicode minus. A digit within a word
    (x2) or an exponent (m^2) is no number.
    """
    text = _UNITS_OF_SPACING.sub("", text.replace("\u2212", "-"))
    found = next(iter(collections.deque(_NUMBER.finditer(text), maxlen=1)), None)
    if found is None:
        return None
    sign = -1.0 if (found["sign"] == "-") != (found["inner_sign"] == "-") else 1.0
    try:
        if found["over"]:
            value = float(found["over"]) / float(found["under"])
        elif found["numerator"]:
            value = float(found["numerator"]) / float(found["denominator"])
            value += float(found["whole"] or 0) if value < 1 else 0.0  # 1 1/2 is a mixed number, 10 20/4 is not
        else:
            value = float(found["decimal"].replace(",", "") + (found["exponent"] or ""))
    except (ZeroDivisionError, OverflowError, ValueError):  # 1/0, or too many digits for a float
        return None
    return (sign * value, found["percent"] is not None) if math.isfinite(value) else None
