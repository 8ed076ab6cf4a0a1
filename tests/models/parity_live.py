"""Parity with `transformers`, live: new random models every time, both ways.

    python -m pytest tests/models/parity_live.py

Needs torch, so it is not collected by `pytest` alone; PARITY_SEED=n repeats a run.
"""

import json
import os
import time

import jax
import numpy as np
import pytest
from comparisons import check_directory
from make_golden import FAMILIES, expected, make, older

from grpo_jax.models import TransformerConfig, create, export, load

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
SEED = int(os.environ.get("PARITY_SEED", time.time_ns() % 2**31))


@pytest.fixture(scope="module", params=list(FAMILIES))
def made(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / request.param
    print(f"PARITY_SEED={SEED}")
    return path, make(request.param, path, SEED)


def hf_logits(path, tokens):
    model = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor(tokens)).logits.numpy()


def test_logits_and_greedy_tokens(made):
    check_directory(*made)


def test_older_config_files(made, tmp_path):
    path, _ = made
    raw = json.loads((path / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(older(raw)))
    check_directory(tmp_path, expected(tmp_path, SEED))


@pytest.mark.parametrize("carry", [True, False], ids=["config of the source", "config written by us"])
def test_export_reloads_in_transformers_with_identical_logits(made, carry, tmp_path):
    path, want = made
    config, _, params = load(path)
    export(tmp_path / "out", config, params, source=path if carry else None)
    np.testing.assert_array_equal(hf_logits(tmp_path / "out", want["tokens"]), hf_logits(path, want["tokens"]))
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(loaded) is type(transformers.AutoModelForCausalLM.from_pretrained(path))
    assert not any(report.values()), report


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_a_model_made_here_means_the_same_in_transformers(family, tmp_path):
    config = TransformerConfig(
        family=family,
        vocab_size=61,
        hidden_size=32,
        intermediate_size=40,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        qkv_bias=family == "qwen2",
        query_key_norm=family == "qwen3",
        initializer_range=0.3,
    )
    _, params = create(config, jax.random.key(SEED))
    export(tmp_path / "out", config, params)
    check_directory(tmp_path / "out", expected(tmp_path / "out", SEED))
