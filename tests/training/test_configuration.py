"""Configuration: files, overrides, errors in the user's words, the round trip, and the description of every key."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from grpo_jax.training.configuration import ConfigurationError, describe, load_config, parse, to_yaml
from grpo_jax.training.sections import OPTIMIZER_KEYS, Config, OptimizerSection

SMALLEST = {"steps": 10, "model": {"path": "tiny"}, "data": {"source": "addition"}}

FILE = """\
name: first
steps: 100
seed: 3
model:
  path: tiny
  tiny: {hidden: 32, heads: 2, kv_heads: 1}
data:
  source: [a.jsonl, b.jsonl]
  template: "{question}\\n"
rewards:
  - exact
  - {function: "rewards.py:short", weight: 0.5, name: short, target: 20}
method: grpo
optimizer:
  learning_rate: 1e-3
  schedule: cosine
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(FILE)
    return path


def error_of(path, *overrides, text=None):
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigurationError) as raised:
        load_config(path, overrides)
    return str(raised.value)


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def test_a_file_with_overrides(file):
    config = load_config(
        file,
        [
            "optimizer.learning_rate=5e-4",
            "optimizer.weight_decay=1",  # a whole number is a number
            "method.beta=0.04",  # the bare name takes options
            "rewards.0.weight=2.0",
            "rewards.1.target=30",
            "rewards.2=format",  # one past the end appends
            "warmup.steps=7",  # an optional section comes into being
            "warmup.optimizer.schedule=linear",
            'sampling.stop=["\\n", "###"]',
            "sampling.top_k=20",
            "data.template=null",
            "directory=/runs/{name}/x",
        ],
    )
    assert config.optimizer.learning_rate == 5e-4 and config.optimizer.schedule == "cosine"
    assert config.optimizer.weight_decay == 1.0
    assert (config.method.name, config.method.options) == ("grpo", {"beta": 0.04})
    assert [(r.function, r.weight, r.name, r.options) for r in config.rewards] == [
        ("exact", 2.0, None, {}),
        ("rewards.py:short", 0.5, "short", {"target": 30}),
        ("format", 1.0, None, {}),
    ]
    assert config.warmup.steps == 7 and config.warmup.source == "demonstrations"
    assert (config.warmup.optimizer.schedule, config.warmup.optimizer.learning_rate) == ("linear", 1e-5)
    assert config.sampling.stop == ("\n", "###") and config.sampling.top_k == 20
    assert config.data.source == ("a.jsonl", "b.jsonl") and config.data.template is None
    assert config.directory == "/runs/first/x"
    tiny = config.model.tiny
    assert (tiny.layers, tiny.hidden, tiny.heads, tiny.kv_heads, tiny.mlp) == (2, 32, 2, 1, 256)


def test_smallest_and_its_defaults():
    config = parse(SMALLEST)
    assert (config.directory, config.warmup, config.rewards, config.method.name) == ("runs/run", None, (), "grpo")
    assert (config.training.updates, config.sampling.temperature, config.mesh.data) == (1, 1.0, -1)
    with pytest.raises(ValidationError, match="frozen"):
        config.steps = 3


@pytest.mark.parametrize(
    "text, value",
    [
        ("1e-3", 1e-3), ("1E5", 1e5), ("-.5", -0.5), ("2.", 2.0), ("10", 10), ("-3", -3), ("0", 0), (".inf", math.inf),
        ("true", True), ("False", False), ("null", None), ("~", None), ("", None),
        ("yes", "yes"), ("on", "on"), ("No", "No"), ("1:30", "1:30"), ("2024-01-01", "2024-01-01"), ("1_000", "1_000"),
        ("1.2.3", "1.2.3"), ("e5", "e5"), ('"1e-3"', "1e-3"), ("[1, a, 1e3]", [1, "a", 1000.0]),
        ("{a: {b: 1}}", {"a": {"b": 1}}),
    ],
)  # fmt: skip
def test_scalars(file, text, value):
    found = load_config(file, [f"method.option={text}"]).method.options["option"]
    assert found == value and type(found) is type(value)


