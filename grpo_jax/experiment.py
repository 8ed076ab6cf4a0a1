"""A run from its configuration to its report: what the command line and the notebook drive."""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from grpo_jax import methods, processes, rewards
from grpo_jax.models.kernels import attention_path
from grpo_jax.supervised import warm_up
from grpo_jax.training import assemble, metrics, progress
from grpo_jax.training.agreement import check_alike, check_shared, of_configuration, of_data
from grpo_jax.training.compilation import compile_lightly, keep_compiled, leave_constants_in_place
from grpo_jax.training.configuration import Config, check_same_run, load_config, parse, to_yaml
from grpo_jax.training.correction import corrected, uncorrected
from grpo_jax.training.fused import Fused, obstacle
from grpo_jax.training.instruments import CompileCounter
from grpo_jax.training.loop import Run, iterate
from grpo_jax.training.mesh import replicate
from grpo_jax.training.optimizer import optimizer as make_optimizer
from grpo_jax.training.recording import Recorder
from grpo_jax.training.report import report
from grpo_jax.training.stopping import StopSignal, due, next_due
from grpo_jax.training.viewing import Viewed
from grpo_jax.types import Method, Prompt, State

if TYPE_CHECKING:
    from grpo_jax.training.checkpoints import Checkpoints

CONFIG_FILE = "config.yaml"
GROUPS_KEPT = 100  # sampled groups that a run writes down, evenly over its steps


