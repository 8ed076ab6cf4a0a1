"""A plan by the TPU compiler, for chips that nobody needs to have. Needs libtpu."""

import json

import pytest

from grpo_jax import cli

pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install 'grpo_jax[tpu]'")
SHAPE = {
    "model_type": "qwen3",
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 128,
}
RUN = {
    "name": "small",
    "steps": 10,
    "data": {"source": "none.jsonl", "max_prompt": 256},
    "rewards": ["exact"],
    "batch": {"prompts": 8, "group_size": 4, "tokens_per_device": 1024},
    "sampling": {"max_new": 128},
    "mesh": {"data": 1, "fsdp": 4},
}


@pytest.fixture
def planned(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))

    def plan(*overrides):
        file = tmp_path / "run.yaml"
        file.write_text(json.dumps({**RUN, "model": {"path": str(tmp_path)}}))
        with pytest.raises(SystemExit) as stop:
            cli.main(["plan", str(file), "--topology", "v5e:2x2", "--json", "-", *overrides])
        return stop.value.code, json.loads(capsys.readouterr().out)

    return plan


def test_a_small_run_fits_and_its_cache_is_as_large_as_its_keys_and_values(planned):
    code, plan = planned()
    assert code == 0 and plan["fits"] and plan["mesh"] == {"fsdp": 4}
    programs = {program["name"]: program for program in plan["programs"]}
    cache = programs["sample"]["memory"]["cache"]
    # two contexts of 256 and eight rows of 128 on each chip; keys and values, three layers, two heads of 128, bfloat16
    assert cache == 2 * 3 * 2 * 128 * 2 * (2 * 256 + 8 * 128)
    parameters = plan["parameters"] * 4 / 4
    assert programs["update"]["memory"]["parameters"] == pytest.approx(parameters, rel=0.01)
    assert programs["update"]["memory"]["optimizer"] == pytest.approx(2 * parameters, rel=0.01)
    crossed = sum(c["wire"] for c in programs["weights for sampling"]["collectives"])
    assert crossed == pytest.approx(plan["parameters"] * 2 * 3 / 4, rel=0.01)
    useful = next(part["useful"] for part in plan["parts"] if part["name"] == "update")
    flops = next(part["flops"] for part in plan["parts"] if part["name"] == "update")
    assert 1 < 4 * flops / useful < 2  # the head once more, and attention in whole blocks


def test_a_run_for_which_there_is_no_room_is_refused_with_advice(planned):
    code, plan = planned("batch.prompts=4096", "batch.tokens_per_device=2000000", "model.remat=false")
    assert code == 2 and not plan["fits"] and plan["free"] < 0
    assert any(program["refused"] for program in plan["programs"])
    assert any("batch.tokens_per_device=1000000" in advice["keys"] for advice in plan["advice"])
