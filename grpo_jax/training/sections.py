"""The keys of a configuration, by section: type, bounds, default and meaning of each."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

# What each optimizer reads, besides the keys that all of them read.
OPTIMIZER_KEYS = {
    "adamw": ("b1", "b2", "epsilon", "weight_decay"),
    "adam": ("b1", "b2", "epsilon"),
    "sgd": ("b1", "weight_decay"),
    "lion": ("b1", "b2", "weight_decay"),
    "adafactor": ("weight_decay",),
    "muon": ("b1", "weight_decay"),
}

Count = Annotated[int, Field(ge=1)]
Period = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Messages = Annotated[tuple[dict[str, str], ...], Field(strict=False)]
Texts = Annotated[tuple[str, ...], Field(strict=False)]


class Section(BaseModel):
    """A group of keys. Values are not coerced: "3" is text and 3.0 is not a whole number."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class OpenSection(Section):
    """A group of keys that also takes the options of the function that it names."""

    model_config = ConfigDict(extra="allow")

    @property
    def options(self) -> dict[str, Any]:
        """The keys beyond the declared ones."""
        return dict(self.model_extra or {})


class TinySection(Section):
    layers: Count = Field(2, description="transformer layers")
    hidden: Count = Field(64, description="width of the residual stream")
    heads: Count = Field(4, description="query heads; hidden must be a multiple")
    kv_heads: Count = Field(2, description="key and value heads; heads must be a multiple")
    mlp: Count = Field(256, description="width of the feed-forward layer")
    initializer_range: Positive = Field(0.02, description="standard deviation of the initial weights")

    @model_validator(mode="after")
    def _divisible(self) -> TinySection:
        if self.hidden % self.heads:
            raise ValueError(f"hidden {self.hidden} is not a multiple of heads {self.heads}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
        return self


class ModelSection(Section):
    path: str = Field(
        description='Hugging Face directory, name of a downloaded model, or "tiny" for one made on the spot'
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16", description="dtype of the computation; weights are float32"
    )
    remat: bool | None = Field(
        None,
        description="recompute activations in the backward pass: less memory, more time; null: where they would take "
        "more memory than weights, gradient and moments",
    )
    exact: bool = Field(
        False,
        description="arithmetic that does not depend on shapes: log-probs of sampling and of training are the same to "
        "the bit, and both take longer",
    )
    tiny: TinySection = Field(TinySection(), description='sizes of the model that path "tiny" makes')


class DataSection(Section):
    source: str | Texts = Field(
        description='prompts: .jsonl or .parquet files, a directory, a dataset name, "addition" (built in), '
        "or path/to/file.py:function that makes (training rows, held-out rows)"
    )
    split: str | None = Field(None, description="split of a dataset, such as train")
    prompt_column: str = Field("prompt", description="column with the prompt: text or a list of chat messages")
    template: str | Messages | None = Field(
        None, description="text, or a list of chat messages, with {column} fields that make the prompt"
    )
    max_prompt: Count = Field(512, description="longest prompt in tokens; longer ones are left out and counted")
    shuffle: bool = Field(True, description="shuffle each epoch, by the seed")
    tokenizer: str | None = Field(None, description='path, or "bytes" for the embedded one; null: the model\'s own')
    options: dict[str, Any] = Field({}, description="options of the function that makes the prompts")


def _named(value: Any) -> Any:
    return {"function": value} if isinstance(value, str) else value


class RewardSection(OpenSection):
    function: str = Field(description="name of a built-in, path/to/file.py:function, or package.module:function")
    weight: float | dict[str, float] = Field(
        1.0, description="weight of its channel in the sum, or of each of its channels by name"
    )
    name: str | None = Field(None, description="name of its channel; null: the function's name")


class MethodSection(OpenSection):
    name: str = Field("grpo", description="a published method, or path/to/file.py:function")


class BatchSection(Section):
    prompts: Count = Field(32, description="prompts per step")
    group_size: Count = Field(8, description="completions per prompt")
    tokens_per_device: Count = Field(16384, description="tokens, prompts included, that one device computes at once")


class TrainingSection(Section):
    updates: Count = Field(1, description="optimizer updates per batch of rollouts, each on a part of it")
    passes: Count = Field(1, description="times over the batch, with `updates` each, dealt anew; above 1 is off-policy")

    @property
    def number(self) -> int:
        """Updates per step."""
        return self.updates * self.passes

    fused: bool = Field(True, description="run whole steps as one program where every reward is in-graph")
    importance_cap: Positive | None = Field(
        None,
        description="truncated importance sampling: the loss of a sampled token times its probability under the policy "
        "over that under the sampler, at most this (usual: 2); null: off",
    )
    truncated_limit: Share = Field(0.5, description="share of completions cut off by max_new above which a step warns")


class SamplingSection(Section):
    max_new: Count = Field(512, description="longest completion in tokens")
    min_new: Period = Field(0, description="shortest completion in tokens: no stop before")
    temperature: Positive = Field(1.0, description="temperature; log-probs of training are taken at it too")
    top_k: Period = Field(0, description="sample among the k likeliest tokens; 0: all")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="sample among the likeliest tokens that hold p")
    min_p: Share = Field(0.0, description="leave out tokens below this share of the likeliest one's probability")
    stop: Texts = Field((), description="texts that end a completion, besides the model's stop tokens")
    weights: Literal["auto", "gathered", "divided"] = Field(
        "auto",
        description="on a mesh that splits the weights: gathered once for a rollout, or divided as in training and "
        "gathered in every decode step; auto: gathered where a copy takes half of the memory that is left, or less",
    )
    precision: Literal["int8"] | None = Field(
        None,
        description="int8: draw rollouts with matrices rounded to eight bits per output channel, half the bytes of a "
        "decode step's weights; evaluation and training stay in model.dtype; null: as model.dtype",
    )


