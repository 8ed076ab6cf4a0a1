"""What a compiled program sends between devices: how often, how much, along which axes, over which network."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from grpo_jax.planning.chips import Chip
from grpo_jax.planning.costs import Program, is_collective
from grpo_jax.planning.hlo import Instruction, Turns, size

_MESH = re.compile(r"mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?\s*\{([^}]*)\}")
_IOTA = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}")


class Collective(NamedTuple):
    """One kind of message along one set of axes, in a whole run of the program, per device.

    wire: bytes that a device sends; network: "ICI" inside a slice, "DCN" between slices, "ICI+DCN" both.
    """

    kind: str
    axes: tuple[str, ...]
    network: str
    times: float
    wire: float
    ici_seconds: float
    dcn_seconds: float

    def times_over(self, runs: float) -> Collective:
        return Collective(*self[:3], *(x * runs for x in self[3:]))

    def without(self, other: Collective) -> Collective:
        return Collective(*self[:3], *(a - b for a, b in zip(self[3:], other[3:])))


class Wires(NamedTuple):
    """The devices of a mesh by their number in the program: place in the mesh, slice, and place in the machine."""

    mesh: Mesh
    chip: Chip
    shape: tuple[int, ...]

    def axes(self, group: Sequence[int]) -> tuple[str, ...]:
        """The mesh axes along which the members of a group differ."""
        places = np.stack(np.unravel_index(np.asarray(group), self.mesh.devices.shape))
        return tuple(a for a, row in zip(self.mesh.axis_names, places) if (row != row[0]).any())

    def slices(self, group: Sequence[int]) -> int:
        flat = self.mesh.devices.flat
        return len({getattr(flat[i], "slice_index", 0) or 0 for i in group})

    def ici(self, group: Sequence[int]) -> float:
        """Bytes per second that a member can send to others of its slice: two ports of every side of the machine along
        which they lie, one where that side does not close to a ring."""
        flat = self.mesh.devices.flat
        places = np.array([_coordinates(flat[i]) for i in group])
        ports = 0
        for side, column in zip(self.shape, places.T):
            if len(set(column)) > 1:
                ports += 2 if side % self.chip.wraps == 0 else 1
        return self.chip.link * max(ports, 1)


def collectives(program: Program, wires: Wires, loops: Turns) -> list[Collective]:
    """What the program sends, the largest first. loops: turns of those loops that the compiler does not know."""
    found: dict[tuple, list[float]] = {}
    for i, times, kind in _messages(program, loops):
        group = group_of(i)
        if not group:
            group = list(range(wires.mesh.size))
        ends = _ends(i)
        inside, slices = max(1, len(group) // wires.slices(group)), wires.slices(group)
        if i.opcode.startswith("collective-permute"):
            ici, dcn = (0.0, ends.sent) if slices > 1 else (ends.sent, 0.0)
        else:
            ici = sent(kind, ends, inside)
            dcn = sent(kind, Ends(ends.sent / inside, ends.received / inside), slices)
        network = "+".join(name for name, moved in (("ICI", ici), ("DCN", dcn)) if moved) or "ICI"
        sums = found.setdefault((kind, wires.axes(group), network), [0.0] * 4)
        seconds = ici / wires.ici(group), dcn / wires.chip.dcn
        for n, more in enumerate((1.0, ici + dcn, *seconds)):
            sums[n] += times * more
    everything = [Collective(*key, *sums) for key, sums in found.items()]
    return sorted(everything, key=lambda c: -c.wire)


class Ends(NamedTuple):
    """Bytes that go in and come out of a collective, of one device."""

    sent: float
    received: float


def sent(kind: str, ends: Ends, members: int) -> float:
    """Bytes that one of so many members puts on the wire when all send as little as they can."""
    share = (members - 1) / members
    if kind.startswith("all-gather"):
        return ends.received * share
    return ends.sent * share * (2 if kind.startswith("all-reduce") else 1)


def _messages(program: Program, loops: Turns) -> Iterator[tuple[Instruction, float, str]]:
    """Every collective, how often it runs, and what it is. One that is spread over several fusions counts where it
    begins; a sum of which a fusion keeps each device's own share is a reduce-scatter."""
    spread: dict[str, tuple[Instruction, float, str]] = {}
    for name, times in program.walk(loops):
        for i in program.computations[name].values():
            if is_collective(i.opcode) and not i.opcode.endswith(("-done", "-update")):
                yield i, times, i.opcode.removesuffix("-start")
            if i.opcode in ("fusion", "async-start"):
                called = i.called("calls") or ""
                for inner in program.computations[called].values():
                    if is_collective(inner.opcode) and not inner.opcode.endswith("-done"):
                        channel = inner.called("channel_id") or inner.name
                        scattered = "reduce-scatter" in called + i.name
                        kind = "reduce-scatter" if scattered else inner.opcode.removesuffix("-start")
                        known = spread.get(channel)
                        if known is None or times < known[1]:
                            spread[channel] = inner, times, kind
    yield from spread.values()


