"""Joining the other processes of a run, as the environment or the caller says."""

from __future__ import annotations

import atexit
import os
import socket
import sys
import threading
from collections.abc import Mapping
from typing import NamedTuple

import jax

from grpo_jax.processes import group as groups

_settled = False  # whether this process has joined others, or has been found or told to be alone


class Announced(NamedTuple):
    """How many processes there should be, and who says so."""

    count: int
    source: str


def join(
    *,
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    timeout: float = 300.0,
    heartbeat: float = 60.0,
) -> None:
    """Become one of several processes, if there are several; before JAX has looked for devices.

    They are found by what the launcher says: TPU metadata, GKE and XPK, SLURM, Open MPI; or by JAX_COORDINATOR_ADDRESS,
    JAX_NUM_PROCESSES and JAX_PROCESS_ID, which the arguments stand for. One process joins nothing.

    coordinator: host:port of process 0. processes: how many; 1 overrides the launcher. process: number of this one.
    timeout: seconds to wait for all to come. heartbeat: seconds without a sign of life after which a process is dead,
    and the others stop.
    Raises: ValueError if what is given is incomplete. A process whose others do not come ends, with a message.
    """
    global _settled
    asked = (coordinator, processes, process) != (None, None, None)
    if groups.current() is not None or (_settled and not asked):
        return
    _settled = True
    given = _given(os.environ, coordinator, processes, process)
    announced = Announced(given[1], "as given") if given else announced_by(os.environ)
    if not jax.distributed.is_initialized():
        if announced is None or announced.count == 1:
            return
        _initialize(given, announced, timeout, heartbeat)
    from jax._src.distributed import global_state  # the client of the coordinator has no public name

    if global_state.num_processes > 1:
        group = groups.Group(global_state.client, index=global_state.process_id, count=global_state.num_processes)
        groups.enter(group)
        atexit.register(group.leave)


def announced_by(environment: Mapping[str, str]) -> Announced | None:
    """What the launcher of this process says of others."""
    from jax._src.clusters import ClusterEnv  # how JAX itself finds them

    platforms = environment.get("JAX_PLATFORMS", "")
    for launcher in ClusterEnv._cluster_types:
        alone = launcher.__name__ == "K8sCluster" and "JOB_COMPLETION_INDEX" not in environment  # a pod of no such job
        if launcher.opt_in_only_method or alone:
            continue
        if "tpu" in launcher.name and platforms and "tpu" not in platforms:
            continue  # a process that was told to stay off the TPU is no worker of it
        if launcher.is_env_present():
            count = launcher.get_process_count()
            if launcher.name == "slurm":  # the tasks of the job, also in a shell in it that is one task of its own
                count = int(environment.get("SLURM_STEP_NUM_TASKS", count))
            return Announced(count, f"that of {launcher.name or launcher.__name__}")
    return None


def _given(
    environment: Mapping[str, str], coordinator: str | None, processes: int | None, process: int | None
) -> tuple[str | None, int, int | None] | None:
    """Address, number of processes and number of this one, where the user gives them."""
    address = coordinator or environment.get("JAX_COORDINATOR_ADDRESS")
    found = {"processes": processes, "process": process}
    for what, variable in (("processes", "JAX_NUM_PROCESSES"), ("process", "JAX_PROCESS_ID")):
        if found[what] is None and variable in environment:
            try:
                found[what] = int(environment[variable])
            except ValueError:
                raise ValueError(f"{variable} is a whole number, got {environment[variable]!r}") from None
    number, mine = found["processes"], found["process"]
    if number == 1:
        return None, 1, None
    if number is None and mine is None and coordinator is None:
        return None  # an address alone is one that JAX uses with what the launcher says of the rest
    if address is None or number is None or mine is None:
        lacking = [
            n
            for n, v in zip(
                ("the coordinator's address", "the number of processes", "the number of this one"),
                (address, number, mine),
            )
            if v is None
        ]
        raise ValueError(
            f"of several processes each is told three things, and {' and '.join(lacking)} is not given: --coordinator "
            "HOST:PORT --processes N --process I, or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        )
    host, colon, port = address.rpartition(":")
    if not (host and colon and port.isdecimal()):
        raise ValueError(f"the coordinator's address is HOST:PORT, with the host of process 0, got {address!r}")
    if not 0 <= mine < number:
        raise ValueError(f"processes are numbered from 0 to {number - 1} where there are {number}, got process {mine}")
    return address, number, mine


def _initialize(
    given: tuple[str | None, int, int | None] | None, announced: Announced, timeout: float, heartbeat: float
) -> None:
    # JAX would end the others with a stack trace as soon as one dies, and takes SIGTERM for itself.
    jax.config.update("jax_enable_recoverability", True)
    jax.config.update("jax_enable_preemption_service", False)
    address, number, mine = given or (None, None, None)
    patience = threading.Timer(timeout, _give_up, (announced, timeout))
    patience.daemon = True
    patience.start()
    try:
        jax.distributed.initialize(
            coordinator_address=address,
            num_processes=number,
            process_id=mine,
            initialization_timeout=int(timeout) + 60,
            heartbeat_timeout_seconds=max(1, int(heartbeat)),
        )
    except RuntimeError as error:
        if "before" in str(error):
            raise RuntimeError(
                "JAX has computed something in this process already, too early to join the others: make the "
                "Experiment, or call grpo_jax.processes.join(), first"
            ) from error
        raise
    finally:
        patience.cancel()


def _give_up(announced: Announced, timeout: float) -> None:
    """JAX itself would wait longer, and then abort with a stack trace."""
    from jax._src.distributed import global_state

    address, mine = global_state.coordinator_address, global_state.process_id
    others = f"the other {announced.count - 1} of {announced.count} processes"
    if address is None:
        who = f"{others} and the address of the first"
    elif mine == 0:
        who = f"{others} to come to {address}"
    elif _answers(address):
        who = f"{others}: process 0 is there, at {address}, but not all of the rest"
    else:
        who = f"process 0 at {address}, where nothing answers"
    print(
        f"grpo-jax: process {mine} of {announced.count} ({socket.gethostname()}) waited {timeout:.0f} s for {who}. The "
        f"number of processes is {announced.source}; for a single one give --processes 1 or JAX_NUM_PROCESSES=1",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError:
        return False
    return True