class OptimizerSection(Section):
    name: Literal[tuple(OPTIMIZER_KEYS)] = Field("adamw", description="the optax optimizer")  # type: ignore[valid-type]
    learning_rate: Positive = Field(1e-6, description="peak learning rate")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="course after the warm-up")
    warmup_steps: Period = Field(0, description="updates over which the learning rate rises linearly to its peak")
    final_fraction: Share = Field(0.0, description="learning rate at the end as a share of the peak (linear, cosine)")
    weight_decay: float = Field(0.0, ge=0, description="decoupled decay of matrices; norms and biases never decay")
    b1: Annotated[float, Field(ge=0, lt=1)] | None = Field(None, description="decay of the first moment; null: usual")
    b2: Annotated[float, Field(ge=0, lt=1)] | None = Field(None, description="decay of the second moment; null: usual")
    epsilon: Positive | None = Field(None, description="added to the root of the second moment; null: usual")
    clip_norm: Positive | None = Field(1.0, description="global norm to which gradients are clipped; null: off")

    @model_validator(mode="after")
    def _read_by_the_optimizer(self) -> OptimizerSection:
        given = [key for key in ("b1", "b2", "epsilon") if getattr(self, key) is not None]
        given += ["weight_decay"] if self.weight_decay else []
        if unread := [key for key in given if key not in OPTIMIZER_KEYS[self.name]]:
            advice = (
                '; for decoupled weight decay use "adamw"' if self.name == "adam" and "weight_decay" in unread else ""
            )
            raise ValueError(f"{self.name} does not read {' or '.join(unread)}: leave out what it would ignore{advice}")
        return self


class SupervisedOptimizerSection(OptimizerSection):
    learning_rate: Positive = Field(1e-5, description="peak learning rate")


class WarmupSection(Section):
    source: str | Texts = Field(
        "demonstrations",
        description='prompts with completions: files, "demonstrations" of the built-in task, or '
        "path/to/file.py:function(problems, count)",
    )
    steps: Count = Field(200, description="supervised updates before the first rollout")
    prompts: Count = Field(64, description="examples per update")
    optimizer: SupervisedOptimizerSection = Field(
        SupervisedOptimizerSection(), description="the optimizer of the supervised updates"
    )
    options: dict[str, Any] = Field({}, description="options of the function that makes the completions")


class MeshSection(Section):
    data: int = Field(-1, description="devices that split the batch and each hold a copy of the weights; -1: the rest")
    fsdp: int = Field(1, description="devices that split the batch and the weights; -1: the rest")
    tensor: int = Field(1, description="devices that split heads and feed-forward layers; -1: the rest")
    sequence: int = Field(
        1, description="devices that split the tokens of a completion, for long ones, and the weights; -1: the rest"
    )
    expert: int = Field(
        1, description="devices that split experts; without any, the batch and the weights; -1: the rest"
    )
    dcn_data: int | None = Field(
        None,
        description="parts joined by the data-center network, which split the batch; null: one for each slice",
    )

    @model_validator(mode="after")
    def _axes(self) -> MeshSection:
        sizes = {axis: size for axis, size in self.model_dump().items() if size is not None}
        if wrong := [f"{axis} {size}" for axis, size in sizes.items() if size < 1 and size != -1]:
            raise ValueError(
                f"the size of an axis is at least 1, or -1 for the rest of the devices; got {', '.join(wrong)}"
            )
        if list(sizes.values()).count(-1) > 1:
            raise ValueError(f"only one axis can take the rest of the devices (-1); got {sizes}")
        return self


class CheckpointSection(Section):
    every: Period = Field(50, description="steps between checkpoints; 0: only at the end")
    keep: Count = Field(2, description="how many of the newest are kept")
    keep_best: Period = Field(1, description="how many of the best by evaluation are kept besides")


