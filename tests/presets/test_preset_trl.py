"""Losses, sampler weights and advantages of TRL."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transcriptions import GROUPS, agree, by_row, draws, mean, over_others, rows

from grpo_jax.losses import mismatch
from grpo_jax.presets import trl


def trl_gamma(a, now, old, w):
    """vespo: a detached weight per sequence, with another program's weights w inside of it."""
    lowest = np.log(1e-8)
    log_w = np.clip(now - old, -20, 20).sum() + np.clip(np.log(np.maximum(w, 1e-300)), lowest, 20).sum()
    log_w = np.clip(log_w, lowest, 20)
    k, lam = (2.0, 3.0) if a >= 0 else (3.0, 2.0)
    return np.exp(lam + k * log_w - lam * np.exp(log_w))


def trl_weights(old, sampler, mode, low=0.6, high=1.5):
    diff = old - sampler if "token" in mode else np.full(len(old), (old - sampler).sum())
    w = np.exp(diff)
    return np.clip(w, low, high) if "truncate" in mode else np.where((w < low) | (w > high), 0, w)


def trl_formula(
    data, logps, at, kind, *, level="token", high=0.2, delta=None, beta=0.0, corrected=False, size=None, mode=None,
    threshold=None,
):  # fmt: skip
    per_row = []
    for a, new, now, old, ref, sampler in rows(data, logps, at):
        t = len(new)
        log_w = new - old
        if level == "sequence":
            log_w = np.full(t, mean(new - old))
        elif level == "sequence_token":
            log_w = new - now + mean(now - old)
        coef_1 = np.exp(log_w)
        w = np.ones(t) if mode is None else trl_weights(old, sampler, mode)
        k3 = (np.exp(ref - new) - (ref - new) - 1) * (coef_1 if corrected else 1)
        if kind == "cispo":
            coef_1 = np.exp(now - old) if level == "token" else np.full(t, np.exp(mean(now - old)))
            loss = -np.minimum(coef_1, high) * a * new
        elif kind == "sapo":
            tau = 1.0 if a > 0 else 1.05
            loss = -a / (1 + np.exp(-tau * (coef_1 - 1))) * 4 / tau
        elif kind == "vespo":
            loss = -trl_gamma(a, now, old, w) * a * new
        else:
            coef_2 = np.clip(coef_1, 1 - 0.2, 1 + high)
            coef_1 = coef_1 if delta is None else np.minimum(coef_1, delta)
            loss = -np.minimum(coef_1 * a, coef_2 * a)
        if threshold is not None:
            loss = loss * (a >= 0 or mean(sampler - now) <= threshold)
        loss = loss if kind == "vespo" else loss * w
        per_row.append(loss + beta * k3)
    n, tokens, total = len(per_row), sum(map(len, per_row)), sum(x.sum() for x in per_row)
    if kind in ("grpo", "sapo"):
        return sum(mean(x) for x in per_row) / n
    return total / {"dr_grpo": n * (size or 1), "luspo": n, "bnpo": tokens}.get(kind, size or tokens)


TRL = [
    ({}, {"kind": "dapo"}),
    ({"loss_type": "dapo", "epsilon_high": 0.28, "beta": 0.04}, {"kind": "dapo", "high": 0.28, "beta": 0.04}),
    ({"loss_type": "dapo", "num_items_in_batch": 64}, {"kind": "dapo", "size": 64}),
    ({"loss_type": "grpo"}, {"kind": "grpo"}),
    (
        {"loss_type": "grpo", "beta": 0.5, "use_bias_correction_kl": True},
        {"kind": "grpo", "beta": 0.5, "corrected": True},
    ),
    ({"loss_type": "grpo", "delta": 1.5}, {"kind": "grpo", "delta": 1.5}),
    ({"loss_type": "grpo", "delta": 1.05}, {"kind": "grpo", "delta": 1.05}),
    ({"loss_type": "bnpo"}, {"kind": "bnpo"}),
    ({"loss_type": "dr_grpo", "max_completion_length": 8}, {"kind": "dr_grpo", "size": 8}),
    ({"loss_type": "cispo"}, {"kind": "cispo"}),
    ({"loss_type": "cispo", "epsilon_high": 1.2}, {"kind": "cispo", "high": 1.2}),
    (
        {"loss_type": "cispo", "epsilon_high": 1.1, "importance_sampling_level": "sequence"},
        {"kind": "cispo", "high": 1.1, "level": "sequence"},
    ),
    ({"loss_type": "sapo"}, {"kind": "sapo"}),
    ({"loss_type": "luspo"}, {"kind": "luspo", "level": "sequence"}),
    ({"loss_type": "vespo", "beta": 0.1}, {"kind": "vespo", "beta": 0.1}),
    ({"loss_type": "grpo", "importance_sampling_level": "sequence"}, {"kind": "grpo", "level": "sequence"}),
    (
        {"importance_sampling_level": "sequence", "beta": 0.3, "use_bias_correction_kl": True},
        {"kind": "dapo", "level": "sequence", "beta": 0.3, "corrected": True},
    ),
    (
        {"loss_type": "grpo", "importance_sampling_level": "sequence_token", "beta": 0.1},
        {"kind": "grpo", "level": "sequence_token", "beta": 0.1},
    ),
]


def trl_case(data, options, formula):
    ref = data.dirty.ref if options.get("beta") else None
    return (
        lambda lp: trl.loss(lp, data.dirty.old, data.a, data.mask, ref_logps=ref, **options),
        lambda lp, at: trl_formula(data, lp, at, **formula),
    )


