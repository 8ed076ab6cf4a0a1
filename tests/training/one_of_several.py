"""A program that the tests of several processes start as each of them: `one_of_several.py PLAN INDEX`."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from grpo_jax import processes

CONFIG = {
    "name": "several",
    "steps": 6,
    "model": {"path": "tiny", "dtype": "float32", "remat": False, "tiny": {"layers": 1, "hidden": 32, "mlp": 64}},
    "data": {"source": "addition", "max_prompt": 6},
    "rewards": ["exact"],
    "batch": {"prompts": 8, "group_size": 4, "tokens_per_device": 1024},
    "sampling": {"max_new": 3},
    "optimizer": {"learning_rate": 3e-3, "schedule": "cosine"},
    "evaluation": {"every": 0, "prompts": 4, "samples": 4, "k": [1, 4]},
    "checkpoint": {"every": 1, "keep": 8, "keep_best": 0},
    "mesh": {"data": -1, "fsdp": 2},
    "metrics": {"console": False, "tensorboard": False},
}


def variety(completions, **columns):
    """What every run of these tests is trained on: a score that any two completions may differ in."""
    return [len(set(text)) / 4 + (ord(text[0]) % 7 if text else 0) for text in completions]


def told(action) -> str:
    """What the action raises."""
    try:
        action()
    except Exception as error:
        return "\n".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())])
    return "nothing"


def trains(plan: dict, index: int) -> dict:
    """To step 4, with a reward that raises in step 1 and a signal in step 2, both in process 1 alone."""
    from grpo_jax.experiment import Experiment

    done = []

    def variety(completions, step, **columns):
        if index == 1 and step not in done:
            done.append(step)
            if step == 1:
                raise KeyError("no such key")
            if step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
        return globals()["variety"](completions)

    experiment = Experiment(plan["config"], reward_functions=[variety])
    said = {"raised": told(lambda: experiment.train(4)), "saved": experiment.checkpoints.latest()}
    experiment.train(4)
    said["stopped"] = experiment.run.state.step
    experiment.train(4)
    return said | {"end": experiment.run.state.step} | differences(plan["config"], index)


def differences(config: dict, index: int) -> dict:
    """What is said where the processes are not alike."""
    from grpo_jax.experiment import Experiment
    from grpo_jax.training.agreement import check_shared
    from grpo_jax.training.keys import fold
    from grpo_jax.training.loop import collect
    from grpo_jax.types import Prompt, Request, State

    def plan(state, draw, key):
        yield [Request(Prompt(index, "1+1="))]

    def first_fails():
        raise ValueError("only process 0 knows")

    run = SimpleNamespace(method=SimpleNamespace(plan=plan), state=State(7, {}, {}))
    other = {**config, "optimizer": {"learning_rate": 1e-3 * (1 + index)}}
    rows = [{"prompt": f"{i}+{index}=", "answer": str(i + index)} for i in range(8)]
    of_memory = {**config, "data": {"source": "memory"}}
    return {
        "configuration": told(lambda: Experiment(other)),
        "prompts": told(lambda: Experiment(of_memory, prompts=rows)),
        "plan": told(lambda: collect(run, fold(0))),
        "first": told(lambda: processes.run_by_first(first_fails, "a test")),
        "directory": told(lambda: check_shared(Path(config["directory"]) / f"of-{index}")),
    }


def is_killed(plan: dict, index: int) -> dict:
    """Resumed; process 2 dies in step 5 while it scores, when the checkpoint of step 5 is there."""
    from grpo_jax.experiment import Experiment

    saved = Path(plan["config"]["directory"]) / "checkpoints" / "5"

    def variety(completions, step, **columns):
        if index == 2 and step == 5:
            while not saved.is_dir():  # it is written behind the step
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGKILL)
        return globals()["variety"](completions)

    Experiment(plan["config"], reward_functions=[variety]).train()
    return {}


def works(plan: dict, index: int) -> dict:
    """For a minute; the victim fails by itself, or is killed."""
    from grpo_jax.processes import group

    group.SETTLE = 1.0
    with processes.together():
        processes.exchange("", "the beginning")
        if index == plan["victim"] and plan["killed"]:
            os.kill(os.getpid(), signal.SIGKILL)
        if index == plan["victim"]:
            raise OSError("disk full")
        time.sleep(60)
    return {}


def joins(plan: dict, index: int) -> dict:
    return {}


if __name__ == "__main__":
    plan, index = json.loads(sys.argv[1]), int(sys.argv[2])
    processes.join(
        coordinator=plan["coordinator"],
        processes=plan["count"],
        process=index,
        timeout=plan["timeout"],
        heartbeat=plan["heartbeat"],
    )
    print(json.dumps(globals()[plan["does"]](plan, index)), flush=True)