def test_a_resolved_configuration_reads_back_equal(file, tmp_path):
    config = load_config(
        file,
        [
            "warmup.steps=7",
            "method.odd={a: '1e-3', b: 'yes', c: 'null', d: .inf, e: '', f: 1e-9, g: [true, 'true', '~']}",
        ],
    )
    again = tmp_path / "config.yaml"
    again.write_text(to_yaml(config))
    assert load_config(again) == config
    assert load_config(again).method.options == config.method.options
    assert type(load_config(again).method.options["odd"]["a"]) is str
    assert list(yaml.safe_load(to_yaml(config))) == list(Config.model_fields)
    assert to_yaml(load_config(again)) == to_yaml(config)


# ---------------------------------------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize(
    "override, expected",
    [
        ("optimizer.learning_rat=1", "optimizer.learning_rat is not a key; did you mean optimizer.learning_rate?"),
        ("learning_rate=1", "learning_rate is not a key; did you mean optimizer.learning_rate?"),
        ("group_sise=4", "group_sise is not a key; did you mean batch.group_size?"),
        ("optimiser.name=adam", "optimiser is not a key; did you mean optimizer?"),
        ("batch.xyzzy=1", "batch.xyzzy is not a key; the keys of batch are prompts, group_size, tokens_per_device"),
        ("warmup.sorce=x", "warmup.sorce is not a key; did you mean warmup.source?"),
        ("model.tiny.layer=1", "model.tiny.layer is not a key; did you mean model.tiny.layers?"),
        ("steps=10.0", "steps is 10.0 (number); expected whole number at least 1"),
        ("steps=0", "steps is 0 (whole number); expected whole number at least 1"),
        ("steps=true", "steps is true (true or false); expected whole number at least 1"),
        ("optimizer.learning_rate=fast", 'optimizer.learning_rate is "fast" (text); expected number above 0'),
        ("optimizer.learning_rate=true", "expected number above 0"),
        ("optimizer.learning_rate=.inf", "optimizer.learning_rate is inf (number); expected number above 0"),
        ("optimizer.b1=1", "optimizer.b1 is 1 (whole number); expected number at least 0 and below 1, or null"),
        ("optimizer.name=adamW", 'optimizer.name is "adamW" (text); expected one of adamw, adam, sgd, lion, '),
        ("data.source=3", "data.source is 3 (whole number); expected text, or list of text"),
        ("data.source.1=3", "data.source.1 is 3 (whole number); expected text"),
        ("data.shuffle=yes", 'data.shuffle is "yes" (text); expected true or false'),
        ("mesh=5", "mesh is 5 (whole number); expected section"),
        ("evaluation.k=[1, a]", 'evaluation.k.1 is "a" (text); expected whole number at least 1'),
        ("rewards.1.weight=null", "rewards.1.weight is null; expected number"),
        ("rewards.2={weight: 2}", "rewards.2.function is missing"),
        ("sampling.top_p=0", "sampling.top_p is 0 (whole number); expected number above 0 and at most 1"),
        ("seed=-1", "expected whole number at least 0 and below 4294967296"),
    ],
)  # fmt: skip
def test_what_was_given_and_what_is_expected(file, override, expected):
    message = error_of(file, override)
    assert expected in message
    assert message.startswith(f"override {override!r}: ")


@pytest.mark.parametrize(
    "override, expected",
    [
        ("steps", "expected key.path=value"),
        ("=3", "expected key.path=value"),
        ("a..b=3", "expected key.path=value"),
        ("steps.x=3", "steps is 100 (whole number); there is no 'x' in it"),
        ("rewards.7.weight=3", "rewards is a list of 2; there is no '7' in it"),
        ("rewards.first.weight=3", "rewards is a list of 2; there is no 'first' in it"),
        ("steps=[1", "is not valid YAML"),
    ],
)
def test_overrides_that_cannot_be_applied(file, override, expected):
    message = error_of(file, override)
    assert expected in message and repr(override) in message


