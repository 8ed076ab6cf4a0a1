"""SPO: no groups. A table of each prompt's success rate is the baseline of its single completion.

A `Tracker` is a pytree, and every function returns a new one. One step: `prompt_weights` says which prompts to draw,
`single_stream` compares the rewards with `success_rate` as it was BEFORE the step, and after the step `tracker_update`
takes the rewards in, with the memory that `forgetting` leaves after the policy's `completion_drift`.

Source: arXiv:2509.13232 and its published code.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

RHO_MIN, RHO_MAX = 0.875, 0.96  # a memory of 8 and of 25 visits


class Tracker(NamedTuple):
    """Discounted counts of every prompt of the pool: successes alpha and failures beta, both above 0."""

    alpha: Float[Array, "P"]
    beta: Float[Array, "P"]


def tracker_init(successes: Float[Array, "P"], trials: Float[Array, "P"], *, rho_min: float = RHO_MIN) -> Tracker:
    """What is known of each prompt from `trials` completions of the initial policy, `successes` of them right.

    alpha = N_0 (s + 0.5) / (n + 1), beta = N_0 (n - s + 0.5) / (n + 1), N_0 = 1 / (1 - rho_min); 0.5 and 0.5 for n = 0.

    successes: in [0, trials]. rho_min: in [0, 1), the least that a visit leaves of earlier ones.
    """
    if isinstance(rho_min, (int, float)) and not 0 <= rho_min < 1:
        raise ValueError(f"rho_min is the least that a visit leaves of earlier ones, in [0, 1), got {rho_min}")
    successes, trials = jnp.asarray(successes).astype(jnp.float32), jnp.asarray(trials).astype(jnp.float32)
    if successes.shape != trials.shape or successes.ndim != 1:
        raise ValueError(
            f"tracker_init needs successes [P] and trials [P], got {list(successes.shape)} and {list(trials.shape)}"
        )
    mass = jnp.where(trials > 0, 1 / (1 - rho_min), 1.0) / (trials + 1)
    return Tracker(mass * (successes + 0.5), mass * (trials - successes + 0.5))


def success_rate(tracker: Tracker) -> Float[Array, "P"]:
    """v = alpha / (alpha + beta), in (0, 1)."""
    return tracker.alpha / (tracker.alpha + tracker.beta)


def prompt_weights(tracker: Tracker, *, gamma: float = 0.0, explore: float = 0.05) -> Float[Array, "P"]:
    """How much each prompt deserves to be drawn next; divide by the sum for probabilities.

    w = sqrt(v (1 - v)) / (alpha + beta)^gamma + explore. gamma: 0 in the published code; above it, well-known prompts
    are drawn less often, as in the paper.
    """
    rate, mass = success_rate(tracker), tracker.alpha + tracker.beta
    return jnp.sqrt(rate * (1 - rate)) / mass**gamma + explore


def single_stream(
    rewards: Float[Array, "N"],
    baselines: Float[Array, "N"],
    group_ids: Int[Array, "N"],
    lengths: Int[Array, "N"] | None = None,
    *,
    epsilon: float = 1e-8,
) -> Float[Array, "N"]:
    """Reward over the prompt's tracked rate, whitened over the whole batch.

    A = r - v; A~ = (A - mean(A)) / (std(A) + epsilon), ddof 1; A~ = A for a batch of one, 0 where all A are equal.

    baselines: `success_rate` of each row's prompt before the update. group_ids: only -1 matters, a row outside the
    batch; NaN rewards are outside too. lengths: if given, a row enters mean and std as often as it has tokens, so that
    a token-mean loss sees centred advantages (a later remedy, not SPO's own).
    """
    rewards, baselines = jnp.asarray(rewards).astype(jnp.float32), jnp.asarray(baselines).astype(jnp.float32)
    group_ids = jnp.asarray(group_ids)
    counts = jnp.ones_like(rewards) if lengths is None else jnp.asarray(lengths).astype(jnp.float32)
    if rewards.ndim != 1 or not rewards.shape == baselines.shape == group_ids.shape == counts.shape:
        raise ValueError(
            "single_stream needs one reward, baseline, id and length per row [N], got rewards "
            f"{list(rewards.shape)}, baselines {list(baselines.shape)}, group_ids {list(group_ids.shape)}, lengths "
            f"{list(counts.shape)}"
        )
    present = (group_ids >= 0) & ~jnp.isnan(rewards)
    raw = jnp.where(present, rewards, 0) - jnp.where(present, baselines, 0)
    counted = present & (counts > 0)
    share = jnp.where(counted, counts, 0)
    size = share.sum()
    # Differences from the lowest, so that equal advantages have exactly no deviation.
    low = jax.lax.stop_gradient(jnp.min(jnp.where(counted, raw, jnp.inf)))
    low = jnp.where(counted.any(), low, 0)
    centred = raw - (low + jnp.sum(share * (raw - low)) / jnp.maximum(size, 1))
    variance = jnp.sum(share * centred**2) / jnp.maximum(size - 1, 1)
    spread = variance > 0
    whitened = jnp.where(spread, centred / (jnp.sqrt(jnp.where(spread, variance, 1)) + epsilon), 0)
    return jnp.where(present, jnp.where(present.sum() > 1, whitened, raw), 0)


def completion_drift(
    stored_logps: Float[Array, "N T"], logps: Float[Array, "N T"], mask: Bool[Array, "N T"]
) -> Float[Array, "N"]:
    """How far the policy has moved on a completion: the mean of |stored - now| over its masked-in tokens, in nats.

    The published code's measure, of which `forgetting` has its half-life; it is no KL estimate. 0 for an empty row.
    """
    mask = jnp.asarray(mask).astype(bool)
    gap = jnp.asarray(stored_logps).astype(jnp.float32) - jnp.asarray(logps).astype(jnp.float32)
    return jnp.sum(jnp.where(mask, jnp.abs(gap), 0), axis=1) / (mask.sum(axis=1) + 1e-8)


def forgetting(
    drift: Float[Array, "N"], *, half_life: float = 0.06, rho_min: float = RHO_MIN, rho_max: float = RHO_MAX
) -> Float[Array, "N"]:
    """What a visit leaves of the earlier ones: rho = clip(2^(-drift / half_life), rho_min, rho_max).

    drift: >= 0, from `completion_drift`; 0 at a prompt's first visit. half_life: in the same unit, above 0.
    """
    _check_rho("rho_min", rho_min)
    _check_rho("rho_max", rho_max)
    if isinstance(half_life, (int, float)) and not half_life > 0:
        raise ValueError(f"half_life is the drift that halves the memory and must be above 0, got {half_life}")
    return jnp.clip(jnp.exp2(-jnp.asarray(drift).astype(jnp.float32) / half_life), rho_min, rho_max)


def tracker_update(
    tracker: Tracker, prompt_ids: Int[Array, "N"], rewards: Float[Array, "N"], rho: Float[Array, "N"]
) -> Tracker:
    """Take the rewards in, row after row (a prompt may come twice): alpha <- rho alpha + r, beta <- rho beta + 1 - r.

    The same as v <- v + (r - v) / (rho (alpha + beta) + 1), which is the paper's form for rewards that are not binary.

    prompt_ids: places in the tables, in [0, P); -1 = padding. rewards: in [0, 1]; NaN leaves the prompt as it is.
    """
    prompt_ids, rewards, rho = (jnp.asarray(x) for x in (prompt_ids, rewards, rho))
    if prompt_ids.ndim != 1 or not prompt_ids.shape == rewards.shape == rho.shape:
        raise ValueError(
            "tracker_update needs one prompt id, reward and rho per row [N], got "
            f"{list(prompt_ids.shape)}, {list(rewards.shape)} and {list(rho.shape)}"
        )
    rewards, rho = rewards.astype(jnp.float32), rho.astype(jnp.float32)

    def visit(tracker: Tracker, row: tuple[Array, Array, Array]) -> tuple[Tracker, None]:
        prompt, reward, kept = row
        counts = (prompt >= 0) & ~jnp.isnan(reward)
        at, reward, kept = jnp.maximum(prompt, 0), jnp.where(counts, reward, 0), jnp.where(counts, kept, 1)
        alpha = kept * tracker.alpha[at] + reward
        beta = kept * tracker.beta[at] + jnp.where(counts, 1 - reward, 0)
        return Tracker(tracker.alpha.at[at].set(alpha), tracker.beta.at[at].set(beta)), None

    # Empty sums, so that under shard_map the tables vary over the mesh as the rows do.
    alike = prompt_ids[:0].sum() + rewards[:0].sum() + rho[:0].sum()
    return jax.lax.scan(visit, jax.tree.map(lambda x: x + alike, tracker), (prompt_ids, rewards, rho))[0]


def _check_rho(name: str, rho: float) -> None:
    if isinstance(rho, (int, float)) and not 0 <= rho <= 1:
        raise ValueError(f"{name} is the share of the memory that a visit leaves, in [0, 1], got {rho}")
