"""docs/library.md: its examples run as they stand and do what they say, and its tables are up to date."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from grpo_jax import advantages, losses

DOCS = Path(__file__).parent.parent / "docs"
BLOCKS = re.findall(r"```python\n(.*?)```", (DOCS / "library.md").read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def names() -> dict:
    names: dict = {}
    exec(BLOCKS[0], names)
    return names


def test_the_loop_learns(names):
    assert float(names["reward"]) > 0.8  # from 0.2


def test_devices_make_no_difference(names):
    names = {**names, "params": {"bigram": names["jnp"].zeros((5, 5))}}  # as untrained
    exec(BLOCKS[1], names)
    jnp, tokens, group_ids, params = (names[k] for k in ("jnp", "tokens", "group_ids", "params"))
    assert len(jax.devices()) == 8
    mask = jnp.ones(tokens.shape, bool)
    adv = advantages.per_decision(advantages.leave_one_out((tokens == 3).mean(axis=1), group_ids), mask)

    def loss(params):  # on policy: the gradient of REINFORCE
        return -(adv * names["log_probs"](params, tokens)).mean()

    expected = jax.grad(loss)(params)["bigram"]
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(names["gradient"]["bigram"], expected, rtol=1e-4, atol=1e-7)


def test_the_examples_import_the_library_alone():
    code = "import jax, sys\n" + BLOCKS[0].replace("range(100)", "range(1)") + BLOCKS[1]
    code += "print(sorted(m for m in sys.modules if m.startswith('grpo_jax.') or m.split('.')[0] == 'flax'))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    loaded = {m.split(".")[1] if "." in m else m for m in eval(out.splitlines()[-1])}
    assert {"advantages", "losses", "segments"} <= loaded <= {"advantages", "losses", "segments", "presets"}


def test_tables_are_up_to_date_and_complete():
    spec = importlib.util.spec_from_file_location("make_library", DOCS / "make_library.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    assert make.page() == make.PAGE.read_text(), "run python docs/make_library.py"
    rows = re.findall(r"^\| `([\w.]+)` \| ((?:[^|\\]|\\.)+) \| `([^`]*)` \|", make.PAGE.read_text(), re.MULTILINE)
    listed = {name for name, _, _ in rows}
    functions = {n for room in (advantages, losses) for n in room.__all__ if callable(getattr(room, n))}
    assert functions <= listed
    assert len(rows) > 150 and all(len(line) > 8 for _, line, _ in rows)
