"""Which meshes are tried, what is advised, and how memory is split: sums that can be done by hand."""

import math
from types import SimpleNamespace

import pytest

from grpo_jax.planning import mesh_search
from grpo_jax.planning.advice import advise
from grpo_jax.planning.chips import CHIPS, GIB, Slice
from grpo_jax.planning.hlo import Module
from grpo_jax.planning.memory import Split, split, stacked
from grpo_jax.planning.mesh_search import Candidate, candidates, search
from grpo_jax.planning.programs import Built, Memory, refused
from grpo_jax.planning.rehearsal import read_shape
from grpo_jax.planning.roofline import Work, forward_flops
from grpo_jax.training.configuration import load_config


def config(*overrides, file="qwen3-8b"):
    return load_config(f"configs/plans/{file}.yaml", overrides)


def place(name, sides, slices=1):
    shape = tuple(map(int, sides.split("x")))
    return Slice(CHIPS[name], shape, slices, [None] * math.prod(shape) * slices)


def test_meshes_multiply_to_the_chips_and_divide_the_model():
    settings, where = config(), place("v5e", "8x8")
    shape, found = read_shape(settings), candidates(settings, where, read_shape(settings))
    assert len(found) > 3
    for candidate in found:
        mesh = candidate.mesh
        tensor = mesh.get("tensor", 1)
        assert math.prod(mesh.values()) == 64
        assert shape.num_heads % tensor == 0 and shape.hidden_size % mesh["fsdp"] == 0
        # 8.2e9 parameters in float32: policy, reference, gradient and two moments are 164 GB
        assert 5 * 4 * 8.19e9 / (mesh["fsdp"] * tensor) < 15.75 * GIB
    assert [c.guess for c in found] == sorted(c.guess for c in found)


def test_of_two_slices_every_candidate_divides_one():
    for candidate in candidates(config(), place("v5e", "4x8", 2), read_shape(config())):
        assert math.prod(candidate.mesh.values()) == 32


def test_a_slice_on_which_no_mesh_holds_the_weights_is_an_error_with_the_sum():
    with pytest.raises(ValueError, match=r"are 38\.\d GiB per chip.* of 15.75: take a larger slice"):
        search(config(), place("v5e", "2x2"))


def plan_of(fits, total, most, turns=4):
    memory = SimpleNamespace(total=total * GIB, activations=0.5 * total * GIB, cache=0.0, temporaries=0.3 * total * GIB)
    where = place("v5e", "4x4")
    free = where.chip.hbm - memory.total
    return SimpleNamespace(
        fits=fits, free=free, most=most, sweeps=turns, place=where, peak=SimpleNamespace(memory=memory)
    )