class Experiment(Viewed):
    """A run: made from a configuration, trained, looked at, resumed.

    config: a Config, a nested dict of its keys, or the path of a YAML file. prompts: rows in memory (dicts) instead of
    `data.source`. reward_functions: functions instead of, or beside, `rewards`. method: a Method instead of `method`.

    Everything that can be wrong with these is an error here, before anything is sampled.
    """

    def __init__(
        self,
        config: Config | Mapping[str, Any] | str | os.PathLike,
        *,
        prompts: Sequence[Mapping[str, Any]] | None = None,
        reward_functions: Sequence[Callable] = (),
        method: Method | None = None,
    ) -> None:
        self.started = time.perf_counter()
        processes.join()
        compile_lightly()
        leave_constants_in_place()
        keep_compiled()
        with processes.together():
            self._open(config, prompts, reward_functions, method)
            self._check_data()

    def _open(
        self,
        config: Config | Mapping[str, Any] | str | os.PathLike,
        prompts: Sequence[Mapping[str, Any]] | None,
        reward_functions: Sequence[Callable],
        method: Method | None,
    ) -> None:
        if prompts is not None and isinstance(config, Mapping):
            config = {**config, "data": {"source": "memory", **config.get("data", {})}}
        if isinstance(config, Mapping):
            config = parse(config)
        self.config = config if isinstance(config, Config) else load_config(config)
        config = self.config
        check_alike(of_configuration(config.model_dump(mode="json"), reward_functions))
        self.directory = Path(config.directory)
        self.model = assemble.open_model(config)
        source = assemble.sources(config, prompts)
        self.pool = assemble.open_pool(
            config, source.train, self.model.tokenizer, split=config.data.split, shuffle=config.data.shuffle
        )
        self.pool_start = self.pool.state()
        self.held_out = self._held_out(source.held_out)
        self.demonstrations = source.demonstrations
        functions = [rewards.resolve(r.model_dump(exclude_none=True)) for r in config.rewards]
        functions += [rewards.resolve(f) for f in reward_functions]
        self.verify = assemble.Verifier(
            functions, self._columns(), time_limit=config.reward_time_limit, on_error=config.on_reward_error
        )
        if self.held_out:
            rewards.check(functions, [*self.held_out[0].columns, *rewards.STANDARD_COLUMNS])
        given = method and corrected(method, cap=config.training.importance_cap)
        self.method = given or methods.configured(config)
        language = functools.partial(assemble.language_model, self.model, config, group_size=self.method.group_size)
        self.language = language()
        self.domain = language(rounded=False).domain()  # what is evaluated is what is saved
        if not (functions or self.method.rewards or config.method.name == "sft"):
            raise ValueError('no reward function: name at least one under rewards, for instance "exact"')
        self.layout = assemble.layout_of(
            config,
            self.model.mesh,
            group_size=config.batch.group_size,
            prompts=-(-config.batch.prompts // config.training.updates),
        )
        self.compiled = CompileCounter()
        self.run: Run | None = None
        self.numbers: dict[str, float] = {}
        self.evaluations: dict[int, dict[str, float]] = {}

    def train(self, steps: int | None = None, *, quiet: bool = False) -> dict[str, float]:
        """Train to `steps` (default: the configured number); return the last evaluation's numbers, or the last step's.

        Resumes by itself from the newest checkpoint of the run's directory. Evaluates before the first step and after
        the last, writes metrics, sampled groups and checkpoints on the way, and the report at the end. On an error the
        state after the last whole step is saved first; Ctrl-C and SIGTERM stop after the step in hand.

        Of several processes all call it alike; process 0 writes and speaks. When one fails or dies all stop, with its
        name, and a signal to one stops all after the same step.
        """
        steps = self.config.steps if steps is None else steps
        console = self.config.metrics.console and not quiet and processes.index() == 0
        say = print if console else (lambda text: None)
        with processes.together():
            self._train(steps, say, console)
        if processes.index() == 0:
            self._finish(say, steps)
        return self.evaluations.get(self.run.state.step, self.numbers)

    def _train(self, steps: int, say: Callable[[str], None], console: bool) -> None:
        config = self.config
        resumed = self.run is None and self._newest() is not None
        check_shared(self._kept_in)
        processes.run_by_first(lambda: self._write_config(resumed), "the configuration of the run")
        if resumed:
            self.resume()
        first = self.run.state.step if self.run else 0
        with metrics.Metrics(
            self.directory,
            tensorboard=config.metrics.tensorboard,
            wandb=config.metrics.wandb,
            run_config=config.model_dump(mode="json"),
            resume_step=first,
        ) as writer:
            self._announce(say, resumed, first)
            if self.run is None:
                self.begin(self._warm_params(writer, console))
            fused = self._fused(say)
            bar = progress.Progress(steps, "training", start=first, enabled=console)
            ahead = nullcontext()
            if not fused and self.run.state.step < steps:
                ahead = assemble.ahead(self.language, self.run)
            with StopSignal() as stop, bar, self.compiled.explained(), ahead:
                self._loop(steps, writer, bar, stop, fused)

    @functools.cached_property
    def checkpoints(self) -> Checkpoints:
        from grpo_jax.training.checkpoints import Checkpoints  # Orbax takes long to import, and a first step needs none

        kept = self.config.checkpoint
        return Checkpoints(self._kept_in, keep=kept.keep, keep_best=kept.keep_best)

    @property
    def _kept_in(self) -> Path:
        return self.directory / "checkpoints"

    def _newest(self) -> int | None:
        return self.checkpoints.latest() if self._kept_in.is_dir() else None

    def begin(self, params: Any = None) -> Run:
        """The run at step 0, from these parameters (default: the model's)."""
        config = self.config
        transform, self.schedule = make_optimizer(config.optimizer, config.steps * config.training.number)
        params = self._starting_params() if params is None else params
        self.pool.restore(self.pool_start)
        state = self.method.init(self.pool)
        self.run = Run(
            method=self.method,
            domain=self.language.domain(),
            pool=self.pool,
            verify=self.verify,
            optimizer=transform,
            mesh=self.model.mesh,
            layout=self.layout,
            policies=assemble.roles_of(self.method, params, transform, self.model.mesh),
            state=state._replace(arrays=replicate(state.arrays, self.model.mesh)),
            seed=config.seed,
            updates=config.training.updates,
            passes=config.training.passes,
        )
        return self.run

    def resume(self, step: int | None = None) -> bool:
        """Continue from a checkpoint (default: the newest): policies, method state and the place in the prompts."""
        step = self.checkpoints.latest() if step is None else step
        if step is None:
            raise FileNotFoundError(f"there is no checkpoint in {self.checkpoints.directory} to resume from")
        self.run = None  # an earlier run of this process is not held while this one is read
        run = self.begin()
        like = jax.tree.map(_abstract, {"policies": run.policies, "arrays": run.state.arrays})
        run.policies.clear()  # not held twice while the saved ones are read
        arrays, host = self.checkpoints.restore(step, like)
        if host["seed"] != self.config.seed:
            raise ValueError(
                f"the checkpoints in {self.directory} are of seed {host['seed']}, the configuration says "
                f"{self.config.seed}: choose another directory or the same seed"
            )
        run.policies = dict(arrays["policies"])
        run.state = State(host["step"], arrays["arrays"], host["host"])
        self.pool.restore(host["pool"])
        self.evaluations = {int(k): v for k, v in host["evaluations"].items()}
        return True

    def save(self) -> None:
        """A checkpoint of where the run stands; nothing if there is one of this step already."""
        run = self.run
        if run.state.step in self.checkpoints.steps():
            return
        host = {
            "step": run.state.step,
            "host": run.state.host,
            "seed": self.config.seed,
            "pool": self.pool.state(),
            "evaluations": {str(k): v for k, v in self.evaluations.items()},
        }
        score = self.evaluations.get(run.state.step, {}).get("pass@1")
        self.checkpoints.save(
            run.state.step, {"policies": run.policies, "arrays": run.state.arrays}, host, metric=score
        )

    def _fused(self, say: Callable[[str], None]) -> Fused | None:
        """The iterations as one program, where they can be."""
        why_not = obstacle(self.run) if self.config.training.fused else "training.fused is false"
        say(f"iterations run part by part: {why_not}" if why_not else "iterations run as one program, fused")
        return None if why_not else Fused(self.run)

    def _loop(
        self, steps: int, writer: metrics.Metrics, bar: progress.Progress, stop: StopSignal, fused: Fused | None
    ) -> None:
        run, config = self.run, self.config
        every, first = max(1, steps // GROUPS_KEPT), run.state.step
        run.log = recorder = Recorder(
            writer=writer,
            note=bar.note,
            clock=run.clock,
            compiled=self.compiled,
            truncated_limit=config.training.truncated_limit,
            exact=config.model.exact,
            prompt=self.pool.__getitem__,
            decode=self.model.tokenizer.decode,
        )

        def written(step: int, times: dict[str, float] | None = None) -> None:
            rate, failures = float(self.schedule(step * config.training.number)), self._failures()
            settled = step > first
            self.numbers = recorder.write(step, rate, failures, groups=step % every == 0, settled=settled, times=times)
            bar.update(step + 1, **self.numbers)

        run.clock.lap()
        self.compiled.lap()
        while True:
            step = run.state.step
            finished, position, stopping = step >= steps, self.pool.state(), stop.agreed()
            try:
                if step == 0 or finished or due(step, config.evaluation.every):
                    self._evaluate_once(step, writer, bar)
                if finished or stopping or due(step, config.checkpoint.every) or (step == 0 and config.warmup):
                    with run.clock("checkpoint"):
                        self.save()
                if finished or stopping:
                    self.checkpoints.wait()
                    return
                if fused:
                    until = min(steps, *(next_due(step, x.every) for x in (config.evaluation, config.checkpoint)))
                    fused.advance(until, stopped=stop.agreed, written=written)
                    continue
                iterate(run)
            except BaseException as error:
                self._rescue(step, position, error)
                raise
            written(step)

    def _evaluate_once(self, step: int, writer: metrics.Metrics, bar: progress.Progress) -> None:
        if not self.held_out or step in self.evaluations:
            return
        with self.run.clock("evaluate"):
            numbers = self.evaluate().numbers
        self.evaluations[step] = numbers
        writer.log(step, numbers, kind="eval")
        bar.update(step, **{"pass@1": numbers["pass@1"]})

    def _rescue(self, step: int, position: Mapping[str, Any], error: BaseException) -> None:
        self.pool.restore(position)
        alive = not any(x.is_deleted() for x in jax.tree.leaves(self.run.policies))
        alike = processes.settle(error)  # all processes write a checkpoint, or none
        if not (alive and self.run.whole):
            self.run = None  # half a step is lost; the next call goes on from the newest checkpoint
        elif alike and self.run.state.step == step:
            self.save()
            self.checkpoints.wait()
            error.add_note(
                f"The state after {step} steps is in {self.checkpoints.directory}; the same command goes on from there."
            )

    def _held_out(self, source: Any) -> list[Prompt]:
        if source is None:
            return []
        section = self.config.evaluation
        pool = assemble.open_pool(self.config, source, self.model.tokenizer, split=section.split, shuffle=False)
        return list(pool)[: section.prompts]

    def _columns(self) -> list[str]:
        return list(dict.fromkeys(name for prompt in self.pool for name in prompt.columns))

    def _write_config(self, resumed: bool) -> None:
        if resumed:
            check_same_run(load_config(self.directory / CONFIG_FILE), self.config)
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / CONFIG_FILE).write_text(to_yaml(self.config), encoding="utf-8")

    def _check_data(self) -> None:
        """Several processes have read the same prompts and weights, and see the same checkpoints."""
        if processes.count() > 1:
            prompts = {"the prompts": list(self.pool), "the held-out prompts": self.held_out}
            check_alike(of_data(prompts, model=self.config.model.path, kept_in=self._kept_in))

    def _failures(self) -> list[str]:
        """What reward functions failed at in the step, on any process, where that is marked and not raised."""
        own = self.verify.take_failures()
        if processes.count() == 1 or self.config.on_reward_error == "stop":
            return own
        every = processes.exchange(json.dumps(own), "the end of a step")
        return [f"{processes.name(i)}: {text}" for i, texts in enumerate(every) for text in json.loads(texts)]

    def _warm_params(self, writer: metrics.Metrics, console: bool) -> Any:
        params = self._starting_params()
        if self.config.warmup is None:
            return params
        return warm_up(self.config, self.model, self.domain, self.demonstrations, writer, console=console)

    def _starting_params(self) -> Any:
        """The model's parameters; read anew if an earlier run of this process has used them up."""
        if any(x.is_deleted() for x in jax.tree.leaves(self.model.params)):
            self.model = assemble.open_model(self.config)
        return self.model.params

    def _announce(self, say: Callable[[str], None], resumed: bool, first: int) -> None:
        size = sum(x.size for x in jax.tree.leaves(self.model.params))
        say(f"{self.config.name}: {size:,} parameters, method {self.config.method.name}, in {self.directory}")
        size = self.method.group_size
        say(assemble.describe_layout(self.layout, self.config, self.model.mesh, group_size=size))
        attention = attention_path(self.model.config, self.model.mesh)
        mismatch = uncorrected(self.config.sampling.precision, cap=self.config.training.importance_cap)
        for line in (self.language.arrangement.said, attention, mismatch):
            if line:
                say(line)
        if self.pool.too_long:
            say(f"{self.pool.too_long} of {self.pool.rows} prompts are longer than data.max_prompt and were left out")
        if resumed:
            say(f"resumed at step {first} of {self.config.steps}")

    def _finish(self, say: Callable[[str], None], steps: int) -> None:
        run = self.run
        png, html = report(self.directory)
        before, after = self.evaluations.get(0), self.evaluations.get(run.state.step)
        if say is print:
            progress.outcome(before, after, metrics.read_samples(self.directory))
            print(f"curves      {png}\nreport      {html}\ncheckpoint  {self.checkpoints.directory}/{run.state.step}")
        if run.state.step < steps:
            say(f"stopped at step {run.state.step} of {steps}; the same command goes on from there")


def _abstract(x: Any) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None))