def test_errors_name_file_and_line_and_come_together(file):
    message = error_of(file, "training.updates=0", text=FILE + "  lr: 1\nsampling:\n  top_k: -1\nzebra: 1\n")
    assert message.splitlines()[0] == "4 errors:"
    assert f"{file}:17: optimizer.lr is not a key" in message
    assert f"{file}:19: sampling.top_k is -1 (whole number); expected whole number at least 0" in message
    assert f"{file}:20: zebra is not a key; the keys of a configuration are name, " in message
    assert "override 'training.updates=0': training.updates is 0" in message


def test_what_is_missing_is_named_with_its_meaning(file):
    message = error_of(file, text="model: {}\ndata:\n")
    assert f"{file}:1: model.path is missing: Hugging Face directory" in message
    assert f"{file}: steps is missing: training steps" in message
    assert f"{file}:2: data is null; expected section" in message


@pytest.mark.parametrize(
    "text, expected",
    [
        ("steps: 1\nsteps: 2\n", "run.yaml:2: steps is given twice"),
        ("model:\n  path: a\n  path: b\n", "run.yaml:3: model.path is given twice"),
        ("a: [1\n", "run.yaml is not valid YAML"),
        ("- a\n", "run.yaml must hold keys and values"),
        ("", "steps is missing"),
    ],
)
def test_files_that_are_no_configuration(file, text, expected):
    assert expected in error_of(file, text=text)


def test_a_file_that_is_not_there(file):
    message = error_of(file.with_name("runs.yaml"))
    assert "cannot read the configuration" in message and f"{file.parent} has run.yaml" in message


@pytest.mark.parametrize(
    "change, expected",
    [
        (
            {"batch": {"tokens_per_device": 700}, "sampling": {"max_new": 200}},
            "batch.tokens_per_device is 700, but one prompt and one completion may take 712 tokens",
        ),
        ({"sampling": {"min_new": 9, "max_new": 8}}, "sampling.min_new 9 is above sampling.max_new 8"),
        ({"training": {"updates": 5}, "batch": {"prompts": 4}}, "training.updates is 5, but a step has only 4 groups"),
        ({"optimizer": {"warmup_steps": 20}, "training": {"updates": 2}}, "but the run has only 20 updates"),
        ({"optimizer": {"warmup_steps": 30}, "training": {"passes": 3}}, "but the run has only 30 updates"),
        ({"optimizer": {"name": "adam", "weight_decay": 0.1}}, "adam does not read weight_decay"),
        ({"optimizer": {"name": "sgd", "b2": 0.9}}, "optimizer: sgd does not read b2"),
        ({"evaluation": {"samples": 4}}, "pass@8 needs at least 8 samples per prompt; got 4"),
        ({"mesh": {"fsdp": -1}}, "only one axis can take the rest"),
        ({"mesh": {"tensor": 0}}, "at least 1, or -1 for the rest of the devices; got tensor 0"),
        ({"model": {"path": "tiny", "tiny": {"heads": 6}}}, "model.tiny: hidden 64 is not a multiple of heads 6"),
        ({"model": {"path": "tiny", "tiny": {"kv_heads": 3}}}, "heads 4 is not a multiple of kv_heads 3"),
    ],
)
def test_keys_that_do_not_fit_together(change, expected):
    with pytest.raises(ConfigurationError) as raised:
        parse(SMALLEST | change)
    assert expected in str(raised.value)


def test_the_tightest_fits_are_accepted():
    tight = {
        "batch": {"tokens_per_device": 712, "prompts": 4},
        "sampling": {"max_new": 200, "min_new": 200},
        "training": {"updates": 4},
        "optimizer": {"warmup_steps": 39},
        "mesh": {"data": 2, "fsdp": -1},
    }
    parse(SMALLEST | tight)


# ---------------------------------------------------------------------------------------------------------------------
# Description


