"""The fastest way to lay a run over a slice: meshes and micro-batch sizes, tried by the compiler."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

from grpo_jax.models import TransformerConfig
from grpo_jax.planning.advice import KEPT
from grpo_jax.planning.chips import Slice
from grpo_jax.planning.plan import Plan, make_plan
from grpo_jax.planning.rehearsal import read_shape
from grpo_jax.planning.roofline import head_weights, layer_weights
from grpo_jax.training.configuration import Config, parse

MOST_TENSOR = 16  # beyond it a layer's messages outweigh what it computes
TRIED = 4  # meshes that are compiled: the most promising ones


class Candidate(NamedTuple):
    """Sizes of the mesh's axes, tokens of a micro-batch on one device, and a guess at a step's seconds."""

    mesh: dict[str, int]
    tokens: int
    guess: float

    @property
    def words(self) -> str:
        return f"{' x '.join(f'{axis} {size}' for axis, size in self.mesh.items())}, {self.tokens} tokens"

    @property
    def keys(self) -> list[str]:
        axes = [f"mesh.{axis}={size}" for axis, size in self.mesh.items()]
        return [*axes, f"batch.tokens_per_device={self.tokens}"]


class Found(NamedTuple):
    """The best plan that fits (None: none does), its candidate, and all that were compiled."""

    best: Plan | None
    chosen: Candidate | None
    tried: list[tuple[Candidate, Plan]]

    def lines(self) -> str:
        """What to put into the configuration."""
        if self.chosen is None:
            return ""
        axes = ", ".join(f"{axis}: {size}" for axis, size in self.chosen.mesh.items())
        return f"mesh: {{{axes}}}\nbatch: {{tokens_per_device: {self.chosen.tokens}}}"


def search(
    config: Config, place: Slice, *, said: Callable[[int, int, str], None] = lambda done, of, text: None
) -> Found:
    """Compile the most promising meshes, and keep the fastest plan that fits ("at worst"; of equals the freer one).

    A micro-batch is the configured one, then a smaller one where that does not fit, or a larger one where most of the
    memory is left.
    said: called with what is done, how much there is to do, and the candidate in hand.
    Raises: ValueError if no mesh can hold the weights and the optimizer's state.
    """
    shape = read_shape(config)
    waiting = candidates(config, place, shape)[:TRIED]
    if not waiting:
        raise ValueError(_no_room(config, place, shape))
    tried: list[tuple[Candidate, Plan]] = []
    while waiting:
        candidate = waiting.pop(0)
        said(len(tried), len(tried) + 1 + len(waiting), " ".join(candidate.keys))
        plan = make_plan(_with(config, candidate), place)
        tried.append((candidate, plan))
        known = {(tuple(c.mesh.items()), c.tokens) for c, _ in tried}
        more = _other_size(config, candidate, plan)
        if more and (tuple(more.mesh.items()), more.tokens) not in known:
            waiting.insert(0, more)
    said(len(tried), len(tried), "done")
    fitting = [(c, p) for c, p in tried if p.fits]
    if not fitting:
        return Found(None, None, tried)
    chosen, best = min(fitting, key=lambda pair: (round(pair[1].most, 3), -pair[1].free))
    return Found(best, chosen, tried)


def candidates(config: Config, place: Slice, shape: TransformerConfig) -> list[Candidate]:
    """Meshes of data, fsdp, tensor and sequence that divide the model and hold its weights, the most promising first.

    The guess: what compute takes at the peak, plus what a micro-batch waits for: weights gathered over fsdp, twice for
    a pass and back; activations summed over tensor, twice a layer each way; gradients summed over data.
    """
    chips = len(place.devices) // place.slices
    found = []
    for data, fsdp, tensor, sequence in _factorings(chips):
        mesh = {"data": data, "fsdp": fsdp, "tensor": tensor, "sequence": sequence}
        if (
            _divides(config, shape, mesh, place.slices)
            and floor(config, shape, fsdp * tensor * sequence) < place.chip.hbm
        ):
            used = {axis: size for axis, size in mesh.items() if size > 1 or axis in ("data", "fsdp")}
            tokens = config.batch.tokens_per_device
            found.append(Candidate(used, tokens, _guess(config, place, shape, mesh, tokens)))
    return sorted(found, key=lambda c: c.guess)


def _no_room(config: Config, place: Slice, shape: TransformerConfig) -> str:
    chips, chip = len(place.devices) // place.slices, place.chip
    least = floor(config, shape, chips) / 2**30
    if least * 2**30 < chip.hbm:
        return (
            f"no mesh of {place.name} divides this model evenly and holds its weights: {shape.num_heads} heads, width "
            f"{shape.hidden_size}, feed-forward {shape.intermediate_size} on {chips} chips a slice; take another slice"
        )
    return (
        f"no mesh of {place.name} holds this run: parameters, gradients and the state of {config.optimizer.name} alone "
        f"are {least:.3g} GiB per chip when divided over all of them, of {chip.hbm / 2**30:.4g}: take a larger slice, "
        "or an optimizer that keeps less (optimizer.name=lion or adafactor)"
    )


def floor(config: Config, shape: TransformerConfig, ways: int) -> float:
    """Bytes of a chip that no layout goes below: float32 weights, gradient, the optimizer's state, and a reference."""
    roles = 1 + bool(config.method.options.get("kl"))
    return 4 * _parameters(shape) * (roles + 1 + KEPT[config.optimizer.name]) / ways


