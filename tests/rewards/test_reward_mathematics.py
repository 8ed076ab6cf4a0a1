"""Mathematical equivalence, and processes that hang, die or do not start."""

import logging
import os
import sys
import textwrap
import threading
import time

import numpy as np
import pytest

from grpo_jax import rewards as R
from grpo_jax.rewards import comparison, mathematics
from grpo_jax.rewards.comparison import Comparisons, Outcome

HANGS = r"\boxed{9^{9^{9^{9}}}}"


def judge(completions, answers, **options):
    reward = R.resolve({"function": "math", "processes": 2, **options})
    scores = R.score([reward], [""] * len(completions), completions, {"answer": answers}).scores[:, 0]
    return [None if np.isnan(s) else float(s) for s in scores]


CASES = [
    (r"So it is \boxed{\frac{1}{2}}.", "0.5", 1),
    (r"\boxed{0.5}", r"$\frac{1}{2}$", 1),
    (r"\boxed{\frac{2}{4}}", "1/2", 1),
    (r"\boxed{\frac{1}{3}}", "1/2", 0),
    (r"\boxed{\{3, 1, 2\}}", r"\{1,2,3\}", 1),
    (r"\boxed{\{1, 2\}}", r"\{1,2,3\}", 0),
    (r"\boxed{(1, 2]}", "(1,2]", 1),
    (r"\boxed{(1, 2)}", "(1,2]", 0),
    (r"\boxed{(-\infty, 3) \cup (5, \infty)}", r"(-\infty,3)\cup(5,\infty)", 1),
    (r"<answer>2\pi</answer>", r"2\pi", 1),
    ("<answer>2</answer>", r"2\pi", 0),
    (r"it equals $(x+1)^2$", r"x^2 + 2x + 1", 1),
    (r"it equals $x^2+1$", r"x^2 + 2x + 1", 0),
    ("#### 1,072", "1072", 1),
    (r"#### 2\pi", r"2\pi", 1),
    (r"\boxed{72}", "48 + 24 = 72\n#### 72", 1),
    (r"\boxed{\sqrt{8}}", r"2\sqrt{2}", 1),
    (r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}", r"\begin{pmatrix}1\\2\end{pmatrix}", 1),
    (r"\boxed{x = 5}", "5", 1),
    (r"\boxed{50\%}", "0.5", 1),
    ("no answer", "5", 0),
    ("", "5", 0),
    (r"\boxed{4}", "????", None),
    (r"\boxed{4}", "", None),
    (r"\boxed{4}", None, None),
    (r"\boxed{4}", ["3", "2+2"], 1),
    (r"\boxed{4}", ["????", "3"], 0),
    (r"\boxed{4}", 4, 1),
]


def test_worked_examples():
    completions, answers, right = zip(*CASES)
    wrong = [(case, judged) for case, judged in zip(CASES, judge(completions, answers)) if judged != case[2]]
    assert not wrong and None in right


def test_chat_completions_on_another_thread():
    outcome = []
    chat = [[{"role": "assistant", "content": r"\boxed{1/2}"}]]
    thread = threading.Thread(target=lambda: outcome.append(judge(chat, ["0.5"])))
    thread.start()
    thread.join()
    assert outcome == [[1]]


def test_an_expression_that_takes_for_ever_is_cut_off(caplog):
    completions = [HANGS, r"\boxed{1}", HANGS, r"\boxed{2}"]
    judge([r"\boxed{1}", r"\boxed{2}"], ["1", "1"])
    processes = list(mathematics._comparisons[0]._processes)
    started = time.monotonic()
    with caplog.at_level(logging.WARNING):
        assert judge(completions, ["1", "1", "1", "1"], time_limit=0.5) == [0, 1, 0, 0]
    assert time.monotonic() - started < 2.5
    assert "1 of 3 comparisons took too long and count as wrong" in caplog.text
    assert mathematics._comparisons[0]._processes == processes  # they stopped it themselves: none had to be replaced
    assert judge(completions[1:2], ["1"]) == [1]


def test_an_interrupted_call_leaves_fresh_processes(monkeypatch):
    monkeypatch.setattr(mathematics, "_comparisons", [Comparisons()])
    reward = R.resolve({"function": "math", "time_limit": 8.0, "processes": 1})
    with pytest.raises(R.RewardError, match="reward 'math' .* did not end within 1 s"):
        R.score([reward], [""], [HANGS], {"answer": ["1"]}, time_limit=1.0)
    started = time.monotonic()
    assert judge([r"\boxed{1}"], ["1"], processes=1) == [1]
    assert time.monotonic() - started < 5.0


