"""The command line: train, plan, eval, sample, export, report, config, methods."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

EXAMPLES = """\
  grpo-jax train configs/quickstart.yaml
  grpo-jax train configs/gsm8k_qwen.yaml model.path=Qwen/Qwen2.5-0.5B-Instruct optimizer.learning_rate=2e-6
  grpo-jax plan configs/gsm8k_qwen.yaml --topology v5e:2x4
  grpo-jax eval runs/quickstart
  grpo-jax sample runs/quickstart "23+45=" --count 8
  grpo-jax export runs/quickstart my-model
  grpo-jax report runs/quickstart
  grpo-jax config configs/quickstart.yaml
  grpo-jax methods"""

TRAIN = """\
Train as CONFIG (a YAML file) says; key.path=value overrides any of its keys, with the value read as YAML:
  grpo-jax train configs/quickstart.yaml steps=50 method.kl=0.01 mesh.fsdp=4

The run's directory (`directory`, default runs/NAME) gets config.yaml, metrics.jsonl, samples.jsonl, TensorBoard files,
checkpoints/, report.html and its picture. The same command goes on from the newest checkpoint. Ctrl-C and SIGTERM stop
after the step in hand and save one (a second Ctrl-C stops at once). The last line, for scripts, is
`NAME: pass@1 BEFORE -> AFTER in S s`; with evaluation.at_least set, a pass@1 below it makes the exit status 1.

On many hosts the same command runs on each, once. Under SLURM, Open MPI, GKE or XPK, and on the workers of a TPU slice,
they find each other; elsewhere each is told three things, in flags or as JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
JAX_PROCESS_ID:
  grpo-jax train configs/quickstart.yaml --coordinator 10.0.0.1:8476 --processes 2 --process 0
Process 0 writes and speaks; checkpoints need a directory that all share. They must be started alike (configuration,
code, versions, prompts), which is checked first. When one fails or dies, all stop within a minute or two and say which,
and the same command goes on from the newest checkpoint, with any number of processes. A signal to one stops all after
the same step."""

PLAN = """\
What the run of a configuration would take of a slice of TPUs, before there is one: the programs that `train` runs are
compiled for it by libtpu (pip install 'grpo_jax[tpu]'), on any machine, without weights, tokenizer or prompts; of the
model a directory with its config.json is enough.
  grpo-jax plan configs/plans/qwen3-8b.yaml --topology v6e:4x4 mesh.fsdp=16 batch.tokens_per_device=8192
  grpo-jax plan configs/plans/qwen3-8b.yaml --topology v5e:8x8 --slices 2 --mesh auto --json plan.json

Shown, per chip: memory of every program (parameters, optimizer, gradients, keys and values, activations, temporaries)
and what is left of the chip; every kind of message with its bytes, mesh axes, and whether it stays in the slice (ICI)
or leaves it (DCN); a roofline of the step; and if it does not fit, keys of the configuration that help. A plan takes
some minutes, most of them in the compiler. Exit status 2: it does not fit.

--mesh auto compiles the most promising meshes, with smaller and larger micro-batches, and prints the fastest that fits
with the lines for the configuration."""

EVAL = """\
Evaluate a run's policy (its best checkpoint, else the newest) or the model of a configuration on the held-out prompts:
greedy, pass@1, unbiased pass@k, and maj@k, the share whose most frequent answer is right."""

SAMPLE = "Draw a group of completions for a prompt, with their log-probs under the policy."
EXPORT = "Write the policy of a run as a Hugging Face directory that transformers loads, tokenizer included."
REPORT = "Draw the run's curves (report.png) and write one self-contained page with sampled groups (report.html)."
CONFIG = """\
Print the resolved configuration as YAML, or without a file every key with its type, default and meaning.

