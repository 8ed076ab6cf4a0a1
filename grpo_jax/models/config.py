"""What a decoder-only transformer is made of, read from and written as Hugging Face `config.json`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

ARCHITECTURES = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
SLIDING, GLOBAL = "sliding_attention", "full_attention"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary position embedding: its base and how its frequencies are stretched.

    `kind` is "default", "linear" (all frequencies divided by `factor`) or "llama3" (only wavelengths beyond
    `original_length / low_frequency`, with a smooth passage up to `original_length / high_frequency`).
    """

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    low_frequency: float = 1.0
    high_frequency: float = 4.0
    original_length: int = 8192


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """A decoder-only transformer. The defaults are those of Qwen2; hashable, so it may be a static argument of `jit`.

    `family` names the Hugging Face architecture it is read from and written to; everything that the forward pass does
    differently between families is one of the other fields.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    family: str = "qwen2"
    tie_embeddings: bool = True
    qkv_bias: bool = True
    output_bias: bool = False
    mlp_bias: bool = False
    query_key_norm: bool = False  # RMSNorm of every query and key head, before the rotary embedding
    post_norms: bool = False  # a norm after attention and after the feed-forward, before the residual is added
    norm_offset: bool = False  # norms multiply by 1 + weight
    scale_embedding: bool = False  # embeddings times sqrt(hidden_size)
    query_scale: float | None = None  # scores are multiplied by it; None: head_dim ** -0.5
    attention_softcap: float | None = None
    final_softcap: float | None = None
    activation: str = "silu"  # or "gelu_tanh"
    norm_epsilon: float = 1e-6
    rope: Rope = Rope()
    local_rope: Rope | None = None  # of sliding layers, where it differs
    sliding_window: int | None = None
    sliding_layers: tuple[bool, ...] | None = None  # which layers have the window; None: all
    max_length: int = 32_768  # positions the model was trained for
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    exact: bool = False  # arithmetic as in `models.exact`

    def __post_init__(self) -> None:
        heads = ("num_heads", "num_kv_heads", "head_dim")
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", *heads):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if self.family not in ARCHITECTURES:
            raise ValueError(f"unknown family {self.family!r}; known: {', '.join(ARCHITECTURES)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}: "
                "every key/value head serves the same number of query heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for the rotary embedding, got {self.head_dim}")
        if self.activation not in ACTIVATIONS.values():
            raise ValueError(f"activation must be 'silu' or 'gelu_tanh', got {self.activation!r}")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window must be at least 1, got {self.sliding_window}")
        if self.sliding_layers is not None:
            if len(self.sliding_layers) != self.num_layers:
                raise ValueError(f"sliding_layers has {len(self.sliding_layers)} entries for {self.num_layers} layers")
            if any(self.sliding_layers) and self.sliding_window is None:
                raise ValueError("sliding_layers are given without a sliding_window")
        for rope in (self.rope, self.local_rope):
            if rope is not None and rope.kind not in ("default", "linear", "llama3"):
                raise ValueError(f"rotary scaling {rope.kind!r} is not supported; supported: default, linear, llama3")

    @property
    def score_scale(self) -> float:
        return self.head_dim**-0.5 if self.query_scale is None else self.query_scale

    @property
    def windowed(self) -> tuple[bool, ...]:
        """For every layer, whether it sees the last `sliding_window` positions only."""
        return self.sliding_layers or (self.sliding_window is not None,) * self.num_layers


def read_config(path: str | Path) -> TransformerConfig:
    """The configuration of a Hugging Face model directory (or of a `config.json`).

    Raises: FileNotFoundError without config.json; ValueError for an architecture or an option that is not supported.
    """
    path = Path(path)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"no config.json in {path}: expected a Hugging Face model directory")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(raw).__name__}")
    try:
        return from_hf(raw)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def from_hf(raw: dict[str, Any]) -> TransformerConfig:
    """`TransformerConfig` of the contents of a `config.json`."""
    family = _family(raw)
    gemma = family.startswith("gemma")
    _refuse(raw)

    def need(key: str) -> Any:
        if raw.get(key) is None:
            raise ValueError(f"{key} is missing")
        return raw[key]

    def get(key: str, default: Any) -> Any:
        return default if raw.get(key) is None else raw[key]

    layers, heads, hidden = need("num_hidden_layers"), need("num_attention_heads"), need("hidden_size")
    head_dim = get("head_dim", {"gemma2": 256, "gemma3_text": 256, "qwen3": 128}.get(family, hidden // heads))
    activation = get("hidden_activation", "gelu_pytorch_tanh") if gemma else get("hidden_act", "silu")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is not supported; supported: {', '.join(ACTIVATIONS)}")
    attention_bias = bool(get("attention_bias", False)) and family != "mistral"
    rope, local_rope = _ropes(raw, family)
    window, sliding = _windows(raw, family, layers)
    eos = raw.get("eos_token_id")
    return TransformerConfig(
        family=family,
        vocab_size=need("vocab_size"),
        hidden_size=hidden,
        intermediate_size=need("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=get("num_key_value_heads", {"gemma2": 4, "gemma3_text": 4, "mistral": 8}.get(family, heads)),
        head_dim=head_dim,
        tie_embeddings=get("tie_word_embeddings", gemma),
        qkv_bias=family == "qwen2" or attention_bias,
        output_bias=family != "qwen2" and attention_bias,
        mlp_bias=family == "llama" and bool(get("mlp_bias", False)),
        query_key_norm=family in ("qwen3", "gemma3_text"),
        post_norms=gemma,
        norm_offset=gemma,
        scale_embedding=gemma,
        query_scale=get("query_pre_attn_scalar", 256) ** -0.5 if gemma else None,
        # absent is not null: a Gemma 2 config that does not say has the caps, one that says null has none
        attention_softcap=raw.get("attn_logit_softcapping", 50.0) if family == "gemma2" else None,
        final_softcap=raw.get("final_logit_softcapping", 30.0 if family == "gemma2" else None) if gemma else None,
        activation=ACTIVATIONS[activation],
        norm_epsilon=get("rms_norm_eps", 1e-6),
        rope=rope,
        local_rope=local_rope,
        sliding_window=window,
        sliding_layers=sliding,
        max_length=get("max_position_embeddings", 32_768),
        initializer_range=get("initializer_range", 0.02),
        bos_token_id=raw.get("bos_token_id"),
        eos_token_ids=() if eos is None else (eos,) if isinstance(eos, int) else tuple(eos),
        pad_token_id=raw.get("pad_token_id"),
    )


def to_hf(config: TransformerConfig) -> dict[str, Any]:
    """The contents of a `config.json` that `transformers` reads as this model.

    Raises: ValueError if the family's architecture cannot express it (say, capped scores in a Qwen2).
    """
    family, gemma = config.family, config.family.startswith("gemma")
    eos, activations = config.eos_token_ids, {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    raw: dict[str, Any] = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_activation" if gemma else "hidden_act": activations[config.activation],
        "max_position_embeddings": config.max_length,
        "initializer_range": config.initializer_range,
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_dropout": 0.0,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
        "pad_token_id": config.pad_token_id,
        "use_cache": True,
    }
    if family == "gemma3_text":
        local = config.local_rope or config.rope
        raw["rope_parameters"] = {GLOBAL: _rope_to_hf(config.rope), SLIDING: _rope_to_hf(local)}
        # readers that predate `rope_parameters`
        raw |= {"rope_theta": config.rope.theta, "rope_local_base_freq": local.theta}
    else:
        raw |= {"rope_parameters": _rope_to_hf(config.rope), "rope_theta": config.rope.theta}
    if config.rope.kind != "default":
        raw["rope_scaling"] = {k: v for k, v in _rope_to_hf(config.rope).items() if k != "rope_theta"}
    if family in ("qwen3", "llama", "gemma2", "gemma3_text"):
        raw["attention_bias"] = config.qkv_bias
    if family == "llama":
        raw["mlp_bias"] = config.mlp_bias
    if family == "mistral":
        raw["sliding_window"] = config.sliding_window
    elif family != "llama":
        raw["layer_types"] = [SLIDING if slides else GLOBAL for slides in config.windowed]
        raw["sliding_window"] = config.sliding_window
    if family.startswith("qwen"):
        raw["use_sliding_window"] = any(config.windowed)
        raw["max_window_layers"] = config.windowed.index(True) if any(config.windowed) else config.num_layers
    if gemma:
        raw["query_pre_attn_scalar"] = _whole(config.score_scale**-2)
        raw["attn_logit_softcapping"] = config.attention_softcap
        raw["final_logit_softcapping"] = config.final_softcap
    lost = differences(config, from_hf(raw))
    if lost:
        raise ValueError(
            f"{ARCHITECTURES[family]} cannot express "
            + ", ".join(f"{key}={getattr(config, key)!r}" for key in lost)
            + "; choose another family"
        )
    return raw


def differences(one: TransformerConfig, other: TransformerConfig) -> list[str]:
    """Names of the fields in which two configurations mean something different."""

    def meaning(config: TransformerConfig) -> dict[str, Any]:
        window = config.sliding_window if any(config.windowed) else None
        spelled = {
            "query_scale": round(config.score_scale, 12),
            "sliding_layers": config.windowed,
            "sliding_window": window,
        }
        return vars(config) | spelled | {"local_rope": config.local_rope or config.rope}

    ours, theirs = meaning(one), meaning(other)
    return [key for key in ours if ours[key] != theirs[key]]


def _family(raw: dict[str, Any]) -> str:
    supported = ", ".join(ARCHITECTURES.values())
    kind, names = raw.get("model_type"), raw.get("architectures") or []
    if "text_config" in raw:
        raise ValueError(
            f"architecture {(names or [kind])[0]} is multimodal and not supported (supported: {supported}); save its "
            "text model on its own, for Gemma 3 as Gemma3ForCausalLM, and load that directory"
        )
    by_name = [family for family, name in ARCHITECTURES.items() if name in names]
    if by_name and kind in (None, by_name[0]):
        return by_name[0]
    if not names and kind in ARCHITECTURES:
        return kind
    what = f"architecture {names[0]}" if names else f"model_type {kind!r}"
    raise ValueError(f"{what} is not supported; supported: {supported}")


def _refuse(raw: dict[str, Any]) -> None:
    """Options that would change the numbers and that the forward pass does not have."""
    if raw.get("quantization_config"):
        raise ValueError("quantized weights (quantization_config) are not supported; load the unquantized model")
    if raw.get("use_bidirectional_attention"):
        raise ValueError("use_bidirectional_attention is not supported: the model must be causal")


def _ropes(raw: dict[str, Any], family: str) -> tuple[Rope, Rope | None]:
    """The rotary embedding of global and of sliding layers, from the new `rope_parameters` or from the older keys."""
    new = raw.get("rope_parameters") or {}
    length = raw.get("max_position_embeddings") or 8192
    if family != "gemma3_text":
        flat = new or raw.get("rope_scaling") or {}
        return _rope(flat, raw.get("rope_theta") or 10_000.0, length, raw), None
    nested = new if GLOBAL in new or SLIDING in new else {}
    stretched = nested.get(GLOBAL) or raw.get("rope_scaling") or {}
    return (
        _rope(stretched, raw.get("rope_theta") or 1_000_000.0, length, raw),
        _rope(nested.get(SLIDING) or {}, raw.get("rope_local_base_freq") or 10_000.0, length, raw),
    )


def _rope(parameters: dict[str, Any], theta: float, length: int, raw: dict[str, Any]) -> Rope:
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    partial = parameters.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise ValueError(f"partial_rotary_factor {partial} is not supported, only 1")
    rope = Rope(theta=float(parameters.get("rope_theta") or theta), kind=kind)
    if kind in ("default", "linear", "llama3"):
        names = {"linear": ["factor"], "llama3": ["factor", "low_freq_factor", "high_freq_factor"]}.get(kind, [])
        missing = [name for name in names if parameters.get(name) is None]
        if missing:
            raise ValueError(f"rotary scaling {kind!r} needs {', '.join(missing)}")
    if kind == "linear":
        return dataclasses.replace(rope, factor=float(parameters["factor"]))
    if kind == "llama3":
        return dataclasses.replace(
            rope,
            factor=float(parameters["factor"]),
            low_frequency=float(parameters["low_freq_factor"]),
            high_frequency=float(parameters["high_freq_factor"]),
            original_length=parameters.get("original_max_position_embeddings") or length,
        )
    return rope


def _rope_to_hf(rope: Rope) -> dict[str, Any]:
    raw: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": rope.theta}
    if rope.kind != "default":
        raw["factor"] = rope.factor
    if rope.kind == "llama3":
        raw["low_freq_factor"] = rope.low_frequency
        raw["high_freq_factor"] = rope.high_frequency
        raw["original_max_position_embeddings"] = rope.original_length
    return raw


def _windows(raw: dict[str, Any], family: str, layers: int) -> tuple[int | None, tuple[bool, ...] | None]:
    """The window, and which layers have it where not all do."""
    gemma = family.startswith("gemma")
    window = raw.get("sliding_window", 4096 if gemma or family == "mistral" else None)
    if family == "llama" or window is None or (family.startswith("qwen") and not raw.get("use_sliding_window")):
        return None, None
    if family == "mistral":
        return window, None
    types = raw.get("layer_types")
    if types is not None:
        unknown = sorted(set(types) - {SLIDING, GLOBAL})
        if unknown:
            raise ValueError(f"layer_types {', '.join(unknown)} are not supported; supported: {SLIDING}, {GLOBAL}")
        sliding = tuple(kind == SLIDING for kind in types)
    elif gemma:
        every = raw.get("sliding_window_pattern") or (2 if family == "gemma2" else 6)
        sliding = tuple((layer + 1) % every != 0 for layer in range(layers))
    else:
        first = raw.get("max_window_layers", 28)
        sliding = tuple(layer >= first for layer in range(layers))
    return (window, sliding) if any(sliding) else (None, None)


def _whole(value: float) -> float | int:
    """`transformers` types the field as an integer; 1/sqrt and back leaves round-off."""
    return round(value) if abs(value - round(value)) < 1e-6 * max(value, 1.0) else value