class EvaluationSection(Section):
    every: Period = Field(50, description="steps between evaluations; 0: only before the first step and after the last")
    source: str | Texts | None = Field(
        None, description="held-out prompts; null: those of the function in data.source, if one is there"
    )
    split: str | None = Field(None, description="split of a dataset, such as test")
    prompts: Count = Field(128, description="how many of the held-out prompts are used")
    samples: Count = Field(8, description="completions per prompt for pass@k")
    k: Annotated[tuple[Count, ...], Field(strict=False)] = Field((1, 8), description="each k of pass@k")
    greedy: bool = Field(True, description="also the share solved by the greedy completion")
    channel: str | None = Field(None, description="reward channel in which a score of 1 is right; null: the first")
    at_least: Share | None = Field(None, description="pass@1 at the end below which `train` exits with status 1")

    @model_validator(mode="after")
    def _enough_samples(self) -> EvaluationSection:
        if too_many := [k for k in self.k if k > self.samples]:
            raise ValueError(
                f"pass@{max(too_many)} needs at least {max(too_many)} samples per prompt; got {self.samples}"
            )
        return self


class MetricsSection(Section):
    console: bool = Field(True, description="progress and tables on the terminal")
    tensorboard: bool = Field(True, description="TensorBoard event files in the run directory")
    wandb: str | None = Field(None, description="Weights & Biases project to log to; null: off")


class Config(Section):
    """A whole run. Paths are relative to the working directory."""

    name: str = Field("run", description="name of the run")
    directory: str = Field("runs/{name}", description="where everything of the run is written; {name} is filled in")
    seed: int = Field(0, ge=0, lt=2**32, description="decides every random choice of the run")
    steps: Count = Field(description="training steps: one batch of rollouts each")
    model: ModelSection = Field(description="the policy")
    data: DataSection = Field(description="the prompts")
    rewards: Annotated[tuple[Annotated[RewardSection, BeforeValidator(_named)], ...], Field(strict=False)] = Field(
        (), description="reward functions, each a channel; a bare name stands for its function"
    )
    reward_time_limit: Positive = Field(60.0, description="seconds that a reward function may take for a batch")
    on_reward_error: Literal["stop", "mask"] = Field(
        "stop", description="stop the run, or leave the rows out and go on"
    )
    method: Annotated[MethodSection, BeforeValidator(lambda v: {"name": v} if isinstance(v, str) else v)] = Field(
        MethodSection(), description="the method and its options; a bare name stands for its name"
    )
    batch: BatchSection = Field(BatchSection(), description="three numbers; the rest is derived")
    training: TrainingSection = Field(TrainingSection(), description="the updates of a step")
    sampling: SamplingSection = Field(SamplingSection(), description="how completions are drawn")
    optimizer: OptimizerSection = Field(OptimizerSection(), description="the optimizer and its schedule")
    warmup: WarmupSection | None = Field(None, description="supervised updates before the first step; null: off")
    mesh: MeshSection = Field(MeshSection(), description="how devices are used")
    checkpoint: CheckpointSection = Field(CheckpointSection(), description="what is kept to resume from")
    evaluation: EvaluationSection = Field(EvaluationSection(), description="held-out prompts during training")
    metrics: MetricsSection = Field(MetricsSection(), description="where numbers go besides metrics.jsonl")

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        longest = self.data.max_prompt + self.sampling.max_new
        room = self.batch.tokens_per_device * max(self.mesh.sequence, 1)
        if room < longest and self.mesh.sequence != -1:
            raise ValueError(
                f"batch.tokens_per_device is {self.batch.tokens_per_device}, but one prompt and one completion may "
                f"take {longest} tokens (data.max_prompt {self.data.max_prompt} + sampling.max_new "
                f"{self.sampling.max_new}): raise the one to at least {longest}, or lower one of the others"
            )
        if self.model.exact and self.sampling.precision:
            raise ValueError(
                f"model.exact makes sampling and training compute the same, but sampling.precision is "
                f"{self.sampling.precision!r}, which rounds the weights for sampling alone: leave out one of the two"
            )
        if self.model.exact and self.mesh.sequence != 1:
            raise ValueError(
                "model.exact needs all tokens of a completion on one device, but mesh.sequence is "
                f"{self.mesh.sequence}: divide the weights with mesh.fsdp instead"
            )
        if self.sampling.min_new > self.sampling.max_new:
            raise ValueError(
                f"sampling.min_new {self.sampling.min_new} is above sampling.max_new {self.sampling.max_new}"
            )
        if self.training.updates > self.batch.prompts:
            raise ValueError(
                f"training.updates is {self.training.updates}, but a step has only {self.batch.prompts} groups "
                f"(batch.prompts) and a group is never divided: lower the one or raise the other"
            )
        if self.optimizer.warmup_steps >= self.steps * self.training.number:
            raise ValueError(
                f"optimizer.warmup_steps is {self.optimizer.warmup_steps}, but the run has only "
                f"{self.steps * self.training.number} updates (steps * training.updates * training.passes)"
            )
        return self

    @model_validator(mode="after")
    def _directory_of_the_run(self) -> Config:
        object.__setattr__(self, "directory", self.directory.replace("{name}", self.name))
        return self
