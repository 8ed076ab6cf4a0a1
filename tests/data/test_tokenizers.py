"""Tokenizers against transformers itself, UTF-8, and chats written out by hand."""

import json
import subprocess
import sys

import numpy as np
import pytest
from chat_templates import CHATML, TURNS

from grpo_jax.data import ByteTokenizer, HuggingFaceTokenizer, Tokenizer, load_tokenizer

TEXTS = [
    "",
    "23+45=",
    "naïve café\n\t ",
    "数学 🙂 \u2028",
    " leading and  double ",
    "\x00\x7f\x80ÿ",
    "".join(map(chr, range(1, 0x250))),
]
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2+3?"}]


def auto(path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


# ------------------------------------------------------------------------------------------------------------- bytes


def test_bytes_are_the_utf8_of_every_text():
    tokenizer = load_tokenizer("bytes")
    assert isinstance(tokenizer, Tokenizer) and isinstance(tokenizer, ByteTokenizer)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32 and bytes(ids.tolist()) == text.encode()
        assert tokenizer.decode(ids) == text
        assert np.array_equal(tokenizer.encode_prompt(text), ids)
    assert len({*tokenizer.stop_ids, tokenizer.pad_id}) == 2
    assert all(256 <= i < tokenizer.vocab_size for i in (*tokenizer.stop_ids, tokenizer.pad_id))


def test_bytes_decode_leaves_out_stop_and_padding_and_survives_half_a_character():
    assert ByteTokenizer().decode([54, 56, 256, 257, 257]) == "68"
    assert ByteTokenizer().decode(list("é".encode()[:1])) == "\ufffd"


def test_saved_bytes_are_the_same_tokenizer_for_transformers(tmp_path):
    tokenizer = ByteTokenizer()
    tokenizer.save(tmp_path)
    theirs, again = auto(tmp_path), load_tokenizer(tmp_path)
    for text in TEXTS:
        assert theirs(text)["input_ids"] == tokenizer.encode(text).tolist()
        assert theirs.decode(tokenizer.encode(text), clean_up_tokenization_spaces=False) == text
        assert again.decode(again.encode(text)) == text
    assert (theirs.eos_token_id, theirs.pad_token_id, len(theirs)) == (*tokenizer.stop_ids, tokenizer.pad_id, 258)
    assert (again.stop_ids, again.pad_id, again.vocab_size) == (tokenizer.stop_ids, tokenizer.pad_id, 258)
    # The one byte string that no text has: each of the 256 ids is its own byte in the saved vocabulary too.
    assert theirs.decode(list(range(256))) == tokenizer.decode(range(256))


def test_bytes_have_no_chat_template():
    with pytest.raises(ValueError, match="chats.*byte tokenizer has no chat template"):
        ByteTokenizer().encode_prompt(CHAT)


# ------------------------------------------------------------------------------------------------------ Hugging Face


def test_chat_becomes_the_template_up_to_where_the_answer_starts(build):
    tokenizer = load_tokenizer(build(template=CHATML))
    written = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is 2+3?<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer.encode_prompt(CHAT)
    assert ids.dtype == np.int32
    assert tokenizer.tokenizer.decode(ids, clean_up_tokenization_spaces=False) == written
    theirs = tokenizer.tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    assert ids.tolist() == theirs


def test_a_chat_that_ends_with_the_assistant_is_continued(build):
    tokenizer = load_tokenizer(build(template=CHATML))
    chat = [*CHAT, {"role": "assistant", "content": "The answer"}]
    text = tokenizer.tokenizer.decode(tokenizer.encode_prompt(chat), clean_up_tokenization_spaces=False)
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\nThe answer")


@pytest.mark.parametrize("prompt", ["What is 2+3?", "<bos>What is 2+3?", CHAT[1:], ""])
def test_bos_comes_exactly_once(build, prompt):
    tokenizer = load_tokenizer(build(template=TURNS, bos=True))
    bos = tokenizer.tokenizer.bos_token_id
    ids = tokenizer.encode_prompt(prompt)
    assert ids[0] == bos and (ids == bos).sum() == 1 and ids.dtype == np.int32
    assert bos not in tokenizer.encode("What is 2+3?")


def test_no_bos_where_the_tokenizer_adds_none(build):
    tokenizer = load_tokenizer(build())
    assert np.array_equal(tokenizer.encode_prompt("two"), tokenizer.encode("two"))


def test_stop_ids_join_eos_the_template_and_the_generation_config(build):
    def stops(**options):
        tokenizer = load_tokenizer(build(**options))
        return tokenizer.tokenizer.convert_ids_to_tokens(list(tokenizer.stop_ids))

    assert stops() == ["<|endoftext|>"]
    assert stops(template=CHATML) == ["<|endoftext|>", "<|im_end|>"]
    assert stops(template=TURNS, bos=True) == ["<|endoftext|>", "<end_of_turn>"]
    assert stops(generation={"eos_token_id": [0, 5]}) == ["<|endoftext|>", "<end_of_turn>"]
    assert stops(generation={"eos_token_id": 3}, eos=False) == ["<|im_end|>"]


def test_a_template_that_only_adds_text_behind_an_answer_adds_no_stop(build):
    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    assert load_tokenizer(build(template=plain)).stop_ids == (0,)


def test_decode_leaves_out_what_is_not_text(build):
    tokenizer = load_tokenizer(build(template=CHATML, generation={"eos_token_id": [0, 5]}))
    text = " The answer , is\n five ."  # spaces before punctuation must survive
    ids = tokenizer.encode(text).tolist()
    assert tokenizer.decode([2, *ids, 3, 0, 5, tokenizer.pad_id, -1, tokenizer.vocab_size + 7]) == text
    assert tokenizer.decode(np.asarray(ids)) == text
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_saved_tokenizer_comes_back_with_template_and_stops(build, tmp_path):
    tokenizer = load_tokenizer(build(template=TURNS, bos=True, generation={"eos_token_id": [0, 3], "top_k": 7}))
    (tmp_path / "generation_config.json").write_text('{"top_k": 7}')
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.stop_ids == tokenizer.stop_ids == (0, 3, 5)
    assert np.array_equal(again.encode_prompt(CHAT), tokenizer.encode_prompt(CHAT))
    assert json.loads((tmp_path / "generation_config.json").read_text())["top_k"] == 7
    assert auto(tmp_path).eos_token == "<|endoftext|>"


def test_a_padding_token_of_its_own_is_kept(build):
    theirs = auto(build())
    assert HuggingFaceTokenizer(theirs).pad_id == 0
    theirs.pad_token = "<bos>"
    assert HuggingFaceTokenizer(theirs).pad_id == 1


# ------------------------------------------------------------------------------------------------------------ errors


def test_errors_say_what_is_missing(build, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="chats.*no chat template.*give prompts as text"):
        load_tokenizer(build()).encode_prompt(CHAT)
    with pytest.raises(ValueError, match="ends a completion: set eos_token"):
        load_tokenizer(build(eos=False))
    with pytest.raises(FileNotFoundError, match="no tokenizer in directory .*tokenizer.json"):
        load_tokenizer(tmp_path)
    for path in ("./nowhere", "/no/where", str(tmp_path / "nowhere"), "a/b/c"):
        with pytest.raises(FileNotFoundError, match="no tokenizer at .*hub name"):
            load_tokenizer(path)
    refuses = load_tokenizer(build(template="{{ raise_exception('no system role') }}"))
    with pytest.raises(ValueError, match=r"refuses a chat with roles \['system', 'user'\]: no system role"):
        refuses.encode_prompt(CHAT)


def test_a_name_the_hub_does_not_have(monkeypatch):
    from transformers import AutoTokenizer

    def absent(name):
        raise OSError("it has no such model")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", absent)
    with pytest.raises(FileNotFoundError, match="'owner/model'.*hub answers: it has no such model"):
        load_tokenizer("owner/model")


def test_importing_is_light_and_bytes_need_no_transformers():
    script = (
        "import sys, grpo_jax.data as d; t = d.ByteTokenizer(); t.decode(t.encode('68'));"
        "d.Pool.open([{'prompt': 'a'}], tokenizer=t).take(1);"
        "print([m for m in ('transformers', 'sentencepiece', 'datasets', 'pyarrow', 'torch') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"
