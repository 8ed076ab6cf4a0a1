"""Make the environments of the other projects, in $BENCH_VENVS (default ~/.cache/grpo_bench/venvs).

python -m benchmarks.peers.install [trl tunix easydel]       about 2 minutes and 2 GB each; Python 3.11
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
from pathlib import Path

from benchmarks.peers.schedule import ENVIRONMENTS

TORCH = "torch==2.13.0"
# Tunix converts its weights with torch; EasyDeL's trainers import Pillow without requiring it.
PACKAGES = {
    "trl": [TORCH, "trl==1.16.0", "transformers==5.23.0"],
    "tunix": [TORCH, "google-tunix==0.1.7", "jax==0.10.2", "flax==0.12.8"],
    "easydel": ["easydel==0.3.0", "pillow"],
}
PYTHON = "python3.11"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="ENVIRONMENT", help=f"default: all of {', '.join(PACKAGES)}")
    names = parser.parse_args().names or list(PACKAGES)
    if unknown := [name for name in names if name not in PACKAGES]:
        parser.error(f"there is no environment {unknown[0]!r}; there are {', '.join(PACKAGES)}")
    if shutil.which(PYTHON) is None:
        parser.error(f"{PYTHON} is not on the path: these versions of the projects are for it")
    for name in names:
        install(name, ENVIRONMENTS / name)


def install(name: str, where: Path) -> None:
    """One environment; nothing if it is there."""
    python = where / "bin" / "python"
    if python.exists():
        print(f"{name}: there already, in {where}")
        return
    print(f"{name}: {', '.join(PACKAGES[name])} into {where}", flush=True)
    partial = where.with_name(f"{name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    subprocess.run([PYTHON, "-m", "venv", str(partial)], check=True)
    # one after the other: pip's resolver goes back and forth for long when it gets them together
    for package in PACKAGES[name]:
        subprocess.run([str(partial / "bin" / "python"), "-m", "pip", "install", "-q", package], check=True)
    partial.rename(where)


if __name__ == "__main__":
    main()
