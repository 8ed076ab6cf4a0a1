"""Every method against loops in float64 on ragged batches: advantages, weights, loss, gradient by differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import losses, methods
from grpo_jax.types import Decisions

MAX_NEW = 9


def members(i, data):
    """Rows of the same group that have a reward; nobody for a row that has none or is in no group."""
    if data.groups[i] < 0 or np.isnan(data.total[i]):
        return []
    return [j for j in range(len(data.groups)) if data.groups[j] == data.groups[i] and not np.isnan(data.total[j])]


def compared(data, formula):
    """formula(own reward, rewards of the group, rewards of the others), 0 for those compared with nobody."""
    result = np.zeros(len(data.total))
    for i in range(len(result)):
        group = members(i, data)
        if len(group) > 1:
            result[i] = formula(data.total[i], data.total[group], data.total[[j for j in group if j != i]])
    return result


def z_score(epsilon):
    return lambda own, group, others: (own - group.mean()) / (group.std(ddof=1) + epsilon) if np.ptp(group) else 0.0


def lower_median(values):
    return np.sort(values)[(len(values) - 1) // 2]


def median_centred(own, group, others):
    centre = lower_median(group)
    return (own - centre) / (lower_median(np.abs(group - centre)) + 1e-3)


def without_pivots(data):
    weights, seen = data.weights.copy(), set()
    for i in range(len(weights)):
        group = members(i, data)
        if group and data.groups[i] not in seen and data.total[i] == lower_median(data.total[group]):
            weights[i] = 0
            seen.add(data.groups[i])
    return weights


ADVANTAGES = {
    "grpo": z_score(1e-6),
    "dapo": z_score(1e-6),
    "gspo": z_score(0.3),
    "guide_grpo": z_score(1e-6),
    "dr_grpo": lambda own, group, others: own - group.mean(),
    "rloo": lambda own, group, others: own - others.mean(),
    "mc_grpo": median_centred,
}


def clip(ratio, advantage, low, high):
    return max(-advantage * ratio, -advantage * np.clip(ratio, 1 - low, 1 + high))


def k3(new, ref):
    return np.exp(ref - new) - 1 - (ref - new)


def token_losses(name, data, new, i):
    """The losses of the trained decisions of row i."""
    a, m = data.advantage[i], data.mask[i]
    logs, old = new[i][m], data.old[i][m]
    ratio = np.exp(logs - old)
    if name == "gspo":
        ratio = np.full(m.sum(), np.exp((logs - old).mean()))
        return [clip(r, a, 0.1, 0.2) for r in ratio] + 0.2 * k3(logs, data.ref[i][m])
    if name == "rloo":
        ratio = np.full(m.sum(), np.exp((logs - old).sum()))
        return [clip(r, a, 0.3, 0.3) for r in ratio] + 0.2 * k3(logs, data.ref[i][m])
    if name == "guide_grpo" and not data.plain[i]:
        return -a * ratio / (ratio + data.gamma[i])
    low, high, beta = {"dapo": (0.2, 0.28, 0), "guide_grpo": (0.1, 0.3, 0)}.get(name, (0.1, 0.3, 0.2))
    return [clip(r, a, low, high) for r in ratio] + beta * k3(logs, data.ref[i][m])


def summed_loss(name, data, new):
    """The rows' losses under their weights; in RLOO and GSPO every entry of a row is the same, so its mean is one."""
    rows = [i for i in range(len(data.weights)) if data.weights[i] > 0 and data.mask[i].any()]
    each = {i: np.asarray(token_losses(name, data, new, i)) for i in rows}
    count = sum(data.weights[i] for i in rows)
    if name in ("gspo", "rloo", "guide_grpo"):
        return sum(data.weights[i] * each[i].mean() for i in rows) / count
    if name == "dr_grpo":
        return sum(data.weights[i] * each[i].sum() for i in rows) / (MAX_NEW * count)
    return sum(data.weights[i] * each[i].sum() for i in rows) / sum(data.weights[i] * len(each[i]) for i in rows)


