"""Raw SentencePiece models: a `.model` file as a tokenizer, and the same as files for transformers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from grpo_jax.data.tokenizers import load_tokenizer, no_template, save_backend, with_bos
from grpo_jax.types import Message

# A raw model has no generation_config.json that would name the token that closes a turn; these are what models use.
TURN_ENDS = ("<end_of_turn>", "<|im_end|>", "<|eot_id|>", "<|end|>")
UNIGRAM, BPE = 1, 2  # TrainerSpec.ModelType
CONTROL, USER_DEFINED = 3, 4  # SentencePiece.Type


class SentencePieceTokenizer:
    """A SentencePiece model. Prompts start with its BOS piece if it has one; chats need a template, which it lacks.

    Raises: FileNotFoundError if there is no such file, ValueError if it is no SentencePiece model or has no EOS piece.
    """

    def __init__(self, path: str | PathLike):
        from sentencepiece import SentencePieceProcessor

        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"no SentencePiece model at {str(path)!r}")
        try:
            self.processor = SentencePieceProcessor(model_proto=self.path.read_bytes())
        except RuntimeError as error:
            raise ValueError(
                f"{str(path)!r} is not a SentencePiece model ({error}); for files of transformers give their directory"
            ) from error
        pieces = self.processor
        self.vocab_size = pieces.vocab_size()
        ends = [pieces.eos_id(), *(pieces.piece_to_id(piece) for piece in TURN_ENDS)]
        self.stop_ids = tuple(dict.fromkeys(i for i in ends if i >= 0 and not pieces.is_unknown(i)))
        if not self.stop_ids:
            raise ValueError(
                f"SentencePiece model {str(path)!r} has no piece that ends a text: train it with an eos_id"
            )
        self.pad_id = pieces.pad_id() if pieces.pad_id() >= 0 else self.stop_ids[0]
        self._bos = pieces.bos_id() if pieces.bos_id() >= 0 else None

    def encode(self, text: str) -> Int[ndarray, " P"]:
        return np.asarray(self.processor.encode(text), np.int32)

    def encode_prompt(self, prompt: str | Sequence[Message]) -> Int[ndarray, " P"]:
        if not isinstance(prompt, str):
            raise ValueError(no_template(f"SentencePiece model {str(self.path)!r}"))
        return with_bos(self.encode(prompt), self._bos)

    def decode(self, ids: Sequence[int] | Int[ndarray, " T"]) -> str:
        silent = {*self.stop_ids, self.pad_id}
        kept = [i for i in np.asarray(ids, np.int64).tolist() if 0 <= i < self.vocab_size and i not in silent]
        return self.processor.decode([i for i in kept if not self.processor.is_control(i)])

    def save(self, path: str | PathLike) -> None:
        """Write the same tokenizer for transformers. Raises: ValueError if the files would tokenize differently."""
        spec = self._spec()
        names = {"bos_token": self.processor.bos_id(), "eos_token": self.processor.eos_id()}
        names |= {"pad_token": self.processor.pad_id(), "unk_token": self.processor.unk_id()}
        special = {name: self.processor.id_to_piece(i) for name, i in names.items() if i >= 0}
        save_backend(_backend(spec, bos=self._bos), path, stop_ids=self.stop_ids, **special)
        written = load_tokenizer(path)
        for text in _probes(spec):
            if not np.array_equal(written.encode(text), self.encode(text)):
                raise ValueError(
                    f"SentencePiece model {str(self.path)!r} does not survive conversion for transformers: "
                    f"{text!r} has other tokens there. Keep the .model file beside the exported model and load that."
                )

    def _spec(self) -> Any:
        from sentencepiece import sentencepiece_model_pb2 as messages

        spec = messages.ModelProto()  # type: ignore[attr-defined]  # protobuf makes it at run time
        spec.ParseFromString(self.path.read_bytes())
        return spec


def _backend(spec: Any, *, bos: int | None) -> Any:
    """The model of the `tokenizers` library with the pieces, normalisation and whitespace rules of a ModelProto."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )

    trainer, rules = spec.trainer_spec, spec.normalizer_spec
    if trainer.model_type == UNIGRAM:
        scores = [(piece.piece, piece.score) for piece in spec.pieces]
        backend = Tokenizer(models.Unigram(scores, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback))
    elif trainer.model_type == BPE:
        vocab = {piece.piece: i for i, piece in enumerate(spec.pieces)}
        options = {
            "unk_token": trainer.unk_piece,
            "fuse_unk": True,
            "byte_fallback": trainer.byte_fallback,
            "ignore_merges": True,
        }
        backend = Tokenizer(models.BPE(vocab, _merges(spec), **options))
    else:
        raise ValueError("only unigram and BPE SentencePiece models can be saved for transformers")

    steps: list[Any] = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    # Split off rather than added: text after an added token would be normalised anew and get a prefix space of its own.
    whole = sorted((p.piece for p in spec.pieces if p.type == USER_DEFINED), key=len, reverse=True)
    if whole:
        backend.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(map(re.escape, whole))), "isolated")

    strip = [decoders.Strip(" ", left=1)] if rules.add_dummy_prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    control = [piece.piece for piece in spec.pieces if piece.type == CONTROL]
    backend.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in control])
    if bos is not None:
        piece = spec.pieces[bos].piece
        backend.post_processor = processors.TemplateProcessing(
            single=f"{piece} $A", pair=f"{piece} $A $B", special_tokens=[(piece, bos)]
        )
    return backend


def _merges(spec: Any) -> list[tuple[str, str]]:
    """All ways to make a piece of two, the best pieces first: what BPE over scores does, as a list of merges."""
    scores = {piece.piece: piece.score for piece in spec.pieces if piece.type not in (CONTROL, USER_DEFINED)}
    ranked = sorted(scores, key=lambda piece: -scores[piece])
    return [
        (piece[:cut], piece[cut:])
        for piece in ranked
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]


def _probes(spec: Any) -> list[str]:
    """Texts with every whitespace rule, digits, accents, scripts and pieces of the vocabulary."""
    words = [piece.piece.replace("▁", " ") for piece in spec.pieces if piece.type == 1][:2000]
    return [
        "",
        "23+45=68",
        " a  b\tc\n\nd ",
        "\n e \n",
        "The answer is \\boxed{x^2 + 1}.",
        "Ünïcödé ﬁ ① 数学 🙂",
        "".join(words),
        "1".join([" a ", *(piece.piece for piece in spec.pieces if piece.type == USER_DEFINED), " b"]),
        " ".join(words[::-1]),
    ]
