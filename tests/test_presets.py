"""Each stack's source, written out again in float64 by loops, against the presets: values and gradients to 1e-5.

The formulas keep the shape of the source they are taken from (what it detaches, clamps, multiplies and divides by, in
its order), one completion at a time, and share nothing with each other that the stacks do not.
"""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import presets
from grpo_jax.losses import mismatch
from grpo_jax.presets import nemo_rl, openrlhf, trl, tunix, verl

GROUPS = np.array([0, 0, 0, 0, 1, 1, 1, 2, 3, 3, -1])


@pytest.fixture(scope="module")
def data():
    """Rows of several lengths, one empty, one with a hole; garbage under the mask; groups of 4, 3, 1, 2."""
    draw = np.random.default_rng(0)
    n, t = len(GROUPS), 5
    mask = np.arange(t) < np.array([5, 3, 0, 2, 5, 4, 1, 3, 5, 2, 3])[:, None]
    mask[0, 2] = False
    logps = -draw.exponential(1.0, (n, t))
    old = logps + draw.normal(0, 0.35, (n, t))
    ref = logps + draw.normal(0, 0.5, (n, t))
    sampler = old + draw.normal(0, 0.4, (n, t))
    advantages = draw.choice([-1.3, 0.4, 1.1, -0.2], n)
    junk = np.where(mask, 0, draw.choice([np.nan, np.inf, -np.inf], (n, t)))
    dirty = {k: np.float32(v + junk) for k, v in {"logps": logps, "old": old, "ref": ref, "sampler": sampler}.items()}
    return SimpleNamespace(
        mask=mask, logps=logps, old=old, ref=ref, sampler=sampler, a=advantages, dirty=SimpleNamespace(**dirty)
    )


def agree(cases, data):
    """Each case: preset(logps), in float32 with garbage under the mask, against formula(logps, at), in float64.

    `at` is where the gradient is taken: what a stack detaches is computed from it. The presets are one program.
    """

    def all_of_them(logps):
        values, pull = jax.vjp(lambda lp: jnp.stack([preset(lp) for preset, _ in cases.values()]), logps)
        return values, jax.vmap(pull)(jnp.eye(len(cases)))[0]

    values, gradients = jax.jit(all_of_them)(jnp.asarray(data.dirty.logps))
    for (name, (_, formula)), value, gradient in zip(cases.items(), values, gradients, strict=True):
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


# ---- TRL ------------------------------------------------------------------------------------------


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


# ---- verl ------------------------------------------------------------------------------------------


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
    weights = mismatch.truncated_importance(data.dirty.old, data.dirty.sampler, cap=1.3) if weigh else 1.0
    options = {"clip_ratio_low": 0.1, "clip_ratio_high": 0.25, "clip_ratio_c": 1.4, "loss_agg_mode": mode}
    if kl:
        options |= {"ref_logps": data.dirty.ref, "kl_loss_type": kl, "kl_loss_coef": 0.3}
    return (
        lambda lp: verl.loss(name, lp, data.dirty.old, data.a, data.mask, rollout_is_weights=weights, **options),
        lambda lp, at: verl_formula(data, lp, at, name, mode, 0.1, 0.25, 1.4, kl=kl, weigh=weigh),
    )


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


# ---- Tunix ------------------------------------------------------------------------------------------


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
    if options.pop("weigh", False):
        weights = mismatch.truncated_importance(data.dirty.old, data.dirty.sampler, cap=1.2)
        options["sampler_is_weights"] = weights
    return (
        lambda lp: tunix.loss(lp, data.dirty.old, data.a, data.mask, ref_logps=data.dirty.ref, **options),
        lambda lp, at: tunix_formula(data, lp, at, **formula),
    )


def test_tunix(data):
    agree({str(options): tunix_case(data, options, formula) for options, formula in TUNIX}, data)


# ---- NeMo RL ------------------------------------------------------------------------------------------


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
    if kind:
        typed = (
            {}
            if kind in ("raw", "product")
            else {
                "truncated_importance_sampling_type": kind,
                "truncated_importance_sampling_ratio": 1.3,
                "truncated_importance_sampling_ratio_min": 0.7,
            }
        )
        product = {"sequence_level_importance_ratios": kind == "product"}
        options["importance_weights"] = nemo_rl.sampler_weights(
            data.dirty.old, data.dirty.sampler, data.mask, **typed, **product
        )
    if options.pop("approximate", False):
        options["generation_logps"] = data.dirty.sampler
    return (
        lambda lp: nemo_rl.loss(lp, data.dirty.old, data.a, data.mask, ref_logps=data.dirty.ref, **options),
        lambda lp, at: nemo_formula(data, lp, at, **formula),
    )


