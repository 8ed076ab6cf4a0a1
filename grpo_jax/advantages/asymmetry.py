"""TempSamp-R1: groups with one perfect row put in, and what keeps it from making every other row look bad."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grpo_jax import segments
from grpo_jax.advantages.group import _compared


def asymmetric(
    rewards: Float[Array, "N"], *, threshold: float = 0.8, compression: float = 0.01, expansion: float = 1.0
) -> Float[Array, "N"]:
    """Reward map that flattens differences above a threshold and widens those below; then compare within groups.

    tau + alpha_1 ln(1 + r - tau) for r >= tau, tau - (e^{alpha_2 (tau - r)} - 1) / (e^{alpha_2} - 1) below.

    Continuous and increasing: 0 -> 0.0868, 0.8 -> 0.8, 1 -> 0.8018 by default. rewards: the graded part alone, in
    [0, 1]; add format rewards afterwards. threshold, compression, expansion: tau, alpha_1, alpha_2. What is not finite
    becomes NaN: it does not apply.
    Raises: ValueError unless compression > 0 and expansion > 0.
    Source: arXiv:2509.18056, as in a published implementation.
    """
    for name, value in (("compression", compression), ("expansion", expansion)):
        if not value > 0:
            raise ValueError(f"{name} must be above 0, or the map is not increasing, got {value}")
    rewards = jnp.asarray(rewards).astype(jnp.float32)
    finite = jnp.isfinite(rewards)
    over = jnp.where(finite, rewards, 0) - threshold
    above = compression * jnp.log1p(jnp.maximum(over, 0))
    below = jnp.expm1(expansion * jnp.maximum(-over, 0)) / math.expm1(expansion)
    return jnp.where(finite, threshold + jnp.where(over >= 0, above, -below), jnp.nan)


def anchored(
    rewards: Float[Array, "N"],
    group_ids: Int[Array, "N"],
    injected: Bool[Array, "N"],
    *,
    kappa: float = 1.2,
    epsilon: float = 1e-6,
) -> Float[Array, "N"]:
    """The alternative to a map: the drawn rows are compared among themselves, the injected row is set over the best.

    A = (r - mean) / (std + epsilon) over the group's drawn rows, ddof 1; injected rows get kappa max A.

    injected: rows that the policy did not draw. 0 in a group whose drawn rows are one, equal or none.
    Source: an ablation of arXiv:2509.18056; kappa is reconstructed.
    """
    rewards, group_ids = _compared(rewards, group_ids)
    injected = jnp.asarray(injected).astype(bool)
    if injected.shape != rewards.shape:
        raise ValueError(f"injected must have one value per row, got {list(injected.shape)} for {list(rewards.shape)}")
    drawn = segments.z_score(rewards, group_ids, ~injected, ddof=1, epsilon=epsilon)
    return jnp.where(injected, kappa * segments.maximum(drawn, group_ids, ~injected), drawn)
