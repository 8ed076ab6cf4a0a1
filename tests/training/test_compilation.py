"""The cache of compiled programs, compilation ahead of need, and why something is compiled again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.training import compilation
from grpo_jax.training.ahead import Ahead
from grpo_jax.training.compilation import compile_lightly, keep_compiled, leave_constants_in_place
from grpo_jax.training.instruments import CompileCounter

SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_enable_compilation_cache",
)

PROGRAM = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
import grpo_jax.losses, grpo_jax.advantages

assert jax.config.jax_compilation_cache_dir is None, "importing the functions sets nothing"
from grpo_jax.training.compilation import keep_compiled
from grpo_jax.training.instruments import CompileCounter

jnp.arange(3) + 1  # compiled before the cache is there
kept = keep_compiled()
with CompileCounter() as compiled:
    x = np.linspace(0, 1, 35, dtype=np.float32).reshape(5, 7)
    total = jax.jit(lambda x: jnp.sum(jnp.tanh(x @ x.T) ** 3))(x)
    small = jnp.cumsum(x)
seen = compiled.total
bits = [np.asarray(x).tobytes().hex() for x in (total, small)]
print(json.dumps([str(kept), seen.count, seen.fetched, *bits]))
"""


@pytest.fixture
def settings(monkeypatch, tmp_path):
    """JAX without a cache, as in a process of its own; put back afterwards."""
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_a_second_process_compiles_nothing_and_computes_the_same_bits(tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_COMPILATION", "JAX_PERSISTENT"))}
    environment |= {"XDG_CACHE_HOME": str(tmp_path)}
    runs = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=120, check=True
        )
        runs.append(json.loads(done.stdout))
    (place, count, fetched, *bits), (_, again, fetched_again, *same) = runs
    assert place == str(tmp_path / "grpo_jax" / "compiled") and os.stat(place).st_mode & 0o77 == 0
    assert count > 1 and fetched == 0
    assert again == fetched_again == count, "all of them come from the cache"
    assert same == bits


def test_a_cache_of_the_users_own_stays(settings, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    size = jax.config.jax_compilation_cache_max_size
    assert keep_compiled() is None
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "mine")
    assert jax.config.jax_compilation_cache_max_size == size


def test_a_cache_that_is_switched_off_stays_off(settings, tmp_path):
    jax.config.update("jax_enable_compilation_cache", False)
    assert keep_compiled() is None and jax.config.jax_compilation_cache_dir is None
    assert not list(tmp_path.iterdir())


def test_a_directory_that_cannot_be_written_is_a_warning(settings, tmp_path):
    (tmp_path / "grpo_jax").write_text("a file where a directory should be")
    with pytest.warns(UserWarning, match=r"every run compiles anew: .*grpo_jax.*JAX_COMPILATION_CACHE_DIR") as told:
        assert keep_compiled() is None
    assert len(told) == 1 and jax.config.jax_compilation_cache_dir is None


def test_what_a_killed_writer_left_is_removed(settings, tmp_path):
    directory = tmp_path / "grpo_jax" / "compiled"
    directory.mkdir(parents=True)
    for name in ("whole-cache", "whole-atime", "cut-cache"):
        (directory / name).write_bytes(b"12345678")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert keep_compiled() == directory
    assert {p.name for p in directory.iterdir()} - {".lockfile"} == {"whole-cache", "whole-atime"}
    assert jax.config.jax_compilation_cache_max_size == compilation.CACHE_BYTES > 0
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0


def test_a_recompilation_is_told_with_the_argument_that_changed(caplog):
    @jax.jit
    def told_step(params, batch):
        return params["w"] * jnp.sum(batch["x"]) + batch["y"].sum()

    w = {"w": np.ones(3, np.float32)}
    told_step(w, {"x": np.ones((4, 5)), "y": np.ones(2)})
    with CompileCounter() as counter, counter.explained():
        told_step(w, {"x": np.ones((4, 7)), "y": np.ones(2)})
        assert counter.lap().causes == ("told_step: batch['x'] is f32[4,7], was f32[4,5]",)
        told_step(w, {"x": np.ones((4, 7), np.int32), "y": np.ones(2)})
        assert counter.lap().causes[0].startswith("told_step: batch['x'] is i32[4,7], was f32[4,")
        told_step(w, {"x": np.ones((4, 5)), "y": np.ones(2)})
        assert counter.lap() == (0, 0, {}, 0, ()), "known already"
    assert not jax.config.jax_explain_cache_misses
    assert not caplog.records, "none of it goes into JAX's log"
    told_step(w, {"x": np.ones((9, 9)), "y": np.ones(2)})
    assert counter.total.count == 2


