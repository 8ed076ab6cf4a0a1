"""Text to token ids and back: the tokenizer of a Hugging Face model, a raw SentencePiece model, or plain bytes."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from grpo_jax.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt")


@runtime_checkable
class Tokenizer(Protocol):
    """What the samplers, rewards and trainers ask of a tokenizer.

    `vocab_size`: ids are in [0, vocab_size). `stop_ids`: every id that ends a completion. `pad_id`: fills arrays and
    is never compared with anything.
    """

    @property
    def vocab_size(self) -> int: ...

    @property
    def stop_ids(self) -> tuple[int, ...]: ...

    @property
    def pad_id(self) -> int: ...

    def encode(self, text: str) -> Int[ndarray, " P"]:
        """Ids of a piece of text as it stands: no token is added before or after it."""

    def encode_prompt(self, prompt: str | Sequence[Message]) -> Int[ndarray, " P"]:
        """Ids of a prompt: a chat through its template up to where the answer starts; text with BOS if the tokenizer
        wants one, never two."""

    def decode(self, ids: Sequence[int] | Int[ndarray, " T"]) -> str:
        """Text of a completion, without stop, padding and other special tokens."""

    def save(self, path: str | PathLike) -> None:
        """Write a directory that transformers' AutoTokenizer loads, stop ids in its generation_config.json."""


def load_tokenizer(path: str | PathLike) -> Tokenizer:
    """The tokenizer of a model.

    `path`: a directory or hub name that AutoTokenizer knows, a SentencePiece `.model` file (or a directory that holds
    nothing else), or "bytes" for the embedded one.
    Raises: FileNotFoundError if there is nothing at `path`, ValueError if no token ends a completion.
    """
    name = str(path)
    if name == "bytes":
        return ByteTokenizer()
    place = Path(path).expanduser()
    if place.suffix == ".model" or place.is_file():
        return _sentencepiece(place)
    if place.is_dir():
        if any((place / file).is_file() for file in TOKENIZER_FILES):
            return HuggingFaceTokenizer(_auto_tokenizer(str(place)), stop_ids=_generation_stops(str(place)))
        models = sorted(place.glob("*.model"))
        if len(models) == 1:
            return _sentencepiece(models[0])
        raise FileNotFoundError(
            f"no tokenizer in directory {name!r}: expected one of {', '.join(TOKENIZER_FILES)}, or one SentencePiece "
            f".model file"
        )
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise FileNotFoundError(
            f"no tokenizer at {name!r}: expected a directory, a SentencePiece .model file, a hub name such as "
            f"'Qwen/Qwen2.5-0.5B', or 'bytes'"
        )
    try:
        return HuggingFaceTokenizer(_auto_tokenizer(name), stop_ids=_generation_stops(name))
    except OSError as error:
        raise FileNotFoundError(
            f"no tokenizer at {name!r}: it is not a directory here, and the Hugging Face hub answers: {error}"
        ) from error


class ByteTokenizer:
    """UTF-8 bytes as tokens: ids 0 to 255, 256 ends a completion, 257 fills arrays. Needs no files."""

    vocab_size = 258
    stop_ids = (256,)
    pad_id = 257

    def encode(self, text: str) -> Int[ndarray, " P"]:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def encode_prompt(self, prompt: str | Sequence[Message]) -> Int[ndarray, " P"]:
        if not isinstance(prompt, str):
            raise ValueError(no_template("the byte tokenizer"))
        return self.encode(prompt)

    def decode(self, ids: Sequence[int] | Int[ndarray, " T"]) -> str:
        ids = np.asarray(ids, np.int64)
        return ids[(ids >= 0) & (ids < 256)].astype(np.uint8).tobytes().decode(errors="replace")

    def save(self, path: str | PathLike) -> None:
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

        vocab = {character: byte for byte, character in enumerate(_byte_characters())}
        backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        stop, pad = "<|endoftext|>", "<|padding|>"
        backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in (stop, pad)])
        save_backend(backend, path, stop_ids=self.stop_ids, eos_token=stop, pad_token=pad)


