"""How much the completions of a prompt differ from each other. Host only."""

from __future__ import annotations

from itertools import combinations

import numpy as np
from jaxtyping import Int


def ngram_diversity(
    completions: Int[np.ndarray, "N T"], lengths: Int[np.ndarray, "N"], group_ids: Int[np.ndarray, "N"], *, n: int = 4
) -> float:
    """1 - the mean Jaccard similarity of the token n-grams of two completions of a group, averaged over groups.

    In [0, 1]; 0 if no group has two rows. A completion of fewer than n tokens is one n-gram of its own. Rows with id -1
    are left out. Raises: ValueError for n < 1.
    Source: reconstructed; arXiv:2603.07777 speaks of response diversity and gives values, but no formula.
    """
    if n < 1:
        raise ValueError(f"an n-gram has at least one token, got n {n}")
    rows = [tuple(np.asarray(row[:length]).tolist()) for row, length in zip(completions, lengths)]
    grams = [{r[i : i + n] for i in range(max(len(r) - n + 1, 1))} for r in rows]
    ids = np.asarray(group_ids)
    differ = []
    for group in np.unique(ids[ids >= 0]):
        pairs = list(combinations(np.flatnonzero(ids == group), 2))
        if pairs:
            differ.append(np.mean([1 - len(grams[a] & grams[b]) / len(grams[a] | grams[b]) for a, b in pairs]))
    return float(np.mean(differ)) if differ else 0.0
