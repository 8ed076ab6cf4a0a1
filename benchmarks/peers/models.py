"""Write the models, tokenizers and prompts of the workload, as Hugging Face directories.

    python -m benchmarks.peers.models [small smallv32k large qwen1.5b]     into $BENCH_MODELS

Weights are normal with deviation 0.08, wide enough that the next token is far from uniform.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from pathlib import Path

import jax

from benchmarks.peers.workload import EOS_ID, MODELS, PAD_ID, PROMPTS, SPECIALS, Sizes, path
from grpo_jax import models
from grpo_jax.data.tokenizers import HuggingFaceTokenizer, load_tokenizer

LARGEST_TOKENIZER = 32768  # ids beyond it have no text, and none is needed
LONGEST = 2048
DEVIATION, BIAS_DEVIATION = 0.08, 0.05


def write(name: str) -> Path:
    """The directory of a model; made unless it is there, whole."""
    sizes, directory = MODELS[name], path(name)
    if (directory / "prompts.json").exists():
        return directory
    shutil.rmtree(directory, ignore_errors=True)
    directory.parent.mkdir(parents=True, exist_ok=True)
    config = config_of(sizes)
    tokenizer, words = make_tokenizer(min(sizes.vocabulary, LARGEST_TOKENIZER))
    dtype = "float32" if sizes.parameters < 10**9 else "bfloat16"
    models.export(directory, config, parameters(config), tokenizer=tokenizer, dtype=dtype)
    stored = {str(length): make_prompts(tokenizer, words, length, PROMPTS[length]) for length in PROMPTS}
    (directory / "prompts.json").write_text(json.dumps(stored))
    return directory


def config_of(sizes: Sizes) -> models.TransformerConfig:
    return models.TransformerConfig(
        family="qwen2",
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.mlp,
        num_layers=sizes.layers,
        num_heads=sizes.heads,
        num_kv_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        initializer_range=DEVIATION,
        max_length=LONGEST,
        eos_token_ids=(EOS_ID,),
        pad_token_id=PAD_ID,
    )


def parameters(config: models.TransformerConfig) -> dict:
    _, params = models.create(config, jax.random.key(0))
    attention = params["layers"]["attention"]
    for number, name in enumerate(sorted(name for name in attention if name.endswith("_bias"))):
        noise = jax.random.normal(jax.random.key(number + 1), attention[name].shape)
        attention[name] = BIAS_DEVIATION * noise
    return params


def make_words(count: int, seed: int) -> list[str]:
    """Different words that can be spoken: consonant and vowel in turn."""
    rng, words = random.Random(seed), {}
    while len(words) < count:
        syllables = [rng.choice("bcdfghjklmnprstvwz") + rng.choice("aeiou") for _ in range(rng.randint(1, 4))]
        words["".join(syllables) + rng.choice(["", "", *"lmnrst"])] = None
    return list(words)


def make_tokenizer(vocabulary: int) -> tuple[HuggingFaceTokenizer, list[str]]:
    """A byte-level BPE of exactly `vocabulary` ids, and the words that are one token with the space before them."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers import models as backends
    from transformers import PreTrainedTokenizerFast

    words = make_words(2 * vocabulary, seed=vocabulary)
    backend = Tokenizer(backends.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = random.Random(0)
    common = (" " + " ".join(rng.choices(words[: vocabulary // 2], k=40)) for _ in range(vocabulary // 4))
    backend.train_from_iterator([*common, *(" " + word for word in words)], trainer)
    if backend.get_vocab_size() != vocabulary:
        raise ValueError(f"the tokenizer came out with {backend.get_vocab_size()} ids, {vocabulary} were asked for")
    whole = [w for w in words if len(backend.encode(" " + w).ids) == 1]
    pad, eos, unknown = SPECIALS
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=pad,
        eos_token=eos,
        unk_token=unknown,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return HuggingFaceTokenizer(fast), whole


def make_prompts(tokenizer: HuggingFaceTokenizer, words: list[str], length: int, count: int) -> list[dict]:
    rng = random.Random(length)
    texts = ["".join(" " + word for word in rng.choices(words, k=length)) for _ in range(count)]
    prompts = [{"text": text, "ids": tokenizer.encode(text).tolist()} for text in texts]
    if any(len(p["ids"]) != length for p in prompts):
        raise ValueError(f"a prompt of {length} words is not {length} tokens")
    return prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=["small"], metavar="MODEL", help=", ".join(MODELS))
    for name in parser.parse_args().names:
        if name not in MODELS:
            parser.error(f"there is no model {name!r}; there are {', '.join(MODELS)}")
        directory = write(name)
        print(
            f"{name}: {MODELS[name].parameters:,} parameters, {load_tokenizer(directory).vocab_size} ids, {directory}"
        )


if __name__ == "__main__":
    main()
