"""Compiling once: a cache on disk that outlives the process, and why something was compiled again."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import jax
from filelock import FileLock

CACHE_BYTES = 4 * 2**30  # beyond it the programs that were used longest ago go
SHOWN = 3  # arguments that an explanation names
LOGGERS = ("jax._src.interpreters.partial_eval", "jax._src.compiler", "jax._src.compilation_cache")
ACCOUNTS = ("TRACING CACHE MISS", "PERSISTENT COMPILATION CACHE MISS", "Writing ", "Not writing ")


def keep_compiled() -> Path | None:
    """Have JAX keep compiled programs in $XDG_CACHE_HOME/grpo_jax/compiled (default ~/.cache), small ones too.

    A program is found again by its text, the versions, the flags, and the kind and number of devices (of CPUs also by
    their instructions). A cache that JAX was told of already stays as it is, and so does one that was switched off:
    JAX_COMPILATION_CACHE_DIR=/elsewhere, JAX_ENABLE_COMPILATION_CACHE=false. What is in it is run as it is: the
    directory is the user's own.

    Returns the directory, None where nothing was set. Warns, and nothing more, where it cannot be written.
    """
    if jax.config.jax_compilation_cache_dir or not jax.config.jax_enable_compilation_cache:
        return None
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    directory = (base if base.is_absolute() else Path("~/.cache").expanduser()) / "grpo_jax" / "compiled"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with FileLock(directory / ".lockfile", timeout=10):
            for program in directory.glob("*-cache"):  # one whose writer was killed has no time of use, and may be cut
                if not program.with_name(program.name.removesuffix("-cache") + "-atime").exists():
                    program.unlink()
    except (OSError, NotImplementedError, RuntimeError) as error:  # the last two: no home, no locks on this file system
        warnings.warn(
            f"compiled programs are not kept, and every run compiles anew: {directory} cannot be written ({error}). "
            "Name another directory in JAX_COMPILATION_CACHE_DIR",
            stacklevel=2,
        )
        return None
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_compilation_cache_max_size", CACHE_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return directory


def compile_lightly() -> None:
    """Where there are only CPUs, leave out the newer of XLA's two ways to write loops.

    The programs are as fast, and take less time and memory to compile. For the versions of JAX
    that this was measured with, before JAX has started, and unless XLA_FLAGS says otherwise already.
    """
    flags, accelerators = os.environ.get("XLA_FLAGS", ""), ("libtpu", "jax_plugins")
    only_cpus = os.environ.get("JAX_PLATFORMS") == "cpu" or not any(map(importlib.util.find_spec, accelerators))
    if only_cpus and jax.__version_info__[:2] == (0, 10) and "xla_cpu_use_fusion_emitters" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_use_fusion_emitters=false".strip()


def leave_constants_in_place() -> None:
    """Where libtpu is installed, have it not keep what a loop only reads in main memory and in fast memory at once.

    The copy in fast memory, as of the prompts' keys and values in a decode step, is made again in every turn of the
    loop, and nothing reads it. For the version that this was seen with, before JAX has started, and unless
    LIBTPU_INIT_ARGS says otherwise already.
    """
    flag, given = "xla_msa_enable_while_redundant_eviction_elimination", os.environ.get("LIBTPU_INIT_ARGS", "")
    if installed("libtpu").startswith("0.0.42") and flag not in given:
        os.environ["LIBTPU_INIT_ARGS"] = f"{given} --{flag}=false".strip()


def installed(package: str) -> str:
    """The version of a package, or "not installed"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


class Explanations(logging.Filter):
    """While open, JAX's own account of every retrace goes to `note` as a line, and not into the log.

    "step: batch['x'] is f32[4,7], was f32[4,5]": against the nearest arguments that the function was traced for.
    """

    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__()
        self._note = note
        self._before = False

    def __enter__(self) -> None:
        self._before = bool(jax.config.jax_explain_cache_misses)
        jax.config.update("jax_explain_cache_misses", True)
        for name in LOGGERS:
            logging.getLogger(name).addFilter(self)

    def __exit__(self, *exception: object) -> None:
        jax.config.update("jax_explain_cache_misses", self._before)
        for name in LOGGERS:
            logging.getLogger(name).removeFilter(self)

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if text.startswith("TRACING CACHE MISS") and (cause := _cause(text)):
            self._note(cause)
        return self._before or not text.startswith(ACCOUNTS)


def _cause(account: str) -> str | None:
    """The line that matters of JAX's account; None if it is written otherwise than this reads it."""
    changes = re.findall(r"^\s*\* at (.+), now (.+) and before (.+)$", account, re.MULTILINE)
    if known := re.search(r"^  for (\S+)", account, re.MULTILINE):
        told = "; ".join(f"{where} is {now}, was {before}" for where, now, before in changes[:SHOWN])
        told += f"; and {len(changes) - SHOWN} more" if len(changes) > SHOWN else ""
        return f"{known[1]}: {told or account.splitlines()[-1].strip(' *')}"
    new = re.search(r"^    (\S+) id=\d+ defined at (.+)$", account, re.MULTILINE)
    return f"{new[1]}: a function that was not there before, {new[2]}" if new else None
