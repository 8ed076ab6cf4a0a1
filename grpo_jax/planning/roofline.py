"""How long a step takes at the least: FLOPs, main memory and networks against what the chips can do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from grpo_jax.models import TransformerConfig
from grpo_jax.planning.collectives import Collective, Wires, collectives
from grpo_jax.planning.costs import Cost, Program, Rates
from grpo_jax.planning.programs import Built


class Work(NamedTuple):
    """A step's rows: contexts, rows under each, their longest lengths in tokens, and updates that share them."""

    contexts: int
    rows: int
    prompt: int
    new: int
    updates: int = 1


class Part(NamedTuple):
    """A part of a step, all its runs: FLOPs and bytes of one chip, and seconds.

    chip: every instruction as slow as its FLOPs or its bytes are. useful: FLOPs of the model in this part on all chips,
    nothing computed twice.
    """

    name: str
    flops: float
    bytes: float
    compute: float
    hbm: float
    chip: float
    ici: float
    dcn: float
    useful: float

    @property
    def least(self) -> float:
        """Seconds with every message behind computation."""
        return max(self.chip, self.ici, self.dcn)

    @property
    def most(self) -> float:
        """Seconds with none."""
        return self.chip + self.ici + self.dcn

    @property
    def bound(self) -> str:
        """What it waits for longest."""
        waits = {"compute": self.compute, "HBM": self.hbm, "ICI": self.ici, "DCN": self.dcn}
        return max(waits, key=lambda name: waits[name])


def together(parts: Iterable[Part]) -> list[Part]:
    """Those of one name as one."""
    by_name: dict[str, Part] = {}
    for part in parts:
        known = by_name.get(part.name)
        by_name[part.name] = Part(part.name, *map(sum, zip(known[1:], part[1:]))) if known else part
    return list(by_name.values())


class Priced(NamedTuple):
    """A program's parts and what it sends, all its runs."""

    parts: list[Part]
    sends: list[Collective]


def price(built: Built, wires: Wires, config: TransformerConfig, work: Work) -> Priced | None:
    """A program against the rates of its chips; None if it was refused. A sampler has two parts, and draws every row to
    its full length."""
    if built.text is None:
        return None
    rates = Rates(wires.chip.peak, wires.chip.hbm_bandwidth)
    program = Program(built.text, rates)
    loops = counted(program, built.turns)
    useful = _useful(config, work)

    def part(name: str, cost: Cost, sends: list[Collective]) -> Part:
        moved, flops, chip = cost.times(built.runs)
        ici, dcn = (sum(getattr(c, f"{net}_seconds") for c in sends) * built.runs for net in ("ici", "dcn"))
        share = useful.get(name.split(" ")[0], 0.0) * (built.name == "sample" if built.samples else built.runs)
        return Part(name, flops, moved, flops / rates.flops, moved / rates.bytes, chip, ici, dcn, share)

    cost, sends = program.total(loops=loops), collectives(program, wires, loops)
    everything = [c.times_over(built.runs) for c in sends]
    if not built.samples:
        return Priced([part(built.name, cost, sends)], everything)
    still = dict.fromkeys(loops, 0.0)
    before, quiet = program.total(loops=still), collectives(program, wires, still)
    known = {c[:3]: c for c in quiet}
    later = [c.without(known[c[:3]]) if c[:3] in known else c for c in sends]
    return Priced([part("prefill", before, quiet), part("decode", cost + before.times(-1), later)], everything)


def counted(program: Program, turns: Sequence[int]) -> dict[str, float]:
    """Turns of the loops that the compiler cannot count and that compute: in their order, and none of those beyond,
    which are for the rows that are left when others have finished. Here none finishes early."""
    unknown = [loop for loop in program.loops() if program.trips(loop) is None]
    computing = [loop.name for loop in unknown if program.cost(loop.called("body") or "").flops > 0]
    return dict.fromkeys((loop.name for loop in unknown), 0.0) | {n: float(t) for n, t in zip(computing, turns)}


def layer_weights(config: TransformerConfig) -> float:
    """Parameters of all layers' matrices."""
    heads = 2 * (config.num_heads + config.num_kv_heads) * config.head_dim
    return 1.0 * config.num_layers * config.hidden_size * (heads + 3 * config.intermediate_size)


def head_weights(config: TransformerConfig) -> float:
    return 1.0 * config.hidden_size * config.vocab_size


def forward_flops(config: TransformerConfig, work: Work) -> float:
    """Of one pass over all contexts and rows, each context once: 2 per weight and token, and 4 per visible pair of
    tokens, head and head size."""
    tokens = work.contexts * (work.prompt + work.rows * work.new)
    windows = [config.sliding_window if slides else None for slides in config.windowed]
    pairs = work.contexts * sum(_pairs(work, window) for window in windows)
    matrices = layer_weights(config) * tokens + head_weights(config) * work.contexts * work.rows * work.new
    return 2 * matrices + 4.0 * config.num_heads * config.head_dim * pairs


def _pairs(work: Work, window: int | None) -> float:
    """Pairs of a context and its rows in which one token sees the other."""

    def line(n: int) -> float:
        reach = n if window is None else min(n, window)
        return reach * (reach + 1) / 2 + (n - reach) * reach

    return line(work.prompt) + work.rows * (line(work.prompt + work.new) - line(work.prompt))


def _useful(config: TransformerConfig, work: Work) -> dict[str, float]:
    """FLOPs that a part of a step cannot do without, by its name or the first word of it."""
    whole, prompts = forward_flops(config, work), forward_flops(config, work._replace(rows=0))
    return {"prefill": prompts, "decode": whole - prompts, "log-probs": whole, "update": 3 * whole / work.updates}
