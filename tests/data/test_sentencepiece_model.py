"""SentencePiece models trained on the spot, against the sentencepiece library and, once saved, transformers."""

import io
import random

import numpy as np
import pytest

from grpo_jax.data import load_tokenizer

TEXT = "the a number sum of two and three is equal to what plus minus answer question how many apples does Ann have"


def train(path, **options):
    import sentencepiece

    rng = random.Random(0)
    texts = [
        " ".join(rng.choices(TEXT.split(), k=8)) + f" {rng.randint(0, 99)}+{rng.randint(0, 99)}=" for _ in range(300)
    ]
    model = io.BytesIO()
    options = {"vocab_size": 110, "hard_vocab_limit": False, "minloglevel": 2, **options}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=model, **options)
    path.write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "bpe", "byte_fallback": True, "vocab_size": 370, "normalization_rule_name": "identity"},
        {"model_type": "unigram", "user_defined_symbols": ["<end_of_turn>", "12+3"], "pad_id": 3},
        {"model_type": "bpe", "user_defined_symbols": ["<end_of_turn>"], "remove_extra_whitespaces": False},
        {"model_type": "unigram", "add_dummy_prefix": False, "byte_fallback": True, "vocab_size": 330, "bos_id": -1},
    ],
    ids=lambda options: "-".join(map(str, options)),
)
def test_model_file_and_its_saved_form_agree_with_sentencepiece(tmp_path, options):
    theirs = train(tmp_path / "pieces.model", **options)
    ours = load_tokenizer(tmp_path / "pieces.model")
    ours.save(tmp_path / "saved")
    saved = load_tokenizer(tmp_path / "saved")
    turn = [theirs.piece_to_id("<end_of_turn>")] if "user_defined_symbols" in options else []
    assert ours.stop_ids == saved.stop_ids == (theirs.eos_id(), *turn)
    assert ours.vocab_size == saved.vocab_size == theirs.vocab_size()
    assert ours.pad_id == saved.pad_id == (3 if "pad_id" in options else theirs.eos_id())
    bos = [theirs.bos_id()] if theirs.bos_id() >= 0 else []
    for text in ["the sum of 12+34=", "How many  apples?", " two", "two\n", "naïve 数学", "what<end_of_turn>two"]:
        ids = theirs.encode(text)
        assert ours.encode(text).tolist() == saved.encode(text).tolist() == ids, text
        assert ours.encode_prompt(text).tolist() == saved.encode_prompt(text).tolist() == [*bos, *ids]
        assert ours.encode(text).dtype == np.int32
        content = [i for i in ids if i not in turn and i != theirs.unk_id()]
        assert ours.decode([*bos, *content, theirs.eos_id(), 10**6, -1]) == theirs.decode(content)
        assert saved.decode([*bos, *content, theirs.eos_id(), 10**6, -1]) == theirs.decode(content)


def test_a_directory_with_nothing_but_the_model_is_enough(tmp_path):
    theirs = train(tmp_path / "tokenizer.model")
    assert load_tokenizer(tmp_path).encode("two and three").tolist() == theirs.encode("two and three")


def test_saving_refuses_files_that_would_tokenize_differently(tmp_path):
    # A line break that is a piece, under rules that make it a space: transformers has no way to say that.
    train(tmp_path / "pieces.model", user_defined_symbols=["\n"], normalization_rule_name="nmt_nfkc")
    with pytest.raises(ValueError, match="pieces.model' does not survive conversion"):
        load_tokenizer(tmp_path / "pieces.model").save(tmp_path / "saved")


def test_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="no SentencePiece model at"):
        load_tokenizer(tmp_path / "absent.model")
    (tmp_path / "broken.model").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="broken.model' is not a SentencePiece model"):
        load_tokenizer(tmp_path / "broken.model")
    train(tmp_path / "endless.model", eos_id=-1)
    with pytest.raises(ValueError, match="no piece that ends a text"):
        load_tokenizer(tmp_path / "endless.model")
    train(tmp_path / "pieces.model")
    with pytest.raises(ValueError, match="chats.*no chat template"):
        load_tokenizer(tmp_path / "pieces.model").encode_prompt([{"role": "user", "content": "two"}])
