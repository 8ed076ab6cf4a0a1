"""Records survive the disk, a kill and a resume; the instruments measure what they say."""

import json
import math
import struct
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.training import instruments, metrics
from grpo_jax.training.instruments import Clock, CompileCounter, memory
from grpo_jax.training.metrics import Metrics, read_metrics, read_samples


def lines(path):
    return path.read_text().splitlines()


def events(directory):
    """(step, {tag: value}) of the scalars in TensorBoard event files, read by the TFRecord layout."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted((directory / "tensorboard").iterdir()):
        content, at = path.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            event = Event.FromString(content[at + 12 : at + 12 + length])
            at += 12 + length + 4
            found.append((event.step, {v.tag: v.simple_value for v in event.summary.value}, event))
    return found


def test_values_come_back(tmp_path):
    with Metrics(tmp_path, tensorboard=False) as metrics:
        metrics.log(0, {"reward": 0.25, "kl": jnp.float32(0.5), "entropy": np.float64(1e-9), "truncated": 0})
        metrics.log(0, {"pass@1": jnp.bfloat16(0.5), "length_mean": 7.0}, kind="eval")
        metrics.log(1, {"reward": math.nan, "kl": math.inf})
        # A reader sees what was logged while the run goes on.
        assert len(lines(tmp_path / "metrics.jsonl")) == 3
    first, second, third = (json.loads(line) for line in lines(tmp_path / "metrics.jsonl"))
    assert (first["step"], first["kind"], first["reward"], first["kl"]) == (0, "train", 0.25, 0.5)
    assert third["reward"] is None and third["kl"] is None
    series = read_metrics(tmp_path)
    assert set(series) == {"reward", "kl", "entropy", "truncated", "eval/pass@1", "eval/length_mean"}
    steps, values = series["reward"]
    np.testing.assert_array_equal(steps, [0, 1])
    np.testing.assert_array_equal(values, [0.25, np.nan])
    assert series["entropy"].values[0] == 1e-9
    assert series["eval/pass@1"].values.tolist() == [0.5]


def one_run(directory, steps, resume_step=None, stop=None):
    with Metrics(directory, tensorboard=False, resume_step=resume_step) as metrics:
        if not resume_step:
            for step in range(50):
                metrics.log(step, {"loss": 1 / (step + 1)}, kind="warmup")
        for step in range(resume_step or 0, stop or steps):
            if step % 4 == 0:
                metrics.log(step, {"pass@1": step / 10}, kind="eval")
            metrics.log(step, {"reward": step / 7})
            metrics.samples(step, [{"prompt": f"p{step}", "completions": ["a"]}])


def test_a_resumed_run_has_every_step_once(tmp_path):
    one_run(tmp_path / "whole", 12)
    one_run(tmp_path / "cut", 12, stop=9)
    for name in ("metrics.jsonl", "samples.jsonl"):  # killed in the middle of a line
        with open(tmp_path / "cut" / name, "a") as file:
            file.write('{"step": 9, "kind": "tr')
    assert len(read_metrics(tmp_path / "cut")["reward"].steps) == 9
    one_run(tmp_path / "cut", 12, resume_step=6)
    whole, cut = read_metrics(tmp_path / "whole"), read_metrics(tmp_path / "cut")
    assert set(whole) == set(cut) and len(cut["warmup/loss"].steps) == 50
    for name in whole:
        np.testing.assert_array_equal(whole[name].steps, cut[name].steps)
        np.testing.assert_array_equal(whole[name].values, cut[name].values)
    assert read_samples(tmp_path / "whole") == read_samples(tmp_path / "cut")
    assert "kind" not in json.loads(lines(tmp_path / "cut" / "samples.jsonl")[0])


def test_the_evaluation_of_the_step_resumed_at_stays_and_counts_once(tmp_path):
    one_run(tmp_path, 12)
    with Metrics(tmp_path, tensorboard=False, resume_step=4) as metrics:
        series = read_metrics(tmp_path)
        assert series["eval/pass@1"].steps.tolist() == [0, 4] and series["reward"].steps.tolist() == [0, 1, 2, 3]
        metrics.log(4, {"pass@1": 0.9}, kind="eval")
    steps, values = read_metrics(tmp_path)["eval/pass@1"]
    assert steps.tolist() == [0, 4] and values.tolist() == [0.0, 0.9]
    Metrics(tmp_path, tensorboard=False, resume_step=3).close()
    assert read_metrics(tmp_path)["eval/pass@1"].steps.tolist() == [0]


def test_records_of_another_run_are_not_mixed_in(tmp_path):
    one_run(tmp_path, 5)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(FileExistsError, match=r"up to step 49.*resume_step"):
        Metrics(tmp_path, tensorboard=False)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    Metrics(tmp_path, tensorboard=False, resume_step=0).close()
    assert set(read_metrics(tmp_path)) == {"warmup/loss", "eval/pass@1"} and read_samples(tmp_path) == []
    assert read_metrics(tmp_path)["eval/pass@1"].steps.tolist() == [0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"reward": np.zeros(3)}, r"'reward' must be one number, got shape \(3,\)"),
        ({"reward": "high"}, r"'reward' must be one number, got str 'high'"),
        ({"reward": None}, r"'reward' must be one number, got NoneType"),
        ({"step": 3.0}, r"'step' is used by the record"),
    ],
)
def test_what_is_not_a_number_is_refused(tmp_path, values, message):
    with Metrics(tmp_path, tensorboard=False) as metrics, pytest.raises(ValueError, match=message):
        metrics.log(0, {"kl": 0.1} | values)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_sampled_groups_come_back(tmp_path):
    row = {
        "prompt": [{"role": "user", "content": "1+1="}],
        "completions": ["2\n", "ü\udc80\u2028"],
        "rewards": {"exact": jnp.array([1.0, np.nan])},
        "advantages": np.array([1.0, -1.0], np.float32),
        "lengths": np.array([2, 3]),
        "prompt_id": np.int64(7),
    }
    with Metrics(tmp_path, tensorboard=False) as metrics:
        metrics.samples(3, [row, {"prompt": "x", "completions": []}])
    first, second = read_samples(tmp_path)
    assert first["step"] == 3 and first["prompt"] == row["prompt"] and first["completions"] == row["completions"]
    np.testing.assert_array_equal(first["rewards"]["exact"], [1.0, np.nan])
    assert first["advantages"] == [1.0, -1.0] and first["lengths"] == [2, 3] and first["prompt_id"] == 7
    assert second["completions"] == [] and second["rewards"] == {}
    Metrics(tmp_path, tensorboard=False, resume_step=4).close()
    assert read_samples(tmp_path)[0]["completions"] == row["completions"]


def test_what_is_written_is_closed_now_and_then(tmp_path, monkeypatch):
    """A mounted bucket keeps a file when it is closed: of a machine that vanishes, only the last moments are lost."""
    monkeypatch.setattr(metrics, "KEPT_OPEN", 0.0)
    with Metrics(tmp_path, tensorboard=False) as writer:
        for step in range(3):
            writer.log(step, {"reward": step})
            writer.samples(step, [{"prompt": "p", "completions": ["c"]}])
            held = {link.resolve().parent for link in Path("/proc/self/fd").iterdir()}
            assert tmp_path.resolve() not in held
    assert read_metrics(tmp_path)["reward"].values.tolist() == [0, 1, 2] and len(read_samples(tmp_path)) == 3


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p"}, "completions not in"),
        (
            {"prompt": "p", "completions": ["a", "b"], "advantages": [1.0]},
            r"advantages has shape \(1,\).*2 completions",
        ),
        ({"prompt": "p", "completions": ["a"], "rewards": {"exact": [1, 2]}}, r"rewards\['exact'\] has shape \(2,\)"),
        ({"prompt": "p", "completions": ["a"], "rewards": [1.0]}, r"\{channel: values\}, got list"),
    ],
)
def test_a_group_that_does_not_fit_is_refused(tmp_path, row, message):
    with Metrics(tmp_path, tensorboard=False) as metrics, pytest.raises(ValueError, match=message):
        metrics.samples(0, [row])


def test_errors_of_reading(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no run in .*nowhere'.*does not exist"):
        read_metrics(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"has no metrics.jsonl"):
        read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "kind": "train", "reward": 1}\nnot json\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2 is not a record of a run: 'not json'"):
        read_metrics(tmp_path)


def test_console_lines(tmp_path, capsys):
    heard = []
    with Metrics(tmp_path, tensorboard=False, console=heard.append) as metrics:
        metrics.log(4, {"reward": 0.123456, "kl": 0.0}, kind="eval")
    assert heard == ["eval 4  reward 0.1235  kl 0"] and capsys.readouterr().out == ""


def test_tensorboard_files_hold_the_values(tmp_path):
    with Metrics(tmp_path, run_config={"seed": 3}) as metrics:
        metrics.log(0, {"reward": 0.5, "kl": math.nan})
        metrics.log(7, {"pass@1": 0.75}, kind="eval")
    scalars = {(step, tag): value for step, values, _ in events(tmp_path) for tag, value in values.items()}
    assert scalars[0, "train/reward"] == 0.5 and scalars[7, "eval/pass@1"] == 0.75
    assert math.isnan(scalars[0, "train/kl"])
    assert any("config" in tag for _, tag in scalars)
    with Metrics(tmp_path, resume_step=5):
        pass
    starts = [step for step, _, event in events(tmp_path) if event.session_log.status == 1]
    assert starts == [5]  # readers drop what they have of later steps


def test_without_tensorboard_there_is_one_warning(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    monkeypatch.delitem(sys.modules, "tensorboardX.proto.event_pb2", raising=False)
    with pytest.warns(UserWarning, match="pip install tensorboardX") as caught, Metrics(tmp_path) as metrics:
        metrics.log(0, {"reward": 1.0})
    assert len(caught) == 1 and read_metrics(tmp_path)["reward"].values.tolist() == [1.0]


def test_wandb_is_asked_for_by_name(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"'project' was asked for.*grpo_jax\[wandb\]"):
        Metrics(tmp_path / "none", tensorboard=False, wandb="project")

    calls, logged = [], []
    run = types.SimpleNamespace(log=logged.append, finish=lambda: calls.append("finish"))
    fake = types.SimpleNamespace(init=lambda **options: calls.append(options) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for resume_step in (None, 4, 0):
        with Metrics(tmp_path, tensorboard=False, wandb="project", run_config={"a": 1}, resume_step=resume_step) as m:
            m.log(4, {"reward": 1.0})
    first, resumed, anew = calls[0], calls[2], calls[4]
    assert calls[1] == "finish" and first["project"] == "project" and first["config"] == {"a": 1}
    assert first["id"] == resumed["id"] != anew["id"]
    assert logged[0] == {"step": 4, "train/reward": 1.0}


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with Metrics(tmp_path / "run", console=True) as metrics:
        metrics.log(0, {"reward": 1.0})
        metrics.samples(0, [{"prompt": "p", "completions": ["a"]}])
    assert not (tmp_path / "run").exists()


class Hand:
    """A clock that is moved by hand."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(instruments.time, "perf_counter", lambda: self.now)

    def pass_time(self, seconds):
        self.now += seconds


