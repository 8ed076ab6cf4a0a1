"""What a program compiled for TPU costs, read from its text: bytes to and from main memory, and FLOPs.

XLA's own `cost_analysis` counts the body of a loop once, whatever its trip count, and counts bytes that never leave the
fast memory of the core. Here a loop counts as often as it runs, a slice as what it takes, an update in place as what it
writes, an array in fast memory nothing, and a kernel what it says it costs; arrays count with their tiles' padding.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16}
BITS |= {"s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64, "f8e4m3fn": 8, "f8e5m2": 8}
FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id", "replica-id"}
VIEWS = {"bitcast", "reshape", "convert", "copy", "transpose", "opt-barrier"}
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")


class Cost(NamedTuple):
    bytes: float = 0.0  # to and from the main memory of one device
    flops: float = 0.0  # of matrix products, on one device
    wire: float = 0.0  # bytes that collectives put out, of one device

    def __add__(self, other: tuple) -> Cost:
        return Cost(*(a + b for a, b in zip(self, other)))

    def times(self, n: float) -> Cost:
        return Cost(*(a * n for a in self))


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


class Program:
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

    def total(self, *, loops: float = 1) -> Cost:
        """Of the whole program; a loop whose trip count the compiler does not know runs `loops` times."""
        return self.cost(self.entry, loops=loops)

    def cost(self, computation: str, *, loops: float = 1) -> Cost:
        here = self.computations[computation]
        return sum((self._one(i, here, loops) for i in here.values()), Cost())

    def steps(self) -> list[str]:
        """The bodies of the loops whose trip count is not known: of a sampler, one token for every row."""
        everything = (i for here in self.computations.values() for i in here.values())
        return [i.called("body") or "" for i in everything if i.opcode == "while" and not self.trips(i)]

    def trips(self, loop: Instruction) -> int | None:
        """How often a loop runs that counts from 0 up to a constant; None if that is not what it does."""
        condition = self.computations[loop.called("condition")]
        test = next(i for i in condition.values() if i.root)
        if test.opcode == "fusion":
            condition = self.computations[test.called("calls")]
            test = next(i for i in condition.values() if i.root)
        bounds = [condition[o] for o in test.operands if condition[o].opcode == "constant"]
        return int(bounds[0].rest.split(")")[0]) if test.opcode == "compare" and bounds else None

    def largest(self, computation: str, most: int = 12) -> Iterator[tuple[float, str]]:
        """The instructions that move most, for reading."""
        here = self.computations[computation]
        costs = sorted(((self._one(i, here, 1).bytes, i) for i in here.values()), key=lambda x: -x[0])
        for size, i in costs[:most]:
            where = re.search(r'op_name="([^"]*)"', i.rest)
            yield size, f"{i.opcode} {i.name} {i.shape[:90]} {where[1][-80:] if where else ''}"

    def _one(self, i: Instruction, here: dict[str, Instruction], loops: float) -> Cost:
        if i.opcode in FREE or i.opcode.endswith(("-done", "-update")):
            return Cost()
        if i.opcode == "while":
            return self.cost(i.called("body"), loops=loops).times(self.trips(i) or loops)
        if i.opcode in ("conditional", "call"):
            names = re.findall(r"(?:_computation|to_apply|calls)=%?([\w.\-]+)", i.rest)
            listed = re.search(r"branch_computations=\{([^}]*)\}", i.rest)
            names += [n.strip().lstrip("%") for n in listed[1].split(",")] if listed else []
            return max((self.cost(n, loops=loops) for n in names), default=Cost())
        shapes = [here[o].shape for o in i.operands if o in here]
        if i.opcode == "custom-call":
            said = re.search(r'"cost_estimate":\s*\{([^}]*)\}', i.rest)
            numbers = dict(re.findall(r'"(\w+)":\s*"?(-?\d+)', said[1])) if said else {}
            moved = numbers.get("bytes_accessed") or numbers.get("bytes_accessed_estimate")
            return Cost(float(moved or _size(i.shape) + sum(map(_size, shapes))), float(numbers.get("flops", 0)))
        if re.match("all-|collective-|reduce-scatter|send|recv", i.opcode):
            sent = sum(_size(s, everywhere=True) for s in shapes)
            return Cost(2 * sum(map(_size, shapes)), 0.0, sent)
        moved = self._moved(i, here)
        return Cost(moved, self._flops(i, here))

    def _moved(self, i: Instruction, here: dict[str, Instruction]) -> float:
        if i.opcode == "fusion":
            inner = self.computations[i.called("calls")]
            reads = sum(
                min(_size(here[o].shape), self._read(inner, n, here[o].shape)) for n, o in enumerate(i.operands)
            )
            return reads + self._written(inner, i.shape)
        if i.opcode in ("copy-start", "slice-start", "dynamic-slice-start"):
            to = _ARRAY.findall(i.shape)[0 if i.opcode == "copy-start" else 1]
            return (_bytes(*to, everywhere=True) if _size(here[i.operands[0]].shape) else 0.0) + _bytes(*to)
        if i.opcode == "async-start":
            return sum(self._moved(inner, self.computations[i.called("calls")]) for inner in self._roots(i))
        if i.opcode in ("dynamic-slice", "slice", "gather"):
            return (_size(i.shape, everywhere=True) if _size(here[i.operands[0]].shape) else 0) + _size(i.shape)
        if i.opcode == "dynamic-update-slice":
            return (_size(here[i.operands[1]].shape, everywhere=True) if _size(i.shape) else 0.0) + _size(
                here[i.operands[1]].shape
            )
        return _size(i.shape) + sum(_size(here[o].shape) for o in i.operands if o in here)

    def _roots(self, i: Instruction) -> list[Instruction]:
        return [x for x in self.computations[i.called("calls")].values() if x.root]

    def _read(self, inner: dict[str, Instruction], number: int, outer: str) -> float:
        """Bytes that a fusion takes of one operand: slices of it, or all."""
        if not _size(outer):
            return 0.0
        name = next(
            n for n, i in inner.items() if i.opcode == "parameter" and i.rest.split(")")[0].strip() == str(number)
        )
        return self._taken(inner, name, _size(outer))

    def _taken(self, inner: dict[str, Instruction], name: str, whole: float) -> float:
        taken = 0.0
        for user in inner.values():
            if name not in user.operands:
                continue
            at = user.operands.index(name)
            if user.opcode in ("dynamic-slice", "slice", "gather") and at == 0:
                taken += _size(user.shape, everywhere=True)
            elif user.opcode == "dynamic-update-slice" and at == 0:
                continue
            elif user.opcode in VIEWS and not user.root:
                taken += self._taken(inner, user.name, whole)
            elif user.opcode == "fusion":
                nested = self.computations[user.called("calls")]
                for n, operand in enumerate(user.operands):
                    if operand == name:
                        taken += self._read(nested, n, _plain(user, n, inner))
            else:
                return whole
        return min(taken, whole)

    def _written(self, inner: dict[str, Instruction], outer: str) -> float:
        """Bytes that a fusion writes: what it puts into an array in place, or its whole outputs."""
        root = next(i for i in inner.values() if i.root)
        outs = [inner[o] for o in root.operands] if root.opcode == "tuple" else [root]
        sizes = [_bytes(*a) for a in _ARRAY.findall(outer)]
        total = 0.0
        for out, size in zip(outs, sizes):
            while out.opcode in ("bitcast", "fusion"):
                if out.opcode == "bitcast":
                    out = inner[out.operands[0]]
                else:
                    inner = self.computations[out.called("calls")]
                    out = next(i for i in inner.values() if i.root)
            put = out.opcode == "dynamic-update-slice"
            total += min(size, _size(inner[out.operands[1]].shape, everywhere=True)) if put else size
        return total

    def _flops(self, i: Instruction, here: dict[str, Instruction]) -> float:
        if i.opcode == "fusion" or i.opcode == "async-start":
            inner = self.computations[i.called("calls")]
            return sum(self._flops(x, inner) for x in inner.values())
        return _products(i, here) if i.opcode in ("convolution", "dot") else 0.0


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


def _size(shape: str, *, everywhere: bool = False) -> float:
    """Bytes of a shape in main memory; `everywhere`: in fast memory too."""
    return sum(_bytes(*a, everywhere=everywhere) for a in _ARRAY.findall(shape))


def _plain(user: Instruction, number: int, inner: dict[str, Instruction]) -> str:
    return re.sub(r"S\(\d\)", "", inner[user.operands[number]].shape)


def _bytes(dtype: str, dims: str, layout: str = "", *, everywhere: bool = False) -> float:
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


def _dims(shape: str) -> list[int]:
    return [int(d) for d in _ARRAY.search(shape)[2].split(",") if d]


def _products(i: Instruction, here: dict[str, Instruction]) -> float:
    """FLOPs of a matrix product, which the TPU compiler writes as a convolution."""
    left, right = (_dims(here[o].shape) for o in i.operands[:2])
    out = _dims(i.shape)
    if i.opcode == "dot":
        over = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.rest)[1]
        return 2.0 * math.prod(out) * math.prod(left[int(d)] for d in over.split(",") if d)
    lhs, rhs, to = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.rest).groups()
    window = re.search(r"window=\{([^}]*)\}", i.rest)
    options = dict(x.split("=") for x in window[1].split()) if window else {}
    pairs = 1.0
    for d in range(len([c for c in lhs if c.isdigit()])):
        n, k, m = left[lhs.index(str(d))], right[rhs.index(str(d))], out[to.index(str(d))]
        pairs *= _met(n, k, m, {name: value.split("x")[d] for name, value in options.items()})
    return 2.0 * out[to.index("b")] * out[to.index("f")] * right[rhs.index("i")] * pairs


def _met(n: int, k: int, m: int, window: dict[str, str]) -> int:
    """How many pairs of an output and a kernel position of one dimension meet an input that is there."""
    stride, spread, apart = (int(window.get(name, 1)) for name in ("stride", "lhs_dilate", "rhs_dilate"))
    low = int(window.get("pad", "0_0").split("_")[0])
    places = (o * stride + j * apart - low for o in range(m) for j in range(k))
    return sum(p % spread == 0 and 0 <= p <= (n - 1) * spread for p in places)
