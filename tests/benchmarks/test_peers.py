"""The comparison's arithmetic, tables and workload. No other project is needed, and nothing is timed."""

from __future__ import annotations

import json
import subprocess
from argparse import Namespace

import numpy as np
import pytest

from benchmarks import fused
from benchmarks.peers import __main__ as comparison
from benchmarks.peers import floors, measure, models, ours, run_ours, table, targets, workload
from benchmarks.peers.schedule import ENVIRONMENTS, PEERS, PLAN, better_waiting, schedule
from benchmarks.peers.workload import MODELS, SHAPES, Shape, Sizes
from grpo_jax.data import load_tokenizer
from grpo_jax.models import load
from grpo_jax.training.loop import iterate

TINY, SHAPE = Sizes(hidden=16, layers=2, heads=2, kv_heads=1, mlp=32, vocabulary=512), Shape(2, 6, 2, 4)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A model of the workload, small and without the others, where the runners look for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workload, "MODELS_DIRECTORY", tmp_path_factory.mktemp("models"))
        patch.setitem(MODELS, "tiny", TINY)
        patch.setattr(models, "PROMPTS", {128: 4, 512: 2})
        yield models.write("tiny")


def result(label: str, peer: str, **figures) -> dict:
    line = {
        "run": "1",
        "machine": "here",
        "label": label,
        "peer": peer,
        "task": label.replace(" ", ""),
        "argv": [label],
    }
    return line | {"model": "small", "dtype": "float32", "waiting": None} | figures


def test_the_models_have_the_parameters_that_are_said():
    for sizes in (*MODELS.values(), TINY):
        shapes = models.models.abstract(models.config_of(sizes))[1]
        assert sum(leaf.size for leaf in models.jax.tree.leaves(shapes)) == sizes.parameters
    assert round(MODELS["qwen1.5b"].parameters / 1e9, 2) == 1.54


def test_a_model_on_disk_is_what_any_stack_reads(tiny):
    config, _, params = load(tiny)
    tokenizer = load_tokenizer(tiny)
    assert config.vocab_size == tokenizer.vocab_size == 512 and tokenizer.stop_ids == (workload.EOS_ID,)
    assert np.std(params["layers"]["attention"]["key_bias"]) == pytest.approx(models.BIAS_DEVIATION, rel=0.5)
    for length in (128, 512):
        for prompt in workload.prompts("tiny", Shape(2, length, 1, 1)):
            assert tokenizer.encode_prompt(prompt["text"]).tolist() == prompt["ids"] and len(prompt["ids"]) == length
    (short,) = workload.prompts("tiny", Shape(1, 7, 1, 1))
    assert tokenizer.encode_prompt(short["text"]).tolist() == short["ids"] and len(short["ids"]) == 7


@pytest.mark.skipif(not PEERS["torch"].python.exists(), reason=f"no environment with torch in {ENVIRONMENTS}")
def test_torch_reads_the_model_and_agrees(tiny):
    """With the log-probs of the update batch that our own pass gives."""
    rows = ours.fixed_rows("tiny", SHAPE)
    code = (
        "import sys, torch, numpy as np; from benchmarks.peers import run_torch as r, workload as w;"
        "m = r.AutoModelForCausalLM.from_pretrained(sys.argv[1]);"
        "ids = torch.tensor(np.load(sys.argv[2])).long(); np.save(sys.argv[2], r.log_probs(m, ids, 4).detach().numpy())"
    )
    file = tiny / "rows.npy"
    np.save(file, np.concatenate([rows.contexts.tokens[rows.sampled_under], rows.completions], axis=1))
    environment = comparison.os.environ | comparison.QUIET | {"PYTHONPATH": str(comparison.ROOT)}
    subprocess.run([str(PEERS["torch"].python), "-c", code, str(tiny), str(file)], env=environment, check=True)
    run = models.models.evaluate(*load(tiny)[1:], rows)
    np.testing.assert_allclose(run.logps, np.load(file), atol=2e-5)


