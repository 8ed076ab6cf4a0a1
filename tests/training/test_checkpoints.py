"""Checkpoints: bit-equal round trips, other meshes, donation, kills, what is kept, errors."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from grpo_jax.training import host_state
from grpo_jax.training.checkpoints import CheckpointError, Checkpoints
from grpo_jax.types import Contexts, Prompt, Request, Rollout

OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
update = jax.jit(OPTIMIZER.update)


def run_arrays(seed=0, width=16):
    """What a run saves: parameters, the optimizer's state (named tuples), a method's arrays of several dtypes."""
    keys = jax.random.split(jax.random.key(seed), 4)
    params = {
        "embedding": jax.random.normal(keys[0], (32, width)),
        "layers": {"up": jax.random.normal(keys[1], (2, width, 8)), "norm": jnp.full((2, width), jnp.pi)},
    }
    _, state = update(jax.tree.map(jnp.sin, params), OPTIMIZER.init(params), params)
    copy = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    return {
        "policies": {"policy": {"params": params, "opt_state": state}, "reference": {"params": copy}},
        "method": (
            jnp.array([jnp.nan, -0.0, jnp.inf]),
            {"count": jnp.int32(7), "seen": jnp.array([True, False])},
            None,
        ),
    }


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def bits(x):
    return np.asarray(x).tobytes()


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, a), (_, b) in zip(jax.tree.leaves_with_path(found), jax.tree.leaves_with_path(expected)):
        assert a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b), jax.tree_util.keystr(path)


def rollout():
    rows = np.arange(2, dtype=np.int32)
    per_decision = np.array([[-0.5, np.nan, 0.0], [-1.5, -0.25, np.nan]], np.float32)
    return Rollout(
        contexts=Contexts(
            tokens=rows[:, None], lengths=np.ones(2, np.int32), extras={"pixels": np.zeros((2, 3), np.uint8)}
        ),
        sampled_under=rows,
        trained_under=rows,
        completions=np.arange(6, dtype=np.int32).reshape(2, 3),
        lengths=np.array([2, 3], np.int32),
        completion_mask=per_decision < 0,
        behavior_logps=per_decision,
        sampler_logps=per_decision,
        finished=np.array([True, False]),
        temperature=np.ones(2, np.float32),
        prompt_ids=rows,
        index=rows,
        group_ids=np.array([0, -1], np.int32),
        weights=np.ones(2, np.float32),
        update_ids=-np.ones(2, np.int32),
        scores=np.zeros((2, 0), np.float32),
        columns={"level": rows},
        channels=("exact", "length"),
    )


HOST = {
    "step": 3,
    "rate": 0.1 + 0.2,
    "large": 2**80,
    "odd": [float("nan"), float("inf"), -0.0, 5e-324, True, None, "ünï\n", ""],
    "pair": (1, (2.0, ())),
    "$": {"$": "tuple", "items": [1]},
    "pool": {"order": np.arange(5)[::-1], "epoch": np.int64(2), "empty": np.zeros((0, 3), np.float16)},
    "half": np.array([1.5, np.nan, -0.0], ml_dtypes.bfloat16),
    "words": np.array(["a", "bcd"]),
    "scalar": np.array(3.5, np.float32),
    "columns": np.asfortranarray(np.arange(6.0).reshape(2, 3))[:, ::2],
    "prompt": Prompt(4, [{"role": "user", "content": "1+1="}], {"answer": "2"}),
    "asked": [Request(Prompt(1, "x"), count=3, prefix=(np.array([5]), np.array([np.nan])), stop=("\n",))],
}


def assert_same_host(found, expected):
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_same_host(found[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for a, b in zip(found, expected):
            assert_same_host(a, b)
    elif isinstance(expected, (np.ndarray, np.generic)):
        assert found.dtype == expected.dtype and found.shape == expected.shape and bits(found) == bits(expected)
    elif isinstance(expected, Request):
        assert_same_host(vars(found), vars(expected))
    else:
        assert repr(found) == repr(expected)


# ---------------------------------------------------------------------------------------------------------------------
# The host half


def test_host_state_comes_back_exactly():
    assert_same_host(host_state.decode(*host_state.encode(HOST)), HOST)


def test_a_rollout_comes_back_exactly():
    given = rollout()
    found = host_state.decode(*host_state.encode({"surplus": [given]}))["surplus"][0]
    assert type(found) is Rollout and (found.role, found.channels) == ("policy", ("exact", "length"))
    assert found.unit_ids is None
    assert_same(found, given)


@pytest.mark.parametrize(
    "value, message",
    [
        ({"seen": {3: 1}}, r"host\['seen'\] has the key 3 \(int\)"),
        ({"a": [0, {1, 2}]}, r"host\['a'\]\[1\] is a builtins\.set"),
        ({"a": jnp.ones(2)}, r"host\['a'\] is a JAX array"),
        ((np.array([None]),), r"host\[0\] is an array of dtype object"),
        ([np.zeros(2, [("x", "O")])], r"host\[0\] is an array of dtype"),
        (re.compile("x"), r"host is a re\.Pattern"),
    ],
)
def test_what_has_no_exact_form_is_refused_with_its_place(value, message):
    with pytest.raises(TypeError, match=message):
        host_state.encode(value)


# ---------------------------------------------------------------------------------------------------------------------
# Round trips


def test_arrays_and_host_come_back_bit_for_bit(tmp_path):
    arrays = run_arrays()
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(3, arrays, HOST)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.latest() == 3
        found, host = checkpoints.restore(3, abstract(arrays))
        assert_same(found, arrays)
        assert_same_host(host, HOST)
        assert_same_host(checkpoints.host(3), HOST)
        # The optimizer's state works, and goes on as the original does.
        policies = [tree["policies"]["policy"] for tree in (found, arrays)]
        states = [update(policy["params"], policy["opt_state"], policy["params"]) for policy in policies]
        assert_same(*states)


def test_arrays_without_elements_and_numpy_arrays(tmp_path):
    arrays = {"buffer": jnp.zeros((0, 4), jnp.int32), "table": np.arange(3.0, dtype=np.float32), "x": jnp.ones(2)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, arrays, None)
        found, host = checkpoints.restore(0, arrays)
    assert host is None
    assert_same(found, arrays)


@pytest.mark.parametrize("names, shape", [(("fsdp",), (8,)), (("data", "fsdp"), (2, 2)), (("tensor",), (1,))])
def test_restores_on_another_mesh(tmp_path, names, shape):
    def place(tree, names, shape):
        mesh = jax.make_mesh(
            shape, names, axis_types=(AxisType.Auto,) * len(names), devices=jax.devices()[: np.prod(shape)]
        )
        spec = PartitionSpec(names[-1])
        divides = lambda x: x.ndim and x.shape[0] % mesh.shape[names[-1]] == 0  # noqa: E731
        return jax.tree.map(
            lambda x: jax.device_put(x, NamedSharding(mesh, spec if divides(x) else PartitionSpec())), tree
        )

    arrays = place(run_arrays(), ("fsdp", "tensor"), (2, 4))
    like = abstract(place(run_arrays(seed=1), names, shape))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, arrays, {})
        found, _ = checkpoints.restore(1, like)
    assert_same(found, arrays)
    assert [x.sharding for x in jax.tree.leaves(found)] == [x.sharding for x in jax.tree.leaves(like)]


def test_part_of_a_checkpoint(tmp_path):
    arrays = run_arrays()
    params = {"policies": {"policy": {"params": arrays["policies"]["policy"]["params"]}}}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, arrays, {"name": "x"})
        assert_same(checkpoints.restore(1, abstract(params), partial=True)[0], params)
        with pytest.raises(
            CheckpointError, match=r"opt_state\.1\.0\.mu\.embedding: saved float32\[32, 16\], not expected"
        ):
            checkpoints.restore(1, abstract(params))
        shapes = checkpoints.shapes(1)
    assert shapes["policies.reference.params.layers.up"].shape == (2, 16, 8)
    assert shapes["policies.reference.params.layers.up"].dtype == jnp.bfloat16
    assert len(shapes) == len(jax.tree.leaves(arrays))


def test_buffers_may_be_donated_right_after_a_save(tmp_path):
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    arrays = {str(i): jnp.arange(400_000.0) + i for i in range(6)}
    expected = jax.tree.map(np.array, arrays)
    with Checkpoints(tmp_path) as checkpoints:
        table = np.arange(8.0)
        host = {"table": table}
        checkpoints.save(1, arrays, host)
        for _ in range(5):
            arrays = overwrite(arrays)
        jax.block_until_ready(arrays)
        table[:] = -1
        found, host = checkpoints.restore(1, abstract(arrays))
    assert_same(found, expected)
    np.testing.assert_array_equal(host["table"], np.arange(8.0))


# ---------------------------------------------------------------------------------------------------------------------
# What is kept, what is refused


def test_newest_and_best_are_kept(tmp_path):
    metrics = {1: 0.1, 2: 0.9, 3: None, 4: 0.9, 5: 0.5, 6: None, 7: 0.2}
    with Checkpoints(tmp_path, keep=2, keep_best=1) as checkpoints:
        for step, metric in metrics.items():
            checkpoints.save(step, {"x": jnp.full(2, step)}, {"step": step}, metric=metric)
        checkpoints.wait()
        assert (checkpoints.steps(), checkpoints.latest(), checkpoints.best()) == ([4, 6, 7], 7, 4)
    with Checkpoints(tmp_path, keep=1, keep_best=2) as checkpoints:  # metrics are read back from disk
        assert (checkpoints.steps(), checkpoints.best()) == ([4, 6, 7], 4)
        assert checkpoints.host(4) == {"step": 4}
        checkpoints.save(8, {"x": jnp.full(2, 8)}, {})
        checkpoints.wait()
        assert (checkpoints.steps(), checkpoints.best()) == ([4, 7, 8], 4)
    assert sorted(int(p.name) for p in tmp_path.iterdir()) == [4, 7, 8]


def test_without_metrics_only_the_newest_are_kept(tmp_path):
    with Checkpoints(tmp_path, keep=1, keep_best=3) as checkpoints:
        for step in range(3):
            checkpoints.save(step, {"x": jnp.ones(1)}, None)
        checkpoints.wait()
        assert (checkpoints.steps(), checkpoints.best()) == ([2], None)


def test_nothing_is_overwritten(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, {"x": jnp.ones(1)}, "first")
        for step in (5, 4):
            with pytest.raises(CheckpointError, match=f"cannot save step {step}: .* holds step 5 already"):
                checkpoints.save(step, {"x": jnp.zeros(1)}, "second")
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(CheckpointError, match="cannot save step 5"):
            checkpoints.save(5, {"x": jnp.zeros(1)}, "second")
        arrays, host = checkpoints.restore(5, {"x": jnp.zeros(1)})
    assert (arrays["x"][0], host) == (1, "first")


def test_a_directory_without_checkpoints(tmp_path):
    for directory in (tmp_path, tmp_path / "nothing"):
        with Checkpoints(directory) as checkpoints:
            assert (checkpoints.steps(), checkpoints.latest(), checkpoints.best()) == ([], None, None)
            with pytest.raises(CheckpointError, match=f"{re.escape(str(directory))} holds no finished checkpoint"):
                checkpoints.restore(3, {})
    assert not list(tmp_path.iterdir()), "reading must not write"


def test_a_checkpoint_of_another_model(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, run_arrays(), {})
        with pytest.raises(CheckpointError, match="no checkpoint of step 2: .* holds the steps \\[1\\]"):
            checkpoints.restore(2, {})
        expected = r"params\.embedding: saved float32\[32, 16\], expected float32\[32, 24\]"
        with pytest.raises(CheckpointError, match=expected):
            checkpoints.restore(1, abstract(run_arrays(width=24)))
        like = run_arrays()
        like["policies"]["reference"] = {"params": like["policies"]["policy"]["params"]}
        with pytest.raises(
            CheckpointError, match=r"reference\.params\.embedding: saved bfloat16\[32, 16\], expected float32"
        ):
            checkpoints.restore(1, abstract(like))
        like = run_arrays()
        like["policies"]["teacher"] = like["policies"].pop("reference")
        for partial in (False, True):
            with pytest.raises(CheckpointError, match=r"teacher\.params\.embedding: not in the checkpoint"):
                checkpoints.restore(1, abstract(like), partial=partial)


def test_arguments_are_checked_before_anything_is_written(tmp_path):
    directory = tmp_path / "checkpoints"
    with Checkpoints(directory) as checkpoints:
        with pytest.raises(TypeError, match=r"method\.0 is a float"):
            checkpoints.save(1, {"method": [1.0]}, {})
        with pytest.raises(TypeError, match="must be a tree with names"):
            checkpoints.save(1, jnp.ones(2), {})
        with pytest.raises(TypeError, match="the key 3"):
            checkpoints.save(1, {"x": jnp.ones(2)}, {3: 1})
        with pytest.raises(CheckpointError, match="finite number or None, got nan"):
            checkpoints.save(1, {"x": jnp.ones(2)}, {}, metric=float("nan"))
    assert not directory.exists()
    with pytest.raises(CheckpointError, match="keep must be at least 1"):
        Checkpoints(directory, keep=0)


# ---------------------------------------------------------------------------------------------------------------------
# Interruptions and time

KILLED = """
import os, signal, sys
import jax.numpy as jnp
from grpo_jax.training.checkpoints import Checkpoints

