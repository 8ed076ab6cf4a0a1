"""How rewards are named: built-ins, files, modules, functions, mappings; and what is said when that fails."""

import functools
import textwrap

import pytest

from grpo_jax import rewards as R


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my rewards.py"
    path.write_text(
        textwrap.dedent("""
        from dataclasses import dataclass

        calls = []

        def brevity(completions, scale=1.0):
            calls.append(len(completions))
            return [scale / len(c) for c in completions]

        def count(completions):
            return [float(len(calls))] * len(completions)

        @dataclass
        class Judge:
            strict: bool = True

            @staticmethod
            def judge(completions):
                return [2.0] * len(completions)
        """)
    )
    return path


def value(reward):
    return R.score([reward], ["p"], ["abcd"], {"answer": ["abcd"], "lengths": [3]}).scores[0, 0]


def test_built_in_names():
    assert set(R.BUILT_IN) == {"exact", "numeric", "math", "tags", "regex", "length"}
    reward = R.resolve("exact")
    assert (reward.name, reward.weight, value(reward)) == ("exact", 1.0, 1.0)
    reward = R.resolve({"function": "regex", "pattern": "[a-d]+", "weight": 0.5, "name": "letters"})
    assert (reward.name, reward.weight, value(reward)) == ("letters", 0.5, 1.0)
    reward = R.resolve({"function": R.length_penalty, "target": 1, "limit": 5})
    assert (reward.name, value(reward)) == ("length", -0.5)
    assert R.resolve(R.exact_match).name == "exact"
    assert R.resolve(reward) is reward


def test_functions_of_a_file_share_its_module(file):
    brevity = R.resolve(f"{file}:brevity")
    assert brevity.name == "brevity" and value(brevity) == 0.25
    assert value(R.resolve({"function": f"{file}:brevity", "scale": 2.0, "name": None})) == 0.5
    assert value(R.resolve(f"{file}:count")) == 2.0
    assert value(R.resolve(f"{file}:Judge.judge")) == 2.0


def test_functions_of_a_module(file, monkeypatch):
    monkeypatch.syspath_prepend(file.parent)
    file.rename(file.parent / "some_rewards.py")
    assert value(R.resolve("some_rewards:brevity")) == 0.25


def test_functions_and_partials(file):
    assert R.resolve(lambda completions: [1.0]).name == "reward"
    assert R.resolve(functools.partial(value, 3)).name == "value"


@pytest.mark.parametrize(
    "spec, message",
    [
        ("exakt", r"there is no reward 'exakt'. Nearest: exact, .*Built in are exact, numeric, math, tags"),
        ("package.module.function", "'package.module:function'"),
        ("nowhere.py:function", "there is no file 'nowhere.py'"),
        ("no_such_module:function", "the module 'no_such_module' could not be loaded: ModuleNotFoundError"),
        ("math:sqroot", "math has no function 'sqroot'; it has sqrt"),
        ("math:pi", "a reward is a name"),
        (3, "a reward is a name, 'path/to/file.py:function' or a function, got 3"),
        ({"weight": 1.0}, "needs the key 'function'"),
        ({"function": "exact", "colum": "x"}, "'exact' has no option 'colum'; nearest: column"),
        ({"function": "exact", "wieght": 1.0}, "'exact' has no option 'wieght'; nearest: weight"),
        ({"function": "regex"}, "'regex' needs the option 'pattern'"),
        ({"function": "length"}, "'length' needs the options 'target', 'limit'"),
        ({"function": "regex", "pattern": "("}, r"pattern '\(' is not a regular expression"),
        ({"function": "length", "target": 5, "limit": 5}, "0 <= target < limit"),
        ({"function": "tags", "tags": "think"}, "tags must be a list"),
        ({"function": "tags", "tags": ["<think>"]}, "without brackets"),
        ({"function": "exact", "extract": "end"}, "extract must be one of"),
        ({"function": "numeric", "tolerance": 2}, "tolerance is a relative error"),
        ({"function": "math", "time_limit": 0}, "time_limit must be a positive"),
        ({"function": "exact", "weight": "1"}, "weight must be a finite number, got '1'"),
        ({"function": "exact", "weight": float("nan")}, "weight must be a finite number"),
        ({"function": "exact", "weight": {"exact": True}}, "weight must be a finite number"),
        ({"function": "exact", "name": 3}, "name must be a text"),
    ],
)
def test_mistakes(spec, message):
    with pytest.raises(ValueError, match=message):
        R.resolve(spec)


def test_mistakes_in_a_file(file, tmp_path):
    with pytest.raises(ValueError, match="has no function 'brevety'; it has brevity"):
        R.resolve(f"{file}:brevety")
    with pytest.raises(
        ValueError, match=r"reward 'brevity' \(.*my rewards.py:6\) has no option 'scal'; nearest: scale"
    ):
        R.resolve({"function": f"{file}:brevity", "scal": 2.0})
    broken = tmp_path / "broken.py"
    broken.write_text("import nonsense_module\n")
    with pytest.raises(ValueError, match="broken.py could not be loaded: ModuleNotFoundError.*nonsense_module"):
        R.resolve(f"{broken}:f")
