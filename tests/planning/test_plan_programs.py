"""A plan of a small run on virtual devices: what it compiles is what training asks for, and what it says adds up."""

import json

import jax
import numpy as np
import pytest
from rich.console import Console

from grpo_jax import cli
from grpo_jax.experiment import Experiment
from grpo_jax.models import folding
from grpo_jax.planning import CHIPS, Slice, make_plan, programs, show, to_json
from grpo_jax.planning.memory import Split
from grpo_jax.planning.programs import Memory
from grpo_jax.planning.rehearsal import everywhere, placed, rehearse
from grpo_jax.planning.roofline import Part, together
from grpo_jax.sampling import compaction, decoding, language_model
from grpo_jax.training.configuration import parse
from grpo_jax.training.loop import iterate
from grpo_jax.training.mesh import make_mesh

RUN = {
    "name": "planned",
    "steps": 1,
    "model": {"path": "tiny", "tiny": {"layers": 1, "hidden": 16, "heads": 2, "kv_heads": 2, "mlp": 32}},
    "data": {"source": "addition", "max_prompt": 16},
    "rewards": ["exact"],
    "method": {"name": "grpo", "kl": 0.01},
    "batch": {"prompts": 8, "group_size": 2, "tokens_per_device": 32},
    "sampling": {"max_new": 8},
    "training": {"fused": False, "truncated_limit": 1.0},
    "evaluation": {"prompts": 8, "samples": 2, "k": [1], "greedy": False},
    "metrics": {"console": False, "tensorboard": False},
    "mesh": {"data": 2, "fsdp": 2, "tensor": 2},
}


@pytest.fixture(scope="module")
def plan():
    return make_plan(parse(RUN), Slice(CHIPS["v5e"], (2, 4), 1, jax.devices()))


class Asked(Exception):
    """The last program of a step was asked for; it need not run."""


@pytest.fixture
def traced(monkeypatch):
    """The text of every program that a plan would compile; only the small one that places weights is compiled."""
    texts, compiled = {}, programs._compile

    def trace(mesh, name, program, *arguments, **static):
        if name == "weights for sampling":
            return compiled(mesh, name, program, *arguments, **static)
        lowered = program.lower(*arguments, **static)
        texts[name] = lowered.as_text()
        return programs._Made(name, Memory(0.0, 0.0, 0.0), None, placed(lowered.out_info, everywhere(mesh)), 0.0)

    monkeypatch.setattr(programs, "_compile", trace)
    return texts


def test_what_a_step_of_training_asks_for_is_what_is_planned(traced, monkeypatch, tmp_path):
    config = parse({**RUN, "directory": str(tmp_path)})
    programs.build(rehearse(config, make_mesh(**config.mesh.model_dump())))
    asked = {}

    def stand_in(name, program, last=False):
        def call(*arguments, **static):
            lowered = program.lower(*arguments, **static)
            asked[name] = lowered.as_text()
            if last:
                raise Asked
            # rows of one token, so that they weigh something
            values = jax.tree.map(lambda x: np.full(x.shape, x.dtype != np.float32, x.dtype), lowered.out_info)
            return jax.device_put(values, everywhere(run.mesh))

        return call

    run = Experiment(config).begin()
    monkeypatch.setattr("grpo_jax.sampling.language_model.draw", stand_in("sample", decoding.draw))
    run.compiled._evaluate = stand_in("log-probs of the reference", run.compiled._evaluate)
    run.compiled._shape = stand_in("advantages", run.compiled._shape)
    run.compiled._update["policy"] = stand_in("update", run.compiled._update["policy"], last=True)
    with pytest.raises(Asked):
        iterate(run)
    assert asked.keys() == traced.keys()
    for name, text in asked.items():
        assert text == traced[name], name


def test_a_plan_names_every_program_and_how_often_a_step_runs_it(plan):
    runs = {program.name: (program.runs, program.turns) for program in plan.programs}
    assert list(runs) == [
        "weights for sampling",
        "sample",
        "log-probs of the reference",
        "advantages",
        "update",
    ]
    assert runs["sample"][1] == 8  # tokens
    assert runs["update"][1] == 2  # micro-batches
    assert all(size >= 0 for program in plan.programs for size in program.memory)
    assert plan.fits and plan.free == CHIPS["v5e"].hbm - max(p.memory.total for p in plan.programs)


def test_of_several_updates_all_but_the_first_need_a_pass_of_old_log_probs(traced):
    config = parse({**RUN, "training": {**RUN["training"], "updates": 2, "passes": 2}})
    built = programs.build(rehearse(config, make_mesh(**config.mesh.model_dump())))
    assert {b.name: b.runs for b in built[2:]} == {
        "log-probs of the reference": 1,
        "log-probs of the policy": 1,
        "advantages": 1,
        "update": 1,
        "update after the first": 3,
    }


