"""Steps a second of the quickstart with an in-graph reward: whole steps as one program, beside the same part by part.

    python -m benchmarks.fused [CONFIG] [key.path=value ...]

Both record every step as `train` does. Blocks of steps alternate in one process; medians over the blocks.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable

import jax

from grpo_jax.experiment import Experiment
from grpo_jax.training.configuration import load_config
from grpo_jax.training.fused import Fused, obstacle
from grpo_jax.training.loop import iterate
from grpo_jax.training.metrics import Metrics
from grpo_jax.training.recording import Recorder

CONFIG, BLOCKS, SECONDS = "configs/quickstart_fused.yaml", 7, 3.0


def runner(path: str, overrides: list[str], directory: str, *, fused: bool) -> Callable[[int], None]:
    """A run that has compiled; called, it goes that many steps on."""
    experiment = Experiment(load_config(path, [*overrides, f"directory={directory}", "metrics.tensorboard=false"]))
    run = experiment.begin()
    recorder = Recorder(
        writer=Metrics(directory, tensorboard=False),
        note=print,
        clock=run.clock,
        compiled=experiment.compiled,
        truncated_limit=1.0,
        exact=experiment.config.model.exact,
        prompt=experiment.pool.__getitem__,
        decode=experiment.model.tokenizer.decode,
    )
    run.log = recorder
    if fused and (why_not := obstacle(run)):
        raise SystemExit(f"{path} cannot be fused: {why_not}")
    program = Fused(run) if fused else None

    def write(step: int, times: dict[str, float] | None = None) -> None:
        recorder.write(step, 0.0, [], groups=False, settled=False, times=times)

    def go(steps: int) -> None:
        if program:
            program.advance(run.state.step + steps, stopped=lambda: False, written=write)
        else:
            for step in range(run.state.step, run.state.step + steps):
                iterate(run)
                write(step)
        jax.block_until_ready(run.policies)

    go(24)  # compiles, and the fused one finds its pace
    return go


def rates(path: str, overrides: list[str]) -> dict[str, list[float]]:
    """Steps a second in each block, part by part and fused."""
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        goers = {
            "part by part": runner(path, overrides, one, fused=False),
            "fused": runner(path, overrides, other, fused=True),
        }
        start = time.perf_counter()
        goers["part by part"](8)
        steps = max(8, int(SECONDS * 8 / (time.perf_counter() - start)))
        found: dict[str, list[float]] = {name: [] for name in goers}
        for _ in range(BLOCKS):
            for name, go in goers.items():
                start = time.perf_counter()
                go(steps)
                found[name].append(steps / (time.perf_counter() - start))
    return found


def main(arguments: list[str]) -> None:
    path = arguments.pop(0) if arguments and "=" not in arguments[0] else CONFIG
    found = rates(path, arguments)
    medians = {name: statistics.median(values) for name, values in found.items()}
    for name, values in found.items():
        print(f"{name:14s} {medians[name]:8.2f} steps/s  (blocks {min(values):.2f} to {max(values):.2f})")
    print(f"{'ratio':14s} {medians['fused'] / medians['part by part']:8.2f}")


if __name__ == "__main__":
    main(sys.argv[1:])
