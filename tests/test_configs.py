"""Every ready configuration runs, on a small model of its family that is made on the spot."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import pytest

from grpo_jax import models
from grpo_jax.data import load_tokenizer
from grpo_jax.experiment import Experiment
from grpo_jax.training.configuration import load_config
from grpo_jax.training.metrics import read_metrics

ROOT = Path(__file__).parent.parent
CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"
FAMILIES = {
    "qwen": [
        {"family": "qwen2"},
        {"family": "qwen3", "qkv_bias": False, "query_key_norm": True},
    ],
    "llama": [{"family": "llama", "qkv_bias": False}],
    "gemma": [
        {
            "family": "gemma2",
            "qkv_bias": False,
            "post_norms": True,
            "norm_offset": True,
            "scale_embedding": True,
            "activation": "gelu_tanh",
            "attention_softcap": 50.0,
            "final_softcap": 30.0,
            "sliding_window": 64,
            "sliding_layers": (True, False),
        }
    ],
}
CASES = [(name, shape) for name, shapes in FAMILIES.items() for shape in shapes]


def model_directory(path: Path, shape: dict) -> Path:
    """A small random model of the family with a byte-level tokenizer that knows chats."""
    tokenizer = load_tokenizer("bytes")
    config = models.TransformerConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        eos_token_ids=tuple(tokenizer.stop_ids),
        **shape,
    )
    _, params = models.create(config, jax.random.key(0))
    models.export(path, config, params, tokenizer=tokenizer)
    settings = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": CHAT}))
    return path


def overrides(tmp_path: Path, model: Path) -> list[str]:
    return [
        f"model.path={model}",
        f"directory={tmp_path / 'run'}",
        "steps=2",
        "batch.prompts=2",
        "batch.group_size=2",
        "batch.tokens_per_device=2048",
        "sampling.max_new=6",
        "optimizer.warmup_steps=0",
        "metrics.console=false",
        "metrics.tensorboard=false",
        "mesh.data=2",
        "mesh.fsdp=2",
        "mesh.tensor=2",
    ]


@pytest.mark.parametrize(("name", "shape"), CASES, ids=[shape["family"] for _, shape in CASES])
def test_grade_school_mathematics(tmp_path, name, shape):
    rows = [{"question": f"What is {i} and {i}?", "answer": f"It is {2 * i}.\n#### {2 * i}"} for i in range(6)]
    source = tmp_path / "problems.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = model_directory(tmp_path / "model", shape)
    changes = [
        *overrides(tmp_path, model),
        f"data.source={source}",
        "data.split=null",
        f"evaluation.source={source}",
        "evaluation.split=null",
        "evaluation.prompts=2",
    ]
    if name == "llama":
        changes += ["method.buffer=2", "method.max_rounds=2"]
    experiment = Experiment(load_config(ROOT / "configs" / f"gsm8k_{name}.yaml", changes))
    assert experiment.run is None
    experiment.train()
    assert experiment.run.state.step == 2
    assert "eval/pass@4" in read_metrics(experiment.directory)
    experiment.export(tmp_path / "exported")
    config, _, params = models.load(tmp_path / "exported")
    assert config == experiment.model.config
    for ours, theirs in zip(jax.tree.leaves(experiment.run.params["policy"]), jax.tree.leaves(params), strict=True):
        assert (jax.device_get(ours) == jax.device_get(theirs)).all()


def test_a_reward_function_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    source = tmp_path / "prompts.jsonl"
    source.write_text("".join(json.dumps({"prompt": f"Say something kind to {name}. "}) + "\n" for name in "abcdef"))
    model = model_directory(tmp_path / "model", FAMILIES["qwen"][0])
    changes = [*overrides(tmp_path, model), f"data.source={source}", "data.max_prompt=48"]
    experiment = Experiment(load_config("configs/custom_reward.yaml", changes))
    experiment.train()
    series = read_metrics(experiment.directory)
    assert {"reward/polite", "reward/length", "kl"} <= series.keys()


def test_the_quickstart_is_valid():
    config = load_config(ROOT / "configs" / "quickstart.yaml")
    assert config.evaluation.at_least == 0.75 and config.model.path == "tiny"
