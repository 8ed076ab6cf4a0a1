"""The two rooms are light and stand alone."""

import subprocess
import sys

HEAVY = ("flax", "optax", "orbax", "grain", "transformers", "torch", "tensorflow", "matplotlib", "pydantic", "rich")


def test_losses_and_advantages_pull_in_nothing_heavy():
    code = (
        "import sys, jax; before = set(sys.modules); import grpo_jax.losses, grpo_jax.advantages;"
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    environment = {"PYTHONPATH": ":".join(filter(None, sys.path)), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "grpo_jax" in done.stdout
    assert not set(done.stdout.split()) & set(HEAVY), done.stdout
