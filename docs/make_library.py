"""Write the tables of docs/library.md from the docstrings and signatures of the library.

python docs/make_library.py            rewrite them
python docs/make_library.py --check    exit with 1 if they are not up to date
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

from grpo_jax import advantages, losses, presets, segments

SHAPED = r"""(?:Float|Int|Bool|UInt|Num)\[[^"']*["']([^"']*)["']\]"""
NUMBER = r"arXiv:(\d{4}\.\d{4,5})"
PAGE = Path(__file__).parent / "library.md"
BEGIN, END = "<!-- tables: written by docs/make_library.py -->", "<!-- end of tables -->"
ROOMS = {
    "Advantages": (advantages, "advantages"),
    "Losses": (losses, "losses"),
    "KL estimators": (losses.kl, "losses.kl"),
    "Segmented statistics": (segments, "segments"),
    "Presets": (presets, "presets"),
}


def public(module: ModuleType) -> Iterator[tuple[str, Callable]]:
    """The public functions of a module: those it lists, else those that it defines; of listed modules, theirs."""
    names = getattr(module, "__all__", None) or [
        name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__
    ]
    for name in sorted(names, key=str.lower):
        value = getattr(module, name)
        if inspect.ismodule(value) and module is presets:
            yield from ((f"{name}.{inner}", function) for inner, function in public(value))
        elif not name.startswith("_") and (inspect.isfunction(value) or inspect.isclass(value)):
            yield name, value


def summary(function: Callable) -> str:
    """The first sentence of the docstring, on one line."""
    first = (inspect.getdoc(function) or "").split("\n\n")[0].replace("\n", " ")
    return re.split(r"(?<=[a-z\])0-9])(?<!Dr)(?<!\.)\. ", first)[0].removesuffix(".").removesuffix(":")


def on_host(function: Callable) -> bool:
    """Whether it is numpy or Python, and not for jit and vmap."""
    file = inspect.getdoc(sys.modules[function.__module__]) or ""
    return "Host only" in (inspect.getdoc(function) or "") + file or "run on the host" in file


def source(function: Callable) -> str:
    """The papers that the docstring names, else those that the file's does."""
    own, file = inspect.getdoc(function) or "", inspect.getdoc(sys.modules[function.__module__]) or ""
    found = dict.fromkeys(re.findall(NUMBER, own) or re.findall(NUMBER, file))
    return ", ".join(f"[{n}](https://arxiv.org/abs/{n})" for n in found)


def shapes(function: Callable) -> str:
    """What goes in and comes out: `rewards [N], group_ids [N] -> [N]`; keyword options by name."""
    if inspect.isclass(function):
        return "fields " + ", ".join(f"{k} {_shape(v)}".strip() for k, v in function.__annotations__.items())
    signature = inspect.signature(function)
    parts, keywords = [], []
    for p in signature.parameters.values():
        shown = f"{p.name} {_shape(p.annotation)}".strip()
        if p.default not in (p.empty, None):
            shown += f"={p.default if not isinstance(p.default, str) else repr(p.default)}"
        (keywords if p.kind is p.KEYWORD_ONLY else parts).append(shown)
    out = _structure(signature.return_annotation)
    return "; ".join(filter(None, [", ".join(parts), ", ".join(keywords)])) + (f" -> {out}" if out else "")


ALIASES = {"Values": "[N]", "Ids": "[N]", "Where": "[N]", "Weights": "[K]", "Rates": "[M]", "Counts": "[M]"}


def _shape(annotation: object) -> str:
    text = str(annotation)
    if text in ALIASES:
        return ALIASES[text]
    found = re.findall(SHAPED, text)
    return ", ".join(dict.fromkeys(f"[{', '.join(f.split())}]" if f.strip() else "scalar" for f in found))


def _structure(annotation: object) -> str:
    """A result's shapes within its tuples and dicts."""
    if str(annotation) in ALIASES:
        return ALIASES[str(annotation)]
    text = re.sub(SHAPED, lambda found: _shape(found[0]), str(annotation))
    return re.sub(r"dict\[str, (.*)\]", r"{name: \1}", re.sub(r"tuple\[(.*)\]", r"(\1)", text))


def tables() -> str:
    lines = []
    for title, (module, prefix) in ROOMS.items():
        lines += [f"## {title}: `grpo_jax.{prefix}`", ""]
        lines += ["| name | what it is | shapes | paper |", "| --- | --- | --- | --- |"]
        for name, function in public(module):
            host = " (host)" if on_host(function) else ""
            cells = (f"`{name}`", summary(function) + host, f"`{shapes(function)}`", source(function))
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)


def page() -> str:
    """The page with its tables as they should be."""
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{tables()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    if "--check" in sys.argv:
        same = page() == PAGE.read_text()
        sys.exit(0 if same else "docs/library.md is not up to date: run python docs/make_library.py")
    PAGE.write_text(page())