A file may stand on another with `base: other.yaml` (relative to itself): mappings are merged key by key, but one that
gives a `name` or `source` replaces the base's."""
METHODS = "The methods that method.name may say, a line each; with a name, what it does and its options."


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse and run. Errors that are the user's to mend come as one message without a traceback (GRPO_JAX_DEBUG=1
    shows it)."""
    options = _parsed(arguments)
    try:
        status = options.run(options)
    except KeyboardInterrupt as error:
        print("grpo-jax: interrupted", *getattr(error, "__notes__", ()), sep="\n", file=sys.stderr)
        status = 130
    except Exception as error:
        if os.environ.get("GRPO_JAX_DEBUG"):
            raise
        notes = "".join(f"\n{note}" for note in getattr(error, "__notes__", ()))
        user_error = isinstance(error, (ValueError, OSError, RuntimeError, ImportError, KeyError))
        if not user_error:
            raise
        inner = error.__cause__
        told = inner is None or str(inner) in str(error)
        cause = "" if told else f"\ncaused by {type(inner).__name__}: {inner}"
        print(f"grpo-jax: {_who()}{error}{cause}{notes}", file=sys.stderr)
        status = 1
    sys.exit(status or 0)


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Arguments; overrides may stand anywhere among the options."""
    top = parser()
    options, rest = top.parse_known_args(arguments)
    if rest and hasattr(options, "overrides") and not any(text.startswith("-") for text in rest):
        options.overrides = [*options.overrides, *rest]
    elif rest:
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    return options


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="grpo-jax",
        description="Reinforcement fine-tuning of language models (GRPO and its family) in JAX.",
        epilog=f"examples:\n{EXAMPLES}\n\nEach command has its own --help.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, summary: str, text: str, run) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name, help=summary, description=text, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        added.set_defaults(run=run)
        return added

    overrides = {"nargs": "*", "metavar": "key.path=value", "help": "keys to set; `grpo-jax config` lists all of them"}
    added = command("train", "train a model", TRAIN, train)
    added.add_argument("config", help="YAML file")
    added.add_argument("overrides", **overrides)
    several = added.add_argument_group("several processes, where no launcher tells them of each other")
    several.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0; the port is any that is free there")
    several.add_argument("--processes", type=int, metavar="N", help="how many; 1: alone, whatever the launcher says")
    several.add_argument("--process", type=int, metavar="I", help="number of this one, from 0")

    added = command("plan", "what a run takes of a slice of TPUs", PLAN, plan)
    added.add_argument("config", help="YAML file")
    added.add_argument("overrides", **overrides)
    added.add_argument("--topology", required=True, metavar="CHIP:SHAPE", help="v4, v5e, v5p or v6e, and sides")
    added.add_argument("--slices", type=int, default=1, help="slices joined by the data-center network (default: 1)")
    added.add_argument("--mesh", choices=["auto"], help="auto: look for the fastest mesh; default: the configured one")
    added.add_argument("--json", metavar="FILE", help="write the plan as JSON too; -: print it instead of tables")

    added = command("eval", "evaluate a run or a model", EVAL, evaluate)
    added.add_argument("target", help="run directory, or configuration file")
    added.add_argument("overrides", **overrides)
    added.add_argument("--step", type=int, help="checkpoint to evaluate (default: the best, else the newest)")
    added.add_argument("--output", help="predictions as JSONL (default: predictions.jsonl in the run's directory)")

    added = command("sample", "draw completions for a prompt", SAMPLE, sample)
    added.add_argument("target", help="run directory, or configuration file")
    added.add_argument("prompt", help="text of the prompt; with --chat the user's message")
    added.add_argument("--chat", action="store_true", help="use the tokenizer's chat template")
    added.add_argument("--count", type=int, default=8, help="completions (default: 8)")
    added.add_argument("--temperature", type=float, help="default: the configured one; 0: greedy")
    added.add_argument("--seed", type=int, default=0)
    added.add_argument("--step", type=int, help="checkpoint (default: the best, else the newest)")
    added.add_argument("--json", action="store_true", help="one JSON object per completion, token log-probs included")

    added = command("export", "checkpoint -> Hugging Face directory", EXPORT, export)
    added.add_argument("run_directory", help="run directory")
    added.add_argument("path", help="directory to make; must not exist")
    added.add_argument("--step", type=int, help="checkpoint (default: the best, else the newest)")

    added = command("report", "curves and sampled groups of a run", REPORT, write_report)
    added.add_argument("run_directory", help="run directory")

    added = command("config", "show the configuration", CONFIG, show_config)
    added.add_argument("config", nargs="?", help="YAML file; without it, the list of all keys")
    added.add_argument("overrides", **overrides)

    added = command("methods", "the methods, a line each", METHODS, show_methods)
    added.add_argument("name", nargs="?", help="one of them, or path/to/file.py:function")
    return top


def train(options: argparse.Namespace) -> int:
    started = time.perf_counter()
    from grpo_jax import processes
    from grpo_jax.experiment import Experiment
    from grpo_jax.training.configuration import load_config

    config = load_config(options.config, options.overrides)
    processes.join(coordinator=options.coordinator, processes=options.processes, process=options.process)
    if processes.index():
        _silence()
    experiment = Experiment(config)
    experiment.train()
    before, after = experiment.evaluations.get(0), experiment.evaluations.get(experiment.run.state.step)
    seconds = time.perf_counter() - started
    if experiment.run.state.step < config.steps:
        return 143  # stopped from outside: nothing that comes after it should take it for finished
    say = print if _speaks() else lambda text: None
    if before is None or after is None:
        say(f"{config.name}: {experiment.run.state.step} steps in {seconds:.0f} s")
        return 0
    say(f"{config.name}: pass@1 {before['pass@1']:.2f} -> {after['pass@1']:.2f} in {seconds:.0f} s")
    least = config.evaluation.at_least
    return 1 if least is not None and after["pass@1"] < least else 0