def test_rows_for_which_there_is_no_room_at_first_are_planned_to_be_drawn_again(traced, monkeypatch):
    """On each of 4 shards 32 rows begin, 8 of them come to the end, and 24 go on later, 8 at a time."""
    monkeypatch.setattr(folding, "COLUMNS", 4)
    monkeypatch.setattr(language_model, "COLUMNS", 4)
    monkeypatch.setattr(compaction, "FEWEST_DECISIONS", 16)
    jax.clear_caches()
    batch, sampling = {"prompts": 16, "group_size": 8, "tokens_per_device": 64}, {"max_new": 48}
    config = parse({**RUN, "batch": batch, "sampling": sampling})
    built = {b.name: b for b in programs.build(rehearse(config, make_mesh(**config.mesh.model_dump())))}
    jax.clear_caches()
    sample, again = built["sample"], built["sample again"]
    assert sample.runs == 1 and sample.turns[0] == 12 and sum(sample.turns) == 48
    assert again.runs == 3 and again.turns == (1, 36)  # what is given is read at once


def test_parts_of_one_name_are_one():
    one, two = (Part("decode", *(float(n * x) for x in range(8))) for n in (1, 10))
    other = one._replace(name="update")
    assert together([one, other, two]) == [Part("decode", *(11.0 * x for x in range(8))), other]


def test_weights_cross_the_network_once_a_rollout_and_activations_are_summed_over_tensor(plan):
    sends = {program.name: program.sends for program in plan.programs}
    gathered = [c for c in sends["weights for sampling"] if c.kind == "all-gather"]
    assert {c.axes for c in gathered} == {("fsdp",)}
    # half of the parameters that fsdp divides: all matrices, of which tensor has taken its half
    assert sum(c.wire for c in gathered) < plan.parameters * 2 / 2
    assert any(c.kind == "all-reduce" and "tensor" in c.axes for c in sends["update"])


def test_times_add_up_to_a_step_and_no_part_beats_the_peak(plan):
    assert plan.least == sum(p.least for p in plan.parts) <= plan.most
    assert {p.name for p in plan.parts} >= {"prefill", "decode", "update"}
    for part in plan.parts:
        assert part.least >= max(part.compute, part.hbm) * (1 - 1e-9) and part.bound in ("compute", "HBM", "ICI", "DCN")
        assert plan.mfu(part)[0] <= plan.mfu(part)[1] <= 1


def test_json_is_complete_and_plain(plan):
    value = json.loads(json.dumps(to_json(plan), allow_nan=False))
    assert value["fits"] is True and value["mesh"] == {"data": 2, "fsdp": 2, "tensor": 2}
    for program in value["programs"]:
        memory = program["memory"]
        assert set(memory) == {*Split._fields, "total"}
        assert memory["total"] == pytest.approx(sum(memory[k] for k in Split._fields))
        assert all(set(c) >= {"kind", "axes", "network", "times", "wire"} for c in program["collectives"])
    assert value["step_seconds"]["overlapped"] <= value["step_seconds"]["one_after_the_other"]


def test_a_plain_terminal_gets_readable_tables(plan):
    console = Console(width=160, no_color=True, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    show(plan, console=console)
    text = console.export_text()
    for words in ("on v5e:2x4, 8 chips, mesh data 2 x fsdp 2 x tensor 2", "memory of a chip in GiB, of 15.75", "fits:"):
        assert words in text
    for name in ("decode", "Assumptions", "log-probs of the reference"):
        assert name in text


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"mesh": {"data": 2, "fsdp": 3}}, "v5e:2x4 has 8 chips, and mesh.data=2, mesh.fsdp=3 takes 6"),
        ({"mesh": {"data": 3, "fsdp": -1}}, "mesh.data=3, mesh.fsdp=-1 takes a multiple of 3"),
        ({"mesh": {"data": 1, "tensor": 8}}, "axis 'heads' of size 2 does not divide over mesh axis tensor of size 8"),
        ({"model": {"path": "/nowhere"}}, "no config.json in /nowhere"),
        ({"method": {"name": "grpo", "k1": 0.1}}, "method 'grpo' has no option 'k1'"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_compiled(changes, said):
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        make_plan(parse({**RUN, **changes}), Slice(CHIPS["v5e"], (2, 4), 1, jax.devices()))


def test_the_command_refuses_what_it_cannot_write_or_find_in_one_line(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(RUN))
    for options, said in (
        (["--topology", "v5e:3x3"], "v5e has no slice '3x3'"),
        (["--topology", "v5e:2x2", "--json", str(tmp_path / "none" / "plan.json")], "there is no directory"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(["plan", str(file), *options])
        assert stop.value.code == 1 and said in capsys.readouterr().err


def test_overrides_may_stand_before_and_after_the_options():
    options = cli._parsed(["plan", "run.yaml", "steps=3", "--topology", "v5e:4x4", "mesh.fsdp=4", "model.remat=true"])
    assert options.overrides == ["steps=3", "mesh.fsdp=4", "model.remat=true"]
    with pytest.raises(SystemExit):
        cli._parsed(["plan", "run.yaml", "--topology", "v5e:4x4", "--slice", "2", "--fast"])
