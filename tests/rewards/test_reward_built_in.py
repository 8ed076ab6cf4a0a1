"""Extraction, exact and numeric match, format, length: worked examples."""

import time

import numpy as np
import pytest

from grpo_jax import rewards as R
from grpo_jax.rewards import extraction


def apply(function, completions, **columns):
    reward = R.resolve(function)
    scores = R.score([reward], [""] * len(completions), completions, columns).scores[:, 0]
    return [None if np.isnan(s) else float(s) for s in scores]


@pytest.mark.parametrize(
    "text, number, percent",
    [
        ("The answer is 1,234.", 1234, False),
        ("1,234,567.5 in all", 1234567.5, False),
        ("$1{,}234$", 1234, False),
        ("12,34", 34, False),
        ("1, 2, 3", 3, False),
        ("costs $5", 5, False),
        ("costs \\$7.50.", 7.5, False),
        ("-$5", -5, False),
        ("$-5", -5, False),
        ("x = - 5", -5, False),
        ("\u22127", -7, False),
        ("10 - 3", 3, False),
        ("10-3", 3, False),
        ("f(2)-3", 3, False),
        ("3/4", 0.75, False),
        ("10 / 4", 2.5, False),
        ("-3/4", -0.75, False),
        ("1 1/2", 1.5, False),
        ("12 20/5", 4, False),
        (r"\frac{3}{4}", 0.75, False),
        (r"-\dfrac{1}{ 8 }", -0.125, False),
        (r"\frac{-1}{2}", -0.5, False),
        ("2.5e-3", 0.0025, False),
        (".5", 0.5, False),
        ("50%", 50, True),
        (r"12.5\%", 12.5, True),
        ("25 m^2", 25, False),
        ("25 m^{2}", 25, False),
        ("4 x2", 4, False),
    ],
)
def test_last_number(text, number, percent):
    found = extraction.last_number(text)
    assert found is not None
    assert found[0] == pytest.approx(number, rel=1e-12) and found[1] is percent


@pytest.mark.parametrize("text", ["", "none", "x2", "1/0", "1" * 400, "9e999", "-", "$", "."])
def test_no_number(text):
    assert extraction.last_number(text) is None


@pytest.mark.parametrize(
    "text",
    ["1" * 100_000, "1" + ",111" * 30_000 + "1", "1/" + "1" * 50_000 + ".5", "1 " * 50_000, r"\boxed{" * 20_000]
    + ["<answer>" * 10_000, "-" * 100_000, " " * 100_000, "#" * 100_000],
    ids=lambda text: text[:8],
)
def test_extraction_takes_linear_time(text):
    started = time.perf_counter()
    extraction.last_number(text)
    extraction.marked_answer(text)
    assert time.perf_counter() - started < 1.0