def test_everything_is_seeded(tiny):
    one, other = (workload.update_batch("tiny", SHAPE) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(one, other))
    prompts, completions, advantages = one
    assert prompts.shape == (4, 6) and completions.shape == (4, 4) and advantages.shape == (4,)
    assert np.array_equal(prompts[0], prompts[1]) and not np.array_equal(prompts[1], prompts[2])
    assert completions.min() >= len(workload.SPECIALS) and completions.max() < 512
    assert models.make_words(50, seed=3) == models.make_words(50, seed=3) != models.make_words(50, seed=4)


@pytest.mark.parametrize("rows", [64, 128, 256])
def test_ragged_lengths(rows):
    lengths = workload.ragged_lengths(rows, 512)
    assert np.array_equal(lengths, workload.ragged_lengths(rows, 512))
    assert lengths.min() >= 1 and lengths.max() == 512 and lengths.mean() == pytest.approx(128, abs=0.5)
    inside = np.log(lengths[(lengths > 8) & (lengths < 512)])
    assert 0.7 < inside.std() < 1.1, "log-normal of deviation 1, cut at the top"
    even = workload.even_lengths(lengths)
    assert even.sum() == lengths.sum() and np.ptp(even) <= 1 and len(even) == rows


def test_a_task_has_its_shape_unless_told_otherwise():
    assert workload.shape_of("sampleB", {}) == Shape(8, 512, 16, 64) and SHAPES["sampleB"].rows == 128
    assert workload.shape_of("sampleB", {"new": "3", "old": "1"}) == Shape(8, 512, 16, 3)
    for wrong in ({"new": "0"}, {"prompt": "513"}, {"prompts": "65"}):
        with pytest.raises(ValueError, match="at most 64"):
            workload.shape_of("sampleA", wrong)


def test_floors_count_every_product_of_the_algorithm():
    """Against a count token by token, layer by layer."""
    e, layers, kv, f, v = TINY.hidden, TINY.layers, TINY.kv_width, TINY.mlp, TINY.vocabulary
    projections = 2 * (e * e + 2 * e * kv + e * e + 3 * e * f)  # query, key and value, output, gate-up-down

    def token(seen: float) -> float:
        return layers * (projections + 2 * e * seen + 2 * e * seen)

    prompts = SHAPE.prompts * sum(token(i + 0.5) for i in range(SHAPE.prompt))
    rows = SHAPE.rows * sum(token(SHAPE.prompt + t + 0.5) + 2 * e * v for t in range(SHAPE.new))
    assert floors.forward_flops(TINY, SHAPE) == pytest.approx(prompts + rows)
    assert floors.update_flops(TINY, SHAPE, passes=5) == pytest.approx(5 * (prompts + rows))
    weights = layers * projections / 2 + e * v
    kept = [SHAPE.prompts * SHAPE.prompt + SHAPE.rows * t for t in range(SHAPE.new)]
    read = sum(4 * (weights + layers * 2 * kv * n) for n in kept)
    assert floors.decode_bytes(TINY, SHAPE) == pytest.approx(read)
    slow_memory, slow_arithmetic = floors.Machine(1e30, 1e9), floors.Machine(1e9, 1e30)
    assert floors.sample_seconds(TINY, SHAPE, slow_memory) == pytest.approx(read / 1e9)
    assert floors.sample_seconds(TINY, SHAPE, slow_arithmetic) == pytest.approx((prompts + rows) / 1e9)


def test_a_shared_prompt_is_counted_once():
    alone, shared = Shape(16, 512, 1, 64), Shape(1, 512, 16, 64)
    more = floors.forward_flops(MODELS["small"], alone) - floors.forward_flops(MODELS["small"], shared)
    assert more == pytest.approx(15 * floors.prefill_flops(MODELS["small"], shared))


