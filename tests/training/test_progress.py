"""What is printed: numbers, the progress line on a terminal, in a log and in a notebook, and the tables."""

import io
import math
import sys
import time
import types

import pytest
from rich.console import Console

from grpo_jax.training import progress as progress_module
from grpo_jax.training.progress import Progress, format_number, format_seconds, group_table, plain_text, table


class Hand:
    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(progress_module.time, "perf_counter", lambda: self.now)

    def pass_time(self, seconds):
        self.now += seconds


@pytest.fixture
def hand(monkeypatch):
    return Hand(monkeypatch)


def log_console(width=200):
    return Console(file=io.StringIO(), force_terminal=False, width=width, color_system=None, force_jupyter=False)


def terminal(width):
    return Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None, force_jupyter=False)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.31234, "0.312"),
        (12, "12"),
        (7.456, "7.46"),
        (123.456, "123"),
        (41234.0, "41.2k"),
        (3.2e9, "3.2G"),
        (0.0123, "0.012"),
        (0.00123, "0.0012"),
        (1.3e-5, "1.3e-05"),
        (0.01, "0.010"),
        (-0.5, "-0.500"),
        (0.0, "0"),
        (math.nan, "–"),
        (-math.inf, "-∞"),
        (None, "–"),
        ("word", "word"),
        (True, "True"),
    ],
)
def test_numbers_are_short(value, text):
    assert format_number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(6.6, "0:07"), (59.7, "1:00"), (750, "12:30"), (11045, "3:04:05"), (183600, "2d 3h"), (math.nan, "–")],
)
def test_seconds_are_a_clock(seconds, text):
    assert format_seconds(seconds) == text


def test_time_left_forgets_the_compilation(hand):
    with Progress(100, "GRPO", enabled=False) as progress:
        assert math.isnan(progress.rate) and math.isnan(progress.left)
        hand.pass_time(60)  # compiles
        progress.update(1)
        hand.pass_time(30)  # and once more
        progress.update(2)
        for step in range(3, 21):
            hand.pass_time(0.5)
            progress.update(step)
        assert progress.rate == pytest.approx(2.0)
        assert progress.left == pytest.approx(40.0)
        assert progress.elapsed == pytest.approx(99.0)
        progress.update(100)
        assert progress.left == 0


def test_a_resumed_run_counts_only_its_own_steps(hand):
    with Progress(100, "GRPO", start=50, enabled=False) as progress:
        assert progress.done == 50
        for step in (51, 52, 53):
            hand.pass_time(2)
            progress.update(step)
        assert progress.rate == pytest.approx(0.5)
        assert progress.left == pytest.approx(94)


def test_long_runs_keep_few_marks(hand):
    with Progress(10**6, "GRPO", enabled=False) as progress:
        for step in range(1, 20001):
            hand.pass_time(0.1)
            progress.update(step)
        assert len(progress._marks) <= 4096
        assert progress.rate == pytest.approx(10.0)


def test_a_log_gets_a_line_every_few_seconds(hand):
    console = log_console()
    with Progress(100, "GRPO", every=5, console=console) as progress:
        for step in range(1, 101):
            hand.pass_time(0.125)
            progress.update(step, reward=step / 100, kl=0.5, nonsense=3.0)
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "GRPO  1/100 (1%)  reward 0.010  KL 0.500  0:00 gone"
    assert lines[1] == "GRPO  41/100 (41%)  reward 0.410  KL 0.500  8 step/s  0:05 gone  0:07 left"
    assert lines[2] == "GRPO  81/100 (81%)  reward 0.810  KL 0.500  8 step/s  0:10 gone  0:02 left"
    assert lines[3:] == ["GRPO  100/100 (100%)  reward 1  KL 0.500  in 0:12"]


def test_numbers_that_are_not_given_again_stay(hand):
    console = log_console()
    with Progress(4, "GRPO", every=0, console=console) as progress:
        progress.update(1, **{"reward": 0.1, "pass@1": 0.31, "tokens_sampled_per_s": 41234.0})
        hand.pass_time(1)
        progress.update(2, reward=0.2)
        hand.pass_time(100)
        progress.update(3, reward=0.3)
    lines = console.file.getvalue().splitlines()
    assert "reward 0.200  pass@1 0.310  41.2k tok/s  1 step/s" in lines[1].replace("1.00 step/s", "1 step/s")
    assert "s/step" in lines[2] and "reward 0.300  pass@1 0.310" in lines[2]


def test_what_is_shown_can_be_chosen(hand):
    console = log_console()
    with Progress(2, "warm-up", show=("accuracy", "absent"), console=console) as progress:
        progress.update(1, loss=1.5, accuracy=0.25)
    assert "accuracy 0.250" in console.file.getvalue() and "loss" not in console.file.getvalue()
    console = log_console()
    with Progress(2, "solve", console=console) as progress:
        progress.update(1, a=1, b=2, c=3, d=4, e=5)
    assert "a 1  b 2  c 3  d 4  in" in console.file.getvalue()


