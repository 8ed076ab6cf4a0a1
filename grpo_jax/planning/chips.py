"""TPU chips and the slices they come in: what each can compute, hold and move."""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from grpo_jax.training.compilation import installed, leave_constants_in_place

GIB = 2**30


class Chip(NamedTuple):
    """A TPU generation, per chip. Bandwidths are bytes per second."""

    name: str
    peak: float  # bfloat16 FLOP/s
    hbm: float  # bytes that a program may use
    hbm_bandwidth: float
    link: float  # of one of its ICI ports, in one direction
    ports: int
    dcn: float  # its share of its host's network
    shapes: tuple[str, ...]  # the slices that are offered
    wraps: int  # a side of the slice that is a multiple of this closes to a ring

    @property
    def ici(self) -> float:
        """All ports in one direction."""
        return self.link * self.ports


# Peak, HBM and ICI: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, read in 2026 (ICI in Gbps there, one direction of all
# ports). `hbm` is what the TPU compiler lets a program have, which is less than the 16, 32, 95 and 32 GB of the tables.
# Network: the tables' bandwidth of a pod divided by its chips (v5e 6.4 Tbps, v6e 25.6 Tbps, of 256); for v4 and v5p,
# whose tables have none, the hosts' interface of 100 and 200 Gbps divided by four chips.
_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16")
CHIPS = {
    "v4": Chip("v4", 275e12, 31.75 * GIB, 1228e9, 50e9, 6, 3.125e9, _CUBES, 4),
    "v5e": Chip("v5e", 197e12, 15.75 * GIB, 819e9, 50e9, 4, 3.125e9, _FLAT, 16),
    "v5p": Chip("v5p", 459e12, 95.74 * GIB, 2765e9, 100e9, 6, 6.25e9, (*_CUBES, "16x16x24"), 4),
    "v6e": Chip("v6e", 918e12, 31.25 * GIB, 1600e9, 100e9, 4, 12.5e9, _FLAT, 16),
}


class Slice(NamedTuple):
    """Some chips that nobody needs to have, as devices for the compiler."""

    chip: Chip
    shape: tuple[int, ...]
    slices: int
    devices: Sequence[Any]

    @property
    def name(self) -> str:
        once = f"{self.chip.name}:{'x'.join(map(str, self.shape))}"
        return once if self.slices == 1 else f"{self.slices} x {once}"


def parse_topology(name: str) -> tuple[Chip, tuple[int, ...]]:
    """The chip and the sides of a slice written v5e:4x4.

    Raises: ValueError naming the nearest slices that there are, for a chip or a shape that is not offered.
    """
    generation, _, sides = name.lower().partition(":")
    chip = CHIPS.get(generation)
    if chip is None:
        near = difflib.get_close_matches(generation, CHIPS, 1, 0.5)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"there is no TPU {generation!r}{meant} Known are {', '.join(CHIPS)}, as in v5e:4x4")
    if not re.fullmatch(r"\d+(x\d+)*", sides) or sides not in chip.shapes:
        raise ValueError(
            f"{generation} has no slice {sides!r}; the nearest are {', '.join(_nearest(sides, chip))} "
            f"(written {generation}:{chip.shapes[0]})"
        )
    return chip, tuple(map(int, sides.split("x")))


def _nearest(sides: str, chip: Chip) -> list[str]:
    """Shapes with about as many chips, the nearest first."""
    count = lambda shape: math.prod(map(int, re.findall(r"\d+", shape))) if re.search(r"\d", shape) else 0  # noqa: E731
    wanted = max(count(sides), 1)
    return sorted(chip.shapes, key=lambda s: abs(math.log(count(s) / wanted)))[:3]


def open_slice(name: str, slices: int = 1) -> Slice:
    """The devices of a topology for the compiler alone; nothing is asked of this machine, and nothing allocated.

    Raises: ValueError for a topology that is not offered, or that the installed libtpu refuses; ImportError without it.
    """
    chip, shape = parse_topology(name)
    if slices < 1:
        raise ValueError(f"--slices is the number of slices, 1 or more, got {slices}")
    _without_machine(chip, math.prod(shape))
    leave_constants_in_place()
    from jax.experimental import topologies

    options: dict[str, Any] = {} if slices == 1 else {"num_slices": slices}
    if chip.name == "v4":  # two cores that work as one device, as v4 machines have them
        options["chip_config_name"] = "megacore"
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=f"{chip.name}:{_sides(shape)}", **options)
    except Exception as error:
        version = installed("libtpu")
        raise ValueError(
            f"libtpu {version} does not compile for {chip.name}:{_sides(shape)}: {str(error).splitlines()[0]}. Another "
            "version may (pip install -U 'grpo_jax[tpu]'), or another slice"
        ) from error
    return Slice(chip, shape, slices, list(found.devices))


def _sides(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _without_machine(chip: Chip, chips: int) -> None:
    """Have libtpu be a compiler and nothing else: it asks no metadata server, and takes no chip that is here."""
    try:
        import libtpu  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "plans are made by the TPU compiler, libtpu, which is not installed here; it needs no TPU: "
            "pip install 'grpo_jax[tpu]'"
        ) from error
    kinds = {"v5e": "v5litepod", "v6e": "v6e", "v5p": "v5p", "v4": "v4"}
    for key, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": f"{kinds[chip.name]}-{min(chips, 8)}",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
    }.items():
        os.environ.setdefault(key, value)