def test_nemo_rl(data):
    agree({str(options): nemo_rl_case(data, options, formula) for options, formula in NEMO_RL}, data)


# ---- OpenRLHF ------------------------------------------------------------------------------------------


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
    if "weigh" in options:
        options["is_weights"] = openrlhf.sampler_weights(
            data.dirty.old,
            data.dirty.sampler,
            data.mask,
            is_correction_type=options.pop("weigh"),
            is_correction_threshold=(0.7, 1.3),
        )
    return (
        lambda lp: openrlhf.loss(lp, data.dirty.old, data.a, data.mask, **options),
        lambda lp, at: openrlhf_formula(data, lp, at, **formula),
    )


def test_openrlhf(data):
    agree({str(options): openrlhf_case(data, options, formula) for options, formula in OPENRLHF}, data)


def test_far_from_the_reference():
    """Bounds on KL terms that the batch does not reach: value 10 and no gradient, for log-ratios within 20 and over."""
    mask, logps, none = np.ones((1, 1), bool), jnp.array([[-1.0]]), np.zeros(1)

    def terms(lp, gap):
        ref = jax.lax.stop_gradient(lp) + gap
        options = {"ref_logps": ref, "reference_policy_kl_penalty": 1.0}
        return {
            "verl": verl.kl_penalty(lp, ref, "k3").sum(),
            "openrlhf": openrlhf.loss(lp, lp, none, mask, ref_logps=ref, estimator="k3", init_coef=1.0),
            "nemo_rl": nemo_rl.loss(lp, lp, none, mask, **options),
            # over 20 the weight that NeMo RL puts on its KL term has no gradient either, however small the product
            "nemo_rl, weighed": nemo_rl.loss(lp, lp, none, mask, generation_logps=logps + 5, **options),
        }

    gaps = jnp.array([3.5, 19.0, 25.0, -12.0, -25.0])
    values = jax.jit(jax.vmap(lambda gap: terms(logps, gap)))(gaps)
    slopes = jax.jit(jax.vmap(lambda gap: jax.jacobian(terms)(logps, gap)))(gaps)
    for name in ("verl", "openrlhf", "nemo_rl"):
        np.testing.assert_allclose(values[name], 10, err_msg=name)
        np.testing.assert_allclose(slopes[name], 0, err_msg=name)
    assert float(values["nemo_rl, weighed"][-1]) == pytest.approx(np.exp(-5) * 19, rel=1e-5)
    assert float(slopes["nemo_rl, weighed"][-1, 0, 0]) == 0
    for a, b in (("kl", "k1"), ("mse", "k2"), ("low_var_kl", "k3")):
        assert verl.kl_penalty(logps, 0 * logps, a) == verl.kl_penalty(logps, 0 * logps, b)


# ---- advantages ------------------------------------------------------------------------------------------


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


def nemo(leave_one_out, divide=True):
    """E[x^2] - mean^2, times n / (n - 1), of the rows that enter the baseline; what that leaves undefined is 0."""

    def formula(own, group, others):
        if len(group) < 2:
            return 0.0
        rows = others if leave_one_out else group
        std = 0.0
        if len(rows) > 1 and np.ptp(rows):
            std = np.sqrt(((rows**2).mean() - rows.mean() ** 2) * len(rows) / (len(rows) - 1))
        return (own - rows.mean()) / (std + 1e-6 if divide and std > 0 else 1)

    return formula


def compared(rewards):
    return (GROUPS >= 0) & ~np.isnan(rewards)


def rloo_normalized(rewards):
    values, sizes = by_row(rewards, over_others), by_row(rewards, lambda own, group, others: len(group))
    inside = values[sizes > 1]
    return np.where(sizes > 1, (values - inside.mean()) / (inside.std(ddof=1) + 1e-4), 0)


