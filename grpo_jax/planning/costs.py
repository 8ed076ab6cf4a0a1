"""What a program compiled for TPU costs, read from its text: bytes to and from main memory, FLOPs, bytes on the wire.

XLA's own `cost_analysis` counts the body of a loop once, whatever its trip count, and counts bytes that never leave the
fast memory of the core. Here a loop counts as often as it runs, a slice as what it takes, an update in place as what it
writes, an array in fast memory nothing, and a kernel what it says it costs; arrays count with their tiles' padding.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from grpo_jax.planning.hlo import ARRAY, Instruction, Module, Turns, array_bytes, elements, size

FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id", "replica-id"}
ROOM = 'custom_call_target="AllocateBuffer"'  # for what a loop will write; nothing is written yet
VIEWS = {"bitcast", "reshape", "convert", "copy", "transpose", "opt-barrier"}
# Matrix products of each block of scores in JAX's splash attention, whose kernels do not say what they cost.
SPLASH = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}


class Rates(NamedTuple):
    """FLOP/s, and bytes of main memory per second, of one device."""

    flops: float = math.inf
    bytes: float = math.inf


class Cost(NamedTuple):
    bytes: float = 0.0  # to and from the main memory of one device
    flops: float = 0.0  # of matrix products, on one device
    seconds: float = 0.0  # each instruction as slow as its FLOPs or its bytes are at the device's rates

    def __add__(self, other: tuple) -> Cost:
        return Cost(*(a + b for a, b in zip(self, other)))

    def times(self, n: float) -> Cost:
        return Cost(*(a * n for a in self))


class Program(Module):
    """A compiled program whose instructions are priced."""

    def __init__(self, text: str, rates: Rates = Rates()) -> None:  # noqa: B008
        super().__init__(text)
        self.rates = rates

    def total(self, *, loops: float | Turns = 1) -> Cost:
        """Of the whole program; a loop whose trip count the compiler does not know runs `loops` times (by name)."""
        return self.cost(self.entry, loops=loops)

    def cost(self, computation: str, *, loops: float | Turns = 1) -> Cost:
        asked = {"": loops} if isinstance(loops, (int, float)) else loops
        here = self.computations[computation]
        return sum((self._one(i, here, asked) for i in here.values()), Cost())

    def steps(self) -> list[str]:
        """The bodies of the loops whose trip count is not known: of a sampler, one token for every row."""
        everything = (i for here in self.computations.values() for i in here.values())
        return [i.called("body") or "" for i in everything if i.opcode == "while" and not self.trips(i)]

    def largest(self, computation: str, most: int = 12) -> Iterator[tuple[float, str]]:
        """The instructions that move most, for reading."""
        here = self.computations[computation]
        costs = sorted(((self._one(i, here, {}).bytes, i) for i in here.values()), key=lambda x: -x[0])
        for moved, i in costs[:most]:
            where = re.search(r'op_name="([^"]*)"', i.rest)
            yield moved, f"{i.opcode} {i.name} {i.shape[:90]} {where[1][-80:] if where else ''}"

    def _one(self, i: Instruction, here: dict[str, Instruction], asked: Turns) -> Cost:
        if i.opcode in FREE or i.opcode.endswith(("-done", "-update")) or ROOM in i.rest:
            return Cost()
        if i.opcode == "while":
            turns = self.turns(i, asked)
            return self.cost(i.called("body") or "", loops=asked).times(turns) if turns else Cost()
        if i.opcode in ("conditional", "call"):
            return max((self.cost(n, loops=asked) for n in i.branches()), default=Cost())
        shapes = [here[o].shape for o in i.operands if o in here]
        if i.opcode == "custom-call":
            return self._timed(*self._said(i, shapes))
        if is_collective(i.opcode):
            return self._timed(2 * sum(map(size, shapes)), 0.0)
        return self._timed(self._moved(i, here), self._flops(i, here))

    def _said(self, i: Instruction, shapes: list[str]) -> tuple[float, float]:
        """Bytes and FLOPs of a kernel: what it says, or what it reads and writes; of splash attention by its grid."""
        said = re.search(r'"cost_estimate":\s*\{([^}]*)\}', i.rest)
        numbers = dict(re.findall(r'"(\w+)":\s*"?(-?\d+)', said[1])) if said else {}
        moved = numbers.get("bytes_accessed") or numbers.get("bytes_accessed_estimate")
        products = next((n for name, n in SPLASH.items() if i.name.startswith(name)), 0)
        flops = float(numbers.get("flops", 0)) if said else 0.0
        if products and not said:
            kernel = _splash(shapes)
            flops = products * self._visited.get(kernel.queries, kernel.blocks) * kernel.product
        return float(moved or size(i.shape) + sum(map(size, shapes))), flops

    @functools.cached_property
    def _visited(self) -> dict[tuple[int, ...], int]:
        """Blocks of scores that attention visits, by the shape of its queries, as the forward kernels say it: the grid
        of a backward kernel has places for others too."""
        found: dict[tuple[int, ...], int] = {}
        for here in self.computations.values():
            for i in here.values():
                if i.name.startswith("splash_mha_fwd") and i.opcode == "custom-call":
                    kernel = _splash([here[o].shape for o in i.operands])
                    found[kernel.queries] = max(kernel.blocks, found.get(kernel.queries, 0))
        return found

    def _timed(self, moved: float, flops: float) -> Cost:
        return Cost(moved, flops, max(moved / self.rates.bytes, flops / self.rates.flops))

    def _moved(self, i: Instruction, here: dict[str, Instruction]) -> float:
        if i.opcode == "fusion":
            inner = self.computations[i.called("calls") or ""]
            reads = sum(min(size(here[o].shape), self._read(inner, n, here[o].shape)) for n, o in enumerate(i.operands))
            return reads + self._written(inner, i.shape)
        if i.opcode in ("copy-start", "slice-start", "dynamic-slice-start"):
            to = ARRAY.findall(i.shape)[0 if i.opcode == "copy-start" else 1]
            return (array_bytes(*to, everywhere=True) if size(here[i.operands[0]].shape) else 0.0) + array_bytes(*to)
        if i.opcode == "async-start":
            return sum(self._moved(inner, self.computations[i.called("calls") or ""]) for inner in self._roots(i))
        if i.opcode in ("dynamic-slice", "slice", "gather"):
            return (size(i.shape, everywhere=True) if size(here[i.operands[0]].shape) else 0) + size(i.shape)
        if i.opcode == "dynamic-update-slice":
            return (size(here[i.operands[1]].shape, everywhere=True) if size(i.shape) else 0.0) + size(
                here[i.operands[1]].shape
            )
        return size(i.shape) + sum(size(here[o].shape) for o in i.operands if o in here)

    def _roots(self, i: Instruction) -> list[Instruction]:
        return [x for x in self.computations[i.called("calls") or ""].values() if x.root]

    def _read(self, inner: dict[str, Instruction], number: int, outer: str) -> float:
        """Bytes that a fusion takes of one operand: slices of it, or all."""
        if not size(outer):
            return 0.0
        name = next(n for n, i in inner.items() if i.opcode == "parameter" and i.number == number)
        return self._taken(inner, name, size(outer))

    def _taken(self, inner: dict[str, Instruction], name: str, whole: float) -> float:
        taken = 0.0
        for user in inner.values():
            if name not in user.operands:
                continue
            at = user.operands.index(name)
            if user.opcode in ("dynamic-slice", "slice", "gather") and at == 0:
                taken += size(user.shape, everywhere=True)
            elif user.opcode == "dynamic-update-slice" and at == 0:
                continue
            elif user.opcode in VIEWS and not user.root:
                taken += self._taken(inner, user.name, whole)
            elif user.opcode == "fusion":
                nested = self.computations[user.called("calls") or ""]
                if not user.root and all(i.opcode in ("parameter", "copy", "bitcast") for i in nested.values()):
                    taken += self._taken(inner, user.name, whole)  # the same values in other tiles, as they are read
                    continue
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
        sizes = [array_bytes(*a) for a in ARRAY.findall(outer)]
        total = 0.0
        for out, whole in zip(outs, sizes):
            while out.opcode in ("bitcast", "fusion"):
                if out.opcode == "bitcast":
                    out = inner[out.operands[0]]
                else:
                    inner = self.computations[out.called("calls") or ""]
                    out = next(i for i in inner.values() if i.root)
            put = out.opcode == "dynamic-update-slice"
            total += min(whole, size(inner[out.operands[1]].shape, everywhere=True)) if put else whole
        return total

    def _flops(self, i: Instruction, here: dict[str, Instruction]) -> float:
        if i.opcode == "fusion" or i.opcode == "async-start":
            inner = self.computations[i.called("calls") or ""]
            return sum(self._flops(x, inner) for x in inner.values())
        return _products(i, here) if i.opcode in ("convolution", "dot") else 0.0


def is_collective(opcode: str) -> bool:
    return bool(re.match("all-|collective-|reduce-scatter|ragged-all|send|recv", opcode))


class _Splash(NamedTuple):
    """A splash attention kernel: its queries [..., heads, tokens, head size], blocks of scores of a head, and FLOPs of
    the product of one block for all heads."""

    queries: tuple[int, ...]
    blocks: int
    product: float


def _splash(shapes: list[str]) -> _Splash:
    """The first operand has a place for each block, the last integers of three dimensions are masks of a block."""
    arrays = [elements(shape)[0] for shape in shapes]
    queries = next(sizes for kind, sizes, _ in arrays if len(sizes) >= 3 and "f" in kind)
    *_, rows, columns = arrays[0][1]
    masks = [sizes[-2:] for kind, sizes, _ in arrays if kind == "s32" and len(sizes) >= 3]
    block = math.prod(masks[-1]) if masks else (queries[-2] // rows) ** 2
    return _Splash(queries, rows * columns, 2.0 * math.prod(queries[:-2]) * block * queries[-1])


def _plain(user: Instruction, number: int, inner: dict[str, Instruction]) -> str:
    return re.sub(r"S\(\d\)", "", inner[user.operands[number]].shape)


def _dims(shape: str) -> list[int]:
    return [int(d) for d in ARRAY.search(shape)[2].split(",") if d]


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