def plan(options: argparse.Namespace) -> int:
    import jax

    jax.config.update("jax_platforms", "cpu")  # nothing runs on a device, not even where there is one
    from grpo_jax.planning import command
    from grpo_jax.training.configuration import load_config

    config = load_config(options.config, options.overrides)
    where = {"topology": options.topology, "slices": options.slices, "auto": options.mesh == "auto"}
    kept = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)  # JAX cannot read back what it keeps of absent chips
    try:
        return 0 if command.run(config, **where, json_file=options.json) else 2
    finally:
        jax.config.update("jax_enable_compilation_cache", kept)


def evaluate(options: argparse.Namespace) -> int:
    experiment = _open(options.target, options.step, options.overrides)
    result = experiment.evaluate()
    if not _speaks():
        return 0
    from grpo_jax.training.progress import table

    table("held-out", ["", "value"], list(result.numbers.items()))
    path = Path(options.output) if options.output else experiment.directory / "predictions.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in result.predictions)
    print(f"{len(result.predictions)} predictions in {path}")
    return 0


def sample(options: argparse.Namespace) -> int:
    experiment = _open(options.target, options.step)
    prompt = [{"role": "user", "content": options.prompt}] if options.chat else options.prompt
    rows = experiment.sample(prompt, count=options.count, temperature=options.temperature, seed=options.seed)
    if not _speaks():
        return 0
    texts = experiment.domain.text(rows)
    logps = [rows.sampler_logps[i, : rows.lengths[i]].tolist() for i in range(len(rows))]
    if options.json:
        for i, text in enumerate(texts):
            ids = rows.completions[i, : rows.lengths[i]].tolist()
            print(
                json.dumps({"completion": text, "tokens": ids, "logps": logps[i], "finished": bool(rows.finished[i])})
            )
        return 0
    from grpo_jax.training.progress import table

    table(options.prompt, ["completion", "tokens", "log-prob"], [[t, len(x), sum(x)] for t, x in zip(texts, logps)])
    return 0


def export(options: argparse.Namespace) -> int:
    if Path(options.path).exists():
        raise FileExistsError(
            f"{options.path} is there already, and an export overwrites nothing: name a new directory"
        )
    experiment = _open(options.run_directory, options.step)
    experiment.export(options.path)
    if not _speaks():
        return 0
    print(f"{options.path}: load it with transformers.AutoModelForCausalLM.from_pretrained")
    return 0


def write_report(options: argparse.Namespace) -> int:
    from grpo_jax.training.report import report

    png, html = report(options.run_directory)
    print(f"{png}\n{html}")
    return 0


def show_config(options: argparse.Namespace) -> int:
    from grpo_jax.training.configuration import describe, load_config, to_yaml

    if options.config:
        print(to_yaml(load_config(options.config, options.overrides)), end="")
        return 0
    rows = describe()
    widths = [max(len(getattr(row, name)) for row in rows) for name in ("key", "type", "default")]
    for row in rows:
        print("  ".join(f"{text:<{width}}" for text, width in zip(row, widths)) + f"  {row.meaning}")
    return 0


def show_methods(options: argparse.Namespace) -> int:
    from grpo_jax import methods

    if options.name:
        print(methods.explain(options.name))
        return 0
    lines = methods.summaries()
    width = max(map(len, lines))
    for name, line in lines.items():
        print(f"{name:<{width}}  {line}")
    return 0


def _speaks() -> bool:
    """Whether this is the process that prints and writes."""
    from grpo_jax import processes

    return processes.index() == 0


def _who() -> str:
    """Of several processes, the one that says it."""
    joined = sys.modules.get("grpo_jax.processes")
    return f"{joined.name()}: " if joined and joined.count() > 1 else ""


def _silence() -> None:
    """Of several processes one speaks; the others do if they fail."""
    import logging
    import warnings

    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


def _open(target: str, step: int | None, overrides: Sequence[str] = ()):
    """The experiment of a run's directory with its checkpoint's parameters, or of a configuration with the model's."""
    from grpo_jax.experiment import CONFIG_FILE, Experiment
    from grpo_jax.training.configuration import load_config

    path = Path(target)
    if not path.is_dir():
        return Experiment(load_config(path, overrides))
    file = path / CONFIG_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{path} holds no run: there is no {CONFIG_FILE} in it")
    # The mesh of the training run may need more devices than there are here: one axis over those that there are.
    sizes = {"data": -1, "fsdp": 1, "tensor": 1, "sequence": 1, "expert": 1, "dcn_data": "null"}
    here = [*(f"mesh.{axis}={size}" for axis, size in sizes.items()), f"directory={json.dumps(str(path))}"]
    experiment = Experiment(load_config(file, [*here, *overrides]))
    used = experiment.restore_params(step)
    print(f"checkpoint of step {used}", file=sys.stderr)
    return experiment