OPTIONS = {
    "grpo": {"clip_low": 0.1, "clip_high": 0.3, "kl": 0.2},
    "dr_grpo": {"clip_low": 0.1, "clip_high": 0.3, "kl": 0.2},
    "mc_grpo": {"clip_low": 0.1, "clip_high": 0.3, "kl": 0.2},
    "dapo": {},
    "gspo": {"clip_low": 0.1, "clip_high": 0.2, "kl": 0.2, "epsilon": 0.3},
    "rloo": {"clip": 0.3, "kl": 0.2},
    "guide_grpo": {"clip_low": 0.1, "clip_high": 0.3, "quantile": 0.7},
}


def computed(method, batch, new):
    @jax.jit
    @jax.value_and_grad
    def loss(logps):
        each, _ = method.objective(Decisions(logps=logps), batch, {})
        return each if each.shape == () else losses.weighted_sum(each, method.aggregate(batch))

    return loss(jnp.asarray(new, jnp.float32))


def slopes(function, x, step=1e-6):
    result = np.zeros_like(x)
    for place in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[place] += step
        down[place] -= step
        result[place] = (function(up) - function(down)) / (2 * step)
    return result


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", OPTIONS)
def test_method(make, name, seed):
    data = make.ragged(seed)
    data.gamma = [
        max(np.quantile(np.exp((new - old)[m]), 0.7), 1e-4) if m.any() else 0
        for new, old, m in zip(data.new, data.old, data.mask)
    ]
    method = methods.resolve(name, options=OPTIONS[name], settings={**make.settings, "max_new": MAX_NEW})
    batch, _ = jax.jit(lambda batch: method.advantage(batch, {}, None))(data.batch())
    data.advantage = compared(data, ADVANTAGES[name])
    np.testing.assert_allclose(batch.advantages, np.where(data.mask, data.advantage[:, None], 0), rtol=1e-4, atol=1e-5)
    assert np.abs(data.advantage).max() > 0.3
    if name == "mc_grpo":
        data.weights = without_pivots(data)
    np.testing.assert_array_equal(batch.weights, data.weights)
    loss, gradient = computed(method, batch, data.new)
    expected = slopes(lambda new: summed_loss(name, data, new), data.new)
    scale = np.abs(expected).max()
    assert float(loss) == pytest.approx(summed_loss(name, data, data.new), rel=2e-5)
    np.testing.assert_allclose(gradient, expected, atol=3e-5 * scale)
    silent = (data.weights == 0)[:, None] | ~data.mask
    assert not np.asarray(gradient)[silent].any() and scale > 1e-3


def disco(data, new, *, score, tau, divergence):
    """J over groups, D over tokens, one-sided penalty; rows of weight c are c rows."""
    rows = [i for i in range(len(data.weights)) if data.weights[i] > 0]
    gain = np.where(data.mask, new - data.old, 0)
    length = np.maximum(data.mask.sum(1), 1)
    s = (np.where(data.mask, new if score == "logL" else np.exp(gain), 0)).sum(1) / length
    total, groups = 0.0, {g for i, g in enumerate(data.groups) if g >= 0 and data.weights[i] > 0}
    for group in groups:
        right, wrong = ([i for i in rows if data.groups[i] == group and data.total[i] == v] for v in (1, 0))
        if not right or not wrong:
            continue
        up, down = data.weights[right], data.weights[wrong]
        against = tau * np.log((down * np.exp(s[wrong] / tau)).sum() / down.sum())
        total += (up * s[right]).sum() / up.sum() - against
    tokens = data.weights[:, None] * data.mask
    each = -gain if divergence == "kl" else np.exp(gain) - 1 - gain
    drift = (tokens * each).sum() / tokens.sum()
    return total / len(groups), drift


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    "options",
    [
        {"score": "logL", "tau": 10.0, "divergence": "kl"},
        {"score": "Lratio", "tau": 0.5, "divergence": "low_var_kl"},
    ],
)
def test_disco(make, options, seed):
    data = make.ragged(seed, binary=True)
    method = methods.resolve("disco", options={**options, "penalty": 3.0}, settings=make.settings)
    _, now = disco(data, data.new, **options)
    assert abs(now) > 1e-3

    def expected(new):
        gained, drift = disco(data, new, **options)
        return -gained + max(3.0 * (now - 1e-4), 0) * drift  # the excess is a constant

    loss, gradient = computed(method, data.batch(), data.new)
    assert float(loss) == pytest.approx(expected(data.new), rel=1e-4, abs=1e-6)
    differences = slopes(expected, data.new)
    np.testing.assert_allclose(gradient, differences, atol=5e-5 * np.abs(differences).max())
