"""Pools: what they read, what they refuse, and that their order is exact, complete and resumable."""

import json
import sys
import timeit
import types
from collections import Counter

import numpy as np
import pytest
from chat_templates import CHATML

from grpo_jax.data import ByteTokenizer, Pool, load_tokenizer
from grpo_jax.types import Prompt

BYTES = ByteTokenizer()
ROWS = [
    {"prompt": f"{i}+1=", "answer": str(i + 1), "level": i % 3, "tags": ["a", str(i)], "weight": i / 2}
    for i in range(23)
]


def pool(rows=ROWS, **options):
    return Pool.open(rows, tokenizer=options.pop("tokenizer", BYTES), **options)


def ids(prompts):
    return [prompt.id for prompt in prompts]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_parquet(path, rows):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=5)
    return path


# ------------------------------------------------------------------------------------------------------------- order


def test_every_epoch_has_every_prompt_once_in_an_order_of_its_own():
    opened = pool(seed=3)
    epochs = [ids(opened.take(23)) for _ in range(4)]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4 and list(range(23)) not in epochs
    assert ids(pool(seed=3).take(92)) == sum(epochs, [])  # in one go, over the borders of epochs
    assert ids(pool(seed=4).take(23)) not in epochs
    assert [len(pool().take(n)) for n in (0, 1, 100)] == [0, 1, 100]


def test_the_order_is_the_documented_function_of_seed_and_epoch():
    # Frozen: a change here would make runs go on with other prompts than they were stopped at.
    assert ids(pool(ROWS[:7], seed=5).take(14)) == [4, 3, 5, 6, 2, 0, 1, 6, 1, 5, 4, 2, 0, 3]


def test_shuffles_are_uniform():
    first = Counter(ids(pool(ROWS[:5], seed=seed).take(1))[0] for seed in range(500))
    places = Counter(ids(pool(ROWS[:5]).take(2500))[4::5])
    from scipy.stats import chisquare

    assert len(first) == len(places) == 5
    assert min(chisquare(list(first.values())).pvalue, chisquare(list(places.values())).pvalue) > 1e-3


def test_without_shuffling_the_rows_come_in_order():
    assert ids(pool(shuffle=False).take(50)) == [*range(23), *range(23), *range(4)]


def test_epoch_is_that_of_the_next_prompt():
    opened = pool()
    seen = []
    for _ in range(6):
        seen.append(opened.epoch)
        opened.take(9)
    assert seen == [0, 0, 0, 1, 1, 1]  # 0, 9, 18 of 23, then 27, 36, 45
    assert opened.epoch == 2


def test_restored_pool_goes_on_exactly():
    opened = pool(seed=1)
    opened.take(17)
    state = json.loads(json.dumps(opened.state()))
    rest = ids(opened.take(60))
    again = pool(seed=1)
    again.take(5)
    again.restore(state)
    assert again.epoch == 0 and ids(again.take(60)) == rest
    again.restore(state)
    assert ids(again.take(30)) + ids(again.take(30)) == rest


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"seed": 2}, "seed=1, this one has seed=2"),
        ({"shuffle": False}, "shuffle=True"),
        ({"rows": ROWS[1:]}, "prompts=23, this one has prompts=22"),
        ({"rows": [*ROWS[1:], ROWS[0]]}, "fingerprint"),
    ],
)
def test_a_position_in_another_order_is_refused(change, what):
    with pytest.raises(ValueError, match=what):
        pool(**{"seed": 1, **change}).restore(pool(seed=1).state())


def test_shards_deal_the_order_out():
    whole = ids(pool(seed=2).take(60))
    parts = [pool(seed=2).shard(index, 3) for index in range(3)]
    drawn = [ids(part.take(13)) + ids(part.take(7)) for part in parts]
    for index in range(3):
        assert drawn[index] == whole[index::3]
    assert parts[0].state() == parts[1].state() == parts[2].state()
    assert parts[0].epoch == 60 // 23
    # Five hosts take over from three, and a shard of a shard is a shard.
    fives = [pool(seed=2).shard(index, 5) for index in range(5)]
    for five in fives:
        five.restore(parts[0].state())
    assert [p.id for turn in zip(*(five.take(4) for five in fives)) for p in turn] == ids(pool(seed=2).take(80))[60:]
    assert ids(pool(seed=2).shard(1, 2).shard(1, 3).take(10)) == whole[3::6]
    started = pool(seed=2)
    started.take(11)
    assert ids(started.shard(1, 3).take(10)) == whole[12::3][:10]
    with pytest.raises(ValueError, match="expected a shard 0 to 2 of 3, got 3"):
        pool().shard(3, 3)


