"""Every method has a ready configuration, and each runs: two steps of it, smaller, through the command line's code."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

from grpo_jax import methods
from grpo_jax.experiment import Experiment
from grpo_jax.training.configuration import load_config
from grpo_jax.training.metrics import read_metrics

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs" / "methods").glob("*.yaml"))
SMALL = [
    "steps=2",
    "model.tiny.layers=1",
    "model.tiny.hidden=32",
    "model.tiny.mlp=32",
    "batch.prompts=4",
    "warmup.steps=2",
    "warmup.prompts=8",
    "warmup.optimizer.warmup_steps=0",
    "optimizer.warmup_steps=0",
    "evaluation.every=0",
    "evaluation.prompts=8",
    "evaluation.at_least=null",
    "metrics.console=false",
    "metrics.tensorboard=false",
]


def test_every_method_has_one():
    named = {path.stem: load_config(path) for path in CONFIGS}
    assert named.keys() >= set(methods.names()) - {"sft"}  # sft is the warm-up of all of them
    for name, config in named.items():
        assert config.name == name and config.method.name == name
        assert config.evaluation.at_least is not None, "a run that does not learn says so"


# A policy that knows nothing never succeeds; these train only on groups with successes and failures.
CHOOSY = ("bidirectional_pairing", "dapo", "guide_grpo", "unlikeliness")
COIN = "def coin(prompts, completions, **columns):\n    return [float(sum(map(ord, c)) % 2) for c in completions]\n"
OWN = {"spo": ["data.options.largest=13", "data.options.held_out=4", "method.offline=2", "batch.prompts=8"]}


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_it_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (tmp_path / "coin.py").write_text(COIN)
    coin = [f"rewards=['{tmp_path}/coin.py:coin']"] if path.stem in CHOOSY else []
    changes = [*SMALL, f"directory={tmp_path / 'run'}", *coin, *OWN.get(path.stem, [])]
    experiment = Experiment(load_config(path, changes))
    before = jax.tree.map(np.asarray, experiment.model.params)
    experiment.train()
    assert experiment.run.state.step == 2
    series = read_metrics(experiment.directory)
    assert np.isfinite(series["loss"].values).all() and np.isfinite(series["grad_norm"].values).all()
    after = jax.tree.map(np.asarray, experiment.run.params["policy"])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(after))
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, after)
    assert all(jax.tree.leaves(moved)), "every weight was trained, in the warm-up at least"
