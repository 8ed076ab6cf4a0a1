"""How far our logits are from those of `transformers`, per family: the golden files of the tests, as a table.

python benchmarks/parity.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "models"))

from comparisons import greedy, row_logits  # noqa: E402

from grpo_jax.models import load  # noqa: E402

GOLDEN = ROOT / "tests" / "models" / "golden"


def main() -> None:
    print(
        f"{'model':<14}{'family':<13}{'max |logit difference|':>23}{'largest |logit|':>17}{'greedy tokens equal':>21}"
    )
    for path in sorted(p for p in GOLDEN.iterdir() if p.is_dir()):
        config, graphdef, params = load(path)
        with np.load(path / "expected.npz") as file:
            expected = dict(file)
        tokens, lengths, wanted = expected["tokens"], expected["lengths"], expected["logits"]
        n, width = tokens.shape
        got = row_logits(graphdef, params, np.zeros((n, 1), np.int32), np.zeros(n, np.int32), tokens[:, None])[:, 0]
        real = np.arange(width) < lengths[:, None]
        gap = np.abs(np.asarray(got) - wanted)[real].max()
        count = expected["greedy"].shape[1]
        same = (np.asarray(greedy(graphdef, params, tokens, lengths, count)) == expected["greedy"]).sum()
        largest = np.abs(wanted[real]).max()
        print(f"{path.name:<14}{config.family:<13}{gap:>18.1e}{largest:>17.1f}{f'{same} of {n * count}':>21}")


if __name__ == "__main__":
    main()
