"""The rooms import only from floors below them, and the importable library pulls in nothing heavy."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "grpo_jax"
FLOORS = {
    "processes": 1,
    "references": 1,
    "segments": 1,
    "types": 1,
    "advantages": 2,
    "losses": 2,
    "presets": 3,
    "models": 3,
    "data": 3,
    "rewards": 3,
    "sampling": 4,
    "training": 5,
    "methods": 6,
    "supervised": 7,
    "experiment": 8,
    "pieces": 8,
    "planning": 9,
    "cli": 10,
    "__main__": 11,
}
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(tree: ast.AST) -> set[str]:
    """Names of the rooms that a file imports from."""
    rooms = set()
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "grpo_jax":
            parts = node.module.split(".")
            names = [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [a.name.split(".")[1] for a in node.names if a.name.startswith("grpo_jax.")]
        rooms |= set(names)
    return rooms


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_file_imports_only_from_its_own_room_and_from_below(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if room == "__init__":
        return
    above = {other for other in imports(ast.parse(path.read_text())) if FLOORS[other] > FLOORS[room]}
    beside = {
        other
        for other in imports(ast.parse(path.read_text()))
        if FLOORS[other] == FLOORS[room] and other != room and FLOORS[room] > 1
    }
    assert not above | beside, f"{room} (floor {FLOORS[room]}) imports from {sorted(above | beside)}"


def test_no_method_is_named_in_training_or_sampling():
    methods = {p.stem for p in (PACKAGE / "methods").glob("*.py")} - {"__init__"}
    for path in [*(PACKAGE / "training").glob("*.py"), *(PACKAGE / "sampling").glob("*.py")]:
        names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
        strings = {n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)}
        allowed = {"grpo"} if path.name == "sections.py" else set()  # the default of a configuration key
        assert not (names | strings) & methods - allowed, path


def test_files_hold_one_thing():
    long = {str(p.relative_to(PACKAGE)): n for p in FILES if (n := len(p.read_text().splitlines())) > 420}
    assert not long


@pytest.mark.parametrize("module", ["grpo_jax", "grpo_jax.losses", "grpo_jax.advantages", "grpo_jax.segments"])
def test_the_library_is_light(module):
    code = f"import json, sys, jax; a = set(sys.modules); import {module}; print(json.dumps([*set(sys.modules) - a]))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    packages = {name.split(".")[0] for name in json.loads(out)}
    assert not packages & {"flax", "optax", "orbax", "grain", "transformers", "torch", "matplotlib", "pydantic", "rich"}