def _parameters(shape: TransformerConfig) -> float:
    return layer_weights(shape) + head_weights(shape) * (1 if shape.tie_embeddings else 2)


def _factorings(chips: int) -> Iterator[tuple[int, int, int, int]]:
    sizes = [n for n in range(1, chips + 1) if chips % n == 0]
    for data, fsdp, tensor in itertools.product(sizes, repeat=3):
        if chips % (data * fsdp * tensor) == 0:
            yield data, fsdp, tensor, chips // (data * fsdp * tensor)


def _divides(config: Config, shape: TransformerConfig, mesh: dict[str, int], slices: int) -> bool:
    tensor, parts = mesh["tensor"], mesh["fsdp"] * mesh["sequence"]
    rows = mesh["data"] * mesh["fsdp"] * slices
    groups = config.batch.prompts * config.batch.group_size
    even = [(shape.num_heads, tensor), (shape.intermediate_size, tensor), (shape.hidden_size, parts)]
    long = config.data.max_prompt + config.sampling.max_new >= 4096  # shorter ones have too few tokens to divide
    sequence = mesh["sequence"] == 1 or (long and mesh["sequence"] <= 8)
    return sequence and tensor <= MOST_TENSOR and rows <= groups and all(n % m == 0 for n, m in even)


def _guess(config: Config, place: Slice, shape: TransformerConfig, mesh: dict[str, int], tokens: int) -> float:
    chip, chips, weights = place.chip, len(place.devices), layer_weights(shape)
    rows = config.batch.prompts * config.batch.group_size
    total = config.batch.prompts * config.data.max_prompt + rows * config.sampling.max_new
    sweeps = max(1, math.ceil(total / (tokens * mesh["data"] * mesh["fsdp"] * place.slices)))
    link = 2 * chip.link
    compute = 8 * 2 * weights * total / (chip.peak * chips)
    gathered = 4 * sweeps * 2 * weights / mesh["tensor"] * (mesh["fsdp"] > 1) / link
    width = 2 * shape.hidden_size * shape.num_layers
    local = total / (mesh["data"] * mesh["fsdp"] * mesh["sequence"] * place.slices)
    summed = 8 * width * local * (1 - 1 / mesh["tensor"]) / link
    joined = 2 * 4 * weights / (mesh["fsdp"] * mesh["tensor"]) * (mesh["data"] > 1) / link
    decoded = config.sampling.max_new * 2 * weights / mesh["tensor"] / chip.hbm_bandwidth
    return compute + gathered + summed + joined + decoded


def _other_size(config: Config, candidate: Candidate, plan: Plan) -> Candidate | None:
    """The micro-batch size worth trying next for a mesh: by powers of two, as much smaller as lets it fit, or, where
    most of the memory is left, as much larger as still does. What moves with it: activations, cache, temporaries."""
    memory, hbm, longest = plan.peak.memory, plan.place.chip.hbm, config.data.max_prompt + config.sampling.max_new
    moving = memory.activations + memory.cache + memory.temporaries
    if not plan.fits:
        sizes = [candidate.tokens // 2**n for n in range(1, 20) if candidate.tokens // 2**n >= longest]
        fitting = [n for n in sizes if memory.total - moving * (1 - n / candidate.tokens) <= hbm]
        return candidate._replace(tokens=(fitting or sizes)[0]) if sizes else None
    sizes = [candidate.tokens * 2**n for n in range(1, max(1, plan.sweeps).bit_length())]
    fitting = [n for n in sizes if memory.total + moving * (n / candidate.tokens - 1) <= 0.95 * hbm]
    return candidate._replace(tokens=fitting[-1]) if fitting and plan.free > 0.5 * hbm else None


def _with(config: Config, candidate: Candidate) -> Config:
    values = config.model_dump()
    values["mesh"] = {**candidate.mesh, "dcn_data": config.mesh.dcn_data}
    values["batch"]["tokens_per_device"] = candidate.tokens
    return parse(values)
