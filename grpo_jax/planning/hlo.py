"""The text of a compiled program: its computations, its loops, and how often each of them turns."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16}
BITS |= {"s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64, "f8e4m3fn": 8, "f8e5m2": 8}
PASSED = {"copy", "bitcast", "convert", "copy-start", "copy-done", "reshape", "broadcast"}
ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")


class Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    operands: list[str]
    rest: str
    root: bool

    def called(self, key: str) -> str | None:
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.rest)
        return found and found[1]

    def branches(self) -> list[str]:
        """The computations of a conditional or a call."""
        names = re.findall(r"(?:_computation|to_apply|calls)=%?([\w.\-]+)", self.rest)
        listed = re.search(r"branch_computations=\{([^}]*)\}", self.rest)
        return names + ([n.strip().lstrip("%") for n in listed[1].split(",")] if listed else [])

    @property
    def number(self) -> int:
        """What stands in its brackets: the value of a constant, the number of a parameter."""
        return int(float(self.rest.split(")")[0]))


Turns = Mapping[str, float]


class Module:
    """The text of a compiled program (`compiled.as_text()`), computation by computation."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry, here = "", None
        for line in text.splitlines():
            if line and not line[0].isspace() and line.rstrip().endswith("{") and "(" in line:
                name = line.removeprefix("ENTRY ").split(" ")[0].lstrip("%")
                here = self.computations.setdefault(name, {})
                self.entry = name if line.startswith("ENTRY") else self.entry
            elif here is not None and (instruction := _read(line)):
                here[instruction.name] = instruction

    def loops(self, computation: str | None = None) -> list[Instruction]:
        """The loops of a computation (default: the entry), in order; not those inside them."""
        return [i for i in self.computations[computation or self.entry].values() if i.opcode == "while"]

    def trips(self, loop: Instruction) -> int | None:
        """How often a loop turns that counts up to a constant; None where data decide.

        The compiler unrolls loops: the count need not go up by one.
        """
        here = self.computations[loop.called("condition") or ""]
        test = _root(here)
        sources = {o: here[o] for o in test.operands}
        if test.opcode == "fusion":
            outer, here = here, self.computations[test.called("calls") or ""]
            inside = [i for i in here.values() if i.opcode == "parameter"]
            test, sources = _root(here), {i.name: outer[test.operands[i.number]] for i in inside}
            sources |= {o: here[o] for o in test.operands if o not in sources}
        if test.opcode != "compare" or len(test.operands) != 2:
            return None
        counter, bound = (sources[o] for o in test.operands)
        if bound.opcode != "constant":
            return None
        place = re.search(r"index=(\d+)", counter.rest)
        if place is None or not re.match("[su]", counter.shape):
            return None
        start, step = self._course(loop, int(place[1]))
        return None if start is None or not step else max(0, -(-(bound.number - start) // step))

    def _course(self, loop: Instruction, place: int) -> tuple[int | None, int | None]:
        """Where the counter at that place of a loop's state starts, and by how much a turn moves it; None: as data
        say."""
        owner = next(here for here in self.computations.values() if here.get(loop.name) is loop)
        state, body = owner[loop.operands[0]], self.computations[loop.called("body") or ""]
        start = self._offset(owner, state.operands[place], None) if state.opcode == "tuple" else None
        root = _root(body)
        step = self._offset(body, root.operands[place], place) if root.opcode == "tuple" else None
        return start, step

    def _offset(self, here: dict[str, Instruction], name: str, place: int | None) -> int | None:
        """A scalar as a number, or as so much more than that place of the state of a loop; None if it is neither."""
        i = here.get(name)
        if i is None:
            return None
        if i.opcode == "constant":
            return i.number
        if i.opcode == "get-tuple-element" and place is not None and f"index={place}," in i.rest + ",":
            return 0
        if i.opcode in PASSED:
            return self._offset(here, i.operands[0], place)
        if i.opcode == "add":
            parts = [self._offset(here, o, place) for o in i.operands]
            return None if None in parts else sum(p for p in parts if p is not None)
        if i.opcode == "fusion":
            inner = self.computations[i.called("calls") or ""]
            values = {p.name: self._offset(here, i.operands[p.number], place) for p in inner.values() if _is_input(p)}
            constants = {
                n: p._replace(opcode="constant", rest=f"{values[n]})") if values.get(n) is not None else p
                for n, p in inner.items()
            }
            return self._offset(constants, _root(inner).name, None)
        return None

    def turns(self, loop: Instruction, asked: Turns) -> float:
        """How often a loop turns: by itself, or else as asked for it by its name (or "" for all)."""
        own = self.trips(loop)
        return asked.get(loop.name, asked.get("", 1)) if own is None else own

    def walk(self, asked: Turns) -> Iterator[tuple[str, float]]:
        """Every computation that is run, and how often; bodies of loops as often as they turn."""
        waiting = [(self.entry, 1.0)]
        while waiting:
            name, times = waiting.pop()
            yield name, times
            for i in self.computations[name].values():
                if i.opcode == "while":
                    turns = self.turns(i, asked)
                    waiting += [(i.called("body") or "", times * turns)] * bool(turns)
                elif i.opcode in ("conditional", "call", "async-start"):
                    waiting += [(n, times) for n in i.branches()]


def elements(shape: str) -> list[tuple[str, tuple[int, ...], str]]:
    """The arrays of a shape: type, sizes, layout."""
    return [(t, tuple(int(d) for d in dims.split(",") if d), layout) for t, dims, layout in ARRAY.findall(shape)]


def size(shape: str, *, everywhere: bool = False) -> float:
    """Bytes of a shape in main memory; `everywhere`: in fast memory too."""
    return sum(array_bytes(*a, everywhere=everywhere) for a in ARRAY.findall(shape))


def array_bytes(dtype: str, dims: str, layout: str = "", *, everywhere: bool = False) -> float:
    """Bytes with the padding of the tile, T(8,128) being 8 of the second most minor dimension by 128 of the last."""
    if "S(" in layout and not everywhere:
        return 0.0
    sizes = [int(d) for d in dims.split(",") if d]
    order = re.match(r"\{([\d,]+)", layout)
    tile = re.search(r"T\(([\d,]+)\)", layout)
    if order and tile and sizes:
        minor = [int(d) for d in order[1].split(",")]
        for d, t in zip(minor, reversed([int(t) for t in tile[1].split(",")])):
            sizes[d] = -(-sizes[d] // t) * t
    return math.prod(sizes) * BITS.get(dtype, 0) / 8


def _root(here: Mapping[str, Instruction]) -> Instruction:
    return next(i for i in here.values() if i.root)


def _is_input(i: Instruction) -> bool:
    return i.opcode == "parameter"


def _read(line: str) -> Instruction | None:
    found = _LINE.match(re.sub(r"/\*.*?\*/", "", line))
    if not found:
        return None
    root, name, shape, opcode, rest = found.groups()
    depth, end = 1, len(rest)
    for at, letter in enumerate(rest):
        depth += (letter in "({[") - (letter in ")}]")
        if depth == 0:
            end = at
            break
    operands = re.findall(r"%([\w.\-]+)", rest[:end])
    return Instruction(name, shape, opcode, operands, rest, bool(root))
