"""What to change when a run does not fit: keys of its configuration, with values and what they save."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from grpo_jax.models import TransformerConfig
from grpo_jax.planning.chips import Slice
from grpo_jax.planning.memory import Split
from grpo_jax.training.configuration import Config

# Arrays as large as the parameters that each optimizer keeps (with the momentum that it has by default).
KEPT = {"adamw": 2, "adam": 2, "muon": 1, "lion": 1, "sgd": 0, "adafactor": 0}
GIB = 2**30


class Advice(NamedTuple):
    """Keys to set, what they do, and about how many bytes of a chip they save."""

    keys: tuple[str, ...]
    why: str
    saves: float


def advise(
    config: Config, place: Slice, shape: TransformerConfig, memory: Split, mesh: Mapping[str, int]
) -> list[Advice]:
    """Changes that would make the fullest program smaller, those that save most first. Estimates: a plan with them set
    is the proof."""
    found = [*_smaller(config, memory), *_more_parts(config, shape, memory, mesh), *_cheaper(config, memory)]
    found = sorted((a for a in found if a.saves > 0.02 * memory.total), key=lambda a: -a.saves)
    return [*found, *_more_chips(place, memory, mesh)]


def _smaller(config: Config, memory: Split) -> list[Advice]:
    """Fewer tokens at once, or kept in another way."""
    found, moving = [], memory.activations + memory.cache + memory.temporaries
    longest, tokens = config.data.max_prompt + config.sampling.max_new, config.batch.tokens_per_device
    least = -(-longest // 256) * 256
    smaller = max(tokens // 2, least)
    if smaller < tokens:
        keys = (f"batch.tokens_per_device={smaller}",)
        found.append(Advice(keys, "fewer tokens at once", moving * (1 - smaller / tokens)))
    if config.model.remat is not True and memory.activations > 0:
        saved = 0.7 * memory.activations
        found.append(Advice(("model.remat=true",), "layers keep their input alone, and are computed again", saved))
    if config.model.dtype == "float32":
        found.append(Advice(("model.dtype=bfloat16",), "computation in half the bytes", moving / 2 + memory.copy / 2))
    if memory.copy and config.sampling.weights != "divided":
        keys, why = ("sampling.weights=divided",), "no gathered copy of the weights; every decode step waits for them"
        found.append(Advice(keys, why, memory.copy))
    return found


def _more_parts(config: Config, shape: TransformerConfig, memory: Split, mesh: Mapping[str, int]) -> list[Advice]:
    """Weights cut into more parts on the same chips."""
    lying = memory.parameters + memory.optimizer + memory.gradients
    data, fsdp, tensor = (mesh.get(axis, 1) for axis in ("data", "fsdp", "tensor"))
    found = []
    if data > 1 and shape.hidden_size % (fsdp * data) == 0:
        keys = ("mesh.data=1", f"mesh.fsdp={fsdp * data}")
        found.append(Advice(keys, "weights and optimizer divided over all rows' chips", lying * (1 - 1 / data)))
    if (
        fsdp % 2 == 0
        and data == 1
        and not shape.num_heads % (2 * tensor)
        and not shape.intermediate_size % (2 * tensor)
    ):
        keys = (f"mesh.fsdp={fsdp // 2}", f"mesh.tensor={2 * tensor}")
        wide = memory.activations + memory.temporaries + memory.copy
        found.append(Advice(keys, "heads, feed-forward and logits divided over more chips", wide / 3))
    return found


def _cheaper(config: Config, memory: Split) -> list[Advice]:
    """An optimizer that keeps less, or no reference."""
    found, kept = [], KEPT[config.optimizer.name]
    for name in ("lion", "adafactor"):
        if KEPT[name] < kept:
            why = {"lion": "one moment; a learning rate about a fifth", "adafactor": "row and column sums for moments"}
            keys = (f"optimizer.name={name}",)
            found.append(Advice(keys, why[name], memory.optimizer * (1 - KEPT[name] / kept)))
    if config.method.options.get("kl"):
        found.append(Advice(("method.kl=0",), "no reference policy is held or asked", memory.parameters / 2))
    return found


def _more_chips(place: Slice, memory: Split, mesh: Mapping[str, int]) -> list[Advice]:
    """The smallest slice of the same chips that holds what is divided over fsdp."""
    chips, lying = math.prod(place.shape), memory.parameters + memory.optimizer + memory.gradients
    for sides in place.chip.shapes:
        more = math.prod(map(int, sides.split("x"))) / chips
        rest = memory.total - lying
        if more > 1 and lying / more + rest / (more if mesh.get("sequence", 1) > 1 else 1) <= place.chip.hbm:
            factor = mesh.get("fsdp", 1) * round(more)
            keys = (f"--topology {place.chip.name}:{sides}", f"mesh.fsdp={factor}")
            return [Advice(keys, "more chips to divide the weights over", lying * (1 - 1 / more))]
    return []