def test_the_schedule_keeps_a_task_together():
    entries = schedule(list(PEERS))
    order = list(dict.fromkeys(e.task for e in entries))
    assert order == list(PLAN) and [e.task for e in entries] == sorted((e.task for e in entries), key=order.index)
    torch = [e.waiting for e in schedule(["torch"], ["sample A"])]
    assert torch == ["ACTIVE", "PASSIVE"] and [e.waiting for e in schedule(["trl"], ["sample A"])] == ["best"]
    updates = schedule(["torch"], ["update, 5 passes"])
    assert [(e.waiting, "micro=16" in e.arguments) for e in updates] == [
        ("ACTIVE", False),
        ("PASSIVE", False),
        ("best", True),
    ]
    cold, warm = schedule(["ours"], ["iteration"])
    assert cold.cache == warm.cache and cold.cache is not None
    with pytest.raises(ValueError, match="there is no 'vllm'; there are ours; torch"):
        schedule(["vllm"])


def test_torch_waits_as_it_was_faster_in_the_task():
    lines = [
        result("sample A", "torch", waiting="ACTIVE", tokens_per_s=900.0),
        result("sample A", "torch", waiting="PASSIVE", tokens_per_s=800.0),
        result("iteration", "torch", waiting="ACTIVE", iteration_s=30.0),
        result("iteration", "torch", waiting="PASSIVE", iteration_s=20.0),
        result("sample B", "torch", waiting="ACTIVE", error="killed"),
    ]
    assert [better_waiting(lines, task) for task in ("sample A", "iteration", "sample B")] == [
        "ACTIVE",
        "PASSIVE",
        "PASSIVE",
    ]


def test_verdicts():
    lines = [
        result("sample A", "ours", tokens_per_s=3000.0, peak_gib=0.5),
        result("sample A", "torch", tokens_per_s=700.0, waiting="PASSIVE"),
        result("sample A", "torch", tokens_per_s=1500.0, waiting="ACTIVE"),
        result("sample A", "tunix", tokens_per_s=1200.0),
        result("sample A", "trl", error="no memory"),
        result("sample B", "ours", tokens_per_s=900.0, peak_gib=0.9),
        result("sample B", "trl", tokens_per_s=400.0, peak_gib=2.0),
        result("sample B", "torch", tokens_per_s=380.0, peak_gib=1.5),
        result("sample B", "torch", tokens_per_s=100.0, peak_gib=0.1),  # slow to be lean: not its best setting
        result("recompile", "ours", compilations=[9, 1, 0]),
        result("gap", "ours", gap_max=0.1, between_shapes_max=0.2, dtype="bfloat16"),
    ]
    rows = {t.work: targets.judge(t, lines) for t in targets.TARGETS}
    a, b, memory = rows["A, tokens/s"], rows["B, tokens/s"], rows["B, peak memory, GiB"]
    assert (a.peer, a.theirs, a.judged, a.verdict) == ("torch", 1500.0, 2.0, "at least")
    assert (b.peer, b.judged, b.verdict) == ("trl", 2.25, "BELOW")
    assert (memory.peer, memory.theirs, memory.verdict) == ("torch", 1.5, "at least")
    assert rows["compilations after the first step"].verdict == "BELOW"
    assert rows["the same, bfloat16, over the gap between shapes"].judged == 0.5
    assert rows["iteration, s"].verdict == "not measured"
    assert {t.smaller for t in targets.TARGETS if t.at_least > t.aim} == {True}


def test_the_tables_say_what_the_results_say(tmp_path):
    file = tmp_path / "results.jsonl"
    old = result("limits", "ours") | {"run": "0", "gflops": 1.0}
    rates = dict.fromkeys(("jax_gflops", "numpy_gflops", "gflops"), 256.0)
    rates |= dict.fromkeys(("jax_gbs", "numpy_gbs", "gbs"), 49.0)
    sampled = result("sample A", "ours", tokens_per_s=3071.0, peak_gib=0.5, shape=list(SHAPES["sampleA"]))
    failed = result("sample A", "tunix", error="killed")
    file.write_text("\n".join(map(json.dumps, [old, result("limits", "ours") | rates, sampled, failed])) + "\n")
    lines = table.read(file)
    assert len(lines) == 3 and len(table.read(file, "0")) == 1
    text = table.figures(lines, ["ours", "tunix"])
    assert "3,071 tokens/s" in text and "12,284" in text and "25%" in text and "failed: killed" in text
    assert "256 GFLOP/s and 49 GB/s" in table.limits(lines)
    assert "| not measured |" in table.comparison(lines)
    with pytest.raises(ValueError, match="has the runs 0, 1; got 2"):
        table.read(file, "2")


