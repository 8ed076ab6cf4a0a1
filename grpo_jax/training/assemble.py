"""From a configuration to the parts of a run: model, tokenizer, prompts, rewards, and the shapes that follow."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array

from grpo_jax import data, models, rewards
from grpo_jax.models.sharding import ways
from grpo_jax.processes import place
from grpo_jax.references import load_function
from grpo_jax.sampling import LanguageModel, bucket
from grpo_jax.sampling.weights import arrange
from grpo_jax.training.batches import put
from grpo_jax.training.configuration import Config
from grpo_jax.training.deal import Layout, choose_layout
from grpo_jax.training.keys import fold
from grpo_jax.training.mesh import make_mesh, shards
from grpo_jax.training.step import Policy, begin
from grpo_jax.types import Batch, Method, Prompt, PyTree, Request, Rollout

if TYPE_CHECKING:
    from grpo_jax.training.ahead import Ahead
    from grpo_jax.training.loop import Run

# Sampling keeps no activations: a launch holds this many times the tokens that a micro-batch of training does.
SAMPLING_TOKENS = 8


class Model(NamedTuple):
    """A policy in memory: structure, parameters and tokenizer."""

    config: models.TransformerConfig
    graphdef: Any
    params: PyTree
    tokenizer: data.Tokenizer
    mesh: Mesh

    def exact(self) -> Model:
        """The same, with arithmetic as in `models.exact`."""
        config = dataclasses.replace(self.config, exact=True)
        return self._replace(config=config, graphdef=models.abstract(config)[0])


def load_model(path: str | Path, *, tokenizer: str | None = None, mesh: Mesh | None = None) -> Model:
    """A Hugging Face directory, or the name of a model that is in the local hub cache, with its tokenizer.

    Weights are float32 on `mesh` (default: all devices as one data axis). Raises: as `models.load`.
    """
    mesh = mesh or make_mesh()
    folder = _local(path)
    config, graphdef, params = models.load(folder, mesh=mesh)
    chosen = data.load_tokenizer(tokenizer or folder)
    if chosen.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer {tokenizer or folder} has {chosen.vocab_size} ids, but the model {path} has only "
            f"{config.vocab_size}: give the tokenizer that belongs to the model (data.tokenizer)"
        )
    return Model(config, graphdef, params, chosen, mesh)


def tiny_model(config: Config, mesh: Mesh) -> Model:
    """A small transformer of random weights, with the byte-level tokenizer unless another is named."""
    tokenizer = data.load_tokenizer(config.data.tokenizer or "bytes")
    shape = tiny_shape(config, tokenizer)
    graphdef, params = models.create(shape, jax.random.key(config.seed))
    params = jax.tree.map(place, params, models.shardings(models.logical_axes(shape), mesh))
    return Model(shape, graphdef, params, tokenizer, mesh)


def tiny_shape(config: Config, tokenizer: data.Tokenizer) -> models.TransformerConfig:
    """What model.tiny describes."""
    sizes = config.model.tiny
    return models.TransformerConfig(
        family="qwen3",
        query_key_norm=True,
        qkv_bias=False,
        vocab_size=tokenizer.vocab_size,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.mlp,
        num_layers=sizes.layers,
        num_heads=sizes.heads,
        num_kv_heads=sizes.kv_heads,
        head_dim=sizes.hidden // sizes.heads,
        initializer_range=sizes.initializer_range,
        max_length=4096,
        eos_token_ids=tuple(int(i) for i in tokenizer.stop_ids),
        pad_token_id=int(tokenizer.pad_id),
    )


def open_model(config: Config) -> Model:
    mesh = make_mesh(**config.mesh.model_dump())
    if config.model.path == "tiny":
        model = tiny_model(config, mesh)
    else:
        model = load_model(config.model.path, tokenizer=config.data.tokenizer, mesh=mesh)
    return model.exact() if config.model.exact else model


def language_model(
    model: Model, config: Config, *, group_size: int, rounded: bool = True, memory: float | None = None
) -> LanguageModel:
    """The policy domain of the configuration. group_size: completions per prompt that the method usually asks for.

    rounded: whether completions are drawn in `sampling.precision`. memory: bytes of one device, for devices that cannot
    be asked.
    """
    sampling = config.sampling
    dtype = jnp.dtype(config.model.dtype)
    return LanguageModel(
        graphdefs={"policy": model.graphdef},
        tokenizer=model.tokenizer,
        mesh=model.mesh,
        max_prompt=config.data.max_prompt,
        max_new=sampling.max_new,
        tokens=SAMPLING_TOKENS * config.batch.tokens_per_device,
        cells=(config.batch.prompts, group_size),
        temperature=sampling.temperature,
        options={name: getattr(sampling, name) for name in ("top_k", "top_p", "min_p", "min_new")},
        stop=tuple(sampling.stop),
        compute_dtype=None if dtype == jnp.float32 else dtype,
        remat=config.model.remat,
        arrangement=arrange(
            model.config,
            model.mesh,
            dtype,
            wanted=sampling.weights,
            precision=sampling.precision if rounded else None,
            memory=memory,
        ),
    )


def layout_of(config: Config, mesh: Mesh, *, group_size: int, prompts: int) -> Layout:
    """The shape of one update on `prompts` groups.

    Raises: ValueError if the tokens of a completion do not divide over the mesh's `sequence`, or do not fit.
    """
    sequence, decisions = ways("tokens", mesh), config.sampling.max_new
    if decisions % sequence:
        legal = [n for n in (decisions // sequence * sequence, -(-decisions // sequence) * sequence) if n]
        raise ValueError(
            f"sampling.max_new is {decisions}, which does not divide over the {sequence} devices of mesh.sequence; "
            f"{' and '.join(map(str, legal))} {'do' if len(legal) > 1 else 'does'}"
        )
    return choose_layout(
        group_size=group_size,
        prompts=prompts,
        context_width=bucket(config.data.max_prompt),
        decisions=decisions,
        tokens_per_device=config.batch.tokens_per_device * sequence,
        shards=shards(mesh),
    )


def open_pool(
    config: Config, source: Any, tokenizer: data.Tokenizer, *, split: str | None = None, shuffle: bool = True
) -> data.Pool:
    return data.Pool.open(
        source,
        tokenizer=tokenizer,
        seed=config.seed,
        max_prompt=config.data.max_prompt,
        prompt_column=config.data.prompt_column,
        template=_plain(config.data.template),
        split=split,
        shuffle=shuffle,
    )


class Sources(NamedTuple):
    """Where prompts come from; held-out prompts and demonstrations for the supervised warm-up may be None."""

    train: Any
    held_out: Any
    demonstrations: Any


def sources(config: Config, prompts: Any = None) -> Sources:
    """The configured sources; `prompts` (rows in memory) stands for `data.source`.

    A source is made by a function if it names one: the built-in task, or path/to/file.py:function.
    """
    warmup, evaluation = config.warmup, config.evaluation
    train, held_out = _plain(config.data.source) if prompts is None else prompts, _plain(evaluation.source)
    make = None if prompts is not None else _maker(config.data.source, {"addition": data.addition})
    if make is not None:
        train, test = _made(make, "data.options", {**config.data.options}, {"seed": config.seed})
        held_out = held_out or test
    demonstrations = None if warmup is None else _plain(warmup.source)
    if warmup is not None and (make := _maker(warmup.source, {"demonstrations": data.demonstrations})):
        count = warmup.steps * warmup.prompts
        demonstrations = _made(
            make, "warmup.options", {"problems": train, "count": count, **warmup.options}, {"seed": config.seed}
        )
    return Sources(train, held_out, demonstrations)


def _maker(source: Any, built_in: Mapping[str, Callable[..., Any]]) -> Callable[..., Any] | None:
    """The function that a source names, if it names one."""
    if not isinstance(source, str):
        return None
    return load_function(source) if ".py:" in source else built_in.get(source)


class Verifier:
    """Scores a rollout with the configured reward functions; checks at the start that they can be called."""

    def __init__(
        self, functions: Sequence[rewards.Reward], columns: Sequence[str], *, time_limit: float, on_error: str
    ) -> None:
        self.functions, self.time_limit, self.on_error = tuple(functions), time_limit, on_error
        rewards.check(self.functions, [*columns, *rewards.STANDARD_COLUMNS])
        self.columns, self.failures = tuple(columns), []

    def unscored(self, rows: Rollout) -> Rollout:
        """The rollout with the channels that its scores are expected to have."""
        none = rewards.score(self.functions, [], [], dict.fromkeys([*self.columns, *rewards.STANDARD_COLUMNS], ()))
        return rows.replace(
            scores=np.full((len(rows), len(none.channels)), np.nan, np.float32),
            channels=tuple(none.channels),
            channel_weights=tuple(float(w) for w in none.weights),
        )

    @property
    def on_the_host(self) -> list[str]:
        """The reward functions that are not in-graph."""
        return [reward.name for reward in self.functions if not rewards.is_in_graph(reward)]

    def trace(self, batch: Batch, step: Array) -> Batch:
        """The batch with what in-graph reward functions say of it, in jit; NaN in padding rows."""
        real = batch.prompt_ids >= 0
        columns = {
            **batch.columns,
            "step": step,
            "prompt_id": batch.prompt_ids,
            "tokens": batch.completions,
            "finished": batch.finished,
            "lengths": batch.lengths,
        }
        scored = rewards.score_in_graph(self.functions, columns)
        own = {k: jnp.where(real.reshape(-1, *[1] * (x.ndim - 1)), x, 0) for k, x in scored.columns.items()}
        return batch.replace(
            scores=jnp.where(real[:, None], scored.scores, jnp.nan),
            channels=tuple(scored.channels),
            channel_weights=tuple(float(w) for w in scored.weights),
            columns={**batch.columns, **own},
        )

    def take_failures(self) -> list[str]:
        """What failed since this was last asked, where failures are marked and not raised."""
        failures, self.failures = self.failures, []
        return failures

    def __call__(self, prompts: Sequence[Prompt], rows: Rollout, texts: Sequence[str], step: int) -> Rollout:
        names = list(dict.fromkeys(name for p in prompts for name in p.columns))
        columns: dict[str, Any] = {name: [p.columns.get(name) for p in prompts] for name in names}
        columns |= {
            "step": step,
            "prompt_id": rows.prompt_ids.tolist(),
            "completion_ids": [ids[:n].tolist() for ids, n in zip(rows.completions, rows.lengths)],
            "tokens": rows.completions,
            "finished": rows.finished.tolist(),
            "lengths": rows.lengths.tolist(),
        }
        chat = [not isinstance(p.text, str) for p in prompts]
        completions = [[{"role": "assistant", "content": t}] if c else t for t, c in zip(texts, chat)]
        scored = rewards.score(
            self.functions,
            [p.text for p in prompts],
            completions,
            columns,
            time_limit=self.time_limit,
            on_error=self.on_error,
        )
        self.failures += scored.failures
        return rows.replace(
            scores=np.asarray(scored.scores, np.float32),
            channels=tuple(scored.channels),
            channel_weights=tuple(float(w) for w in scored.weights),
            columns={**rows.columns, **scored.columns},
        )


def ahead(language: LanguageModel, run: Run) -> Ahead:
    """What the first step goes through, compiled while its completions are being drawn. The sampler is traced here."""
    contexts, width = language.cells or (1, 1)
    usual = [Request(next(iter(run.pool)), count=width)] * contexts
    language.traced_for(run.params, usual, fold(run.seed, "sample"))
    fold(fold(0), "shape", "policy")  # compiled in 20 ms, and between other threads in 500
    return run.compiled.ahead(blank_batch(language, run))


def blank_batch(language: LanguageModel, run: Run) -> Batch:
    """A batch of the shapes that the run's batches will have, as far as can be told, in which nothing was drawn."""
    token = np.zeros(1, np.int32), np.zeros(1, np.float32)
    nothing = Request(next(iter(run.pool)), prefix=token, max_new=0, options={"score": False})
    rows = run.verify.unscored(language.sample({}, [nothing], fold(0)))
    return put(rows, run.layout, run.mesh, updates=run.updates)