PER_ROW = {
    "trl": (lambda r: trl.advantages(r, GROUPS), lambda r: by_row(r, z(1e-4))),
    "trl none": (lambda r: trl.advantages(r, GROUPS, scale_rewards="none"), lambda r: by_row(r, centered)),
    "trl batch": (
        lambda r: trl.advantages(r, GROUPS, scale_rewards="batch"),
        lambda r: by_row(r, centered) / (r[compared(r)].std(ddof=1) + 1e-4),
    ),
    "trl rloo": (
        lambda r: trl.rloo_advantages(r, GROUPS, beta=0.0, reward_clip_range=(-0.5, 0.9)),
        lambda r: by_row(np.clip(r, -0.5, 0.9), over_others),
    ),
    "trl rloo normalized": (
        lambda r: trl.rloo_advantages(r, GROUPS, beta=0.0, normalize_advantages=True),
        rloo_normalized,
    ),
    "tunix": (lambda r: tunix.advantages(r, GROUPS), lambda r: by_row(r, z(1e-6))),
    "tunix drgrpo": (
        lambda r: tunix.advantages(r, GROUPS, advantage_estimator="drgrpo"),
        lambda r: by_row(r, centered),
    ),
    "tunix rloo": (
        lambda r: tunix.advantages(r, GROUPS, advantage_estimator="rloo"),
        lambda r: by_row(r, over_others),
    ),
    "nemo_rl": (lambda r: nemo_rl.advantages(r, GROUPS), lambda r: by_row(r, nemo(True))),
    "nemo_rl plain": (
        lambda r: nemo_rl.advantages(r, GROUPS, normalize_rewards=False),
        lambda r: by_row(r, nemo(True, divide=False)),
    ),
    "nemo_rl group": (
        lambda r: nemo_rl.advantages(r, GROUPS, use_leave_one_out_baseline=False),
        lambda r: by_row(r, nemo(False)),
    ),
}


def test_advantages_by_row():
    same(
        {name: preset for name, (preset, _) in PER_ROW.items()},
        {name: formula for name, (_, formula) in PER_ROW.items()},
    )


def test_trl_rloo_with_kl_in_the_reward(data):
    rewards = draws("normal")
    penalised = rewards - 0.05 * np.where(data.mask, data.old - data.ref, 0).sum(1)
    given = {"old_logps": data.dirty.old, "ref_logps": data.dirty.ref, "mask": data.mask}
    got = jax.jit(lambda r: trl.rloo_advantages(r, GROUPS, **given))(jnp.float32(rewards))
    np.testing.assert_allclose(got, by_row(penalised, over_others), rtol=1e-5, atol=1e-5)


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


def biased_white(values, mask):
    """NeMo RL, OpenRLHF: variance over n, at least 1e-8."""
    middle = values[mask].mean()
    variance = ((values[mask] - middle) ** 2).mean()
    return np.where(mask, (values - middle) / np.sqrt(max(variance, 1e-8)), 0)


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


def test_whitening_of_nearly_nothing():
    """A spread under 1e-4 is not blown up to 1, in NeMo RL and OpenRLHF."""
    close, pair, mask = np.array([1e-5, 3e-5]), np.zeros(2, int), np.ones((2, 1), bool)
    nemo, openrlhf_, equal = jax.jit(
        lambda r: (
            nemo_rl.reinforce_plus_plus(r, pair, mask),
            openrlhf.advantages("reinforce_baseline", r, pair, mask),
            nemo_rl.reinforce_plus_plus(0 * r + 0.3, pair, mask),
        )
    )(close)
    np.testing.assert_allclose(nemo, [[-0.1], [0.1]], rtol=1e-5)
    np.testing.assert_allclose(openrlhf_, [[-0.1], [0.1]], rtol=1e-5)
    assert not np.any(equal)


# ---- by hand, and where stacks differ ----------------------------------------------------------------------