class HuggingFaceTokenizer:
    """A tokenizer of transformers.

    Its stop ids are the end-of-sequence token, those of the model's generation_config.json (`stop_ids`), and the token
    with which the chat template closes the assistant's turn.
    Raises: ValueError if there is none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, stop_ids: Sequence[int] = ()):
        self.tokenizer = tokenizer
        self.vocab_size = max(tokenizer.get_vocab().values()) + 1
        own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.stop_ids = tuple(dict.fromkeys([*own, *map(int, stop_ids), *self._turn_ends()]))
        if not self.stop_ids:
            raise ValueError(
                f"no token of tokenizer {tokenizer.name_or_path!r} ends a completion: set eos_token in its "
                f"tokenizer_config.json or eos_token_id in generation_config.json"
            )
        pad = tokenizer.pad_token_id
        self.pad_id = self.stop_ids[0] if pad is None else int(pad)
        bos = tokenizer.bos_token_id
        self._bos = (
            bos if bos is not None and tokenizer("a", add_special_tokens=True)["input_ids"][:1] == [bos] else None
        )
        marked = (token for token, added in tokenizer.added_tokens_decoder.items() if added.special)
        self._silent = {*self.stop_ids, self.pad_id, *tokenizer.all_special_ids, *marked}

    def encode(self, text: str) -> Int[ndarray, " P"]:
        return np.asarray(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], np.int32)

    def encode_prompt(self, prompt: str | Sequence[Message]) -> Int[ndarray, " P"]:
        if not isinstance(prompt, str):  # the template writes BOS itself where the model wants one
            return self.encode(self._render(prompt))
        return with_bos(self.encode(prompt), self._bos)

    def decode(self, ids: Sequence[int] | Int[ndarray, " T"]) -> str:
        kept = [i for i in np.asarray(ids, np.int64).tolist() if 0 <= i < self.vocab_size and i not in self._silent]
        return str(self.tokenizer.decode(kept, clean_up_tokenization_spaces=False))

    def save(self, path: str | PathLike) -> None:
        self.tokenizer.save_pretrained(str(path))
        write_stop_ids(path, self.stop_ids)

    def _render(self, messages: Sequence[Message]) -> str:
        if self.tokenizer.chat_template is None:
            raise ValueError(no_template(f"tokenizer {self.tokenizer.name_or_path!r}"))
        prefilled = messages[-1]["role"] == "assistant"
        name = self.tokenizer.name_or_path
        try:
            text = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=not prefilled,
                continue_final_message=prefilled,
            )
            return str(text)
        except Exception as error:  # a template is a program: it raises whatever it likes
            roles = [message["role"] for message in messages]
            raise ValueError(
                f"the chat template of tokenizer {name!r} refuses a chat with roles {roles}: {error}"
            ) from error

    def _turn_ends(self) -> list[int]:
        """The added token that the template puts right behind an assistant's answer."""
        if self.tokenizer.chat_template is None:
            return []
        answer = "the-answer"
        try:
            text = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}], tokenize=False
            )
        except ImportError:
            raise
        except Exception:  # a template for other roles: the stop ids of the files have to do
            return []
        tail = self.encode(str(text).rpartition(answer)[2]).tolist()[:1]
        return [token for token in tail if token in self.tokenizer.added_tokens_decoder]


def with_bos(ids: Int[ndarray, " P"], bos: int | None) -> Int[ndarray, " Q"]:
    """The same ids behind one BOS, where the tokenizer has one."""
    return ids if bos is None or (len(ids) and ids[0] == bos) else np.insert(ids, 0, bos)


def no_template(which: str) -> str:
    return (
        f"the prompts are chats (lists of messages) but {which} has no chat template: give prompts as text, or load a "
        f"tokenizer whose files hold a chat_template"
    )


def save_backend(backend, path: str | PathLike, *, stop_ids: Sequence[int], **special_tokens: str) -> None:
    """Write a tokenizer of the `tokenizers` library as a directory for AutoTokenizer."""
    PreTrainedTokenizerFast = _transformers().PreTrainedTokenizerFast
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special_tokens)
    fast.save_pretrained(str(path))
    write_stop_ids(path, stop_ids)


def write_stop_ids(path: str | PathLike, stop_ids: Sequence[int]) -> None:
    """Set `eos_token_id` in the directory's generation_config.json and leave its other settings as they are."""
    file = Path(path) / "generation_config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    file.write_text(json.dumps({**settings, "eos_token_id": list(stop_ids)}, indent=2) + "\n", encoding="utf-8")


def _transformers():
    if "transformers" not in sys.modules:  # tokenizers need no PyTorch, so its absence is no news
        logging.getLogger("transformers").addFilter(lambda record: "PyTorch was not found" not in record.getMessage())
    import transformers

    return transformers


def _auto_tokenizer(path: str) -> PreTrainedTokenizerBase:
    return _transformers().AutoTokenizer.from_pretrained(path)


def _generation_stops(path: str) -> list[int]:
    try:
        stops = _transformers().GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:  # not every model has the file
        return []
    return stops if isinstance(stops, list) else [] if stops is None else [stops]


def _sentencepiece(file: Path) -> Tokenizer:
    from grpo_jax.data.sentencepiece_model import SentencePieceTokenizer

    return SentencePieceTokenizer(file)


def _byte_characters() -> list[str]:
    """The printable character by which byte-level vocabularies write each byte: itself, or 256 upwards in order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in set(printable)]
    return [chr(byte) if byte in set(printable) else chr(256 + hidden.index(byte)) for byte in range(256)]
