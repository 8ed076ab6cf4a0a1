"""Gaussian decisions: a step of a flow or diffusion sampler, x' ~ N(mean, std^2 I), is one decision.

Arrays over latents are [N, T, ...] with T denoising steps; all that follows is taken as the MEAN over latent
dimensions (`...`), so a ratio is the geometric mean of the ratios per dimension and clip ranges are about 1e-4. The
result [N, T] goes where token log-probs and ratios go: `ppo_clip(ratio, advantages, low=1e-4, high=1e-4)`.

std: [N, T], the standard deviation of the step, noise level times sqrt(|dt|). Where it is 0 the step is deterministic
and has no log-prob: NaN, without harm to the gradient where aggregation leaves it out.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from grpo_jax.losses.elementwise import where_finite
from grpo_jax.losses.ratios import LARGEST_TOKEN_LOG_RATIO


def flow_transition(
    states: Float[Array, "N T ..."],
    velocities: Float[Array, "N T ..."],
    times: Float[Array, "N T"],
    next_times: Float[Array, "N T"],
    noise: Float[Array, "N T"],
) -> tuple[Float[Array, "N T ..."], Float[Array, "N T"]]:
    """Mean and std of a stochastic step of a rectified flow that keeps the marginals of the deterministic one.

    mean = x (1 + s^2 dt / 2t) + v (1 + s^2 (1 - t) / 2t) dt, std = s sqrt(-dt), dt = next_times - times < 0.

    times: noise levels in (0, 1], 1 is pure noise. noise s: eta sqrt(t / (1 - t)) in Flow-GRPO, a constant in
    DanceGRPO; 0 is the Euler step. Where one of the three is not finite, or times is not above 0,
    both results are NaN, without harm to the gradient where aggregation leaves the step out.
    Source: Flow-GRPO, arXiv:2505.05470; DanceGRPO, arXiv:2505.07818.
    """
    x, v = _latents(states=states, velocities=velocities)
    named = {"times": times, "next_times": next_times, "noise": noise}
    t, after, s = (_per_step(name, value, x) for name, value in named.items())
    there = jnp.isfinite(t) & jnp.isfinite(after) & jnp.isfinite(s) & (t > 0)
    t, after, s = jnp.where(there, t, 1), jnp.where(there, after, 1), jnp.where(there, s, 0)
    dt, half = after - t, s**2 / (2 * t)
    wide = lambda value: value.reshape(*value.shape, *[1] * (x.ndim - 2))  # noqa: E731
    mean = x * wide(1 + half * dt) + v * wide((1 + half * (1 - t)) * dt)
    return jnp.where(wide(there), mean, jnp.nan), jnp.where(there, s * jnp.sqrt(jnp.maximum(-dt, 0)), jnp.nan)


def gaussian_logp(
    samples: Float[Array, "N T ..."], means: Float[Array, "N T ..."], std: Float[Array, "N T"]
) -> Float[Array, "N T"]:
    """Log-density of each step, mean_d [-(x' - mean)^2 / (2 std^2) - ln std - ln(2 pi) / 2]; x' is a constant.

    Source: Flow-GRPO, arXiv:2505.05470, as its code averages over the latent.
    """
    x, mean = _latents(samples=samples, means=means)
    std = _per_step("std", std, x)
    distance = _mean_square(jax.lax.stop_gradient(x) - mean)
    return _where_noisy(lambda q, s: -q / (2 * s**2) - jnp.log(s) - math.log(2 * math.pi) / 2, distance, std)


def gaussian_ratio(
    samples: Float[Array, "N T ..."],
    means: Float[Array, "N T ..."],
    old_means: Float[Array, "N T ..."],
    std: Float[Array, "N T"],
) -> Float[Array, "N T"]:
    """Importance ratio of each step, rho = exp(mean_d (mean - old)(2 x' - mean - old) / (2 std^2)).

    That is exp(gaussian_logp - old gaussian_logp), without the difference of two numbers of order 1: the clip range
    1e-4 is not far above float32's rounding. The exponent is clamped to +-20.
    Source: Flow-GRPO, arXiv:2505.05470.
    """
    step, from_old = _moves(samples, means, old_means)
    exponent = _mean_product(step, 2 * from_old - step)
    return _ratio(lambda q, s: q / (2 * s**2), exponent, _per_step("std", std, step))


def normalized_gaussian_ratio(
    samples: Float[Array, "N T ..."],
    means: Float[Array, "N T ..."],
    old_means: Float[Array, "N T ..."],
    std: Float[Array, "N T"],
) -> Float[Array, "N T"]:
    """`gaussian_ratio` without its pull below 1, on one scale for all steps: exp((log rho + b) std).

    b = mean_d (mean - old)^2 / (2 std^2) = gaussian_kl(means, old_means, std), so the exponent is
    mean_d (mean - old)(x' - old) / std. Divide the loss by |dt|, as the released code does.
    Source: the released code of Pref-GRPO, arXiv:2508.20751 (not the paper's claim).
    """
    step, from_old = _moves(samples, means, old_means)
    return _ratio(lambda q, s: q / s, _mean_product(step, from_old), _per_step("std", std, step))


def gaussian_kl(
    means: Float[Array, "N T ..."], ref_means: Float[Array, "N T ..."], std: Float[Array, "N T"]
) -> Float[Array, "N T"]:
    """Exact KL between two policies' steps of one std, either way round: mean_d (mean - ref)^2 / (2 std^2).

    The reference gets no gradient. Flow-GRPO's code leaves |dt| out: it has the noise level where this has std.
    Source: arXiv:2505.05470; with std as in later forks.
    """
    mean, ref = _latents(means=means, ref_means=ref_means)
    distance = _mean_square(mean - jax.lax.stop_gradient(ref))
    return _where_noisy(lambda q, s: q / (2 * s**2), distance, _per_step("std", std, mean))


def _moves(samples: Array, means: Array, old_means: Array) -> tuple[Array, Array]:
    """mean - old and x' - old, of which only the first has a gradient."""
    x, mean, old = _latents(samples=samples, means=means, old_means=old_means)
    old = jax.lax.stop_gradient(old)
    return mean - old, jax.lax.stop_gradient(x) - old


def _ratio(exponent: Callable[..., Array], products: Array, std: Array) -> Array:
    bound = LARGEST_TOKEN_LOG_RATIO
    return _where_noisy(lambda q, s: jnp.exp(jnp.clip(exponent(q, s), -bound, bound)), products, std)


def _where_noisy(formula: Callable[..., Array], values: Float[Array, "N T"], std: Float[Array, "N T"]) -> Array:
    """The formula where it exists, NaN where std is not above 0 or something is not finite."""
    noisy = std > 0
    result = where_finite(formula, jnp.where(noisy, values, 0), jnp.where(noisy, jax.lax.stop_gradient(std), 1))
    return jnp.where(noisy, result, jnp.nan)


def _mean_square(difference: Array) -> Float[Array, "N T"]:
    return _mean_product(difference, difference)


def _mean_product(a: Array, b: Array) -> Float[Array, "N T"]:
    """Mean over latent dimensions; where one is not finite NaN, whose gradient is 0."""
    whole = jnp.stack([jnp.isfinite(x).reshape(*x.shape[:2], -1).all(-1) for x in (a, b)]).all(0)
    inside = whole.reshape(*whole.shape, *[1] * (a.ndim - 2))
    product = (jnp.where(inside, a, 0) * jnp.where(inside, b, 0)).reshape(*a.shape[:2], -1)
    return jnp.where(whole, product.mean(-1), jnp.nan)


def _latents(**arrays: Array) -> list[Array]:
    shapes = {name: jnp.shape(array) for name, array in arrays.items()}
    if len(set(shapes.values())) > 1 or min(map(len, shapes.values())) < 3:
        given = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        raise ValueError(f"latents must have one shape [N, T, ...] with at least one latent dimension, got {given}")
    return [jnp.asarray(array).astype(jnp.float32) for array in arrays.values()]


def _per_step(name: str, value: Array, latents: Array) -> Float[Array, "N T"]:
    if jnp.shape(value) != latents.shape[:2]:
        raise ValueError(
            f"{name} must have one value per step {list(latents.shape[:2])}, got {list(jnp.shape(value))}; "
            "spread a schedule [T] with jnp.broadcast_to"
        )
    return jnp.asarray(value).astype(jnp.float32)