def test_worked_by_hand():
    """Eight rewards in groups of 4, 3 and 1, and two completions of 3 and 1 tokens."""
    r, g = np.array([1, 0, 0, 0, 1, 1, 0, 1.0]), np.array([0, 0, 0, 0, 1, 1, 1, 2])
    mask = np.arange(3) < np.array([3, 1, 2, 2, 1, 3, 2, 2])[:, None]
    worked = {
        "grpo": [1.499997, *[-0.499999] * 3, 0.577349, 0.577349, -1.154699, 0.999999],
        "grpo_passk": [1.999996, 0, 0, 0, 0, 0, 0, 0],
        "rloo": [1, *[-0.333333] * 3, 0.5, 0.5, -1, 1],
        "rloo_vectorized": [1, *[-0.333333] * 3, 0.5, 0.5, -1, 0],
        "reinforce_plus_plus_baseline": [0.997404, *[-0.775759] * 3, 0.258586, 0.258586, -1.514576, 1.440694],
        "reinforce_plus_plus": [0.853913, *[-1.097888] * 3, 0.853913, 0.853913, -1.097888, 0.853913],
        "opo": [0.625, *[-0.375] * 3, 0.333333, 0.333333, -0.666667, 1],
    }
    got = jax.jit(lambda r: {name: verl.advantages(name, r, g, mask)[:, 0] for name in worked})(r)
    for name, expected in worked.items():
        np.testing.assert_allclose(got[name], expected, atol=2e-6, err_msg=name)
    new, old = jnp.array([[-0.6, -0.9, -2.1], [-1.5, 0, 0]]), jnp.array([[-1, -0.5, -2], [-0.7, 0, 0]])
    given = new, old, np.array([1.0, -2.0]), np.array([[1, 1, 1], [1, 0, 0]], bool)
    shape, wide = {"clip_ratio_high": 0.28}, {"clip_ratio_low": 0.4, "clip_ratio_high": 0.4}
    modes = {"seq-mean-token-mean": 0.324140, "seq-mean-token-sum": -0.627579, "seq-mean-token-sum-norm": -0.418386}
    expected = [-0.313789, *modes.values(), 0.316392, 0.186712, 0.247040, 0.358882, -0.156895, 0.468865, -0.313789]
    values = jax.jit(
        lambda new, old, a, m: [
            verl.loss("vanilla", new, old, a, m, **shape),
            *(verl.loss("vanilla", new, old, a, m, **shape, loss_agg_mode=mode) for mode in modes),
            verl.loss("gspo", new, old, a, m, **shape),
            verl.loss("geo_mean", new, old, a, m, **wide),
            verl.loss("cispo", new, old, a, m, **shape),
            verl.loss("sapo", new, old, a, m),
            trl.loss(new, old, a, m, loss_type="dr_grpo", epsilon_high=0.28, max_completion_length=4),
            trl.loss(new, old, a, m, loss_type="cispo", epsilon_high=1.2),
            trl.loss(new, old, a, m, epsilon_high=0.28),
        ]
    )(*given)
    np.testing.assert_allclose(values, expected, atol=2e-6)