def test_take_is_fast():
    big = pool([{"prompt": f"{i}="} for i in range(20_000)])
    small = pool(ROWS)
    for opened in (big, small):
        opened.take(64)
        assert min(timeit.repeat(lambda o=opened: o.take(64), number=10, repeat=5)) / 10 < 1e-3


# ------------------------------------------------------------------------------------------------- prompts and columns


def test_columns_travel_untouched():
    opened = pool()
    assert opened[4] == Prompt(4, "4+1=", {"answer": "5", "level": 1, "tags": ["a", "4"], "weight": 2.0})
    assert opened[np.int32(4)] is opened[4] and list(opened)[4] is opened[4]
    assert (len(opened), opened.rows, opened.too_long) == (23, 23, 0)
    with pytest.raises(IndexError, match="no prompt 23: .* 0 to 22"):
        opened[23]
    with pytest.raises(IndexError):
        opened[-1]


def test_a_column_that_a_row_lacks_is_none():
    assert [p.columns for p in pool([{"prompt": "a", "x": 1}, {"prompt": "b", "y": 2}])] == [
        {"x": 1, "y": None},
        {"x": None, "y": 2},
    ]


def test_too_long_prompts_are_left_out_and_counted_and_the_other_ids_stay():
    opened = pool(max_prompt=4)  # "9+1=" fits, "10+1=" does not
    assert (len(opened), opened.too_long, opened.rows) == (10, 13, 23)
    assert sorted(ids(opened.take(10))) == list(range(10)) and "13 too long" in repr(opened)
    tail = pool(ROWS[::-1], max_prompt=4)
    assert sorted(ids(tail.take(10))) == list(range(13, 23)) and tail[22].text == "0+1="
    with pytest.raises(KeyError, match="prompt 10 was left out: it has 5 tokens and max_prompt is 4"):
        opened[10]
    with pytest.raises(ValueError, match="all 23 prompts of the given source are longer than max_prompt=3"):
        pool(max_prompt=3)


def test_tokens_are_kept_unless_the_text_is_another():
    calls = []

    class Counting(ByteTokenizer):
        def encode_prompt(self, prompt):
            calls.append(prompt)
            return super().encode_prompt(prompt)

    opened = pool(tokenizer=Counting())
    calls.clear()
    first, again = opened.tokens(opened[3]), opened.tokens(opened[3])
    assert first is again and calls == ["3+1="] and first.tolist() == list(b"3+1=")
    with pytest.raises(ValueError, match="read-only"):
        first[0] = 0
    assert opened.tokens(opened[3]._replace(text="hint 3+1=")).tolist() == list(b"hint 3+1=")
    assert opened.tokens(Prompt(-1, "new")).tolist() == list(b"new")
    assert opened.tokens(opened[3]) is first


def test_chats_go_through_the_template(build):
    tokenizer = load_tokenizer(build(template=CHATML))
    chat = [{"role": "user", "content": "What is 2+3?"}]
    opened = pool([{"prompt": chat, "answer": "5"}, {"prompt": "plain"}], tokenizer=tokenizer, shuffle=False)
    assert opened[0].text == chat and opened[1].text == "plain"
    decoded = tokenizer.tokenizer.decode(opened.tokens(opened[0]))
    assert decoded == "<|im_start|>user\nWhat is 2+3?<|im_end|>\n<|im_start|>assistant\n"
    with pytest.raises(ValueError, match="chats .* no chat template"):
        pool([{"prompt": "plain"}, {"prompt": chat}])


def test_templates_make_prompts_of_columns():
    rows = [{"question": "2+3", "answer": "5", "Topic name": "sums"}]
    opened = pool(rows, template="{Topic name}: {question}? In \\boxed{{}}.")
    assert opened[0] == Prompt(0, "sums: 2+3? In \\boxed{}.", rows[0])

    class Chats(ByteTokenizer):
        def encode_prompt(self, prompt):
            return self.encode(str(prompt))

    template = [{"role": "system", "content": "Add."}, {"role": "user", "content": "{question}"}]
    chat = pool(rows, template=template, tokenizer=Chats())[0].text
    assert chat == [{"role": "system", "content": "Add."}, {"role": "user", "content": "2+3"}]


