"""What a compiled program sends between devices, read from its text."""

import math
import re
from typing import NamedTuple

KINDS = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"


class Collective(NamedTuple):
    kind: str
    shapes: list[tuple[int, ...]]  # of its results, on one device
    floating: bool
    operation: str  # what it was traced from
    looped: bool

    @property
    def size(self):
        return max(map(math.prod, self.shapes))


def collectives(text: str) -> list[Collective]:
    """Those that join more than one device."""
    found, entry = [], False
    for line in text.splitlines():
        if line and not line[0].isspace() and line.rstrip().endswith("{"):
            entry = line.startswith("ENTRY")
        match = re.search(rf"= (.+?) ({KINDS})(?:-start)?\(", line)
        if match is None or re.search(r"replica_groups=\{(\{\d+\},?)+\}", line):
            continue
        arrays = re.findall(r"(\w+?\d*)\[([\d,]*)\]", match[1])
        source = re.search(r'op_name="([^"]*)"', line)
        found.append(
            Collective(
                match[2],
                [tuple(map(int, dims.split(","))) if dims else () for _, dims in arrays],
                any(name[0] in "fb" for name, _ in arrays),
                source[1] if source else "",
                not entry,
            )
        )
    return found
