"""How long a completion may be, in tokens."""

from __future__ import annotations

from grpo_jax.types import RewardFn


def length_penalty(*, target: int, limit: int) -> RewardFn:
    """0 up to `target` tokens, then falling linearly to -1 at `limit` tokens, -1 beyond.

    r = -clip((length - target) / (limit - target), 0, 1), the length in tokens with the stop token.
    With limit = the longest completion and target = limit - buffer this is the soft overlong punishment of
    Yu et al. 2025 (DAPO, arXiv:2503.14476), eq. 13.
    """
    if not 0 <= target < limit:
        raise ValueError(f"length needs 0 <= target < limit, got target {target} and limit {limit}")

    def reward(lengths) -> list[float | None]:
        return [-min(max((int(length) - target) / (limit - target), 0.0), 1.0) for length in lengths]

    return reward