# ------------------------------------------------------------------------------------------------------------ sources


def test_files_in_the_order_of_their_names_count_rows_on(tmp_path):
    last = write_jsonl(tmp_path / "b.jsonl", ROWS[12:])
    first = write_parquet(tmp_path / "a.parquet", ROWS[:12])
    for source in ([last, first], tmp_path, [str(last), str(first)]):
        assert list(pool(source)) == list(pool())
    (tmp_path / "c.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "x\\u2028"}\r\n\n  \n{"prompt": "\xe2\x80\xa8y"}')
    assert [(p.id, p.text) for p in pool(tmp_path / "c.jsonl")] == [(0, "x\u2028"), (1, "\u2028y")]


def test_parquet_keeps_chats(tmp_path):
    chat = [{"role": "user", "content": "two"}, {"role": "assistant", "content": "three"}]
    rows = [{"q": chat}]

    class Chats(ByteTokenizer):
        def encode_prompt(self, prompt):
            return self.encode(str(prompt))

    opened = pool(write_parquet(tmp_path / "chats.parquet", rows), prompt_column="q", tokenizer=Chats())
    assert opened[0].text == chat


def test_splits_of_a_directory(tmp_path):
    write_parquet(tmp_path / "train-00000-of-00002.parquet", ROWS[:5])
    write_parquet(tmp_path / "train-00001-of-00002.parquet", ROWS[5:9])
    write_parquet(tmp_path / "test-00000-of-00001.parquet", ROWS[9:12])
    assert list(pool(tmp_path, split="train")) == list(pool(ROWS[:9]))
    assert len(pool(tmp_path, split="test")) == 3
    with pytest.raises(ValueError, match=r"several splits, \['test', 'train'\]: choose one with split="):
        pool(tmp_path)
    with pytest.raises(ValueError, match="no file of split 'dev'"):
        pool(tmp_path, split="dev")


def test_a_grain_pipeline_is_a_source():
    from grain import MapDataset

    assert list(pool(MapDataset.source(ROWS))) == list(pool())
    assert len(pool(MapDataset.source(ROWS).map(lambda row: {**row, "extra": 1})[3:9])) == 6
    with pytest.raises(ValueError, match="endless"):
        pool(MapDataset.source(ROWS).repeat())


@pytest.fixture
def library(monkeypatch):
    """A stand-in for `datasets` that knows one dataset on the hub, in two splits."""
    module = types.ModuleType("datasets")
    asked = []

    def load_dataset(*name, split=None):
        asked.append((name, split))
        if name[0] != "owner/sums":
            raise FileNotFoundError("no such dataset")
        splits = {"train": ROWS[:5], "test": ROWS[5:]}
        return splits if split is None else splits[split]

    module.load_dataset, module.asked = load_dataset, asked
    module.load_from_disk = lambda path: {"train": ROWS[:5]}
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


def test_hub_datasets(library, tmp_path):
    assert list(pool("owner/sums", split="train")) == list(pool(ROWS[:5]))
    assert len(pool("owner/sums:main", split="test")) == 18
    assert library.asked == [(("owner/sums",), "train"), (("owner/sums", "main"), "test")]
    with pytest.raises(ValueError, match=r"'owner/sums' has the splits \['train', 'test'\]"):
        pool("owner/sums")
    with pytest.raises(ValueError, match="'owner/none' is not a file or directory here, .*: no such dataset"):
        pool("owner/none")
    (tmp_path / "dataset_dict.json").write_text("{}")
    assert len(pool(tmp_path)) == 5
    with pytest.raises(ValueError, match=r"no split 'test'; it has \['train'\]"):
        pool(tmp_path, split="test")


def test_datasets_library_itself(tmp_path):
    datasets = pytest.importorskip("datasets")
    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": saved, "test": saved.select([0])}).save_to_disk(str(tmp_path / "two"))
    sources = [pool(saved), pool(tmp_path / "one"), pool(tmp_path / "two", split="train")]
    assert all(list(opened) == list(pool()) for opened in sources)
    assert len(pool(tmp_path / "two", split="test")) == 1


def test_without_the_library_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"'owner/sums' is not a .jsonl .* pip install 'grpo_jax\[datasets\]'"):
        pool("owner/sums")


