"""Losses and advantages of verl."""

import functools

import jax
import numpy as np
import pytest
from transcriptions import GROUPS, agree, by_row, centered, compared, mean, over_others, rows, same, z

from grpo_jax.losses import mismatch
from grpo_jax.presets import verl


def verl_aggregate(per_row, mode, scale=None, width=5):
    counts = [len(x) for x in per_row]
    full = sum(c > 0 for c in counts)
    total = sum(x.sum() for x in per_row)
    if mode == "seq-mean-token-mean":
        return sum(x.sum() / (len(x) + 1e-8) for x in per_row) / full
    return total / {"token-mean": sum(counts), "seq-mean-token-sum": full}.get(mode, scale or width)


def verl_kl(new, ref, kind):
    if kind in ("kl", "k1"):
        return new - ref
    if kind == "abs":
        return np.abs(new - ref)
    if kind in ("mse", "k2"):
        return 0.5 * (new - ref) ** 2
    d = np.clip(ref - new, -20, 20)
    return np.clip(np.exp(d) - d - 1, -10, 10)


def verl_formula(data, logps, at, name, mode="token-mean", low=0.2, high=0.2, c=3.0, scale=None, kl=None, weigh=False):
    per_row, terms, whole = [], [], 0.0
    for a, new, now, old, ref, sampler in rows(data, logps, at):
        w = np.minimum(np.exp(old - sampler), 1.3) if weigh else np.ones(len(new))
        ratio = np.exp(np.clip(new - old, -20, 20))
        terms.append(verl_kl(new, ref, kl) if kl else np.zeros(len(new)))
        if name == "geo_mean":
            s = np.sign(a)
            d = s * np.minimum(s * (new - old), s * np.clip(new - old, -low, high))
            advantage = a * len(new) / (len(new) + 1e-8)
            whole -= advantage * np.exp(mean(d)) * np.exp(mean(np.log(w + 1e-10))) / len(data.a)
            continue
        if name == "cispo":
            loss = -np.clip(np.exp(now - old), 1 - low, 1 + high) * a * new
        elif name == "sapo":
            tau = 1.0 if a > 0 else 1.05
            loss = -a * 4 / tau / (1 + np.exp(-tau * (ratio - 1)))
        elif name == "gpg":
            loss = -new * a
        else:
            ratio = np.exp(np.minimum(new - now + mean(now - old), 10)) if name == "gspo" else ratio
            loss = np.maximum(-a * ratio, -a * np.clip(ratio, 1 - low, 1 + high))
            loss = np.minimum(-a * c, loss) if a < 0 and name == "vanilla" else loss
        per_row.append(loss * w)
    policy = whole or verl_aggregate(per_row, "seq-mean-token-mean" if name in ("gspo", "sapo") else mode, scale)
    return policy + (0.3 * verl_aggregate(terms, mode, scale) if kl else 0)


VERL_LOSSES = [
    ("vanilla", "token-mean", "k3", False),
    ("vanilla", "seq-mean-token-mean", "low_var_kl", True),
    ("vanilla", "seq-mean-token-sum", "kl", False),
    ("vanilla", "seq-mean-token-sum-norm", "mse", False),
    ("gspo", "token-mean", "abs", True),
    ("sapo", "token-mean", "k1", True),
    ("gpg", "token-mean", None, True),
    ("geo_mean", "token-mean", "low_var_kl", False),
    ("geo_mean", "seq-mean-token-sum", "k2", True),
    ("cispo", "token-mean", None, False),
    ("cispo", "seq-mean-token-sum-norm", None, True),
]


def verl_case(data, name, mode, kl, weigh):
    options = {"clip_ratio_low": 0.1, "clip_ratio_high": 0.25, "clip_ratio_c": 1.4, "loss_agg_mode": mode}
    if kl:
        options |= {"ref_logps": data.dirty.ref, "kl_loss_type": kl, "kl_loss_coef": 0.3}

    def preset(logps):
        old, sampler = data.dirty.old, data.dirty.sampler
        weights = mismatch.truncated_importance(old, sampler, cap=1.3) if weigh else 1.0
        return verl.loss(name, logps, old, data.a, data.mask, rollout_is_weights=weights, **options)

    return preset, lambda lp, at: verl_formula(data, lp, at, name, mode, 0.1, 0.25, 1.4, kl=kl, weigh=weigh)