@pytest.mark.parametrize("width", [30, 50, 80, 100, 140])
def test_the_terminal_line_fits(hand, width):
    numbers = {"reward": 0.712, "pass@1": 0.683, "kl": 0.0123, "tokens_sampled_per_s": 41234.0, "loss": 0.1}
    console = terminal(width)
    with Progress(600, "GRPO", enabled=False) as progress:
        for step in range(1, 313):
            hand.pass_time(0.07)
            progress.update(step, **numbers)
        console.print(progress)
    lines = console.file.getvalue().rstrip("\n").split("\n")
    assert len(lines) == 1 and len(lines[0].rstrip()) <= width
    assert "312/600" in lines[0]
    for needed, part in ((50, "0:20 left"), (80, "pass@1 0.683"), (100, "step/s"), (140, "41.2k tok/s")):
        if width >= needed:
            assert part in lines[0], lines[0]


def test_the_terminal_line_is_redrawn_in_place():
    console = terminal(100)
    with Progress(3, "GRPO", console=console) as progress:
        progress.update(1, reward=0.25)
        progress.note("step 1: [red]recompiled[/red]")
        progress.update(3, reward=0.75)
    output = console.file.getvalue()
    assert "[red]recompiled[/red]" in output and "\x1b[2K" in output
    last = output.rsplit("GRPO", 1)[1]
    assert "3/3" in last and "reward 0.750" in last and last.count("\n") == 1


def test_nothing_is_shown_when_disabled():
    console = log_console()
    with Progress(3, "GRPO", console=console, enabled=False) as progress:
        progress.update(1, reward=0.25)
        progress.note("quiet")
    assert console.file.getvalue() == ""


def test_a_notebook_shows_one_output_that_changes(monkeypatch, hand):
    shown = []
    handle = types.SimpleNamespace(update=lambda page: shown.append(page))
    fake = types.SimpleNamespace(display=lambda page, display_id: shown.append(page) or handle, HTML=lambda text: text)
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(display=fake))
    monkeypatch.setitem(sys.modules, "IPython.display", fake)
    console = Console(file=io.StringIO(), force_jupyter=True)
    with Progress(100, "<GRPO>", console=console) as progress:
        for step in range(1, 101):
            hand.pass_time(0.1)
            progress.update(step, reward=step / 100)
    assert 15 <= len(shown) <= 25  # ten seconds, twice a second
    assert "&lt;GRPO&gt;" in shown[-1] and "100/100" in shown[-1] and "reward 1" in shown[-1]
    assert console.file.getvalue() == ""


def test_an_error_inside_still_closes_the_line():
    console = terminal(80)
    with pytest.raises(KeyError), Progress(3, "GRPO", console=console):
        raise KeyError
    assert console.file.getvalue().endswith("\x1b[?25h")  # the cursor is back


def test_update_is_cheap():
    console = log_console()
    with Progress(10**6, "GRPO", console=console) as progress:
        start = time.perf_counter()
        for step in range(2000):
            progress.update(step, reward=0.5, kl=0.1)
        assert (time.perf_counter() - start) / 2000 < 5e-4


def test_negative_total():
    with pytest.raises(ValueError, match="got -1"):
        Progress(-1, "GRPO")


def test_table():
    console = log_console()
    table(
        "Before and after", ["", "before", "after"], [["pass@1", 0.31, 0.84], ["[b]len[/b]", 5, None]], console=console
    )
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]] for line in console.file.getvalue().splitlines() if "│" in line
    ]
    assert rows == [["pass@1", "0.310", "0.840"], ["[b]len[/b]", "5", "–"]]
    with pytest.raises(ValueError, match=r"2 columns.*row of 1"):
        table("t", ["a", "b"], [["x"]], console=console)


def test_group_table():
    console = log_console(100)
    completions = ["2", "[red]3[/red]\x1b[31m", "z" * 500]
    group_table(
        [{"role": "user", "content": "1+1="}],
        completions,
        {"exact": [1, 0, math.nan], "format": [0.5, 0.5, 0]},
        [1.25, -0.5, 0.0],
        console=console,
    )
    output = console.file.getvalue()
    assert "user: 1+1=" in output and "[red]3[/red]" in output
    assert "\x1b" not in output and "\\x1b[31m" in output  # shown, not obeyed
    assert "+1.25" in output and "-0.50" in output and "(100 more characters)" in output
    assert output.count("z") == 400
    with pytest.raises(ValueError, match="group of 3 completions needs as many advantages, got 1"):
        group_table("p", completions, [1, 2, 3], [0.0], console=console)
    group_table("p", ["a"], [1.0], [0.0], console=console)
    assert "reward" in console.file.getvalue()


def test_plain_text():
    assert plain_text("a") == "a"
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    assert plain_text(chat) == "system: s\nuser: u"