def test_a_base_with_another_file_on_top(tmp_path):
    (tmp_path / "low.yaml").write_text(
        "steps: 5\nname: low\nmodel: {path: tiny, tiny: {layers: 3, hidden: 32}}\n"
        "data: {source: addition, max_prompt: 9}\n"
        "method: {name: grpo, kl: 0.5}\nwarmup: {steps: 3, options: {noise: 0.1}}\nrewards: [exact, numeric]\n"
    )
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "middle.yaml").write_text("base: ../low.yaml\nname: middle\nmodel: {tiny: {hidden: 48}}\n")
    top = tmp_path / "top.yaml"
    top.write_text(
        "base: inner/middle.yaml\nmethod: {name: rloo}\nrewards: [exact]\nwarmup: {options: {clean: 0.2}}\n"
        "data: {source: [x.jsonl]}\n"
    )
    config = load_config(top, ["model.tiny.layers=4"])
    assert (config.name, config.steps, config.directory) == ("middle", 5, "runs/middle")
    assert (config.model.tiny.layers, config.model.tiny.hidden) == (4, 48)  # merged, key by key
    assert config.method.options == {} and config.method.name == "rloo"  # named anew: the options of the other are gone
    assert config.data.source == ("x.jsonl",) and config.data.max_prompt == 512
    assert config.warmup.options == {"noise": 0.1, "clean": 0.2} and len(config.rewards) == 1
    assert load_config(_written(tmp_path, to_yaml(config))) == config


def test_errors_of_a_base_name_its_file_and_line(tmp_path):
    low, top = tmp_path / "low.yaml", tmp_path / "top.yaml"
    low.write_text("steps: 5\nmodel: {path: tiny}\ndata: {source: addition}\nseeed: 1\n")
    top.write_text("base: low.yaml\nbatch: {promts: 3}\n")
    with pytest.raises(ConfigurationError) as error:
        load_config(top)
    assert f"{low}:4: seeed is not a key" in str(error.value) and f"{top}:2: batch.promts" in str(error.value)
    low.write_text("base: top.yaml\n")
    with pytest.raises(ConfigurationError, match=r"low.yaml:1: base top.yaml leads back to this file"):
        load_config(top)
    top.write_text("base: 3\n")
    with pytest.raises(ConfigurationError, match=r"top.yaml:1: base is 3 .*expected the path of another file"):
        load_config(top)
    top.write_text("base: nowhere.yaml\n")
    with pytest.raises(ConfigurationError, match="cannot read the configuration .*nowhere.yaml.* has low.yaml"):
        load_config(top)


def _written(folder, text):
    path = folder / "written.yaml"
    path.write_text(text)
    return path


def test_every_key_is_described():
    rows = {row.key: row for row in describe()}
    assert all(row.meaning and row.type for row in rows.values())
    assert rows["steps"][1:] == ("whole number at least 1", "required", "training steps: one batch of rollouts each")
    assert rows["data.source"][1:3] == ("text, or list of text", "required")
    assert rows["optimizer.learning_rate"][1:3] == ("number above 0", "1.0e-06")
    assert rows["warmup"][1:3] == ("section, or null", "null")
    assert rows["warmup.source"].default == "demonstrations"
    assert rows["rewards.0.function"][1:3] == ("text", "required")
    assert rows["method.*"].type == "any"

    def keys(values, prefix=""):
        for name, value in values.items():
            yield prefix + name
            if isinstance(value, dict) and name != "options":
                yield from keys(value, f"{prefix}{name}.")

    everything = parse(SMALLEST | {"warmup": {}}).model_dump()
    assert set(keys(everything)) == {key for key in rows if "*" not in key and not key.startswith("rewards.0")}


def test_defaults_that_are_described_are_the_defaults(tmp_path):
    """Writing every described default into a file changes nothing."""
    values = {"steps": 10, "model": {"path": "tiny"}, "data": {"source": "addition"}, "warmup": {}}
    overrides = [
        f"{row.key}={row.default}"
        for row in describe()
        if row.default not in ("required", "") and row.key != "warmup" and ".0." not in row.key
    ]
    assert len(overrides) > 50
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    assert load_config(path, overrides) == parse(values)


def test_every_optimizer_option_is_read_by_some_optimizer():
    assert {key for keys in OPTIMIZER_KEYS.values() for key in keys} <= set(OptimizerSection.model_fields)


def test_import_is_light():
    heavy = ("jax", "orbax", "transformers")
    code = f"import sys, grpo_jax.training.configuration; print([m for m in {heavy} if m in sys.modules])"
    root = Path(__file__).parents[2]
    found = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