def _ends(i: Instruction) -> Ends:
    """Sizes from the shapes; the result of an asynchronous start is (operands, results, ...)."""
    arrays = re.findall(r"\w+\[[\d,]*\](?:\{[^}]*\})?", i.shape)
    count = max(1, len(i.operands))
    if not i.opcode.endswith("-start"):
        received = sum(size(a, everywhere=True) for a in arrays)
        return Ends(received * _ratio(i), received)
    taken, given = arrays[:count], arrays[count : 2 * count]
    return Ends(*(sum(size(a, everywhere=True) for a in part) for part in (taken, given)))


def _ratio(i: Instruction) -> float:
    """How much larger what goes in is than what comes out."""
    members = len(group_of(i)) or 1
    if i.opcode.startswith("all-gather"):
        return 1 / members
    return float(members) if i.opcode.startswith("reduce-scatter") else 1.0


def group_of(i: Instruction) -> list[int]:
    """The devices that speak with the first; a permutation's first two ends. Empty: all of them."""
    if found := _MESH.search(i.rest):
        return _of_mesh(*found.groups())
    if found := _IOTA.search(i.rest):
        groups, dims, order = (_numbers(part or "") for part in found.groups())
        ids = np.arange(math.prod(dims)).reshape(dims)
        return (ids.transpose(order) if order else ids).reshape(groups)[0].tolist()
    if found := _LISTED.search(i.rest):
        return _numbers(re.findall(r"\{([\d, ]*)\}", found[1])[0])
    return []


def _of_mesh(sizes: str, dims: str | None, order: str | None, chosen: str) -> list[int]:
    """mesh['a'=2,'b'=4] {'b'}, or {'b':(1)2} for the first two of b's four after a stride of one; device_ids say in
    which order the devices fill it."""
    shape = {name: int(count) for name, count in re.findall(r"'([^']+)'=(\d+)", sizes)}
    ids = np.arange(math.prod(shape.values()))
    if dims and order:
        ids = ids.reshape(_numbers(dims)).transpose(_numbers(order))
    elif dims and len(_numbers(dims)) == ids.size:
        ids = np.array(_numbers(dims))
    ids = ids.reshape(list(shape.values()) or [1])
    ranges: list[Any] = [[0]] * len(shape)
    for name, before, count in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", chosen):
        whole, place = shape[name], list(shape).index(name)
        if count:
            stride = whole // (int(before) * int(count))
            earlier = ranges[place] if len(ranges[place]) > 1 else [0]
            ranges[place] = sorted({a + stride * n for a in earlier for n in range(int(count))})
        else:
            ranges[place] = range(whole)
    return [int(ids[place]) for place in itertools.product(*ranges)]


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n.strip()]


def _coordinates(device: Any) -> tuple[int, ...]:
    return tuple(getattr(device, "coords", (0,)))
