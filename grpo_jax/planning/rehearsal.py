"""A run in shapes alone: everything that `train` would compile for it, and nothing that holds a number."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grpo_jax import data, methods, models, rewards
from grpo_jax.sampling import LanguageModel
from grpo_jax.training import assemble
from grpo_jax.training.configuration import Config
from grpo_jax.training.keys import fold
from grpo_jax.training.loop import Run
from grpo_jax.training.optimizer import optimizer
from grpo_jax.training.step import Policy, moments
from grpo_jax.types import Method, PyTree, Request


class Blank:
    """A tokenizer of no model: every prompt has the longest length that is allowed, and is another one."""

    vocab_size, stop_ids, pad_id = 1, (0,), 0

    def __init__(self, length: int) -> None:
        self.length = length
        self._known: dict[str, int] = {}

    def encode(self, text: str) -> np.ndarray:
        return np.ones(max(1, len(text.split())), np.int32)

    def encode_prompt(self, prompt: Any) -> np.ndarray:
        ids = np.ones(self.length, np.int32)
        ids[0] = self._known.setdefault(str(prompt), len(self._known))
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return ""

    def save(self, path: Any) -> None:
        raise ValueError("a plan's tokenizer is blank and cannot be saved")


def read_shape(config: Config) -> models.TransformerConfig:
    """The model's shape, from its `config.json` alone: a directory, the file itself, or a name of the hub."""
    if config.model.path == "tiny":
        return assemble.tiny_shape(config, data.load_tokenizer(config.data.tokenizer or "bytes"))
    path = Path(config.model.path)
    if path.exists() or path.is_absolute() or len(path.parts) != 2:
        return models.read_config(path)
    from huggingface_hub import hf_hub_download

    try:
        return models.read_config(hf_hub_download(str(path), "config.json"))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{path} is no directory here, and as a hub name its config.json could not be had: {error}. A plan needs "
            "nothing but that file: give the path of a directory that holds it"
        ) from error


class Rehearsal(NamedTuple):
    """A run in shapes, its model and domain, and what the method's first round asks for."""

    run: Run
    model: assemble.Model
    language: LanguageModel
    requests: list[Request]

    @property
    def parameters(self) -> int:
        return sum(x.size for x in jax.tree.leaves(self.model.params))


def rehearse(config: Config, mesh: Mesh, *, memory: float | None = None) -> Rehearsal:
    """The run of a configuration on a mesh of devices with so many bytes each. Nothing is allocated there.

    Prompts are stand-ins of the longest length allowed, with the columns that rewards ask for.
    Raises: ValueError as `train` would for a method, rewards, a model or a mesh that cannot be.
    """
    shape = dataclasses.replace(read_shape(config), exact=config.model.exact)
    graphdef, params = models.abstract(shape)
    params = placed(params, models.shardings(models.logical_axes(shape), mesh))
    model = assemble.Model(shape, graphdef, params, Blank(config.data.max_prompt), mesh)
    method = methods.configured(config)
    functions = [rewards.resolve(r.model_dump(exclude_none=True)) for r in config.rewards]
    pool, columns = _pool(config, functions, model.tokenizer)
    transform, _ = optimizer(config.optimizer, config.steps * config.training.number)
    language = assemble.language_model(model, config, group_size=method.group_size, memory=memory)
    run = Run(
        method=method,
        domain=language.domain(),
        pool=pool,
        verify=assemble.Verifier(functions, columns, time_limit=config.reward_time_limit, on_error="mask"),
        optimizer=transform,
        mesh=mesh,
        layout=assemble.layout_of(
            config,
            mesh,
            group_size=config.batch.group_size,
            prompts=-(-config.batch.prompts // config.training.updates),
        ),
        policies=_policies(method, params, transform, mesh),
        state=method.init(pool),
        seed=config.seed,
        updates=config.training.updates,
        passes=config.training.passes,
    )
    return Rehearsal(run, model, language, _asked(run))


def placed(tree: PyTree, places: PyTree) -> PyTree:
    """Shapes, each with its sharding (or all with one)."""
    if isinstance(places, jax.sharding.Sharding):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=places), tree)
    return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=at), tree, places)


def everywhere(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def _policies(method: Method, params: PyTree, transform: Any, mesh: Mesh) -> dict[str, Policy]:
    trained = lambda: Policy(params, moments(params, transform, mesh))  # noqa: E731
    return {"policy": trained()} | {n: trained() if r.train else Policy(params) for n, r in method.roles.items()}


def _pool(config: Config, functions: Sequence[rewards.Reward], tokenizer: Any) -> tuple[data.Pool, list[str]]:
    """Four batches of made-up prompts, with a column for every parameter that a reward or a method would look for."""
    numeric = {"numeric": jnp.float32(0)}
    columns: dict[str, Any] = {"completion": "a"}  # what supervised methods read
    for reward in functions:
        known = {*rewards.STANDARD_COLUMNS, "prompts", "completions", *numeric}
        names = [n for n, p in inspect.signature(reward.function).parameters.items() if _free(p) and n not in known]
        value = 0.0 if rewards.is_in_graph(reward) else "0"
        columns |= dict.fromkeys([*names, *getattr(reward.function, "needs", ())], value)
    columns = {name: value for name, value in columns.items() if name not in rewards.STANDARD_COLUMNS}
    rows = [{"prompt": f"prompt {i}", **columns} for i in range(4 * config.batch.prompts)]
    pool = data.Pool.open(rows, tokenizer=tokenizer, seed=config.seed, max_prompt=config.data.max_prompt)
    return pool, list(columns)


def _free(parameter: inspect.Parameter) -> bool:
    required = parameter.default is parameter.empty
    return required and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)


def _asked(run: Run) -> list[Request]:
    """What the method's plan samples first."""
    key = fold(run.seed, run.state.step)
    select = lambda state, n: run.method.select(state, run.pool, n, fold(key, "select"))  # noqa: E731
    return next(run.method.plan(run.state, select, fold(key, "plan")))
