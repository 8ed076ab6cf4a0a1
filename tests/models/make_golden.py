"""Small random `transformers` models and what they compute, written to golden/ for tests that run without torch.

    python tests/models/make_golden.py

Needs torch and transformers. Weights are scaled so that attention, biases, norms and caps all matter; windows and the
length of the RoPE stretching are shorter than the sequences.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parent / "golden"
VOCAB, WIDTH, NEW = 61, 24, 32
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
FAMILIES = {
    "qwen2": ("qwen2", {}),
    "qwen2_window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2, "tie_word_embeddings": True},
    ),
    "qwen3": ("qwen3", {"head_dim": 16, "num_hidden_layers": 3, "tie_word_embeddings": True}),
    "llama": ("llama", {"rope_parameters": LLAMA3}),
    "llama_biased": ("llama", {"attention_bias": True, "mlp_bias": True, "num_hidden_layers": 2}),
    "mistral": ("mistral", {"sliding_window": 6, "num_hidden_layers": 3}),
    "gemma2": (
        "gemma2",
        {
            "head_dim": 16,
            "num_hidden_layers": 3,
            "sliding_window": 6,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 4.0,
            "query_pre_attn_scalar": 9,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {
            "num_hidden_layers": 7,
            "head_dim": 8,
            "sliding_window": 5,
            "query_pre_attn_scalar": 11,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 100000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
}


def make(name: str, path: Path, seed: int) -> dict[str, np.ndarray]:
    """Write a random model of the family to `path`; return prompts, lengths, logits and greedy continuations."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, options = FAMILIES[name]
    torch.set_num_threads(1)  # for models this small, threads only wait for each other
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **SIZES | options), attn_implementation="eager", dtype=torch.float32
    ).eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.ndim == 1:
                centre = 1.0 if "norm" in key and not kind.startswith("gemma") else 0.0
                weight.copy_(centre + 0.3 * torch.randn_like(weight))
            elif "embed_tokens" in key:
                weight.copy_(torch.randn_like(weight) * (0.4 if model.config.tie_word_embeddings else 1.0))
            else:
                weight.copy_(torch.randn_like(weight) * 1.2 * weight.shape[1] ** -0.5)
    model.save_pretrained(path)
    return expected(path, seed)


def expected(path: Path, seed: int) -> dict[str, np.ndarray]:
    """What `transformers` computes with the model in `path`, on padded prompts of different lengths."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float32).eval()
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, VOCAB, size=(3, WIDTH))
    lengths = np.array([WIDTH, 13, 6])
    exists = np.arange(WIDTH) < lengths[:, None]
    tokens = np.where(exists, tokens, 0)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(tokens), attention_mask=torch.tensor(exists, dtype=torch.long)).logits
        left = np.stack([np.roll(row, WIDTH - n) for row, n in zip(tokens, lengths)])
        generated = model.generate(
            input_ids=torch.tensor(left),
            attention_mask=torch.tensor(np.arange(WIDTH) >= WIDTH - lengths[:, None], dtype=torch.long),
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
        )
    return {
        "tokens": tokens.astype(np.int32),
        "lengths": lengths.astype(np.int32),
        "logits": np.where(exists[..., None], logits.numpy(), 0).astype(np.float32),
        "greedy": generated[:, WIDTH:].numpy().astype(np.int32),
    }


def older(raw: dict) -> dict:
    """The same config.json as versions before `rope_parameters` and `layer_types` wrote it."""
    raw = {key: value for key, value in raw.items() if key not in ("layer_types", "dtype")}
    rope = raw.pop("rope_parameters")
    flat = rope.get("full_attention", rope)
    raw["rope_theta"] = flat["rope_theta"]
    scaling = {key: value for key, value in flat.items() if key != "rope_theta"}
    raw["rope_scaling"] = None if scaling == {"rope_type": "default"} else scaling
    if "sliding_attention" in rope:
        raw |= {"rope_local_base_freq": rope["sliding_attention"]["rope_theta"], "sliding_window_pattern": 6}
    return raw | {"torch_dtype": "float32"}


def main() -> None:
    shutil.rmtree(GOLDEN, ignore_errors=True)
    for seed, name in enumerate(FAMILIES):
        path = GOLDEN / name
        path.mkdir(parents=True)
        np.savez_compressed(path / "expected.npz", **make(name, path, seed))
        for file in path.iterdir():
            if file.suffix == ".json" and file.name != "config.json":
                file.unlink()
        config = path / "config.json"
        raw = json.loads(config.read_text())
        raw.pop("transformers_version", None)
        if name in ("llama", "qwen2_window", "gemma3"):
            (path / "older_config.json").write_text(json.dumps(older(raw), indent=1) + "\n")
        config.write_text(json.dumps(raw, indent=1) + "\n")
    total = sum(file.stat().st_size for file in GOLDEN.rglob("*") if file.is_file())
    print(f"{GOLDEN}: {total / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