@pytest.mark.parametrize(
    "text, answer",
    [
        (r"so \boxed{4}", "4"),
        (r"\boxed{1} then \boxed{ \frac{1}{2} }.", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\fbox {7}", "7"),
        (r"\boxed{8} and \boxed{9", "8"),
        (r"\boxed{a \text{ or } b}", r"a \text{ or } b"),
        (r"} \boxed{3} }", "3"),
        (r"\boxed{\boxed{7}}", "7"),
        (r"\boxed{9", None),
        ("boxed{9}", None),
    ],
)
def test_boxed(text, answer):
    assert extraction.boxed(text) == answer


def test_marks():
    assert extraction.after_hashes("5 + 5 = 10\n#### 10\n") == "10"
    assert extraction.after_hashes("#### 1\n#### 1,000\nthat is it") == "1,000"
    assert extraction.after_hashes("none") is None and extraction.after_hashes("####  ") is None
    assert extraction.in_tag("<answer>1</answer> <answer> 2 </answer><answer>") == "2"
    assert extraction.in_tag("</answer><answer>") is None
    assert extraction.in_tag("<final>x</final>", "final") == "x"
    assert extraction.marked_answer(r"\boxed{1} <answer>it is \boxed{7}</answer> #### 3") == "7"
    assert extraction.marked_answer(r"#### 3 \boxed{1}") == "1"
    assert extraction.marked_answer("plain") is None


def test_text_of_a_chat():
    assert extraction.text_of("plain") == "plain"
    chat = [{"role": "assistant", "content": "call"}, {"role": "tool", "content": "4"}]
    assert extraction.text_of(chat) == "call"
    assert extraction.text_of([*chat, {"role": "assistant", "content": "it is 4"}]) == "it is 4"
    assert (
        extraction.text_of([{"role": "assistant", "content": [{"type": "text", "text": "a"}, {"text": "b"}]}]) == "ab"
    )
    assert extraction.text_of([]) == "" and extraction.text_of([{"role": "assistant", "content": None}]) == ""


def test_exact():
    completions = [" 4\n", "4.0", "the answer is 4", "5", "4", ""]
    assert apply("exact", completions, answer=["4", "4", "4", ["4", 5], None, ""]) == [1, 0, 0, 1, None, 1]
    assert apply({"function": "exact", "column": "gold"}, ["4"], gold=[4], answer=["x"]) == [1]


def test_exact_extracts_from_both_sides():
    gsm8k = ["3 + 4 = 7\n#### 7", "#### 7", "7", "#### 8"]
    hashes = {"function": "exact", "extract": "hashes"}
    assert apply(hashes, gsm8k, answer=["one two\n#### 7"] * 4) == [1, 1, 0, 0]
    assert apply(hashes, gsm8k, answer=["7"] * 4) == [1, 1, 0, 0]
    marked = {"function": "exact", "extract": "marked"}
    assert apply(marked, [r"\boxed{x}", "<answer>x</answer>", "#### x", "x"], answer=["x"] * 4) == [1, 1, 1, 0]
    assert apply({"function": "exact", "extract": "tag"}, ["<answer>x</answer>", r"\boxed{x}"], answer=["x"] * 2) == [
        1,
        0,
    ]


@pytest.mark.parametrize(
    "completion, answer, right",
    [
        ("it is 1,234", "1234", 1),
        ("first 3, then 4", 4, 1),
        ("first 4, then 3", 4, 0),
        (r"\boxed{4}, checked in 3 ways", 4, 1),
        ("#### 72", "48 + 24 = <<48+24=72>>72\n#### 72", 1),
        ("0.5", "1/2", 1),
        ("0.333", "1/3", 0),
        ("1000000.5", 1000000, 1),
        ("1000002", 1000000, 0),
        ("0.0000001", 0, 0),
        ("50%", "50%", 1),
        ("50%", "50", 1),
        ("50%", 0.5, 1),
        ("0.5", "50%", 1),
        ("50", "50%", 1),
        ("5000%", "50%", 0),
        ("0.5%", "50%", 0),
        ("no number", 3, 0),
        ("3", "no number", None),
        ("3", None, None),
        ("3", [], None),
        ("3", [1, "3"], 1),
        ("3", ["unknown", "4"], 0),
        ("7", np.int64(7), 1),
        ("1", True, 1),
        ("100000000000000000000000", 10**23, 1),
    ],
)
def test_numeric(completion, answer, right):
    assert apply("numeric", [completion], answer=[answer]) == [right]


def test_numeric_tolerance():
    loose = {"function": "numeric", "tolerance": 0.01}
    assert apply(loose, ["0.333", "0.32", "-0.333"], answer=["1/3"] * 3) == [1, 0, 0]


def test_tags():
    good = "<think>so</think>\n<answer>4</answer>"
    bad = [
        "<answer>4</answer>",
        "<think>so</think>",
        "<think>so<answer>4</answer></think>",
        "<answer>4</answer><think>so</think>",
        good + good,
        "<think><think>so</think><answer>4</answer>",
        "hm " + good,
        "<think>so</think> and <answer>4</answer>",
        good + " done",
        "",
    ]
    assert apply("tags", [good, f"  {good}\n", *bad]) == [1, 1] + [0] * len(bad)
    assert apply({"function": "tags", "opened": True}, [good, good[len("<think>") :]]) == [0, 1]
    r1 = {"function": "tags", "tags": ["think"], "text_after": True}
    assert apply(r1, ["<think>a</think> 4", "<think>a</think>", "b <think>a</think>", "<think>a"]) == [1, 1, 0, 0]


def test_regex():
    whole = {"function": "regex", "pattern": r"a.*\d"}
    assert apply(whole, ["a\n1", "xa1", "a1x"]) == [1, 0, 0]
    assert apply({**whole, "whole": False}, ["a\n1", "xa1x", "1a"]) == [1, 1, 0]
    assert apply(whole, [[{"role": "assistant", "content": "a1"}]]) == [1]


def test_length_counts_tokens():
    soft = {"function": "length", "target": 16384, "limit": 20480}
    lengths = np.array([1, 16384, 17408, 20480, 30000])
    assert apply(soft, ["x" * 100_000] * 5, lengths=lengths) == [0, 0, -0.25, -1, -1]
