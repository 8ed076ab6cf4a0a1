"""The losses of Tunix."""

import jax
import numpy as np
import pytest
from transcriptions import agree, mean, rows

from grpo_jax.losses import mismatch
from grpo_jax.presets import tunix


def tunix_formula(
    data, logps, at, *, algo="grpo", high=0.2, c=None, beta=0.04, kl="kl", clamp=None, weigh=False,
    how="sequence-mean-token-mean",
):  # fmt: skip
    per_row = []
    for a, new, now, old, ref, sampler in rows(data, logps, at):
        log_ratio = np.clip(new - old, -20, 20)
        if algo == "gspo-token":
            log_ratio = np.minimum(new - now + mean(np.clip(now - old, -20, 20)), 10)
        ratio = np.exp(log_ratio)
        loss = np.maximum(-a * ratio, -a * np.clip(ratio, 1 - 0.2, 1 + high))
        loss = np.minimum(-c * a, loss) if c is not None and a < 0 else loss
        loss = loss * (np.minimum(np.exp(np.clip(old - sampler, -20, 20)), 1.2) if weigh else 1)
        d = ref - new
        term = {"kl": -d, "mse_kl": 0.5 * d**2, "low_var_kl": np.exp(d) - d - 1}[kl]
        per_row.append(loss + beta * (term if clamp is None else np.clip(term, -clamp, clamp)))
    total, tokens, full = sum(x.sum() for x in per_row), sum(map(len, per_row)), sum(len(x) > 0 for x in per_row)
    if how == "sequence-mean-token-mean":
        return sum(mean(x) for x in per_row) / full
    denominators = {
        "token-mean": tokens,
        "sequence-mean-token-scale": data.mask.shape[1] * full,
        "seq-mean-token-sum": full,
        "sequence-mean-token-sum-norm": data.mask.shape[0],
    }
    return total / denominators[how]


TUNIX = [
    ({}, {}),
    (
        {"beta": 0.0, "loss_agg_mode": "token-mean", "epsilon_high": 0.28},
        {"beta": 0.0, "how": "token-mean", "high": 0.28},
    ),
    (
        {"loss_algo": "gspo-token", "kl_loss_mode": "mse_kl", "loss_agg_mode": "seq-mean-token-sum"},
        {"algo": "gspo-token", "kl": "mse_kl", "how": "seq-mean-token-sum"},
    ),
    (
        {"epsilon_c": 1.3, "kl_loss_mode": "low_var_kl", "loss_agg_mode": "sequence-mean-token-scale"},
        {"c": 1.3, "kl": "low_var_kl", "how": "sequence-mean-token-scale"},
    ),
    (
        {"kl_loss_mode": "low_var_kl", "kl_clamp_value": 0.1, "loss_agg_mode": "sequence-mean-token-sum-norm"},
        {"kl": "low_var_kl", "clamp": 0.1, "how": "sequence-mean-token-sum-norm"},
    ),
    ({"weigh": True}, {"weigh": True}),
]


def tunix_case(data, options, formula):
    options = dict(options)
    weigh = options.pop("weigh", False)

    def preset(logps):
        old, weights = data.dirty.old, {}
        if weigh:
            weights["sampler_is_weights"] = mismatch.truncated_importance(old, data.dirty.sampler, cap=1.2)
        return tunix.loss(logps, old, data.a, data.mask, ref_logps=data.dirty.ref, **options, **weights)

    return preset, lambda lp, at: tunix_formula(data, lp, at, **formula)


def test_tunix(data):
    agree({str(options): tunix_case(data, options, formula) for options, formula in TUNIX}, data)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, m: tunix.loss(x, x, x, m), "beta is 0.04 and needs ref_logps"),
        (lambda x, m: tunix.loss(x, x, x, m, ref_logps=x, kl_loss_mode="k3"), "Known: kl, mse_kl, low_var_kl"),
    ],
)
def test_errors_say_what_to_do(call, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(call, np.zeros((2, 3), np.float32), np.ones((2, 3), bool))
