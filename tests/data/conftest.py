"""Tokenizers made on the spot: byte-level BPE with a chat template and its own special tokens, saved as a directory."""

import json
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def build(tmp_path_factory):
    """build(template=..., bos=..., generation=...) -> directory of a tokenizer with eos <|endoftext|>."""

    def build(
        *, template: str | None = None, bos: bool = False, eos: bool = True, generation: dict | None = None
    ) -> Path:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
        from transformers import PreTrainedTokenizerFast

        path = tmp_path_factory.mktemp("tokenizer")
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        special = ["<|endoftext|>", "<bos>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>"]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
        backend.train_from_iterator(["What is the sum of two and three? The answer is five."] * 3, trainer)
        names = {"eos_token": "<|endoftext|>"} if eos else {}
        if bos:
            names["bos_token"] = "<bos>"
            backend.post_processor = processors.TemplateProcessing(
                single="<bos> $A", special_tokens=[("<bos>", backend.token_to_id("<bos>"))]
            )
        PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **names).save_pretrained(path)
        if generation is not None:
            (path / "generation_config.json").write_text(json.dumps(generation))
        return path

    return build