# ------------------------------------------------------------------------------------------------------------ bad rows


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b'{"prompt": "a",}', "is not JSON (Expecting property name"),
        (b'["a"]', "is not a table row: expected column names with values, got list"),
        (b'{"question": "a", "answer": 1}', "no column 'prompt'; it has ['question', 'answer'] (see prompt_column"),
        (b'{"prompt": null}', "column 'prompt' is null"),
        (b'{"prompt": 5}', "the prompt is neither text nor a list of messages but int"),
        (b'{"prompt": ""}', "the prompt is empty"),
        (b'{"prompt": []}', "the prompt is a list without messages"),
        (b'{"prompt": ["a"]}', "message 0 of the prompt is not a dict with 'role' and 'content' but str"),
        (b'{"prompt": [{"role": "user", "content": 5}]}', "message 0 of the prompt has no text under 'content'"),
        (b'{"prompt": "\xff"}', "is not UTF-8 (byte 13)"),
        (b'{"prompt": "\\ud83d"}', "the prompt has half of a surrogate pair"),
    ],
)
def test_a_bad_row_is_reported_with_file_and_line(tmp_path, line, what):
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(b'{"prompt": "fine"}\n\n' + line + b'\n{"prompt": "fine"}\n')
    with pytest.raises(ValueError) as error:
        pool(file)
    assert f"{file}, line 3: {what}" in str(error.value) and "1 row is bad" in str(error.value)


def test_many_bad_rows_are_listed_together(tmp_path):
    file = write_parquet(tmp_path / "p.parquet", [{"prompt": "x" * (i % 2)} for i in range(20)])
    with pytest.raises(ValueError) as error:
        pool(file)
    text = str(error.value)
    assert text.startswith("10 rows are bad:") and f"{file}, row 8: the prompt is empty" in text
    assert "row 10:" not in text and text.endswith("and 5 more")
    with pytest.raises(ValueError, match=r"prompts\[1\]: no column 'prompt'"):
        pool([{"prompt": "a"}, {"text": "b"}])


def test_sources_that_are_none(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "notes.txt").write_text("a")
    (tmp_path / "broken.parquet").write_text("a")
    for source, kind, what in [
        (tmp_path / "absent.jsonl", FileNotFoundError, "no such file or directory: '.*absent.jsonl'"),
        ("./absent", FileNotFoundError, "no such file or directory: './absent'"),
        ([tmp_path / "absent.jsonl"], FileNotFoundError, "no such file: .*a list of dicts"),
        (["What is 1+1?"], FileNotFoundError, "no such file: 'What is 1.1.'.*a list of dicts"),
        (tmp_path / "notes.txt", ValueError, "notes.txt': expected a file that ends in .jsonl or .parquet"),
        (tmp_path / "broken.parquet", ValueError, "cannot read .*broken.parquet' as Parquet"),
        (tmp_path / "empty.jsonl", ValueError, "there are no rows in .*empty.jsonl"),
        ([], ValueError, "there are no rows in the given source"),
        (7, ValueError, "a list of dicts, got int"),
        ({"prompt": ["a"]}, ValueError, "a list of dicts, got dict"),
    ]:
        with pytest.raises(kind, match=what):
            pool(source)
    (tmp_path / "inner").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no .jsonl or .parquet file"):
        pool(tmp_path / "inner")
    with pytest.raises(ValueError, match="split='train' chooses among files"):
        pool(ROWS, split="train")


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"template": "Q: {question}"}, r"prompts\[0\]: no column 'question' of the template; it has \['prompt', "),
        ({"template": "\\boxed{}"}, "is not a column .a literal brace is written"),
        ({"template": "{prompt} \\boxed{"}, "a literal brace is written"),
        ({"template": "{prompt.text}"}, "{prompt.text} is not a column"),
        ({"template": "no column"}, "names no column"),
        ({"template": [{"role": "user"}]}, "expected a template of text, or of messages"),
        ({"seed": -1}, "seed must be a whole number from 0, got -1"),
        ({"max_prompt": 0}, "max_prompt is a number of tokens from 1"),
    ],
)
def test_bad_options(options, what):
    with pytest.raises(ValueError, match=what):
        pool(**options)


def test_negative_takes_are_refused():
    with pytest.raises(ValueError, match="cannot take -1 prompts"):
        pool().take(-1)
