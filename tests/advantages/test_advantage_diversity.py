"""How different completions are, by hand and by counting."""

from itertools import combinations

import numpy as np
import pytest

from grpo_jax.advantages.diversity import ngram_diversity


def test_by_hand():
    rows = np.array([[1, 2, 3, 4, 5], [1, 2, 3, 4, 0], [1, 2, 3, 4, 9], [7, 7, 7, 7, 7], [7, 8, 0, 0, 0]])
    lengths = np.array([5, 5, 4, 5, 2])
    measure = lambda which, **options: ngram_diversity(rows[which], lengths[which], np.zeros(len(which)), **options)  # noqa: E731
    assert measure([0, 0]) == 0 and measure([0, 3]) == 1
    assert measure([0, 1]) == pytest.approx(1 - 1 / 3)  # 1234 and 2345 against 1234 and 2340
    assert measure([0, 2]) == pytest.approx(1 - 1 / 2)  # the fifth token of the third row is padding
    assert measure([0, 1, 2]) == pytest.approx(1 - (1 / 3 + 1 / 2 + 1 / 2) / 3)
    assert measure([4, 4]) == 0 and measure([3, 4]) == 1  # too short for an n-gram: compared as a whole
    assert measure([3, 4], n=1) == pytest.approx(1 - 1 / 2)
    assert measure([0]) == 0


def test_against_counting():
    draw = np.random.default_rng(0)
    tokens, lengths, groups = draw.integers(0, 2, (30, 9)), draw.integers(0, 10, 30), draw.integers(-1, 6, 30)

    def similarity(a, b):
        first, second = ({tuple(t[i : i + 3]) for i in range(max(len(t) - 2, 1))} for t in (a, b))
        return sum(x in second for x in first) / len(set(first) | set(second))

    means = []
    for group in range(6):
        texts = [tokens[i][: lengths[i]].tolist() for i in range(30) if groups[i] == group]
        if len(texts) > 1:
            means.append(np.mean([1 - similarity(a, b) for a, b in combinations(texts, 2)]))
    got = ngram_diversity(tokens, lengths, groups, n=3)
    assert got == pytest.approx(np.mean(means), abs=1e-12) and 0.1 < got < 0.9
    order = draw.permutation(30)
    assert ngram_diversity(tokens[order], lengths[order], groups[order], n=3) == pytest.approx(got, abs=1e-12)
    padded = np.pad(tokens, ((0, 0), (0, 4)), constant_values=1)
    assert ngram_diversity(padded, lengths, groups, n=3) == got


def test_no_tokens_are_no_ngram():
    with pytest.raises(ValueError, match="at least one token, got n 0"):
        ngram_diversity(np.zeros((2, 3)), np.ones(2), np.zeros(2), n=0)
