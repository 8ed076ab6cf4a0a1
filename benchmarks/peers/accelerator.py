"""Decoding against the bandwidth of the device, and the update against its arithmetic: for a GPU, and to try anywhere.

    python -m benchmarks.peers.models qwen1.5b
    python -m benchmarks.peers.run_ours decode --device gpu --model qwen1.5b --dtype bfloat16
    python -m benchmarks.peers.run_ours mfu    --device gpu --model qwen1.5b --dtype bfloat16
    python -m benchmarks.peers.run_torch decode --device gpu --model qwen1.5b --dtype bfloat16     (and mfu)

`--opt batch.tokens_per_device=65536 --opt model.remat=false`, or any other key, tries another configuration.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import jax
import numpy as np

from benchmarks.peers import floors, limits, measure, ours
from benchmarks.peers.floors import Machine
from benchmarks.peers.workload import MODELS, shape_of
from grpo_jax.training.loop import iterate
from grpo_jax.types import Request

# Of the data sheets: dense bfloat16 operations and bytes of memory per second.
DEVICES = {
    "H200": Machine(989e12, 4.8e12),
    "H100 PCIe": Machine(756e12, 2.0e12),
    "H100 NVL": Machine(835e12, 3.9e12),
    "H100": Machine(989e12, 3.35e12),
    "A100-SXM4-80GB": Machine(312e12, 2.04e12),
    "A100": Machine(312e12, 1.55e12),
    "L4": Machine(121e12, 0.3e12),
}


def machine() -> Machine:
    """The device's data sheet, or what it was measured to do where it is not among DEVICES."""
    kind = jax.devices()[0].device_kind
    known = next((peak for name, peak in DEVICES.items() if name in kind), None)
    if known:
        return known
    numbers = limits.measured()
    return Machine(numbers["gflops"] * 1e9, numbers["gbs"] * 1e9)


def decode(asked: Namespace) -> dict[str, Any]:
    """The time of all decoding steps (a whole call less one that draws a single token each) against the roofline:
    weights, each prompt's keys and values, and the filled part of each row's own, read once a step."""
    shape, model = shape_of("decode", asked.opt), MODELS[asked.model]
    run = ours.experiment(asked, shape, beta=0.0)
    language, prompts = ours.unending(run), ours.prompts_of(run, shape.prompts)
    params, calls = {"policy": run.model.params}, iter(range(10**6))

    def draw(new: int) -> None:
        requests = [Request(p, count=shape.group, max_new=new) for p in prompts]
        rows = language.sample(params, requests, jax.random.key(next(calls)))
        if not (rows.lengths == new).all():
            raise RuntimeError(f"{new} tokens were asked for, {np.unique(rows.lengths)} came")

    whole = measure.timed(lambda: draw(shape.new), asked.repetitions, shape.rows * shape.new)
    one = measure.timed(lambda: draw(1), asked.repetitions, shape.rows)["median_s"]
    peak, size = machine(), np.dtype(asked.dtype).itemsize
    steps = shape._replace(new=shape.new - 1)
    roofline = floors.decode_bytes(model, steps, size=size) / peak.bandwidth
    seconds = whole["median_s"] - one
    return whole | {
        "shape": shape,
        "device_kind": jax.devices()[0].device_kind,
        "bandwidth": peak.bandwidth,
        "prefill_and_first_s": one,
        "decode_s": seconds,
        "roofline_s": roofline,
        "of_roofline": roofline / seconds,
        "memory_gib": _device_gib(),
    }


def mfu(asked: Namespace) -> dict[str, Any]:
    """Forward, backward and AdamW without a reference: what the model itself needs (each prompt once a group, nothing
    that is computed again) as a share of what the device could do in that time."""
    shape, model = shape_of("mfu", asked.opt), MODELS[asked.model]
    method = ours.on_fixed_rows(ours.fixed_rows(asked.model, shape), shape, beta=0.0, separate_old=False)
    run = ours.experiment(asked, shape, method=method, beta=0.0).begin()

    def once() -> None:
        iterate(run)
        jax.block_until_ready(run.params)

    numbers = measure.timed(once, asked.repetitions, shape.rows * (shape.prompt + shape.new))
    peak, needed = machine(), floors.update_flops(model, shape, passes=3)
    return numbers | {
        "shape": shape,
        "passes": 3,
        "device_kind": jax.devices()[0].device_kind,
        "flops": peak.flops,
        "mfu": needed / numbers["median_s"] / peak.flops,
        "layout": list(run.layout),
        "memory_gib": _device_gib(),
    }


def _device_gib() -> float | None:
    """The most memory that the device has held, where the backend says so."""
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return None if peak is None else peak / 2**30