def test_the_same_name_is_another_thing(data):
    """CISPO's bound, Dr. GRPO's denominator, the empty row, the group of one, k3's gradient: as the table says."""
    capped, clipped, norm, dr, mean, grpo = jax.jit(
        lambda *given: (
            trl.loss(*given, loss_type="cispo", epsilon_high=1.2),
            verl.loss("cispo", *given, clip_ratio_low=1.0, clip_ratio_high=0.2),
            verl.loss(
                "vanilla", *given, clip_ratio_c=1e3, loss_agg_mode="seq-mean-token-sum-norm", loss_scale_factor=8
            ),
            trl.loss(*given, loss_type="dr_grpo", max_completion_length=8),
            verl.loss("vanilla", *given, clip_ratio_c=1e3, loss_agg_mode="seq-mean-token-mean"),
            trl.loss(*given, loss_type="grpo"),
        )
    )(data.dirty.logps, data.dirty.old, data.a, data.mask)
    assert float(capped) == pytest.approx(float(clipped), rel=1e-5)
    assert float(norm) == pytest.approx(float(dr) * len(data.a), rel=1e-5)
    assert float(grpo) == pytest.approx(float(mean) * 10 / 11, rel=1e-5)  # one row is empty
    alone = jax.jit(lambda r: (trl.advantages(r, GROUPS)[7], verl.advantages("grpo", r, GROUPS, data.mask)[7, 0]))
    assert [float(x) for x in alone(jnp.ones(11))] == [0, pytest.approx(1)]
    lp, ref, none, one = jnp.array([[-1.0]]), jnp.array([[-1.5]]), np.zeros(1), np.ones((1, 1), bool)
    nemo = jax.grad(lambda x: nemo_rl.loss(x, x, none, one, ref_logps=ref, reference_policy_kl_penalty=1.0))
    others = jax.grad(lambda x: trl.loss(x, x, none, one, ref_logps=ref, beta=1.0))
    slopes = jax.jit(lambda lp: (nemo(lp)[0, 0], others(lp)[0, 0]))(lp)
    assert [float(x) for x in slopes] == [pytest.approx(0.5), pytest.approx(1 - np.exp(-0.5))]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, m: trl.loss(x, x, x, m, loss_type="dapoo"), "no loss_type 'dapoo'; did you mean 'dapo'"),
        (lambda x, m: trl.loss(x, x, x, m, beta=0.1), "beta is 0.1 and needs ref_logps"),
        (lambda x, m: trl.loss(x, x, x, m, loss_type="dr_grpo"), "max_completion_length"),
        (lambda x, m: trl.loss(x, x, x, m, loss_type="luspo", beta=0.1, ref_logps=x), "luspo has no KL term"),
        (lambda x, m: trl.rloo_advantages(x[:, 0], GROUPS[:2]), "beta is 0.05 and needs ref_logps"),
        (lambda x, m: trl.rloo_advantages(x[:, 0], GROUPS[:2], ref_logps=x), "needs old_logps and mask"),
        (lambda x, m: verl.loss("vanila", x, x, x, m), "did you mean 'vanilla'"),
        (lambda x, m: verl.loss("gspo", x, x, x, m, loss_agg_mode="mean"), "no loss_agg_mode 'mean'"),
        (lambda x, m: verl.advantages("gae", x[:, 0], GROUPS[:2], m), "no advantage estimator 'gae'"),
        (lambda x, m: tunix.loss(x, x, x, m), "beta is 0.04 and needs ref_logps"),
        (lambda x, m: tunix.loss(x, x, x, m, ref_logps=x, kl_loss_mode="k3"), "Known: kl, mse_kl, low_var_kl"),
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
        (lambda x, m: openrlhf.loss(x, x, x, m, policy_loss_type="grpo"), "Known: ppo, gspo"),
        (lambda x, m: openrlhf.advantages("gae", x[:, 0], GROUPS[:2], m), "no advantage estimator 'gae'"),
        (lambda x, m: openrlhf.advantages("rloo", x[:, 0], GROUPS[:2], m, ref_logps=x), "needs old_logps too"),
        (lambda x, m: openrlhf.sampler_weights(x, x, m, is_correction_type="ti"), "did you mean 'tis'"),
    ],
)
def test_errors_say_what_to_do(call, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(call, jnp.zeros((2, 3)), jnp.ones((2, 3), bool))


def test_all_are_there():
    assert presets.__all__ == ["nemo_rl", "openrlhf", "trl", "tunix", "verl"]


def test_spreads_near_nothing():
    """verl's floor is on the variance; NeMo RL does not divide where the others are equal, in float32 as well."""
    close, pair, mask = np.array([0.5, 0.5005]), np.zeros(2, int), np.ones((2, 1), bool)
    got = jax.jit(lambda r: verl.advantages("grpo_vectorized", r, pair, mask)[:, 0])(close)
    np.testing.assert_allclose(got, np.array([-0.00025, 0.00025]) / (1e-3 + 1e-6), rtol=1e-4)
    first = jax.jit(lambda r, g: nemo_rl.advantages(r, g)[0])
    for others in range(2, 12):
        ids = np.where(np.arange(12) <= others, 0, -1)
        assert float(first(np.where(np.arange(12) == 0, 1.0, 0.85), ids)) == pytest.approx(0.15, rel=1e-5)


def test_corrections_under_the_mask_are_not_read(data):
    """A correction of one's own may be anything where nothing is trained."""
    given = np.float32(data.old), data.a, data.mask
    dirty = jnp.stack([np.where(data.mask, 0.7, np.nan), np.full(data.mask.shape, 0.7)])
    losses = (
        lambda lp, w: trl.loss(lp, *given, importance_sampling_ratio=w),
        lambda lp, w: trl.loss(lp, *given, importance_sampling_ratio=w, loss_type="vespo"),
        lambda lp, w: verl.loss("vanilla", lp, *given, rollout_is_weights=w),
        lambda lp, w: verl.loss("geo_mean", lp, *given, rollout_is_weights=w),
        lambda lp, w: tunix.loss(lp, *given, sampler_is_weights=w, beta=0.0),
        lambda lp, w: nemo_rl.loss(lp, *given, importance_weights=w, reference_policy_kl_penalty=0.0),
        lambda lp, w: openrlhf.loss(lp, *given, is_weights=w),
    )
    slopes = jax.jacrev(lambda lp, w: jnp.stack([loss(lp, w) for loss in losses]))
    got, clean = jax.jit(jax.vmap(slopes, (None, 0)))(jnp.float32(data.logps), dirty)
    np.testing.assert_allclose(got, clean, rtol=1e-6)
    assert np.all(np.abs(clean).max((1, 2)) > 1e-3)
