"""What importing the library costs beyond `import jax`, and what it pulls in.

python benchmarks/imports.py        exits non-zero if a heavy package is pulled in or an import takes too long
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys

HEAVY = ("flax", "optax", "orbax", "grain", "transformers", "torch", "tensorflow", "matplotlib", "rich", "pydantic")
LIMITS = {"grpo_jax": 2.0, "grpo_jax.losses, grpo_jax.advantages": 0.3, "grpo_jax.presets": 0.3}  # seconds
PROBE = """
import json, sys, time
import jax, jax.numpy
before, start = {{m.split(".")[0] for m in sys.modules}}, time.perf_counter()
import {module}
seconds = time.perf_counter() - start
added = sorted({{m.split(".")[0] for m in sys.modules}} - before - set(sys.stdlib_module_names))
print(json.dumps({{"seconds": seconds, "packages": added}}))
"""


def measure(module: str, runs: int = 5) -> tuple[float, list[str]]:
    """Median seconds after `import jax`, and the packages that come in beyond it."""
    results = [
        json.loads(
            subprocess.run(
                [sys.executable, "-c", PROBE.format(module=module)], capture_output=True, check=True, text=True
            ).stdout
        )
        for _ in range(runs)
    ]
    return statistics.median(r["seconds"] for r in results), results[0]["packages"]


def main() -> None:
    failed = False
    for module, limit in LIMITS.items():
        seconds, packages = measure(module)
        heavy = [p for p in packages if p in HEAVY]
        print(f"import {module}: {seconds:.3f} s beyond jax; packages beyond jax's: {', '.join(packages) or 'none'}")
        if heavy or seconds > limit:
            failed = True
            print(f"  too heavy: {', '.join(heavy) or f'{seconds:.2f} s, at most {limit} s'}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