TRL_SAMPLERS = [
    ("token_truncate", "dapo"),
    ("token_mask", "sapo"),
    ("sequence_truncate", "cispo"),
    ("sequence_mask", "dapo"),
    ("sequence_mask", "luspo"),
    ("token_truncate", "vespo"),
    ("token_mask", "vespo"),
]


def trl_sampler_case(data, mode, kind):
    """The weight, and the mask of bad and unlikely completions, act on the surrogate; the KL term goes without."""
    beta, level = (0.0, "sequence") if kind == "luspo" else (0.1, "token")
    bounds = {"vllm_importance_sampling_clip_max": 1.5, "vllm_importance_sampling_clip_min": 0.6}
    options = {"loss_type": kind, "beta": beta, "ref_logps": data.dirty.ref, "epsilon_high": 0.3}

    def preset(logps):
        old, sampler, a = data.dirty.old, data.dirty.sampler, data.a
        weights = trl.sampler_weights(old, sampler, data.mask, vllm_importance_sampling_mode=mode, **bounds)
        keep = ~mismatch.drifted(logps, sampler, np.repeat(a[:, None], 5, 1), data.mask, threshold=0.05)[:, None]
        return trl.loss(logps, old, a, data.mask, importance_sampling_ratio=weights, keep=keep, **options)

    return preset, lambda lp, at: trl_formula(
        data, lp, at, kind, level=level, high=0.3, beta=beta, mode=mode, threshold=0.05
    )


def trl_gmpo(data, logps, high=0.4, beta=0.0):
    total = 0.0
    for a, new, _, old, ref, _ in rows(data, logps, logps):
        d = new - old
        clamped = np.clip(d, -0.4, high)
        d = np.minimum(d, clamped) if a > 0 else np.maximum(d, clamped)
        total += -np.exp(mean(d)) * a * (len(new) > 0)  # an empty row is a constant there, without a gradient
        total += beta * mean(np.exp(ref - new) - (ref - new) - 1)
    return total / len(data.a)


def trl_rloo(data, logps):
    total = 0.0
    for a, new, _, old, _, _ in rows(data, logps, logps):
        coef = np.exp(new.sum() - old.sum())
        total += -min(coef * a, np.clip(coef, 0.8, 1.3) * a) * (len(new) > 0)
    return total / len(data.a)


def test_trl(data):
    given, ref = (data.dirty.old, data.a, data.mask), data.dirty.ref
    cases = {str(options): trl_case(data, options, formula) for options, formula in TRL}
    cases |= {f"{mode} {kind}": trl_sampler_case(data, mode, kind) for mode, kind in TRL_SAMPLERS}
    cases["gmpo"] = (lambda lp: trl.gmpo_loss(lp, *given)), (lambda lp, at: trl_gmpo(data, lp))
    cases["gmpo, KL"] = (
        lambda lp: trl.gmpo_loss(lp, *given, epsilon_high=0.1, beta=0.2, ref_logps=ref),
        lambda lp, at: trl_gmpo(data, lp, 0.1, 0.2),
    )
    cases["rloo"] = (lambda lp: trl.rloo_loss(lp, *given, epsilon_high=0.3)), (lambda lp, at: trl_rloo(data, lp))
    agree(cases, data)


def test_trl_bounds_that_are_not_given(data):
    """Defaults: sequence_mask, at most 3, no lower bound; None lifts the upper one."""
    given = data.dirty.old, data.dirty.sampler - 0.4, data.mask
    whole = np.exp(np.where(data.mask, data.old - data.sampler + 0.4, 0).sum(1, keepdims=True))
    assert (whole > 3).any() and (whole < 3).any()
    expected = np.where(data.mask, np.where(whole > 3, 0, whole), 1)
    np.testing.assert_allclose(np.where(data.mask, trl.sampler_weights(*given), 1), expected, rtol=1e-5)
    free = trl.sampler_weights(*given, vllm_importance_sampling_clip_max=None)
    np.testing.assert_allclose(np.where(data.mask, free, 1), np.where(data.mask, whole, 1), rtol=1e-5)


def test_trl_rloo_with_kl_in_the_reward(data):
    rewards = draws("normal")
    penalised = rewards - 0.05 * np.where(data.mask, data.old - data.ref, 0).sum(1)
    given = {"old_logps": data.dirty.old, "ref_logps": data.dirty.ref, "mask": data.mask}
    got = jax.jit(lambda r: trl.rloo_advantages(r, GROUPS, **given))(jnp.float32(rewards))
    np.testing.assert_allclose(got, by_row(penalised, over_others), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, m: trl.loss(x, x, x, m, loss_type="dapoo"), "no loss_type 'dapoo'; did you mean 'dapo'"),
        (lambda x, m: trl.loss(x, x, x, m, beta=0.1), "beta is 0.1 and needs ref_logps"),
        (lambda x, m: trl.loss(x, x, x, m, loss_type="dr_grpo"), "max_completion_length"),
        (lambda x, m: trl.loss(x, x, x, m, loss_type="luspo", beta=0.1, ref_logps=x), "luspo has no KL term"),
        (lambda x, m: trl.rloo_advantages(x[:, 0], GROUPS[:2]), "beta is 0.05 and needs ref_logps"),
        (lambda x, m: trl.rloo_advantages(x[:, 0], GROUPS[:2], ref_logps=x), "needs old_logps and mask"),
    ],
)
def test_errors_say_what_to_do(call, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(call, np.zeros((2, 3), np.float32), np.ones((2, 3), bool))