@pytest.mark.parametrize(
    "status, said, complained, expected",
    [
        (0, 'chatter\n{"peer": "x"}\n', "", {"peer": "x"}),
        (0, "chatter", "", {"error": "its last line is no JSON: chatter"}),
        (1, '{"peer": "x"}', "Traceback\nKeyError: 3\n", {"error": "KeyError: 3"}),
        (-9, "", "", {"error": "exit status -9"}),
    ],
)
def test_what_a_runner_said(status, said, complained, expected):
    assert comparison.result_of(status, said, complained) == expected


def test_measures():
    assert 0 < measure.time.time() - measure.process_start() < 3600
    before, held = measure.peak_gib(), np.ones(2**26, np.uint8)
    assert held.any() and measure.peak_gib() >= max(before, 2**-4)
    calls = iter(range(10))
    numbers = measure.timed(lambda: measure.time.sleep(0.2 if next(calls) == 0 else 0.01), 3, tokens=5)
    assert numbers["first_s"] > 0.2 > numbers["max_s"] and numbers["tokens_per_s"] == 5 / numbers["median_s"]
    numbers = measure.iterations(100.0, 103.0, [110.0, 119.0, 121.0, 124.0])
    assert numbers["first_update_s"] == 10 and numbers["import_s"] == 3 and numbers["iteration_s"] == 2.5
    assert measure.iterations(0.0, 0.0, [1.0])["iteration_s"] is None


def test_our_update_trains_on_the_rows_that_it_is_given(tiny):
    asked = Namespace(model="tiny", dtype="float32", opt={"optimizer.learning_rate": "1e-3"})
    rows = ours.fixed_rows("tiny", SHAPE)
    method = ours.on_fixed_rows(rows, SHAPE, beta=0.0, separate_old=True)
    experiment = ours.experiment(asked, SHAPE, method=method, beta=0.0)
    assert experiment.config.optimizer.learning_rate == 1e-3 and experiment.layout.decisions == SHAPE.new
    run, seen = experiment.begin(), []
    run.log = lambda batch, reports: seen.append((batch, reports[0]))
    iterate(run)
    (batch, report) = seen[0]
    assert batch.old is not None
    np.testing.assert_array_equal(np.asarray(batch.advantages)[:4, 0], rows.scores[:, 0])
    assert report["applied"] == 1 and report["ratio_max"] == 1
    without = ours.on_fixed_rows(rows, SHAPE, beta=0.0, separate_old=False)
    unasked, _ = without.advantage(batch.replace(old=None, rewards=batch.scores), None, None)
    np.testing.assert_array_equal(unasked.advantages, batch.advantages)
    with pytest.raises(AttributeError):
        method.advantage(batch.replace(old=None, rewards=batch.scores), None, None)


def test_our_sampler_goes_on_to_the_end(tiny):
    asked = Namespace(model="tiny", dtype="float32", opt={}, task="sampleA")
    experiment = ours.experiment(asked, SHAPE)
    language = ours.unending(experiment)
    assert experiment.language.tokenizer.stop_ids == (1,) and language.tokenizer.stop_ids == ()
    assert language.tokenizer.vocab_size == 512 and language.max_new == SHAPE.new


def test_steps_as_one_program_run_beside_the_same_part_by_part(monkeypatch):
    monkeypatch.setattr(fused, "BLOCKS", 2)
    monkeypatch.setattr(fused, "SECONDS", 0.05)
    small = ["batch.prompts=4", "batch.group_size=2", "model.tiny.layers=1", "model.tiny.hidden=16"]
    found = fused.rates(str(run_ours.CONFIGS / "quickstart_fused.yaml"), small)
    assert found.keys() == {"part by part", "fused"}
    assert all(len(rates) == 2 and min(rates) > 0 for rates in found.values())
