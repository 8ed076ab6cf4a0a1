"""Each stack's formulas, written out again in float64 by loops, against the presets: values and gradients to 1e-5."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import presets
from grpo_jax.losses import mismatch
from grpo_jax.presets import nemo_rl, openrlhf, trl, tunix, verl

GROUPS = np.array([0, 0, 0, 0, 1, 1, 1, 2, 3, 3, -1])


@pytest.fixture
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


def agrees(preset, formula, data):
    """preset(logps), in float32 with garbage under the mask, against formula(logps, at) in float64.

    `at` is where the gradient is taken: what a stack detaches is computed from it.
    """
    value, gradient = jax.jit(jax.value_and_grad(preset))(jnp.asarray(data.dirty.logps))
    expected = np.zeros(data.logps.shape)
    for place in np.ndindex(data.logps.shape):
        up, down = data.logps.copy(), data.logps.copy()
        up[place], down[place] = up[place] + 1e-6, down[place] - 1e-6
        expected[place] = (formula(up, data.logps) - formula(down, data.logps)) / 2e-6
    assert float(value) == pytest.approx(formula(data.logps, data.logps), rel=1e-5, abs=1e-5)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)
    assert np.abs(expected).max() > 1e-3


# ---- formulas, one completion at a time ------------------------------------------------------------------------------


def rows(data, logps, at):
    """(advantage, new, at, old, ref, sampler) of the masked-in tokens of each row."""
    for i, m in enumerate(data.mask):
        yield data.a[i], logps[i][m], at[i][m], data.old[i][m], data.ref[i][m], data.sampler[i][m]


def clip_loss(ratio, a, low, high):
    return np.maximum(-a * ratio, -a * np.clip(ratio, 1 - low, 1 + high))


def k3(new, ref):
    return np.exp(ref - new) - (ref - new) - 1


def reduce(per_row, how, size=None):
    """per_row: token losses of each row. The aggregations of the stacks, each by its own sums."""
    tokens, full = sum(map(len, per_row)), [x for x in per_row if len(x)]
    return {
        "tokens": lambda: sum(x.sum() for x in per_row) / tokens,
        "all rows": lambda: sum(x.mean() for x in full) / len(per_row),
        "full rows": lambda: sum(x.mean() for x in full) / len(full),
        "row sums": lambda: sum(x.sum() for x in full) / len(full),
        "rows times length": lambda: sum(x.sum() for x in per_row) / (len(per_row) * size),
        "length": lambda: sum(x.sum() for x in per_row) / size,
        "given": lambda: sum(x.sum() for x in per_row) / size,
    }[how]()


# ---- TRL ------------------------------------------------------------------------------------------


def trl_formula(data, logps, at, kind, *, level="token", high=0.2, delta=None, beta=0.0, corrected=False, size=None):
    per_row = []
    for a, new, now, old, ref, _ in rows(data, logps, at):
        log_ratio = new - old
        if level == "sequence" and len(new):
            log_ratio = np.full(len(new), log_ratio.mean())
        if level == "sequence_token" and len(new):
            log_ratio = new - now + (now - old).mean()
        ratio = np.exp(log_ratio)
        if kind == "cispo":
            loss = -np.minimum(np.exp(now - old), high) * a * new
        elif kind == "sapo":
            tau = 1.0 if a > 0 else 1.05
            loss = -a * 4 / tau / (1 + np.exp(-tau * (ratio - 1)))
        elif kind == "gmpo":
            s = np.sign(a)
            kept = s * np.minimum(s * (new - old), s * np.clip(new - old, -0.2, high))
            loss = np.full(len(new), -a * np.exp(kept.mean())) if len(new) else kept
        else:
            first = ratio if delta is None else np.minimum(ratio, delta)
            loss = -np.minimum(first * a, np.clip(ratio, 0.8, 1 + high) * a)
        per_row.append(loss + beta * k3(new, ref) * (ratio if corrected else 1))
    how = {"bnpo": "tokens", "dapo": "tokens", "cispo": "tokens", "dr_grpo": "rows times length"}.get(kind, "all rows")
    if kind == "luspo":
        how, size = "rows times length", 1
    return reduce(per_row, "given" if kind == "dapo" and size else how, size)


@pytest.mark.parametrize(
    ("options", "formula"),
    [
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
        ({"loss_type": "cispo", "epsilon_high": 1.2}, {"kind": "cispo", "high": 1.2}),
        ({"loss_type": "sapo"}, {"kind": "sapo"}),
        ({"loss_type": "luspo"}, {"kind": "luspo", "level": "sequence"}),
        ({"loss_type": "gmpo", "epsilon_high": 0.3}, {"kind": "gmpo", "high": 0.3}),
        ({"loss_type": "grpo", "importance_sampling_level": "sequence"}, {"kind": "grpo", "level": "sequence"}),
        ({"loss_type": "dapo", "importance_sampling_level": "sequence"}, {"kind": "dapo", "level": "sequence"}),
        (
            {"loss_type": "grpo", "importance_sampling_level": "sequence_token", "beta": 0.1},
            {"kind": "grpo", "level": "sequence_token", "beta": 0.1},
        ),
    ],
    ids=str,
)
def test_trl(data, options, formula):
    ref = data.dirty.ref if options.get("beta") else None
    agrees(
        lambda lp: trl.loss(lp, data.dirty.old, data.a, data.mask, ref_logps=ref, **options),
        lambda lp, at: trl_formula(data, lp, at, **formula),
        data,
    )


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_trl_with_a_sampler_of_its_own(data, mode):
    """The weight, and the mask of bad and unlikely completions, act on the surrogate; the KL term goes without."""

    def formula(logps, at):
        per_row = []
        for a, new, now, old, ref, sampler in rows(data, logps, at):
            log_weight = old - sampler
            w = np.exp(log_weight if "token" in mode else np.full(len(new), log_weight.sum()))
            w = np.clip(w, 0.6, 1.5) if "truncate" in mode else np.where((w >= 0.6) & (w <= 1.5), w, 0)
            keep = not (len(new) and a < 0 and (sampler - now).mean() > 0.05)
            per_row.append(clip_loss(np.exp(new - old), a, 0.2, 0.2) * w * keep + 0.1 * k3(new, ref))
        return reduce(per_row, "tokens")

    def preset(logps):
        weights = trl.sampler_weights(
            data.dirty.old, data.dirty.sampler, data.mask, mode=mode, maximum=1.5, minimum=0.6
        )
        spread = np.repeat(data.a[:, None], 5, 1)
        kept = ~mismatch.drifted(logps, data.dirty.sampler, spread, data.mask, threshold=0.05)
        corrections = weights * kept[:, None]
        return trl.loss(
            logps, data.dirty.old, data.a, data.mask, beta=0.1, ref_logps=data.dirty.ref, corrections=corrections
        )

    agrees(preset, formula, data)


def test_trl_rloo(data):
    def formula(logps, at):
        return sum(
            max(-a * np.exp((new - old).sum()), -a * np.clip(np.exp((new - old).sum()), 0.8, 1.2)) if len(new) else 0
            for a, new, _, old, _, _ in rows(data, logps, at)
        ) / len(data.a)

    agrees(lambda lp: trl.rloo_loss(lp, data.dirty.old, data.a, data.mask), formula, data)


# ---- verl ------------------------------------------------------------------------------------------

VERL_MODES = {
    "token-mean": "tokens",
    "seq-mean-token-mean": "full rows",
    "seq-mean-token-sum": "row sums",
    "seq-mean-token-sum-norm": "length",
}


def verl_kl(new, ref, kind):
    d = new - ref
    return {
        "kl": lambda: d,
        "abs": lambda: np.abs(d),
        "mse": lambda: d**2 / 2,
        "low_var_kl": lambda: np.clip(k3(new, ref), -10, 10),
    }[kind]()


def verl_formula(data, logps, at, name, mode="token-mean", low=0.2, high=0.2, scale=5, kl=None, weigh=False):
    per_row, terms = [], []
    for a, new, now, old, ref, sampler in rows(data, logps, at):
        ratio = np.exp(new - old)
        if name == "vanilla":
            loss = clip_loss(ratio, a, low, high)
            loss = np.minimum(loss, -a * 1.4) if a < 0 else loss
        elif name == "gspo":
            loss = clip_loss(np.exp(new - now + ((now - old).mean() if len(new) else 0)), a, low, high)
        elif name == "sapo":
            tau = 1.0 if a > 0 else 1.05
            loss = -a * 4 / tau / (1 + np.exp(-tau * (ratio - 1)))
        elif name == "gpg":
            loss = -new * a
        elif name == "geo_mean":
            s = np.sign(a)
            kept = s * np.minimum(s * (new - old), s * np.clip(new - old, -low, high))
            loss = np.full(len(new), -a * np.exp(kept.mean())) if len(new) else kept
        else:
            loss = -np.clip(np.exp(now - old), 1 - low, 1 + high) * a * new
        per_row.append(loss * (np.minimum(np.exp(old - sampler), 1.3) if weigh else 1))
        terms.append(verl_kl(new, ref, kl) if kl else np.zeros(len(new)))
    own = {"gspo": "full rows", "sapo": "full rows", "geo_mean": "all rows"}.get(name, VERL_MODES[mode])
    return reduce(per_row, own, scale) + 0.3 * reduce(terms, VERL_MODES[mode], scale)


@pytest.mark.parametrize(
    ("name", "mode", "kl", "weigh"),
    [
        ("vanilla", "token-mean", None, False),
        ("vanilla", "seq-mean-token-mean", "low_var_kl", True),
        ("vanilla", "seq-mean-token-sum", "kl", False),
        ("vanilla", "seq-mean-token-sum-norm", "mse", False),
        ("gspo", "token-mean", "abs", False),
        ("sapo", "token-mean", None, True),
        ("gpg", "token-mean", None, False),
        ("geo_mean", "token-mean", "low_var_kl", False),
        ("cispo", "token-mean", None, False),
        ("cispo", "seq-mean-token-sum-norm", None, True),
    ],
)
def test_verl(data, name, mode, kl, weigh):
    weights = mismatch.truncated_importance(data.dirty.old, data.dirty.sampler, cap=1.3) if weigh else 1.0
    options = {"clip_ratio_low": 0.1, "clip_ratio_high": 0.25, "clip_ratio_c": 1.4, "loss_agg_mode": mode}
    if kl:
        options |= {"ref_logps": data.dirty.ref, "kl_loss_type": kl, "kl_loss_coef": 0.3}
    agrees(
        lambda lp: verl.loss(name, lp, data.dirty.old, data.a, data.mask, rollout_is_weights=weights, **options),
        lambda lp, at: verl_formula(data, lp, at, name, mode, 0.1, 0.25, kl=kl, weigh=weigh),
        data,
    )


def test_verl_defaults_and_scale(data):
    agrees(
        lambda lp: verl.loss(
            "cispo", lp, data.dirty.old, data.a, data.mask, loss_agg_mode="seq-mean-token-sum-norm", loss_scale_factor=9
        ),
        lambda lp, at: verl_formula(data, lp, at, "cispo", "seq-mean-token-sum-norm", scale=9),
        data,
    )
    far = jnp.array([[-1.0]]), jnp.array([[2.5]])  # k3 is 28.6 here
    assert float(verl.kl_penalty(*far, "k3")[0, 0]) == 10
    assert float(jax.grad(lambda x: verl.kl_penalty(x, far[1], "k3").sum())(far[0])[0, 0]) == 0
    for a, b in (("kl", "k1"), ("mse", "k2"), ("low_var_kl", "k3")):
        assert verl.kl_penalty(far[0], 0 * far[1], a) == verl.kl_penalty(far[0], 0 * far[1], b)


# ---- Tunix, NeMo RL, OpenRLHF ----------------------------------------------------------------------------------------


def plain_formula(
    data, logps, at, *, ratio="token", high=0.2, dual=None, kl=None, coefficient=0.0, how="tokens", w=None
):
    per_row = []
    for a, new, now, old, ref, sampler in rows(data, logps, at):
        log_ratio = new - old
        if ratio == "sequence" and len(new):
            log_ratio = new - now + (now - old).mean()
        loss = clip_loss(np.exp(log_ratio), a, 0.2, high)
        if dual and a < 0:
            loss = np.minimum(loss, -a * dual)
        d = new - ref
        term = {"k1": d, "k2": d**2 / 2, "k3": k3(new, ref), None: 0 * d}[kl]
        per_row.append(loss * (np.exp(old - sampler) if w else 1) + coefficient * term)
    return reduce(per_row, how)


@pytest.mark.parametrize(
    ("options", "formula"),
    [
        ({}, {"kl": "k3", "coefficient": 0.04, "how": "full rows"}),
        ({"beta": 0.0, "loss_agg_mode": "token-mean", "epsilon_high": 0.28}, {"high": 0.28}),
        (
            {"loss_algo": "gspo-token", "kl_loss_mode": "k2", "loss_agg_mode": "sequence-mean-token-sum"},
            {"ratio": "sequence", "kl": "k2", "coefficient": 0.04, "how": "row sums"},
        ),
        ({"epsilon_c": 1.4, "kl_loss_mode": "k1"}, {"dual": 1.4, "kl": "k1", "coefficient": 0.04, "how": "full rows"}),
    ],
    ids=str,
)
def test_tunix(data, options, formula):
    agrees(
        lambda lp: tunix.loss(lp, data.dirty.old, data.a, data.mask, ref_logps=data.dirty.ref, **options),
        lambda lp, at: plain_formula(data, lp, at, **formula),
        data,
    )


@pytest.mark.parametrize(
    ("options", "formula"),
    [
        ({}, {"kl": "k3", "coefficient": 0.01}),
        (
            {"token_level_loss": False, "ratio_clip_c": 1.4},
            {"kl": "k3", "coefficient": 0.01, "dual": 1.4, "how": "full rows"},
        ),
        ({"reference_policy_kl_penalty": 0.0, "ratio_clip_max": 0.28, "importance_weights": 1}, {"high": 0.28, "w": 1}),
    ],
    ids=str,
)
def test_nemo_rl(data, options, formula):
    options = dict(options)
    if "importance_weights" in options:
        options["importance_weights"] = mismatch.token_importance(data.dirty.old, data.dirty.sampler)
    agrees(
        lambda lp: nemo_rl.loss(lp, data.dirty.old, data.a, data.mask, ref_logps=data.dirty.ref, **options),
        lambda lp, at: plain_formula(data, lp, at, **formula),
        data,
    )


@pytest.mark.parametrize(
    ("options", "formula"),
    [
        ({}, {}),
        ({"dual_clip": 1.4, "eps_clip_low_high": (0.2, 0.27)}, {"dual": 1.4, "high": 0.27}),
        ({"token_level_loss": False, "init_kl_coef": 0.2}, {"kl": "k3", "coefficient": 0.2, "how": "full rows"}),
        (
            {"policy_loss_type": "gspo", "init_kl_coef": 0.1, "kl_estimator": "k2"},
            {"ratio": "sequence", "kl": "k2", "coefficient": 0.1, "how": "full rows"},
        ),
    ],
    ids=str,
)
def test_openrlhf(data, options, formula):
    agrees(
        lambda lp: openrlhf.loss(lp, data.dirty.old, data.a, data.mask, ref_logps=data.dirty.ref, **options),
        lambda lp, at: plain_formula(data, lp, at, **formula),
        data,
    )


# ---- advantages ------------------------------------------------------------------------------------------


@pytest.fixture(params=["normal", "binary", "missing"])
def rewards(request):
    draw = np.random.default_rng(3)
    if request.param == "binary":
        return np.array([1, 0, 0, 0, 1, 1, 0, 1, 1, 1, 1.0])
    values = draw.normal(size=len(GROUPS)).round(2)
    values[GROUPS == 3] = 0.85
    if request.param == "missing":
        values[[1, 5]] = np.nan
    return values


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


def over_others(own, group, others):
    return own - others.mean() if len(others) else 0.0


def nemo(own, group, others):
    std = others.std(ddof=1) if len(others) > 1 and np.ptp(others) else 0.0
    return over_others(own, group, others) / (std + 1e-6 if std > 0 else 1)


def nemo_group(own, group, others):
    std = group.std(ddof=1) if len(group) > 1 and np.ptp(group) else 0.0
    return (own - group.mean()) / (std + 1e-6 if std > 0 else 1)


def compared(rewards):
    return rewards[(GROUPS >= 0) & ~np.isnan(rewards)]


PER_ROW = {
    "trl": (lambda r: trl.advantages(r, GROUPS), lambda r: by_row(r, z(1e-4))),
    "trl none": (
        lambda r: trl.advantages(r, GROUPS, scale_rewards="none"),
        lambda r: by_row(r, lambda own, group, others: own - group.mean()),
    ),
    "trl batch": (
        lambda r: trl.advantages(r, GROUPS, scale_rewards="batch"),
        lambda r: by_row(r, lambda own, group, others: (own - group.mean()) / (compared(r).std(ddof=1) + 1e-4)),
    ),
    "trl rloo": (lambda r: trl.rloo_advantages(r, GROUPS), lambda r: by_row(r, over_others)),
    "tunix": (lambda r: tunix.advantages(r, GROUPS), lambda r: by_row(r, z(1e-6))),
    "tunix drgrpo": (
        lambda r: tunix.advantages(r, GROUPS, advantage_estimator="drgrpo"),
        lambda r: by_row(r, lambda own, group, others: own - group.mean()),
    ),
    "tunix rloo": (
        lambda r: tunix.advantages(r, GROUPS, advantage_estimator="rloo"),
        lambda r: by_row(r, over_others),
    ),
    "nemo_rl": (lambda r: nemo_rl.advantages(r, GROUPS), lambda r: by_row(r, nemo)),
    "nemo_rl plain": (
        lambda r: nemo_rl.advantages(r, GROUPS, normalize_rewards=False),
        lambda r: by_row(r, over_others),
    ),
    "nemo_rl group": (
        lambda r: nemo_rl.advantages(r, GROUPS, use_leave_one_out_baseline=False),
        lambda r: by_row(r, nemo_group),
    ),
    "openrlhf": (lambda r: openrlhf.advantages(r, GROUPS), lambda r: by_row(r, z(1e-9))),
    "openrlhf rloo": (
        lambda r: openrlhf.advantages(r, GROUPS, advantage_estimator="rloo"),
        lambda r: by_row(r, over_others),
    ),
    "openrlhf dr_grpo": (
        lambda r: openrlhf.advantages(r, GROUPS, advantage_estimator="dr_grpo"),
        lambda r: by_row(r, lambda own, group, others: own - group.mean()),
    ),
}


@pytest.mark.parametrize("name", PER_ROW)
def test_advantages_by_row(name, rewards):
    preset, formula = PER_ROW[name]
    np.testing.assert_allclose(jax.jit(preset)(jnp.float32(rewards)), formula(rewards), rtol=1e-5, atol=1e-5)


def test_trl_rloo_with_kl_in_the_reward(data):
    rewards = np.random.default_rng(3).normal(size=len(GROUPS))
    penalised = rewards - 0.3 * np.where(data.mask, data.old - data.ref, 0).sum(1)
    got = trl.rloo_advantages(
        rewards, GROUPS, beta=0.3, old_logps=data.dirty.old, ref_logps=data.dirty.ref, mask=data.mask
    )
    np.testing.assert_allclose(got, by_row(penalised, over_others), rtol=1e-5, atol=1e-5)
    values = by_row(rewards, over_others)
    inside = values[GROUPS >= 0]
    white = np.where(GROUPS >= 0, (values - inside.mean()) / (inside.std(ddof=1) + 1e-4), 0)
    np.testing.assert_allclose(
        trl.rloo_advantages(rewards, GROUPS, normalize_advantages=True), white, rtol=1e-5, atol=1e-5
    )


def alone(formula):
    """verl: a row that is alone in its group keeps its reward."""
    return lambda own, group, others: own if len(group) < 2 else formula(own, group, others)


def white(values, mask):
    inside = values[mask]
    return np.where(mask, (values - inside.mean()) / np.sqrt(inside.var(ddof=1) + 1e-8), 0)


def verl_advantages(name, rewards, mask):
    lengths = mask.sum(1)
    safe = np.nan_to_num(rewards)
    valid = (GROUPS >= 0) & ~np.isnan(rewards)
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
        return white(returns, mask & ~np.isnan(rewards)[:, None])
    centered = by_row(rewards, alone(lambda own, group, others: own - group.mean()))
    if name == "reinforce_plus_plus_baseline":
        return white(np.repeat(centered[:, None], mask.shape[1], 1), mask & valid[:, None])
    floored = lambda own, group, others: (own - group.mean()) / (np.sqrt(max(group.var(ddof=1), 1e-6)) + 1e-6)  # noqa: E731
    values = {
        "grpo": lambda: by_row(rewards, z(1e-6, alone=lambda own: own / (1 + 1e-6))),
        "dr_grpo": lambda: centered,
        "grpo_vectorized": lambda: by_row(rewards, alone(floored)),
        "rloo": lambda: by_row(rewards, alone(over_others)),
        "rloo_vectorized": lambda: by_row(rewards, over_others),
        "gpg": lambda: centered * valid.sum() / (safe[valid] != 0).sum(),
    }[name]()
    return values[:, None] * mask


@pytest.mark.parametrize(
    "name",
    [
        "grpo",
        "dr_grpo",
        "grpo_vectorized",
        "rloo",
        "rloo_vectorized",
        "reinforce_plus_plus",
        "reinforce_plus_plus_baseline",
        "opo",
        "gpg",
    ],
)
def test_verl_advantages(name, rewards, data):
    called = "grpo" if name == "dr_grpo" else name
    options = {"norm_adv_by_std_in_grpo": name != "dr_grpo", "gamma": 0.9}
    got = jax.jit(lambda r: verl.advantages(called, r, GROUPS, data.mask, **options))(jnp.float32(rewards))
    np.testing.assert_allclose(got, verl_advantages(name, rewards, data.mask), rtol=1e-5, atol=1e-5)


def test_worked_by_hand():
    """Eight rewards in groups of 4, 3 and 1, and two completions of 3 and 1 tokens."""
    r, g = np.array([1, 0, 0, 0, 1, 1, 0, 1.0]), np.array([0, 0, 0, 0, 1, 1, 1, 2])
    mask = np.arange(3) < np.array([3, 1, 2, 2, 1, 3, 2, 2])[:, None]
    worked = {
        "grpo": [1.499997, *[-0.499999] * 3, 0.577349, 0.577349, -1.154699, 0.999999],
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
    shape = {"clip_ratio_high": 0.28}
    modes = {"seq-mean-token-mean": 0.324140, "seq-mean-token-sum": -0.627579, "seq-mean-token-sum-norm": -0.418386}
    expected = [-0.313789, *modes.values(), 0.316392, 0.186712, 0.247040, 0.358882, -0.156895, 0.468865, -0.313789]
    values = jax.jit(
        lambda new, old, a, m: [
            verl.loss("vanilla", new, old, a, m, **shape),
            *(verl.loss("vanilla", new, old, a, m, **shape, loss_agg_mode=mode) for mode in modes),
            verl.loss("gspo", new, old, a, m, **shape),
            verl.loss("geo_mean", new, old, a, m, clip_ratio=0.4),
            verl.loss("cispo", new, old, a, m, **shape),
            verl.loss("sapo", new, old, a, m),
            trl.loss(new, old, a, m, loss_type="dr_grpo", epsilon_high=0.28, max_completion_length=4),
            trl.loss(new, old, a, m, loss_type="cispo", epsilon_high=1.2),
            trl.loss(new, old, a, m, epsilon_high=0.28),
        ]
    )(*given)
    np.testing.assert_allclose(values, expected, atol=2e-6)


def test_the_same_name_is_another_thing(data):
    """CISPO's bound, Dr. GRPO's denominator, the empty row, the group of one: where the table says they differ."""
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
    ones = np.ones(11)
    assert float(trl.advantages(ones, GROUPS)[7]) == 0
    assert float(verl.advantages("grpo", ones, GROUPS, data.mask)[7, 0]) == pytest.approx(1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, m: trl.loss(x, x, x, m, loss_type="dapoo"), "no loss_type 'dapoo'; did you mean 'dapo'"),
        (lambda x, m: trl.loss(x, x, x, m, beta=0.1), "beta is 0.1 and needs ref_logps"),
        (lambda x, m: trl.loss(x, x, x, m, loss_type="dr_grpo"), "max_completion_length"),
        (lambda x, m: trl.loss(x, x, x, m, loss_type="luspo", beta=0.1, ref_logps=x), "luspo has no KL term"),
        (lambda x, m: verl.loss("vanila", x, x, x, m), "did you mean 'vanilla'"),
        (lambda x, m: verl.loss("gspo", x, x, x, m, loss_agg_mode="mean"), "no loss_agg_mode 'mean'"),
        (lambda x, m: tunix.loss(x, x, x, m), "beta is 0.04 and needs ref_logps"),
        (lambda x, m: nemo_rl.loss(x, x, x, m), "reference_policy_kl_penalty is 0.01"),
        (lambda x, m: openrlhf.loss(x, x, x, m, policy_loss_type="grpo"), "Known: ppo, gspo"),
        (lambda x, m: verl.advantages("gae", x[:, 0], GROUPS[:2], m), "no advantage estimator 'gae'"),
    ],
)
def test_errors_say_what_to_do(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.zeros((2, 3)), jnp.ones((2, 3), bool))


def test_all_are_there():
    assert presets.__all__ == ["nemo_rl", "openrlhf", "trl", "tunix", "verl"]


def test_spreads_near_nothing():
    """verl's floor is on the variance; NeMo RL does not divide where the others are equal, in float32 as well."""
    close, pair, mask = np.array([0.5, 0.5005]), np.zeros(2, int), np.ones((2, 1), bool)
    got = verl.advantages("grpo_vectorized", close, pair, mask)[:, 0]
    np.testing.assert_allclose(got, np.array([-0.00025, 0.00025]) / (1e-3 + 1e-6), rtol=1e-4)
    for others in range(2, 12):
        rewards = np.array([1.0] + [0.85] * others)
        first = nemo_rl.advantages(rewards, np.zeros(others + 1, int))[0]
        assert float(first) == pytest.approx(0.15, rel=1e-5)


def test_corrections_under_the_mask_are_not_read(data):
    """A correction of one's own may be anything where nothing is trained."""
    given = np.float32(data.old), data.a, data.mask
    dirty = np.where(data.mask, 0.7, np.nan)
    for loss in (
        lambda lp, w: trl.loss(lp, *given, corrections=w),
        lambda lp, w: verl.loss("vanilla", lp, *given, rollout_is_weights=w),
        lambda lp, w: nemo_rl.loss(lp, *given, importance_weights=w, reference_policy_kl_penalty=0.0),
    ):
        got, clean = (jax.jit(jax.value_and_grad(loss))(jnp.float32(data.logps), w) for w in (dirty, 0.7))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, clean)
