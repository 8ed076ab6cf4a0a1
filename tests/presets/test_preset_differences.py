"""Several stacks side by side: what they share, and where one name stands for different things."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transcriptions import GROUPS, by_row, centered, compared, over_others, same, z

from grpo_jax import presets
from grpo_jax.presets import nemo_rl, openrlhf, trl, tunix, verl


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
    both = jax.vmap(lambda gap: (terms(logps, gap), jax.jacobian(terms)(logps, gap)))
    values, slopes = jax.jit(both)(gaps)
    for name in ("verl", "openrlhf", "nemo_rl"):
        np.testing.assert_allclose(values[name], 10, err_msg=name)
        np.testing.assert_allclose(slopes[name], 0, err_msg=name)
    assert float(values["nemo_rl, weighed"][-1]) == pytest.approx(np.exp(-5) * 19, rel=1e-5)
    assert float(slopes["nemo_rl, weighed"][-1, 0, 0]) == 0
    aliases = {"kl": "k1", "mse": "k2", "low_var_kl": "k3"}
    penalty = functools.partial(verl.kl_penalty, logps, 0 * logps)
    for value, alias in jax.jit(lambda: [(penalty(a), penalty(b)) for a, b in aliases.items()])():
        assert value == alias


def test_whitening_of_nearly_nothing():
    """A spread under 1e-4 is not blown up to 1, in NeMo RL and OpenRLHF."""
    close, pair, mask = np.array([1e-5, 3e-5]), np.zeros(2, int), np.ones((2, 1), bool)
    program = jax.jit(
        lambda r: (
            nemo_rl.reinforce_plus_plus(r, pair, mask),
            openrlhf.advantages("reinforce_baseline", r, pair, mask),
        )
    )
    (nemo, openrlhf_), (equal, _) = program(close), program(0 * close + 0.3)
    np.testing.assert_allclose(nemo, [[-0.1], [0.1]], rtol=1e-5)
    np.testing.assert_allclose(openrlhf_, [[-0.1], [0.1]], rtol=1e-5)
    assert not np.any(equal)


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


def test_all_are_there():
    assert presets.__all__ == ["nemo_rl", "openrlhf", "trl", "tunix", "verl"]
