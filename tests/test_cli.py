"""The command line, as a user meets it: each command on a small run, help worth reading, errors in one message."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from grpo_jax import cli, methods, models

CONFIG = """
name: small
steps: 4
model: {path: tiny, dtype: float32, remat: false, tiny: {layers: 1, hidden: 32, mlp: 64, initializer_range: 0.1}}
data: {source: addition, max_prompt: 6}
rewards: [exact]
warmup: {steps: 2, prompts: 8, options: {noise: 0.3}, optimizer: {name: muon, learning_rate: 1e-2}}
batch: {prompts: 8, group_size: 4, tokens_per_device: 1024}
sampling: {max_new: 4}
optimizer: {learning_rate: 1e-3}
evaluation: {every: 2, prompts: 8, samples: 4, k: [1, 4]}
metrics: {tensorboard: true}
"""
COMMANDS = ("train", "eval", "sample", "export", "report", "config", "methods")


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    return stopped.value.code


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    (folder / "small.yaml").write_text(CONFIG)
    assert run("train", str(folder / "small.yaml"), f"directory={folder / 'run'}") == 0
    return folder


def test_train_prints_what_happened_and_ends_in_a_line_for_scripts(trained, capsys):
    config, directory = str(trained / "small.yaml"), f"directory={trained / 'again'}"
    assert run("train", config, directory) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    name, before, arrow, after, _, seconds, unit = lines[-1].removeprefix("small: ").split()
    assert (name, arrow, unit) == ("pass@1", "->", "s")
    assert 0 <= float(before) <= 1 and 0 <= float(after) <= 1 and int(seconds) >= 0
    text = "\n".join(lines)
    assert "8 prompts x 4 completions = 32 rows a step" in text
    for part in ("before", "after", "pass@4", "advantage", "report.png", "checkpoints"):
        assert part in text
    assert run("train", config, directory, "evaluation.at_least=1.0") == 1  # resumed at its end, and not good enough
    assert "resumed at step 4" in capsys.readouterr().out


def test_eval_writes_predictions(trained, capsys):
    assert run("eval", str(trained / "run")) == 0
    out = capsys.readouterr().out
    for name in ("greedy", "pass@1", "pass@4", "maj@4"):
        assert name in out
    rows = [json.loads(line) for line in (trained / "run" / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 8 * 5 and {"prompt", "completion", "correct", "scores", "kind"} <= rows[0].keys()


def test_sample_gives_groups_with_log_probs(trained, capsys):
    assert run("sample", str(trained / "run"), "23+45=", "--count", "3", "--json") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 3
    assert all(len(row["logps"]) == len(row["tokens"]) and max(row["logps"]) <= 0 for row in rows)
    assert run("sample", str(trained / "run"), "23+45=", "--temperature", "0") == 0
    assert "log-prob" in capsys.readouterr().out


def test_export_gives_a_model_that_loads_and_trains_on(trained, tmp_path, capsys):
    target = tmp_path / "exported"
    assert run("export", str(trained / "run"), str(target)) == 0
    models.load(target)
    assert (target / "tokenizer.json").exists()
    assert run("export", str(trained / "run"), str(target)) == 1
    assert "overwrites nothing" in capsys.readouterr().err
    again = [f"directory={tmp_path / 'run'}", f"model.path={target}", "warmup=null", "steps=1"]
    assert run("train", str(trained / "small.yaml"), *again) == 0


def test_report_and_config(trained, capsys):
    assert run("report", str(trained / "run")) == 0
    assert "report.html" in capsys.readouterr().out
    assert run("config", str(trained / "small.yaml"), "optimizer.learning_rate=5e-4") == 0
    assert "learning_rate: 0.0005" in capsys.readouterr().out
    assert run("config") == 0
    assert "tokens, prompts included, that one device computes at once" in capsys.readouterr().out


def test_methods_are_listed_and_explained(capsys):
    assert run("methods") == 0
    listed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert listed.keys() == set(methods.names()) and "median" in listed["mc_grpo"]
    assert run("methods", "mc_grpo") == 0
    out = capsys.readouterr().out
    assert "arXiv:2601.22582" in out and "scale: str = mad" in out and "clip_low: float = 0.2" in out
    assert run("methods", "mc_grop") == 1
    assert "did you mean 'mc_grpo'" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    assert run(command, "--help") == 0
    assert len(capsys.readouterr().out) > 200


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nowhere.yaml"], "nowhere.yaml"),
        (["train", "{config}", "optimizer.learning_rat=1"], "learning_rate"),
        (["train", "{config}", "steps=many"], "steps"),
        (["train", "{config}", "method.name=grop"], "did you mean 'grpo'"),
        (["train", "{config}", "model.path=/no/such/model"], "/no/such/model"),
        (["train", "{config}", "batch.tokens_per_device=5"], "tokens_per_device"),
        (["train", "{config}", "mesh.tensor=3", "mesh.data=1"], "devices"),
        (["eval", "{folder}"], "holds no run"),
        (["report", "{folder}"], "run"),
        (["export", "{folder}/run", "x", "--step", "77"], "77"),
    ],
)
def test_errors_are_one_message(trained, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    filled = [a.format(config=trained / "small.yaml", folder=trained) for a in arguments]
    assert run(*filled) == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "runs").exists(), "nothing is left behind"