def test_the_search_shrinks_what_does_not_fit_grows_what_leaves_room_and_keeps_the_fastest(monkeypatch):
    asked = []

    def compiled(settings, where):
        mesh, tokens = settings.mesh, settings.batch.tokens_per_device
        asked.append((mesh.fsdp, mesh.tensor, tokens))
        if mesh.fsdp == 16:
            return plan_of(tokens <= 4096, 30.0 if tokens > 4096 else 12.0, 5.0)
        return plan_of(True, 4.0 if tokens == 16384 else 13.0, 6.0 if tokens == 16384 else 4.0)

    two = [Candidate({"data": 1, "fsdp": f, "tensor": 16 // f}, 16384, 1.0) for f in (16, 8)]
    monkeypatch.setattr(mesh_search, "candidates", lambda *a: two)
    monkeypatch.setattr(mesh_search, "make_plan", compiled)
    found = search(config(), place("v5e", "4x4"))
    # of 30 GiB 24 move with the size: a quarter of it makes 12; of 4 GiB 3.2 move: four times it make 13.6
    assert asked == [(16, 1, 16384), (16, 1, 4096), (8, 2, 16384), (8, 2, 65536)]
    assert found.best.most == 4.0
    assert found.lines() == "mesh: {data: 1, fsdp: 8, tensor: 2}\nbatch: {tokens_per_device: 65536}"


def test_nothing_that_fits_is_said_so(monkeypatch):
    monkeypatch.setattr(mesh_search, "make_plan", lambda *a: plan_of(False, 17.0, 5.0))
    found = search(config(), place("v5e", "4x4"))
    assert found.best is None and found.lines() == "" and len(found.tried) >= mesh_search.TRIED


def test_forward_flops_of_a_group_count_its_prompt_once():
    shape = read_shape(config(file="qwen2.5-1.5b"))
    per_token = 2 * 28 * 1536 * (2 * (12 + 2) * 128 + 3 * 8960)
    pairs = 512 * 513 / 2 + 8 * sum(512 + t for t in range(1, 1025))
    by_hand = (512 + 8 * 1024) * per_token + 4 * 28 * 12 * 128 * pairs + 8 * 1024 * 2 * 1536 * 151_936
    assert forward_flops(shape, Work(1, 8, 512, 1024)) == pytest.approx(by_hand, rel=1e-12)
    assert forward_flops(shape, Work(32, 8, 512, 1024)) == pytest.approx(32 * by_hand, rel=1e-12)


def test_layers_with_a_window_see_no_further():
    shape = read_shape(config("model.path=configs/plans/models/gemma-3-27b"))
    seen = sum(min(t, 1024) for t in range(1, 4097))
    everything = 4096 * 4097 / 2
    layers = [seen if slides else everything for slides in shape.windowed]
    matrices = 4096 * 2 * 62 * 5376 * (2 * (32 + 16) * 128 + 3 * 21504)
    expected = matrices + 4 * 32 * 128 * sum(layers)
    assert forward_flops(shape, Work(1, 0, 4096, 1)) == pytest.approx(expected, rel=1e-12)
    assert sum(shape.windowed) == 52


TEXT = """ENTRY %main (w: bf16[28,64,64]) -> bf16[28,4,128,64] {
  %w = bf16[28,64,64]{2,1,0} parameter(0)
  %kept = bf16[28,4,128,64]{3,2,1,0} broadcast(%w)
  %fast = bf16[28,4,128,64]{3,2,1,0:S(1)} broadcast(%w)
  %other = f32[9,4,128,64]{3,2,1,0} broadcast(%w)
  %t = (bf16[28,64,64]{2,1,0}, bf16[28,4,128,64]{3,2,1,0}, bf16[28,4,128,64]{3,2,1,0:S(1)}, f32[9,4,128,64]{3,2,1,0}) tuple(%w, %kept, %fast, %other)
  %l = (bf16[28,64,64]{2,1,0}, bf16[28,4,128,64]{3,2,1,0}, bf16[28,4,128,64]{3,2,1,0:S(1)}, f32[9,4,128,64]{3,2,1,0}) while(%t), condition=%c, body=%b
  ROOT %out = bf16[28,4,128,64]{3,2,1,0} get-tuple-element(%l), index=1
}
"""  # noqa: E501
STACK = 28 * 4 * 128 * 64 * 2


def test_what_a_loop_carries_for_all_layers_is_told_from_weights_and_from_fast_memory():
    assert stacked(Module(TEXT), 28) == STACK
    assert stacked(Module(TEXT), 7) == 0


@pytest.mark.parametrize("name, kind", [("sample", "cache"), ("update", "activations")])
def test_the_split_adds_up_to_what_the_compiler_says_and_what_the_run_holds_besides(name, kind):
    own = {"parameters": 4e6, "optimizer": 8e6} if name == "update" else {"copy": 2e6}
    arguments = sum(own.values()) + 5e5
    built = Built(name, 1, own, Memory(arguments, 1e5, 3e7, 1e4), TEXT, 1, 0.0)
    found = split(built, parameters=8e6, optimizer=8e6, layers=28)  # a reference is held besides
    assert getattr(found, kind) == STACK
    assert found.gradients == (4e6 if name == "update" else 0)
    besides = 8e6 + 8e6 - own.get("parameters", 0) - own.get("optimizer", 0)
    assert found.total == pytest.approx(built.memory.total + besides)
    assert found.batch == pytest.approx(5e5) and min(found) >= 0


@pytest.mark.parametrize(
    "message, needed",
    [
        ("RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (22.84G) exceeds", 22.84 * 2**30),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 512.5M of 15.75G hbm.", 0.5 * 2**20),
        ("RESOURCE_EXHAUSTED: something else", math.inf),
        ("INVALID_ARGUMENT: no such layout", None),
    ],
)
def test_what_the_compiler_says_of_a_program_without_room_is_read(message, needed):
    assert refused(message, 512 * 2**20) == needed


def test_advice_names_keys_that_the_configuration_has_and_what_saves_most_comes_first():
    settings, where = config("mesh.data=4", "mesh.fsdp=4"), place("v5e", "4x4")
    memory = Split(4e9, 4e9, 2e9, 2e9, 0, 3e9, 1e8, 6e9, 1e7)
    found = advise(settings, where, read_shape(settings), memory, {"data": 4, "fsdp": 4})
    assert [a.saves for a in found[:-1]] == sorted((a.saves for a in found[:-1]), reverse=True)
    assert ("mesh.data=1", "mesh.fsdp=16") in [a.keys for a in found]
    for advice in found:
        changed = config(*(key for key in advice.keys if not key.startswith("--")))
        assert changed != config()
    before = settings.batch.tokens_per_device
    assert any(a.keys == (f"batch.tokens_per_device={before // 2}",) for a in found)


def test_advice_does_not_repeat_what_is_so_already():
    keys = ("model.remat=true", "optimizer.name=adafactor", "sampling.weights=divided", "method.kl=0")
    settings = config(*keys, "data.max_prompt=8192", "sampling.max_new=8192", "batch.tokens_per_device=16384")
    memory = Split(4e9, 1e7, 0, 2e9, 0, 3e9, 1e8, 6e9, 1e7)
    found = advise(settings, place("v5e", "4x4"), read_shape(settings), memory, {"fsdp": 16})
    given = {key.partition("=")[0] for a in found for key in a.keys}
    assert not given & {"model.remat", "optimizer.name", "sampling.weights", "method.kl", "batch.tokens_per_device"}
