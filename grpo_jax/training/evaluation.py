"""Held-out prompts: greedy, pass@1, unbiased pass@k, and majority vote. Host only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from grpo_jax.training.verification import scored
from grpo_jax.types import Domain, Key, Prompt, PyTree, Request, Rollout


class Evaluation(NamedTuple):
    """numbers: what to log; predictions: one row per completion, for JSONL."""

    numbers: dict[str, float]
    predictions: list[dict[str, Any]]


def pass_at_k(samples: int, correct: np.ndarray, k: int) -> np.ndarray:
    """Probability that at least one of k draws without replacement is correct: 1 - C(n - c, k) / C(n, k).

    samples: n; correct: c of each prompt. Unbiased for k <= n.
    Source: Chen et al. 2021 (arXiv:2107.03374), eq. 1.
    """
    _check_draws(k, samples)
    wrong = samples - np.asarray(correct)
    # C(n - c, k) / C(n, k) = prod_{i = n-c+1 .. n} (1 - k / i), without large factorials.
    return np.array([1.0 - np.prod(1.0 - k / np.arange(w + 1, samples + 1)) if w >= k else 1.0 for w in wrong])


def majority(answers: Sequence[str]) -> int:
    """The first index that holds the most frequent answer; ties go to the answer that came first."""
    counts = Counter(answers)
    best = max(counts.values())
    return next(i for i, a in enumerate(answers) if counts[a] == best)


def evaluate_prompts(
    domain: Domain,
    params: Mapping[str, PyTree],
    prompts: Sequence[Prompt],
    verify: Callable[[Sequence[Prompt], Rollout, list[str], int], Rollout],
    key: Key,
    *,
    samples: int = 8,
    k: Sequence[int] = (1, 8),
    greedy: bool = True,
    channel: str | None = None,
    extract: Callable[[str], str] = str.strip,
    step: int = 0,
) -> Evaluation:
    """Sample every prompt at temperature 1 without truncation, and once greedily; score; count.

    A completion is correct if it scores 1 in `channel` (default: the first). maj@n: the most frequent extracted answer
    is correct.
    Raises: ValueError if there are no prompts, or for a k beyond `samples`.
    """
    if not prompts:
        raise ValueError("there are no prompts to evaluate on")
    wanted = sorted({1, *k})
    for each in wanted:
        _check_draws(each, samples)
    plain = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
    asked = [Request(p, count=samples, temperature=1.0, options=plain) for p in prompts]
    if greedy:
        asked += [Request(p, temperature=0.0, options=plain) for p in prompts]
    rows = domain.sample(params, asked, key)
    owners = [r.prompt for r in asked for _ in range(r.count)]
    texts = domain.text(rows)
    rows = scored(rows, lambda some, at: verify([owners[i] for i in at], some, [texts[i] for i in at], step))
    scores, weights = rows.scores, np.asarray(rows.channel_weights or (1.0,) * rows.scores.shape[1])
    correct = rows.score(channel or rows.channels[0]) >= 1 - 1e-6
    n = len(prompts) * samples
    sampled = correct[:n].reshape(len(prompts), samples)
    numbers = {f"pass@{i}": float(pass_at_k(samples, sampled.sum(axis=1), i).mean()) for i in wanted}
    answers = np.array([extract(t) for t in texts[:n]], object).reshape(len(prompts), samples)
    chosen = [majority(list(a)) for a in answers]
    numbers[f"maj@{samples}"] = float(sampled[np.arange(len(prompts)), chosen].mean())
    if greedy:
        numbers["greedy"] = float(correct[n:].mean())
    numbers["length_mean"] = float(rows.lengths[:n].mean())
    numbers["reward"] = float(np.nansum(scores[:n] * weights, axis=1).mean())
    predictions = [
        {
            "prompt_id": int(rows.prompt_ids[i]),
            "prompt": owners[i].text,
            "completion": texts[i],
            "kind": "sample" if i < n else "greedy",
            "index": int(rows.index[i]) if i < n else 0,
            "correct": bool(correct[i]),
            "scores": {c: None if np.isnan(s) else float(s) for c, s in zip(rows.channels, scores[i])},
            "length": int(rows.lengths[i]),
        }
        for i in range(len(texts))
    ]
    return Evaluation(numbers, predictions)


def _check_draws(k: int, samples: int) -> None:
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} needs between 1 and {samples} draws, as there are {samples} samples per prompt")
