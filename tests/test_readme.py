"""The README's Python runs as it stands, on a small model and for few steps."""

from __future__ import annotations

import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_configs import FAMILIES, model_directory

import grpo_jax
from grpo_jax import advantages
from grpo_jax.methods.grpo import grpo
from grpo_jax.training.step import begin

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return model_directory(tmp_path_factory.mktemp("readme") / "model", FAMILIES["qwen"][0])


def block(beginning: str, model: Path, **changes: str) -> str:
    (code,) = [b for b in BLOCKS if beginning in b]
    assert len([line for line in code.splitlines() if line.strip()]) <= 30, "under 30 lines"
    changes = {"path/to/Qwen2.5-0.5B-Instruct": str(model)} | changes
    for old, new in changes.items():
        assert old in code
        code = code.replace(old, new)
    return code


def test_the_whole_run(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = block(
        "from grpo_jax import Experiment", model, **{'"steps": 100': '"steps": 2', '"max_new": 256': '"max_new": 8'}
    )
    names: dict = {}
    exec(code, names)
    assert names["experiment"].run.state.step == 2
    assert (tmp_path / "mine-hf" / "config.json").exists() and (tmp_path / "runs" / "mine" / "report.html").exists()


def test_the_pieces(model):
    names: dict = {}
    exec(block("sample_groups", model, **{"range(100)": "range(2)", "max_new=64": "max_new=6"}), names)
    assert len(names["rows"]) == 16 and int(names["state"][0].count) == 2


def test_the_losses(model):
    (code,) = [b for b in BLOCKS if "chunked_logps" in b]
    rng = np.random.default_rng(0)
    logps = jnp.asarray(-rng.random((4, 3)), jnp.float32)
    names = {
        "losses": grpo_jax.losses if hasattr(grpo_jax, "losses") else None,
        "logps": logps,
        "old_logps": logps,
        "ref_logps": logps,
        "adv": jnp.ones((4, 3)),
        "weights": jnp.ones(4),
        "mask": jnp.ones((4, 3), bool),
        "hidden": jnp.asarray(rng.normal(size=(4, 3, 8)), jnp.float32),
        "head": jnp.asarray(rng.normal(size=(8, 11)), jnp.float32),
        "tokens": jnp.zeros((4, 3), jnp.int32),
    }
    exec("from grpo_jax import losses\n" + code, names)
    assert float(names["scalar"]) == pytest.approx(-1.0)


def test_the_piece_that_steps_with_a_method(model):
    import jax

    loaded = grpo_jax.load(model)
    rows, texts = grpo_jax.sample_groups(loaded, ["1+1=", "2+2="], jax.random.key(0), group_size=4, max_new=5)
    assert len(texts) == 8
    rewards = jnp.asarray([float(len(t)) for t in texts])
    adv = advantages.per_decision(advantages.group_z_score(rewards, rows.group_ids), rows.completion_mask)
    optimizer, method = optax.adamw(1e-3), grpo(prompts=2, group_size=4)
    policy = begin(loaded.params, optimizer, loaded.mesh)
    step = jax.jit(lambda policy, rows, adv: grpo_jax.train_step(loaded, method, optimizer, policy, rows, adv))
    after, numbers = step(policy, rows, adv)
    assert numbers["ratio_max"] == 1.0 and numbers["gap_max"] < 1e-4 and numbers["applied"] == 1
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(policy.params), jax.tree.leaves(after.params)))