@pytest.mark.parametrize("devices", [1, 8])
def test_a_program_that_was_compiled_ahead_is_not_compiled_again(devices):
    """Through the shapes of one program into the next; on one device they are known before it is compiled."""
    devices = jax.devices()[:devices]
    mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices)
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    ahead_first = jax.jit(lambda w, x: {"y": w * x, "z": x.sum()})
    ahead_second = jax.jit(lambda w, y, count: w + y["y"] * count, donate_argnums=0)
    w, x = (jax.device_put(np.full((8, 4), v, np.float32), everywhere) for v in (2, 3))
    count = np.int32(1)
    ahead = Ahead(x, mesh)
    ahead.then(
        lambda x: ahead.compiled(ahead_first, w, x), lambda y: [ahead.compiled(ahead_second, w, y, count), y][1:]
    )
    ahead.wait(0, x)
    with CompileCounter() as counter:
        y = ahead_first(w, x)
        ahead.wait(1, y)
        before = counter.total.count
        result = ahead_second(w, y, count)
    assert counter.total.count == before <= 1, "only the thread compiled, before the call"
    assert np.asarray(result).tolist() == np.full((8, 4), 8.0).tolist()


def test_a_wrong_guess_and_an_error_ahead_hold_nobody_up():
    done, gate = [], threading.Event()
    shape = lambda n: jax.ShapeDtypeStruct((n,), np.float32)  # noqa: E731
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    ahead = Ahead(shape(3), mesh).then(lambda x: gate.wait(60) and shape(4), done.append)
    ahead.wait(0, np.ones(2, np.float32))
    assert not gate.is_set(), "not waited for: it is done for other arguments"
    gate.set()
    ahead.wait(1, np.ones(4, np.float32))
    time.sleep(0.05)
    assert not done, "given up"

    with Ahead(shape(3), mesh).then(lambda x: time.sleep(0.2), done.append) as ahead:
        pass
    ahead.wait(0, np.ones(3, np.float32))
    assert not done, "left before its turn"

    ahead = Ahead(shape(3), mesh).then(lambda x: shape(4), lambda x: 1 / 0, done.append)
    for stage, n in enumerate((3, 4, 5)):
        ahead.wait(stage, np.ones(n, np.float32))
    assert not done


@pytest.mark.parametrize(
    ("flags", "platforms", "version", "plugin", "want"),
    [
        ("", "cpu", (0, 10, 2), True, "--xla_cpu_use_fusion_emitters=false"),
        ("--mine", "", (0, 10, 2), False, "--mine --xla_cpu_use_fusion_emitters=false"),
        ("--mine", "", (0, 10, 2), True, "--mine"),  # an accelerator's compiler may not know the flag
        ("", "cpu", (0, 11, 0), False, ""),  # a flag that XLA does not know ends the process
        ("--xla_cpu_use_fusion_emitters=true", "cpu", (0, 10, 2), False, "--xla_cpu_use_fusion_emitters=true"),
    ],
)
def test_light_compilation_where_it_is_known_to_do_good(monkeypatch, flags, platforms, version, plugin, want):
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.setattr(jax, "__version_info__", version)
    monkeypatch.setattr(compilation.importlib.util, "find_spec", lambda name: object() if plugin else None)
    compile_lightly()
    assert os.environ["XLA_FLAGS"] == want


@pytest.mark.parametrize(
    ("version", "given", "want"),
    [
        ("0.0.42.1", "", "--xla_msa_enable_while_redundant_eviction_elimination=false"),
        ("0.0.42.1", "--mine=1", "--mine=1 --xla_msa_enable_while_redundant_eviction_elimination=false"),
        ("0.0.42.1", "--xla_msa_enable_while_redundant_eviction_elimination=true", None),
        ("0.0.43", "--mine=1", None),  # a flag that libtpu does not know ends the process
        (None, "", None),
    ],
)
def test_the_tpu_compiler_is_told_where_the_flag_is_known(monkeypatch, version, given, want):
    def installed(name):
        if version is None:
            raise compilation.importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setenv("LIBTPU_INIT_ARGS", given)
    monkeypatch.setattr(compilation.importlib.metadata, "version", installed)
    leave_constants_in_place()
    assert os.environ["LIBTPU_INIT_ARGS"] == (given if want is None else want)