checkpoints = Checkpoints(sys.argv[1])
state = lambda step: {"x": jnp.arange(12_000_000.0) + step, "y": {"z": jnp.full((3,), step)}}
checkpoints.save(1, state(1), {"step": 1}, wait=True)
checkpoints.save(2, state(2), {"step": 2})
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_during_a_save_leaves_the_previous_one(tmp_path):
    directory = tmp_path / "checkpoints"
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "XLA_FLAGS": ""}
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(directory)], env=environment, capture_output=True, text=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    remains = [p for p in directory.iterdir() if p.name != "1"]
    assert remains, "the save was over before the kill: this test shows nothing"
    like = {"x": jax.ShapeDtypeStruct((12_000_000,), jnp.float32), "y": {"z": jax.ShapeDtypeStruct((3,), jnp.int32)}}
    with Checkpoints(directory) as checkpoints:
        assert (checkpoints.steps(), checkpoints.latest()) == ([1], 1)
        arrays, host = checkpoints.restore(1, like)
        assert host == {"step": 1}
        np.testing.assert_array_equal(arrays["x"], np.arange(12_000_000, dtype=np.float32) + 1)
        assert all(p.exists() for p in remains), "reading must not write"
    for step in (2, 3):  # the run comes to the same step again, or saves another
        again = tmp_path / f"again-{step}"
        shutil.copytree(directory, again)
        with Checkpoints(again) as checkpoints:
            checkpoints.save(step, {"x": jnp.ones(3)}, {"step": step, "again": True})
            checkpoints.wait()
            assert checkpoints.host(step) == {"step": step, "again": True}
        assert sorted(p.name for p in again.iterdir()) == ["1", str(step)], "remains of the killed save"


def test_a_small_save_blocks_for_less_than_100_ms(tmp_path):
    arrays, times = run_arrays(width=64), []
    with Checkpoints(tmp_path) as checkpoints:
        for step in range(6):
            checkpoints.wait()
            start = time.perf_counter()
            checkpoints.save(step, arrays, HOST)
            times.append(time.perf_counter() - start)
    assert min(times) < 0.1, times