def test_verl(data):
    """clip_ratio alone does nothing, as long as the two bounds are not None."""
    given, norm = (data.dirty.old, data.a, data.mask), "seq-mean-token-sum-norm"
    cases = {str(options): verl_case(data, *options) for options in VERL_LOSSES}
    cases["scale"] = (
        lambda lp: verl.loss("cispo", lp, *given, loss_agg_mode=norm, loss_scale_factor=9),
        lambda lp, at: verl_formula(data, lp, at, "cispo", norm, scale=9),
    )
    cases["defaults"] = (
        lambda lp: verl.loss("vanilla", lp, *given, clip_ratio=0.05),
        lambda lp, at: verl_formula(data, lp, at, "vanilla"),
    )
    cases["clip_ratio"] = (
        lambda lp: verl.loss("vanilla", lp, *given, clip_ratio=0.05, clip_ratio_low=None, clip_ratio_high=None),
        lambda lp, at: verl_formula(data, lp, at, "vanilla", low=0.05, high=0.05),
    )
    agree(cases, data)


def alone(formula):
    """verl: a row that is alone in its group keeps its reward."""
    return lambda own, group, others: own if len(group) < 2 else formula(own, group, others)


def verl_white(values, mask):
    inside = values[mask]
    middle = inside.sum() / (len(inside) + 1e-8)
    variance = ((inside - middle) ** 2).sum() / (len(inside) + 1e-8) * len(inside) / (len(inside) - 1)
    return np.where(mask, (values - middle) / np.sqrt(variance + 1e-8), 0)


def verl_passk(own, group, others):
    if len(group) < 2 or own < group.max():
        return 0.0
    second = np.sort(group)[-2]
    return (own - second) / (group.std(ddof=1) + 1e-6)


def verl_floored(own, group, others):
    n = len(group)
    variance = ((group**2).sum() - group.sum() ** 2 / n) / (n - 1)
    return (own - group.mean()) / (np.sqrt(max(variance, 1e-6)) + 1e-6)


def verl_advantages(name, rewards, mask):
    lengths, safe, valid = mask.sum(1), np.nan_to_num(rewards), compared(rewards)
    if name == "opo":
        result = np.zeros(len(rewards))
        for i in np.flatnonzero(valid):
            group = [j for j in np.flatnonzero(valid) if GROUPS[j] == GROUPS[i]]
            baseline = (lengths[group] * rewards[group]).sum() / lengths[group].sum() if len(group) > 1 else 0.0
            result[i] = rewards[i] - baseline
        return result[:, None] * mask
    if name == "reinforce_plus_plus":
        returns = np.zeros(mask.shape)
        for i in range(len(rewards)):
            running, last = 0.0, np.flatnonzero(mask[i])[-1:]
            for t in reversed(range(mask.shape[1])):
                running = (safe[i] if t in last else 0.0) + 0.9 * running
                returns[i, t] = running
                running *= mask[i, t]
        return verl_white(returns, mask & ~np.isnan(rewards)[:, None])
    less_mean = by_row(rewards, alone(centered))
    if name == "reinforce_plus_plus_baseline":
        return verl_white(np.repeat(less_mean[:, None], mask.shape[1], 1), mask & valid[:, None])
    values = {
        "grpo": lambda: by_row(rewards, z(1e-6, alone=lambda own: own / (1 + 1e-6))),
        "dr_grpo": lambda: less_mean,
        "grpo_vectorized": lambda: by_row(rewards, alone(verl_floored)),
        "grpo_passk": lambda: by_row(rewards, verl_passk),
        "rloo": lambda: by_row(rewards, alone(over_others)),
        "rloo_vectorized": lambda: by_row(rewards, over_others),
        "gpg": lambda: less_mean * valid.sum() / (safe[valid] != 0).sum(),
    }[name]()
    return values[:, None] * mask


VERL = ["dr_grpo", "grpo_vectorized", "grpo_passk", "rloo", "rloo_vectorized", "gpg", "opo", "reinforce_plus_plus"]
VERL += ["reinforce_plus_plus_baseline", "grpo"]


def test_verl_advantages(data):
    def call(name, r):
        options = {"norm_adv_by_std_in_grpo": name != "dr_grpo", "gamma": 0.9}
        return verl.advantages("grpo" if name == "dr_grpo" else name, r, GROUPS, data.mask, **options)

    same(
        {name: functools.partial(call, name) for name in VERL},
        {name: lambda r, name=name: verl_advantages(name, r, data.mask) for name in VERL},
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, m: verl.loss("vanila", x, x, x, m), "did you mean 'vanilla'"),
        (lambda x, m: verl.loss("gspo", x, x, x, m, loss_agg_mode="mean"), "no loss_agg_mode 'mean'"),
        (lambda x, m: verl.advantages("gae", x[:, 0], GROUPS[:2], m), "no advantage estimator 'gae'"),
    ],
)
def test_errors_say_what_to_do(call, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(call, np.zeros((2, 3), np.float32), np.ones((2, 3), bool))
