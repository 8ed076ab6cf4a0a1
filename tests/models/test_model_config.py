"""config.json of every family, in its newer and older spellings, and back."""

import dataclasses
import json
from pathlib import Path

import pytest

from grpo_jax.models import Rope, TransformerConfig, read_config
from grpo_jax.models.config import from_hf, to_hf

GOLDEN = Path(__file__).parent / "golden"
FAMILIES = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())
BASE = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def raw(kind, **more):
    return BASE | {"model_type": kind} | more


@pytest.mark.parametrize("name", FAMILIES)
def test_round_trip(name):
    config = read_config(GOLDEN / name)
    assert from_hf(to_hf(config)) == config
    assert from_hf(json.loads(json.dumps(to_hf(config)))) == config
    assert hash(config) == hash(read_config(GOLDEN / name / "config.json"))


def test_configurations_as_published():
    qwen = from_hf(
        raw("qwen2", sliding_window=32768, use_sliding_window=False, rope_theta=1e6, tie_word_embeddings=True)
    )
    assert (qwen.qkv_bias, qwen.output_bias, qwen.query_key_norm, qwen.tie_embeddings) == (True, False, False, True)
    assert qwen.sliding_window is None and not any(qwen.windowed) and qwen.rope == Rope(theta=1e6)
    assert qwen.head_dim == 16 and qwen.score_scale == 0.25

    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3"}
    scaling["original_max_position_embeddings"] = 8192
    llama = from_hf(
        raw("llama", rope_theta=5e5, rope_scaling=scaling, eos_token_id=[7, 8, 9], max_position_embeddings=131072)
    )
    assert llama.rope == Rope(
        theta=5e5, kind="llama3", factor=8.0, low_frequency=1.0, high_frequency=4.0, original_length=8192
    )
    assert llama.eos_token_ids == (7, 8, 9) and not llama.tie_embeddings and not llama.qkv_bias

    mistral = from_hf(raw("mistral", sliding_window=4096))
    assert mistral.windowed == (True,) * 12
    assert from_hf(raw("mistral", sliding_window=None)).windowed == (False,) * 12

    gemma2 = from_hf(raw("gemma2", head_dim=256, query_pre_attn_scalar=144, hidden_activation="gelu_pytorch_tanh"))
    assert gemma2.windowed == (True, False) * 6 and gemma2.sliding_window == 4096
    assert (gemma2.attention_softcap, gemma2.final_softcap, gemma2.score_scale) == (50.0, 30.0, 1 / 12)
    assert gemma2.post_norms and gemma2.norm_offset and gemma2.scale_embedding and gemma2.tie_embeddings

    gemma3 = from_hf(
        raw("gemma3_text", head_dim=256, sliding_window=512, sliding_window_pattern=6, rope_theta=1e6)
        | {"rope_local_base_freq": 10000, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    )
    assert gemma3.windowed == ((True,) * 5 + (False,)) * 2
    assert gemma3.rope == Rope(theta=1e6, kind="linear", factor=8.0) and gemma3.local_rope == Rope(theta=1e4)
    assert gemma3.query_key_norm and gemma3.attention_softcap is None and gemma3.final_softcap is None


def test_a_model_made_from_scratch_is_written_as_its_family():
    config = TransformerConfig(
        vocab_size=100, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16
    )
    written = to_hf(config)
    assert written["architectures"] == ["Qwen2ForCausalLM"] and written["model_type"] == "qwen2"
    assert from_hf(written) == config
    norms = dataclasses.replace(config, family="qwen3", query_key_norm=True, qkv_bias=False, head_dim=32)
    assert to_hf(norms)["head_dim"] == 32 and from_hf(to_hf(norms)) == norms
    with pytest.raises(ValueError, match="Qwen2ForCausalLM cannot express query_key_norm=True; choose another family"):
        to_hf(dataclasses.replace(config, query_key_norm=True))


@pytest.mark.parametrize(
    "contents, message",
    [
        (
            raw("gpt2", architectures=["GPT2LMHeadModel"]),
            "GPT2LMHeadModel is not supported; supported: Qwen2ForCausalLM",
        ),
        (raw("mixtral"), "model_type 'mixtral' is not supported"),
        (raw("qwen2", architectures=["Qwen2ForSequenceClassification"]), "Qwen2ForSequenceClassification is not"),
        (
            {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": {}},
            "Gemma3ForConditionalGeneration is multimodal .* as Gemma3ForCausalLM",
        ),
        (raw("llama", rope_scaling={"rope_type": "yarn", "factor": 4.0}), "rotary scaling 'yarn' is not supported"),
        (raw("llama", rope_scaling={"rope_type": "llama3", "factor": 4.0}), "needs low_freq_factor, high_freq_factor"),
        (raw("llama", hidden_act="relu"), "activation 'relu' is not supported; supported: silu"),
        (raw("llama", quantization_config={"bits": 4}), "quantized weights"),
        (raw("llama", partial_rotary_factor=0.5), "partial_rotary_factor 0.5"),
        (raw("gemma3_text", use_bidirectional_attention=True), "must be causal"),
        (raw("qwen2", use_sliding_window=True, sliding_window=4, layer_types=["chunked"] * 12), "layer_types chunked"),
        (raw("llama", num_key_value_heads=3), "num_heads 4 must be a multiple of num_kv_heads 3"),
        ({k: v for k, v in raw("llama").items() if k != "intermediate_size"}, "intermediate_size is missing"),
        ([1], "must hold a JSON object"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(contents, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(contents))
    with pytest.raises(ValueError, match=message) as error:
        read_config(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)


def test_no_config_and_broken_config(tmp_path):
    with pytest.raises(FileNotFoundError, match="no config.json in"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(ValueError, match="not valid JSON"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden_size": 0}, "hidden_size must be a positive integer, got 0"),
        ({"head_dim": 5}, "head_dim must be even"),
        ({"family": "bert"}, "unknown family 'bert'"),
        ({"activation": "relu"}, "activation must be"),
        ({"sliding_layers": (True, False)}, "without a sliding_window"),
        ({"sliding_layers": (True,), "sliding_window": 4}, "1 entries for 2 layers"),
        ({"sliding_window": 0}, "sliding_window must be at least 1"),
    ],
)
def test_impossible_configurations(change, message):
    config = TransformerConfig(
        vocab_size=100, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16
    )
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **change)
