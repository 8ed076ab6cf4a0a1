"""Losses, sampler weights and advantages of NeMo RL."""

import functools

import jax
import numpy as np
import pytest
from transcriptions import GROUPS, agree, biased_white, by_row, centered, compared, mean, rows, same

from grpo_jax.presets import nemo_rl


def nemo_weights(old, sampler, kind, low, high):
    w = np.exp(old - sampler)
    if kind == "product":
        return np.full(len(w), np.exp((old - sampler).sum()))
    if kind == "tis":
        return np.clip(w, low, high)
    if kind == "icepop":
        return np.where((w >= low) & (w <= high), w, 0)
    if kind == "seq-mask-tis":
        return w * (low <= np.exp(mean(old - sampler)) <= high)
    return w


def nemo_formula(
    data, logps, at, *, high=0.2, c=None, kind="ppo", kl="k3", penalty=0.01, approximate=False, weigh=None,
    tokens_level=True, bounds=(0.7, 1.3),
):  # fmt: skip
    per_row, terms = [], []
    for a, new, now, old, ref, sampler in rows(data, logps, at):
        ratio = np.exp(new - old)
        if kind == "gspo":
            ratio = np.full(len(new), np.exp(mean(new - old)))
        clamped = np.clip(ratio, 1 - 0.2, 1 + high)
        loss = np.maximum(-a * ratio, -a * clamped)
        if kind == "cispo":
            loss = -a * np.clip(np.exp(now - old), 1 - 0.2, 1 + high) * new
        elif kind == "reinforce":
            loss = np.maximum(-a * new, -a * new)
        if c is not None and a < 0:
            loss = np.minimum(loss, -a * c)
        per_row.append(loss * (nemo_weights(old, sampler, weigh, *bounds) if weigh else 1))
        weight = np.exp(new - sampler) if approximate else np.exp(new - now)
        d = np.clip(ref - new, -20, 20)
        term = {"k1": -d, "k2": d**2 / 2, "k3": np.exp(d) - 1 - d}[kl]
        terms.append(penalty * np.clip(weight * term, -10, 10))

    def reduce(per_row):
        if tokens_level:
            return sum(x.sum() for x in per_row) / (sum(map(len, per_row)) + 1e-8)
        return sum(x.sum() / (len(x) + 1e-8) for x in per_row) / (sum(len(x) > 0 for x in per_row) + 1e-8)

    return reduce(per_row) + reduce(terms)


NEMO_RL = [
    ({}, {}),
    (
        {"token_level_loss": False, "ratio_clip_c": 1.3, "reference_policy_kl_penalty": 0.5},
        {"tokens_level": False, "c": 1.3, "penalty": 0.5},
    ),
    (
        {"reference_policy_kl_penalty": 0.5, "reference_policy_kl_type": "k1", "ratio_clip_max": 0.28},
        {"penalty": 0.5, "kl": "k1", "high": 0.28},
    ),
    (
        {"reference_policy_kl_penalty": 0.5, "reference_policy_kl_type": "k2", "approximate": True},
        {"penalty": 0.5, "kl": "k2", "approximate": True},
    ),
    ({"reference_policy_kl_penalty": 0.5, "approximate": True}, {"penalty": 0.5, "approximate": True}),
    (
        {"sequence_level_importance_ratios": True, "token_level_loss": False, "weigh": "product"},
        {"kind": "gspo", "tokens_level": False, "weigh": "product"},
    ),
    ({"use_cispo": True, "weigh": "raw"}, {"kind": "cispo", "weigh": "raw"}),
    ({"disable_ppo_ratio": True, "weigh": "tis"}, {"kind": "reinforce", "weigh": "tis"}),
    ({"weigh": "icepop"}, {"weigh": "icepop"}),
    ({"weigh": "seq-mask-tis"}, {"weigh": "seq-mask-tis"}),
    ({"reference_policy_kl_penalty": 0.0}, {"penalty": 0.0}),
]


def nemo_rl_case(data, options, formula):
    options = dict(options)
    kind = options.pop("weigh", None)
    weighing = {"sequence_level_importance_ratios": kind == "product"}
    if kind not in (None, "raw", "product"):
        weighing |= {
            "truncated_importance_sampling_type": kind,
            "truncated_importance_sampling_ratio": 1.3,
            "truncated_importance_sampling_ratio_min": 0.7,
        }
    if options.pop("approximate", False):
        options["generation_logps"] = data.dirty.sampler

    def preset(logps):
        old, ref, weights = data.dirty.old, data.dirty.ref, {}
        if kind:
            weights["importance_weights"] = nemo_rl.sampler_weights(old, data.dirty.sampler, data.mask, **weighing)
        return nemo_rl.loss(logps, old, data.a, data.mask, ref_logps=ref, **options, **weights)

    return preset, lambda lp, at: nemo_formula(data, lp, at, **formula)


def test_nemo_rl(data):
    agree({str(options): nemo_rl_case(data, options, formula) for options, formula in NEMO_RL}, data)


def test_nemo_rl_reinforce_plus_plus(data):
    def call(minus, r):
        return nemo_rl.reinforce_plus_plus(r, GROUPS, data.mask, minus_baseline=minus)

    def formula(minus, r):
        row = by_row(r, centered if minus else lambda own, group, others: own)
        return biased_white(np.repeat(row[:, None], 5, 1), data.mask & compared(r)[:, None])

    same(
        {x: functools.partial(call, x) for x in (True, False)},
        {x: functools.partial(formula, x) for x in (True, False)},
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, m: nemo_rl.loss(x, x, x, m), "reference_policy_kl_penalty is 0.01"),
        (
            lambda x, m: nemo_rl.loss(x, x, x, m, sequence_level_importance_ratios=True, ref_logps=x),
            "set token_level_loss=False",
        ),
        (lambda x, m: nemo_rl.loss(x, x, x, m, use_cispo=True, ratio_clip_c=3.0), "use_cispo weighs tokens"),
        (
            lambda x, m: nemo_rl.sampler_weights(
                x, x, m, truncated_importance_sampling_type="icepop", truncated_importance_sampling_ratio=2.0
            ),
            "'icepop' needs",
        ),
    ],
)
def test_errors_say_what_to_do(call, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(call, np.zeros((2, 3), np.float32), np.ones((2, 3), bool))
