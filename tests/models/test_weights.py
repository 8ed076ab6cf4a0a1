"""Hugging Face directories in and out."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType
from safetensors.numpy import load_file, save_file

from grpo_jax.models import TransformerConfig, create, export, load, logical_axes, shardings, weights

GOLDEN = Path(__file__).parent / "golden"
FAMILIES = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())
CONFIG = TransformerConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8
)


def same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    return all((np.asarray(a) == np.asarray(b)).all() for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other)))


@pytest.fixture
def copy(tmp_path):
    return shutil.copytree(GOLDEN / "llama_biased", tmp_path / "model")


def rewrite(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", FAMILIES)
def test_export_writes_the_tensors_it_was_given_and_loads_back(name, tmp_path):
    config, graphdef, params = load(GOLDEN / name)
    export(tmp_path / "out", config, params, source=GOLDEN / name)
    before, after = load_file(GOLDEN / name / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(before[key].dtype == after[key].dtype and (before[key] == after[key]).all() for key in before)
    again, other, loaded = load(tmp_path / "out")
    assert again == config and other == graphdef and same(loaded, params)
    ours, theirs = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "out", GOLDEN / name))
    assert ours == theirs | {"torch_dtype": "float32"}


def test_a_model_from_scratch_is_exported_with_its_configuration(tmp_path):
    _, params = create(CONFIG, jax.random.key(0))
    export(tmp_path / "deep" / "out", CONFIG, params)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    config, _, loaded = load(tmp_path / "deep" / "out")
    assert config == CONFIG and same(loaded, params)
    raw = json.loads((tmp_path / "deep" / "out" / "config.json").read_text())
    assert (raw["architectures"], raw["model_type"], raw["torch_dtype"]) == (["Qwen2ForCausalLM"], "qwen2", "float32")
    assert (tmp_path / "deep" / "out" / "generation_config.json").is_file()


def test_dtypes(tmp_path):
    _, params = create(CONFIG, jax.random.key(0))
    export(tmp_path / "half", CONFIG, params, dtype=jnp.bfloat16)
    assert {x.dtype for x in load_file(tmp_path / "half" / "model.safetensors").values()} == {
        np.dtype(ml_dtypes.bfloat16)
    }
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    wide, narrow = load(tmp_path / "half")[2], load(tmp_path / "half", dtype=jnp.bfloat16)[2]
    assert {x.dtype for x in jax.tree.leaves(wide)} == {np.dtype("float32")}
    assert {x.dtype for x in jax.tree.leaves(narrow)} == {np.dtype(ml_dtypes.bfloat16)}
    assert same(wide, jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params))
    assert same(wide, jax.tree.map(lambda x: x.astype(jnp.float32), narrow))
    with pytest.raises(ValueError, match="got dtype int32"):
        export(tmp_path / "whole", CONFIG, params, dtype=jnp.int32)


def test_large_models_are_cut_into_several_files(tmp_path, monkeypatch):
    _, params = create(CONFIG, jax.random.key(0))
    monkeypatch.setattr(weights, "SHARD_BYTES", 30_000)
    export(tmp_path / "out", CONFIG, params)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) >= 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all((tmp_path / "out" / file).stat().st_size < 35_000 for file in files)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    stored = {file: load_file(tmp_path / "out" / file) for file in files}
    assert all(name in stored[file] for name, file in index["weight_map"].items())
    assert index["metadata"]["total_size"] == sum(x.nbytes for file in stored.values() for x in file.values())
    assert same(load(tmp_path / "out")[2], params)

    (tmp_path / "out" / files[1]).rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=f"{files[1]} is missing"):
        load(tmp_path / "out")
    shutil.copy(tmp_path / "out" / files[0], tmp_path / "out" / files[1])
    with pytest.raises(ValueError, match="the index|index.json says"):
        load(tmp_path / "out")


@pytest.mark.parametrize("name", ["llama_biased", "gemma3"])
@pytest.mark.parametrize("axes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 8}, {"tensor": 4, "fsdp": 2}], ids=str)
def test_loading_onto_a_mesh_places_each_part_and_reads_it_alone(name, axes, monkeypatch, tmp_path):
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))
    _, _, whole = load(GOLDEN / name)
    largest, original = [], weights._read

    def watched(*args):
        part = original(*args)
        largest.append(part.size)
        return part

    monkeypatch.setattr(weights, "_read", watched)
    config, _, params = load(GOLDEN / name, mesh=mesh)
    assert same(params, whole)
    expected = shardings(logical_axes(config), mesh)
    for leaf, place in zip(jax.tree.leaves(params), jax.tree.leaves(expected)):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
    assert max(largest) <= config.vocab_size * config.hidden_size // axes["fsdp"]
    export(tmp_path / "out", config, params, source=GOLDEN / name)
    assert same(load(tmp_path / "out")[2], whole)


def test_missing_extra_and_misshapen_tensors_are_named(copy):
    name = "model.layers.1.self_attn.k_proj.weight"

    rewrite(copy, lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=rf"missing {name} \[16, 32\]"):
        load(copy)
    rewrite(copy, lambda tensors: tensors.update({name: np.zeros((32, 16), np.float32)}))
    with pytest.raises(ValueError, match=rf"{name} has shape \[32, 16\], expected \[16, 32\]"):
        load(copy)
    rewrite(copy, lambda tensors: tensors.update({name: np.zeros((16, 32), np.float32)}))
    load(copy)
    rewrite(copy, lambda tensors: tensors.update({"model.layers.2.mlp.up_proj.weight": np.zeros((40, 32), np.float32)}))
    with pytest.raises(ValueError, match=r"not expected model.layers.2.mlp.up_proj.weight \[40, 32\]"):
        load(copy)


def test_many_problems_are_counted_not_listed(copy):
    rewrite(copy, lambda tensors: [tensors.pop(name) for name in list(tensors) if "layers.1" in name])
    with pytest.raises(ValueError, match="and 11 more$"):
        load(copy)


def test_second_copies_that_carry_nothing_are_passed_over(tmp_path):
    directory = shutil.copytree(GOLDEN / "qwen3", tmp_path / "model")
    want = load(directory)[2]
    extra = {
        "lm_head.weight": np.ones((61, 32), np.float32),
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32),
    }
    rewrite(directory, lambda tensors: tensors.update(extra))
    assert same(load(directory)[2], want)


def test_stored_types_that_are_not_numbers_of_a_model_are_refused(copy):
    rewrite(copy, lambda tensors: tensors.update({"model.norm.weight": np.zeros(32, np.int8)}))
    with pytest.raises(ValueError, match="model.norm.weight in .* has dtype I8"):
        load(copy)


@pytest.mark.parametrize("keep", [0, 5, 300, -1, -1000])
def test_a_truncated_file_is_named(copy, keep):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model.safetensors is truncated or not a safetensors file"):
        load(copy)


def test_a_directory_without_weights(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="no model.safetensors .* save_pretrained"):
        load(copy)
    (copy / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a safetensors index"):
        load(copy)


class Tokenizer:
    def __init__(self, error=None):
        self.error = error

    def save(self, path):
        (path / "tokenizer.json").write_text("ours")
        if self.error:
            raise self.error


def test_tokenizer_and_generation_config_come_from_the_source_or_from_the_tokenizer(copy, tmp_path):
    (copy / "tokenizer.json").write_text("theirs")
    (copy / "chat_template.jinja").write_text("template")
    (copy / "generation_config.json").write_text('{"temperature": 0.7}')
    (copy / "notes.txt").write_text("not for export")
    config, _, params = load(copy)
    export(tmp_path / "source", config, params, source=copy)
    carried = {path.name for path in (tmp_path / "source").iterdir()}
    assert carried >= {"tokenizer.json", "chat_template.jinja", "generation_config.json"} and "notes.txt" not in carried
    assert (tmp_path / "source" / "generation_config.json").read_text() == '{"temperature": 0.7}'
    export(tmp_path / "given", config, params, source=copy, tokenizer=Tokenizer())
    assert (tmp_path / "given" / "tokenizer.json").read_text() == "ours"
    assert not (tmp_path / "given" / "chat_template.jinja").exists()
    assert (tmp_path / "given" / "generation_config.json").read_text() == '{"temperature": 0.7}'


def test_export_leaves_nothing_half_written_and_overwrites_nothing(tmp_path):
    _, params = create(CONFIG, jax.random.key(0))
    with pytest.raises(OSError, match="disk full"):
        export(tmp_path / "out", CONFIG, params, tokenizer=Tokenizer(OSError("disk full")))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="does not overwrite"):
        export(tmp_path / "out", CONFIG, params)
    assert list((tmp_path / "out").iterdir()) == []


def test_parameters_and_source_must_fit_the_config(tmp_path):
    _, params = create(CONFIG, jax.random.key(0))
    wrong = dict(params, norm=jnp.ones(31))
    with pytest.raises(ValueError, match=r"parameter norm .* expected shape \(32,\), got shape \(31,\)"):
        export(tmp_path / "out", CONFIG, wrong)
    wrong = {key: value for key, value in params.items() if key != "embedding"} | {"more": jnp.ones(3)}
    with pytest.raises(ValueError, match=r"parameter embedding .* expected shape \(64, 32\), got nothing"):
        export(tmp_path / "out", CONFIG, wrong)
    with pytest.raises(ValueError, match="not made from .*vocab_size 61 there, 64 here"):
        export(tmp_path / "out", CONFIG, params, source=GOLDEN / "qwen2")
    assert list(tmp_path.iterdir()) == []