def test_clock_adds_up(monkeypatch):
    hand = Hand(monkeypatch)
    clock = Clock()
    with clock("sample"):
        hand.pass_time(3)
        with clock("reward"):  # taken out of the section around it
            hand.pass_time(2)
    hand.pass_time(1)
    with pytest.raises(KeyError), clock("update"):
        hand.pass_time(4)
        raise KeyError
    lap = clock.lap()
    expected = {"seconds": 10, "seconds/sample": 3, "seconds/reward": 2, "seconds/update": 4, "seconds/other": 1}
    assert lap == pytest.approx(expected)
    with clock("update"):
        hand.pass_time(5)
    with clock("other"):
        hand.pass_time(5)
    lap = clock.lap()
    assert lap["seconds/update"] == 5 and lap["seconds/sample"] == 0 and lap["seconds/other"] == 5
    assert clock.shares() == pytest.approx({"sample": 0.15, "reward": 0.1, "update": 0.45, "other": 0.3})


def test_clock_refuses_a_lap_inside_a_section():
    clock = Clock()
    with clock("sample"), pytest.raises(RuntimeError, match="inside a section"):
        clock.lap()


def test_compilations_are_counted_and_named():
    @jax.jit
    def counted_step(x):
        return jnp.sin(x) @ x

    inputs = [jax.block_until_ready(jnp.ones((n, n))) for n in (3, 4, 5)]
    with CompileCounter() as compiles:
        counted_step(inputs[0])
        counted_step(inputs[0])
        lap = compiles.lap()
        assert (lap.count, dict(lap.names)) == (1, {"jit(counted_step)": 1}) and lap.seconds > 0
        assert compiles.recompiled() == {} and compiles.lap().count == 0
        counted_step(inputs[1])
        assert compiles.lap().count == 1 and compiles.total.count == 2
        assert compiles.recompiled() == {"jit(counted_step)": 2}
    counted_step(inputs[2])
    compiles.close()
    assert compiles.total.count == 2


def test_memory_is_the_peak_of_this_process():
    before = memory()
    if sys.platform == "linux":
        with open("/proc/self/status") as status:
            peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024 / 2**30
        assert before["host_memory_gib"] == pytest.approx(peak, rel=0.05)
    block = np.ones(2**26, np.uint8)
    assert memory()["host_memory_gib"] >= before["host_memory_gib"] > 0.01 and block.nbytes == 2**26
    assert before["memory_gib"] > 0


def test_memory_is_that_of_the_fullest_device(monkeypatch):
    devices = [types.SimpleNamespace(memory_stats=lambda n=n: {"peak_bytes_in_use": n * 2**30}) for n in (2, 5, 3)]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert memory()["memory_gib"] == 5