def roles_of(method: Method, params: PyTree, optimizer: optax.GradientTransformation, mesh: Mesh) -> dict[str, Policy]:
    """The policy and the other roles: copies of it, or models of the same architecture from a path."""
    policies = {"policy": begin(params, optimizer, mesh)}
    places = jax.tree.map(lambda x: x.sharding, params)
    copied = jax.jit(partial(jax.tree.map, jnp.copy), out_shardings=places)  # one program, not one for each leaf
    for name, role in method.roles.items():
        start = copied(params) if role.start == "policy" else _same(role.start, params, mesh)
        policies[name] = begin(start, optimizer, mesh) if role.train else Policy(start)
    return policies


def describe_layout(layout: Layout, config: Config, mesh: Mesh, *, group_size: int) -> str:
    """What follows from the three numbers, in a line."""
    rows = config.batch.prompts * group_size
    return (
        f"{config.batch.prompts} prompts x {group_size} completions = {rows} rows a step, "
        f"{config.training.number} update(s) of {layout.sweeps} micro-batch(es) of {layout.contexts} prompts x "
        f"{layout.rows} completions ({layout.context_width} + {layout.decisions} tokens) on {mesh.size} device(s)"
    )


def _same(path: str, params: PyTree, mesh: Mesh) -> PyTree:
    shapes = jax.tree.map(lambda x: x.shape, params)
    _, _, loaded = models.load(_local(path), mesh=mesh)
    if jax.tree.map(lambda x: x.shape, loaded) != shapes:
        raise ValueError(f"the model {path} has other sizes than the policy: a role of the run shares its architecture")
    return jax.device_put(loaded, jax.tree.map(lambda x: x.sharding, params))


def _local(path: str | Path) -> str:
    """A directory as it is; a hub name from the local cache, or downloaded where there is a network."""
    if Path(path).exists() or str(path).count("/") != 1:
        return str(path)
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"])
    except Exception as error:
        raise FileNotFoundError(
            f"{path} is no directory, and as a hub name it could not be had: {error}. Give the path of a directory"
        ) from error


def _made(function: Callable[..., Any], key: str, given: dict[str, Any], offered: dict[str, Any]) -> Any:
    """What the function makes of its options, and of those offered values that it takes."""
    known = inspect.signature(function).parameters
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"{key}: there is no option {unknown[0]!r}; the options are {', '.join(sorted(known))}")
    return function(**{k: v for k, v in offered.items() if k in known} | given)


def _plain(source: Any) -> Any:
    return list(source) if isinstance(source, tuple) else source
