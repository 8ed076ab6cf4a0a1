"""Several processes train what one trains, stop together, and say what differs between them."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import one_of_several
import pytest

from grpo_jax.experiment import Experiment
from grpo_jax.processes import joining
from grpo_jax.training import agreement, assemble, verification
from grpo_jax.training.checkpoints import Checkpoints
from grpo_jax.training.mesh import make_mesh
from grpo_jax.types import Contexts, Prompt, Request, Rollout

FLAGS = "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count="


def start(does: str, *, count: int, devices: int, members=None, timeout=120, heartbeat=60, **plan) -> list:
    """The processes, each with so many virtual devices, as they run."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    plan |= {"does": does, "count": count, "coordinator": f"localhost:{port}"}
    plan |= {"timeout": timeout, "heartbeat": heartbeat}
    environment = {**os.environ, "XLA_FLAGS": FLAGS + str(devices), "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}
    program = [sys.executable, one_of_several.__file__, json.dumps(plan)]
    return [
        subprocess.Popen([*program, str(i)], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for i in (range(count) if members is None else members)
    ]


def ended(running: list) -> list[tuple[int, str, str]]:
    """Exit status, output and errors of each."""
    try:
        told = [process.communicate(timeout=300) for process in running]
    finally:
        for process in running:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(running, told)]


def config(directory: Path, **changes) -> dict:
    return {**one_of_several.CONFIG, "directory": str(directory), **changes}


def alone(directory: Path) -> Experiment:
    """One process with four devices, to the end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assemble, "make_mesh", lambda **sizes: make_mesh(**sizes, devices=jax.devices()[:4]))
        experiment = Experiment(config(directory), reward_functions=[one_of_several.variety])
        experiment.train()
    return experiment


def compare(one, other) -> None:
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5, atol=3e-7)


def groups(directory: Path) -> list[str]:
    """A group of every step: completions, scores, advantages."""
    return (directory / "samples.jsonl").read_text().splitlines()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Experiment:
    """The run of one process, six steps without a break."""
    return alone(tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture(scope="module")
def of_two(tmp_path_factory) -> tuple[Path, list[dict]]:
    """The run of two processes to step 4, and what each of them met with on the way."""
    directory = tmp_path_factory.mktemp("two") / "run"
    results = ended(start("trains", count=2, devices=2, config=config(directory)))
    assert [status for status, *_ in results] == [0, 0], results
    return directory, [json.loads(output.splitlines()[-1]) for _, output, _ in results]


def test_two_processes_train_what_one_trains(of_two, whole):
    """Through a reward that raises in one, and a signal to one: all stop, and go on, at the same step."""
    directory, said = of_two
    for one in said:
        assert re.search(r"RewardError: process 1 of 2 \(.+\): .*KeyError: 'no such key'", one["raised"])
        assert "the same command goes on" in one["raised"]
        assert (one["saved"], one["stopped"], one["end"]) == (1, 3, 4)
    assert len(groups(directory)) == 4 and groups(directory) == groups(whole.directory)[:4]
    like = {"policies": whole.run.policies}
    saved = Checkpoints(directory / "checkpoints")
    compare(saved.restore(4, like, partial=True)[0], whole.checkpoints.restore(4, like, partial=True)[0])
    assert saved.host(4)["evaluations"]["0"] == whole.evaluations[0]


def test_what_differs_is_said_on_every_process(of_two):
    first, second = of_two[1]
    for one in (first, second):
        assert re.search(r"optimizer.learning_rate: 0.001 on process 0 .+; 0.002 on process 1", one["configuration"])
        assert re.search(r"the prompts: 8 prompts, \w+ on process 0 .+; 8 prompts, \w+ on process 1", one["prompts"])
        assert re.search(
            r"disagree about what is sampled and scored in step 7: process 0 .+ prompts 0,.+ prompts 1,", one["plan"]
        )
        assert one["first"] == "ValueError: only process 0 knows"
        assert re.search(r"process 1 .+ does not see what process 0 writes into .+of-", one["directory"])
    assert first["plan"] == second["plan"] and first["configuration"] == second["configuration"]


def test_when_one_is_killed_all_stop_and_any_number_goes_on(of_two, whole):
    """Four processes go on from what two have saved; one is killed; one goes on from what the four have saved."""
    directory, _ = of_two
    running = start("is_killed", count=4, devices=1, config=config(directory), heartbeat=12)
    running[2].wait(300)
    killed = time.monotonic()
    results = ended(running)
    assert time.monotonic() - killed < 6 + 20
    assert [status for status, *_ in results] == [1, 1, -9, 1], results
    for i in (0, 1, 3):
        assert re.search(r"process 2 of 4 \(.+\)", results[i][2].strip().splitlines()[-1]), results[i][2]
    assert Checkpoints(directory / "checkpoints").latest() == 5
    rest = alone(directory)
    assert groups(directory) == groups(whole.directory)
    assert rest.evaluations[6] == whole.evaluations[6]
    compare(rest.run.policies, whole.run.policies)


def test_one_that_fails_and_a_coordinator_that_dies_end_the_others_by_name():
    started = time.monotonic()
    failing = start("works", count=3, devices=1, heartbeat=6, victim=1, killed=False)
    dying = start("works", count=2, devices=1, heartbeat=6, victim=0, killed=True)
    results, of_dying = ended(failing), ended(dying)
    assert time.monotonic() - started < 50  # they would work for a minute
    assert [status for status, *_ in results] == [1, 1, 1]
    for i in (0, 2):
        last = results[i][2].strip().splitlines()[-1]
        assert re.search(rf"process 1 of 3 \(.+\) failed: OSError: disk full; process {i} of 3 .+ stops too", last)
    assert "OSError: disk full" in results[1][2]
    assert of_dying[0][0] == -9 and of_dying[1][0] in (1, 134)
    assert "process 0 of 2" in of_dying[1][2].strip().splitlines()[-1]


def test_a_process_whose_others_do_not_come_says_whom_it_awaits():
    results = ended(start("joins", count=3, devices=1, members=[0, 1], timeout=4))
    assert [status for status, *_ in results] == [1, 1]
    first, second = (errors.strip().splitlines()[-1] for _, _, errors in results)
    assert re.search(r"process 0 of 3 \(.+\) waited 4 s for the other 2 of 3 processes to come to localhost:", first)
    assert "process 0 is there" in second or "where nothing answers" in second


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, None),
        ({"SLURM_NTASKS": "8"}, None),  # a shell in an allocation
        ({"SLURM_STEP_NUM_TASKS": "8"}, (8, "that of slurm")),
        ({"SLURM_STEP_NUM_TASKS": "1"}, (1, "that of slurm")),
        ({"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:3", "OMPI_COMM_WORLD_SIZE": "4"}, (4, "that of ompi")),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),  # a pod that is no part of a job
    ],
)
def test_launchers_are_recognised(environment, found, monkeypatch):
    if "SLURM_STEP_NUM_TASKS" in environment:
        names = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
        environment = dict.fromkeys(names, "0") | {"SLURM_NTASKS": "8"} | environment
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert joining.announced_by(os.environ) == found


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((None, 2, 0), "the coordinator's address is not given"),
        (("host:1", None, 0), "the number of processes is not given"),
        (("host:1", 2, None), "the number of this one is not given"),
        (("host", 2, 0), "HOST:PORT"),
        (("host:1", 2, 2), "numbered from 0 to 1"),
    ],
)
def test_what_is_given_incompletely_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        joining._given({}, *given)


def test_flags_stand_for_the_variables():
    variables = {"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
    assert joining._given(variables, None, None, None) == ("host:1", 4, 3)
    assert joining._given(variables, None, None, 0) == ("host:1", 4, 0)
    assert joining._given({"JAX_COORDINATOR_ADDRESS": "host:1"}, None, None, None) is None
    with pytest.raises(ValueError, match="JAX_PROCESS_ID is a whole number, got 'x'"):
        joining._given({**variables, "JAX_PROCESS_ID": "x"}, None, None, None)


def test_one_process_joins_nothing_whatever_the_launcher_says(monkeypatch):
    called = []
    monkeypatch.setattr(joining, "_settled", False)
    monkeypatch.setattr(joining, "announced_by", lambda environment: joining.Announced(4, "a launcher"))
    monkeypatch.setattr(joining, "_initialize", lambda *arguments: called.append(arguments))
    joining.join(processes=1)
    joining.join()  # as every Experiment does
    assert not called
    monkeypatch.setattr(joining, "_settled", False)
    joining.join()
    assert len(called) == 1


def rollout(prompts, **fields) -> Rollout:
    n = len(prompts)
    whole, each = np.zeros((n, 2), np.float32), np.zeros(n, np.int32)
    return Rollout(
        contexts=Contexts(tokens=np.zeros((1, 1), np.int32), lengths=np.ones(1, np.int32)),
        **dict.fromkeys(("sampled_under", "trained_under", "lengths", "index", "group_ids", "update_ids"), each),
        completions=np.arange(2 * n, dtype=np.int32).reshape(n, 2),
        **dict.fromkeys(("behavior_logps", "sampler_logps"), whole),
        completion_mask=whole == 0,
        finished=each == 0,
        temperature=np.ones(n, np.float32),
        weights=np.ones(n, np.float32),
        prompt_ids=np.asarray(prompts, np.int32),
        **{"scores": np.zeros((n, 0), np.float32), **fields},
    )


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_prompts_are_shared_whole(count):
    prompts = np.array([7, 7, 3, 9, 3, 9, 9, 1])
    shares = verification.shares_of(prompts, count)
    assert sorted(np.concatenate(shares).tolist()) == list(range(8)) and len(shares) == count
    owners = {int(p): {i for i, share in enumerate(shares) if p in prompts[share]} for p in prompts}
    assert all(len(who) == 1 for who in owners.values())


def test_scores_of_all_come_together(monkeypatch):
    """Three processes, one without a prompt: each sees its own rows, and all get the same whole."""
    rows, sent = rollout([5, 5, 8, 8, 8]), []

    def score(part: Rollout, at: np.ndarray) -> Rollout:
        scores = np.stack([part.prompt_ids, at], axis=1).astype(np.float32)
        return part.replace(
            scores=scores, channels=("prompt", "row"), channel_weights=(1.0, 0.5), columns={"first": part.completions}
        )

    def of_process(index: int, gather) -> Rollout:
        known = {"count": lambda: 3, "index": lambda: index, "gather": gather}
        for name, answer in known.items():
            monkeypatch.setattr(verification.processes, name, answer)
        return verification.scored(rows, score)

    def hand_over(message: bytes):
        sent.append(message)
        raise InterruptedError

    for i in range(3):
        with pytest.raises(InterruptedError):
            of_process(i, hand_over)
    whole = of_process(2, lambda message: sent)
    np.testing.assert_array_equal(whole.scores, [[5, 0], [5, 1], [8, 2], [8, 3], [8, 4]])
    np.testing.assert_array_equal(whole.columns["first"], rows.completions)
    assert (whole.channels, whole.channel_weights) == (("prompt", "row"), (1.0, 0.5))


def test_a_digest_sees_what_matters_and_nothing_that_a_process_adds():
    class Thing:
        """Its repr holds an address."""

    ask = lambda **changes: [Request(Prompt(3, "1+1=", {"x": Thing(), "y": 2}), **changes)]  # noqa: E731
    same = agreement.described(ask())
    assert same == agreement.described(ask()) and "prompts 3," in same
    for changes in ({"count": 2}, {"max_new": 4}, {"context": np.arange(3)}, {"options": {"top_k": 3}}):
        assert agreement.described(ask(**changes)) != same
    rows = rollout([1, 2])
    assert agreement.described(rows) == agreement.described(rows.replace(behavior_logps=rows.behavior_logps + 1))
    assert agreement.described(rows) != agreement.described(rows.replace(weights=rows.weights * 2))
    end = ({"seen": [1, 2]}, [rows])
    assert agreement.returned(end) != agreement.returned(({"seen": [2, 1]}, [rows]))
