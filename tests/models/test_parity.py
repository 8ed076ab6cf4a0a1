"""Every family against `transformers`, through golden files (made by make_golden.py)."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from comparisons import check_directory

from grpo_jax.models import read_config

GOLDEN = Path(__file__).parent / "golden"
FAMILIES = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())


def test_all_families_have_golden_files():
    assert len(FAMILIES) == 8
    assert {read_config(GOLDEN / name).family for name in FAMILIES} == {
        "qwen2",
        "qwen3",
        "llama",
        "mistral",
        "gemma2",
        "gemma3_text",
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_greedy_tokens_equal_transformers(name):
    with np.load(GOLDEN / name / "expected.npz") as expected:
        check_directory(GOLDEN / name, dict(expected))


@pytest.mark.parametrize("name", [name for name in FAMILIES if (GOLDEN / name / "older_config.json").exists()])
def test_older_config_files_mean_the_same(name, tmp_path):
    shutil.copyfile(GOLDEN / name / "older_config.json", tmp_path / "config.json")
    assert read_config(tmp_path) == read_config(GOLDEN / name)
