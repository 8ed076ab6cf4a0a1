"""Losses, sampler weights and advantages of OpenRLHF."""

import functools

import jax
import numpy as np
import pytest
from transcriptions import GROUPS, agree, biased_white, by_row, centered, compared, mean, over_others, rows, same, z

from grpo_jax.presets import openrlhf


def openrlhf_kl(new, ref, kind):
    d = new - ref
    return np.clip({"k1": d, "k2": d**2 / 2.0, "k3": np.exp(-d) - 1 + d}[kind], -10, 10)


def openrlhf_weights(old, sampler, kind, low, high):
    w = np.exp(old - sampler)
    if kind == "tis":
        return np.clip(w, low, high)
    if kind == "icepop":
        return w * ((w >= low) & (w <= high))
    return w * (low <= np.exp(mean(old - sampler)) <= high)


def openrlhf_formula(
    data, logps, at, *, kind="ppo", low=0.2, high=0.2, dual=None, kl=None, coefficient=0.0, weigh=None
):
    per_row, terms = [], []
    for a, new, _, old, ref, sampler in rows(data, logps, at):
        ratio = np.exp(np.clip(new - old, -20, 20))
        if kind == "gspo":
            ratio = np.full(len(new), np.exp(mean(new - old)))
        kept = np.minimum(ratio * a, np.clip(ratio, 1 - low, 1 + high) * a)
        if dual is not None and a < 0:
            kept = np.maximum(kept, dual * a)
        per_row.append(-kept * (openrlhf_weights(old, sampler, weigh, 0.7, 1.3) if weigh else 1))
        terms.append(openrlhf_kl(new, ref, kl) if kl else 0 * new)
    tokens = sum(map(len, per_row))
    policy = sum(x.sum() for x in per_row) / tokens
    if kind == "gspo":
        policy = sum(x.sum() / (len(x) + 1e-8) for x in per_row) / sum(len(x) > 0 for x in per_row)
    return policy + coefficient * sum(x.sum() for x in terms) / tokens


OPENRLHF = [
    ({}, {}),
    ({"kl": None}, {"kl": "k1", "coefficient": 0.01}),
    ({"dual_clip": 1.3, "eps_clip_low_high": (0.1, 0.27)}, {"dual": 1.3, "low": 0.1, "high": 0.27}),
    ({"kl": "k3", "init_coef": 0.2, "eps_clip": 0.1}, {"kl": "k3", "coefficient": 0.2, "low": 0.1, "high": 0.1}),
    (
        {"policy_loss_type": "gspo", "kl": "k2", "init_coef": 0.3},
        {"kind": "gspo", "kl": "k2", "coefficient": 0.3},
    ),
    ({"weigh": "tis", "kl": "k1", "init_coef": 0.3}, {"weigh": "tis", "kl": "k1", "coefficient": 0.3}),
    ({"weigh": "icepop"}, {"weigh": "icepop"}),
    ({"weigh": "seq-mask-tis"}, {"weigh": "seq-mask-tis"}),
]


def openrlhf_case(data, options, formula):
    options = dict(options)
    if "kl" in options:
        options["ref_logps"] = data.dirty.ref
        options |= {"estimator": options["kl"]} if options["kl"] else {}
        del options["kl"]
    kind = options.pop("weigh", None)
    weighing = {"is_correction_type": kind, "is_correction_threshold": (0.7, 1.3)}

    def preset(logps):
        old, weights = data.dirty.old, {}
        if kind:
            weights["is_weights"] = openrlhf.sampler_weights(old, data.dirty.sampler, data.mask, **weighing)
        return openrlhf.loss(logps, old, data.a, data.mask, **options, **weights)

    return preset, lambda lp, at: openrlhf_formula(data, lp, at, **formula)


def test_openrlhf(data):
    agree({str(options): openrlhf_case(data, options, formula) for options, formula in OPENRLHF}, data)


def openrlhf_advantages(rewards, data, estimator, *, kl=None, gamma=1.0, clip=(-10, 10), no_std_norm=False):
    row = by_row(
        rewards,
        {
            "group_norm": z(1e-9),
            "dr_grpo": centered,
            "reinforce_baseline": centered,
            "rloo": over_others,
            "reinforce": lambda own, group, others: own,
        }[estimator],
    )
    counted, advantages = data.mask & compared(rewards)[:, None], np.zeros(data.mask.shape)
    for i, mask in enumerate(counted):
        running, last = 0.0, np.flatnonzero(mask)[-1:]
        for t in reversed(range(len(mask))):
            reward = np.clip(row[i], *clip) if t in last else 0.0
            if kl:
                reward -= 0.01 * openrlhf_kl(data.old[i, t], data.ref[i, t], kl)
            running = reward * mask[t] + (gamma if estimator == "reinforce" else 1.0) * running
            advantages[i, t] = running
    if estimator in ("reinforce", "reinforce_baseline"):
        if no_std_norm:
            return np.where(counted, advantages - advantages[counted].mean(), 0)
        return biased_white(advantages, counted)
    return advantages * counted


OPENRLHF_ESTIMATORS = {
    "group_norm": {},
    "dr_grpo": {"kl": "k1"},
    "rloo": {"kl": "k2", "clip": (-0.5, 0.4)},
    "reinforce": {"gamma": 0.9, "kl": "k3"},
    "reinforce_baseline": {"gamma": 0.9},
    "reinforce_baseline ": {"no_std_norm": True},
}


def test_openrlhf_advantages(data):
    def call(name, r):
        options = dict(OPENRLHF_ESTIMATORS[name])
        kl, clip = options.pop("kl", None), options.pop("clip", (-10, 10))
        if kl:
            options |= {"old_logps": data.dirty.old, "ref_logps": data.dirty.ref, "kl_estimator": kl}
        return openrlhf.advantages(name.strip(), r, GROUPS, data.mask, clip_range=clip, **options)

    def formula(name, r):
        return openrlhf_advantages(r, data, name.strip(), **OPENRLHF_ESTIMATORS[name])

    same(
        {name: functools.partial(call, name) for name in OPENRLHF_ESTIMATORS},
        {name: functools.partial(formula, name) for name in OPENRLHF_ESTIMATORS},
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, m: openrlhf.loss(x, x, x, m, policy_loss_type="grpo"), "Known: ppo, gspo"),
        (lambda x, m: openrlhf.advantages("gae", x[:, 0], GROUPS[:2], m), "no advantage estimator 'gae'"),
        (lambda x, m: openrlhf.advantages("rloo", x[:, 0], GROUPS[:2], m, ref_logps=x), "needs old_logps too"),
        (lambda x, m: openrlhf.sampler_weights(x, x, m, is_correction_type="ti"), "did you mean 'tis'"),
    ],
)
def test_errors_say_what_to_do(call, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(call, np.zeros((2, 3), np.float32), np.ones((2, 3), bool))
