"""Presets against each stack's source, written out again in float64 by loops: values and gradients to 1e-5."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

# The formulas keep the shape of the source they are taken from (what it detaches, clamps, multiplies and divides by, in
# its order), one completion at a time, and share nothing with each other that the stacks do not.

GROUPS = np.array([0, 0, 0, 0, 1, 1, 1, 2, 3, 3, -1])


def agree(cases, data):
    """Each case: preset(logps), in float32 with garbage under the mask, against formula(logps, at), in float64.

    `at` is where the gradient is taken: what a stack detaches is computed from it. The presets are one program.
    """

    program = jax.jit(lambda logps: [jax.value_and_grad(preset)(logps) for preset, _ in cases.values()])
    pairs = program(jnp.asarray(data.dirty.logps))
    for (name, (_, formula)), (value, gradient) in zip(cases.items(), pairs, strict=True):
        expected = np.zeros(data.logps.shape)
        for place in map(tuple, np.argwhere(data.mask)):
            up, down = data.logps.copy(), data.logps.copy()
            up[place] += 1e-6
            down[place] -= 1e-6
            expected[place] = (formula(up, data.logps) - formula(down, data.logps)) / 2e-6
        assert float(value) == pytest.approx(formula(data.logps, data.logps), rel=1e-5, abs=1e-5), name
        np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5, err_msg=name)
        assert np.abs(expected).max() > 1e-3, name


def rows(data, logps, at):
    """(advantage, new, at, old, ref, sampler) of the masked-in tokens of each row."""
    for i, m in enumerate(data.mask):
        yield data.a[i], logps[i][m], at[i][m], data.old[i][m], data.ref[i][m], data.sampler[i][m]


def mean(x):
    return x.sum() / max(len(x), 1)


def draws(kind):
    draw = np.random.default_rng(3)
    if kind == "binary":
        return np.array([1, 0, 0, 0, 1, 1, 0, 1, 1, 1, 1.0])
    values = draw.normal(size=len(GROUPS)).round(2)
    values[GROUPS == 3] = 0.85
    if kind == "missing":
        values[[1, 5]] = np.nan
    return values


def same(calls, formulas):
    """calls[name](rewards), all one program, against formulas[name](rewards), for several kinds of rewards."""
    program = jax.jit(lambda r: {name: call(r) for name, call in calls.items()})
    for kind in ("normal", "binary", "missing"):
        got = program(jnp.float32(draws(kind)))
        for name, formula in formulas.items():
            expected = formula(draws(kind))
            np.testing.assert_allclose(got[name], expected, rtol=1e-5, atol=1e-5, err_msg=f"{name}, {kind}")


def by_row(rewards, formula):
    """formula(own reward, all of the group, the others), 0 for a row in no group or without a reward."""
    result = np.zeros(len(rewards))
    for i, own in enumerate(rewards):
        group = [j for j in range(len(rewards)) if GROUPS[j] == GROUPS[i] and not np.isnan(rewards[j])]
        if GROUPS[i] >= 0 and not np.isnan(own):
            result[i] = formula(own, rewards[group], rewards[[j for j in group if j != i]])
    return result


def z(epsilon, alone=lambda own: 0.0):
    return lambda own, group, others: (
        alone(own) if len(group) < 2 else (own - group.mean()) / (group.std(ddof=1) + epsilon) if np.ptp(group) else 0.0
    )


def centered(own, group, others):
    return own - group.mean()


def over_others(own, group, others):
    return own - others.mean() if len(others) else 0.0


def compared(rewards):
    return (GROUPS >= 0) & ~np.isnan(rewards)


def biased_white(values, mask):
    """NeMo RL, OpenRLHF: variance over n, at least 1e-8."""
    middle = values[mask].mean()
    variance = ((values[mask] - middle) ** 2).mean()
    return np.where(mask, (values - middle) / np.sqrt(max(variance, 1e-8)), 0)