def test_the_same_question_is_asked_once(monkeypatch):
    asked = []

    class Recorder:
        def judge(self, pairs, **options):
            asked.extend(pairs)
            return [Outcome.EQUAL] * len(pairs)

    monkeypatch.setattr(mathematics, "_comparisons", [Recorder()])
    assert judge(["1", "2", "1"], ["1", "1", ["1", "2"]]) == [1, 1, 1]
    assert asked == [(r"\boxed{1}", "1"), (r"\boxed{1}", "2"), (r"\boxed{2}", "1")]


def test_a_missing_math_verify_is_named_at_the_start(monkeypatch):
    monkeypatch.setattr(mathematics.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "grpo_jax\[math\]"'):
        R.resolve("math")


def program(tmp_path, body):
    """A program that stands in for the real one: `body` answers the question (answer, text)."""
    path = tmp_path / "stand_in.py"
    path.write_text(
        textwrap.dedent("""
        import json, os, pathlib, sys, time
        print(json.dumps("ready"), flush=True)
        for line in sys.stdin:
            answer, text, seconds = json.loads(line)
        """)
        + textwrap.indent(textwrap.dedent(body), "    ")
        + '\n    print(json.dumps("equal" if answer == text else "different"), flush=True)\n'
    )
    return Comparisons([sys.executable, str(path)])


def test_a_process_that_dies_is_replaced(tmp_path):
    comparisons = program(tmp_path, "if text == 'die': os._exit(7)")
    pairs = [("a", "a"), ("a", "die"), ("a", "b"), ("b", "b"), ("b", "die")]
    outcomes = comparisons.judge(pairs, time_limit=5, processes=2)
    assert outcomes == [Outcome.EQUAL, Outcome.CRASHED, Outcome.DIFFERENT, Outcome.EQUAL, Outcome.CRASHED]
    comparisons.close()


def test_a_pair_is_asked_again_after_a_death_that_was_not_its_fault(tmp_path):
    comparisons = program(
        tmp_path,
        f"""
        flag = pathlib.Path({str(tmp_path / "died")!r})
        if not flag.exists():
            flag.touch()
            os._exit(7)
        """,
    )
    assert comparisons.judge([("a", "a")], time_limit=5, processes=1) == [Outcome.EQUAL]
    comparisons.close()


def test_a_process_that_died_between_two_questions(tmp_path):
    comparisons = program(tmp_path, "pass")
    assert comparisons.judge([("a", "a")], time_limit=5, processes=1) == [Outcome.EQUAL]
    (process,) = comparisons._processes
    process._process.kill()
    process._process.wait()
    time.sleep(0.2)  # until its last words were heard, in a queue that nobody reads any more
    assert comparisons.judge([("a", "a"), ("a", "b")], time_limit=5, processes=1) == [Outcome.EQUAL, Outcome.DIFFERENT]
    comparisons.close()


def test_a_process_that_does_not_stop_by_itself_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "_GRACE", 0.2)
    comparisons = program(tmp_path, "if text == 'hang': time.sleep(60)")
    pairs = [("a", "hang"), ("a", "a"), ("b", "hang"), ("b", "b"), ("b", "a")]
    started = time.monotonic()
    outcomes = comparisons.judge(pairs, time_limit=0.3, processes=2)
    assert outcomes == [Outcome.TOO_SLOW, Outcome.EQUAL, Outcome.TOO_SLOW, Outcome.EQUAL, Outcome.DIFFERENT]
    assert time.monotonic() - started < 5
    comparisons.close()
    assert all(process.ended for process in comparisons._processes)


def test_processes_that_do_not_start(tmp_path):
    with pytest.raises(RuntimeError, match="did not start: it ended at once"):
        Comparisons([sys.executable, "-c", "pass"]).judge([("a", "a")], time_limit=1, processes=2)
    failing = "import json; print(json.dumps('ModuleNotFoundError: No module named math_verify'))"
    with pytest.raises(RuntimeError, match="did not start: ModuleNotFoundError: No module named math_verify"):
        Comparisons([sys.executable, "-c", failing]).judge([("a", "a")], time_limit=1, processes=2)


def test_close_ends_the_processes(tmp_path):
    comparisons = program(tmp_path, "pass")
    comparisons.judge([("a", "a")], time_limit=5, processes=1)
    (process,) = comparisons._processes
    comparisons.close()
    assert process.ended
    with pytest.raises(ProcessLookupError):
        os.kill(process._process.pid, 0)
