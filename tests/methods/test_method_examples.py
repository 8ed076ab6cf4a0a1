"""Every method on numbers worked by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import losses, methods
from grpo_jax.methods.grpo import grpo, sequence_mean
from grpo_jax.types import Decisions


def shaped(method, batch):
    return jax.jit(lambda batch: method.advantage(batch, {}, None)[0])(batch)


def by_row(batch):
    return np.asarray(batch.advantages)[:, 0]


def value(method, batch, new):
    """The loss of a whole mini-batch and its gradient with respect to the log-probs."""

    def loss(logps):
        each, _ = method.objective(Decisions(logps=logps), batch, {})
        return each if each.shape == () else losses.weighted_sum(each, method.aggregate(batch))

    return jax.jit(jax.value_and_grad(loss))(jnp.asarray(new, jnp.float32))


def resolve(name, **options):
    return methods.resolve(name, options=options, settings={"prompts": 1, "group_size": 2, "max_new": 4})


# ---- plain GRPO and its nearest relatives ----------------------------------------------------------------------

REWARDS, GROUPS = [1, 0, 0, 0, 1, 1, 0, 1], [0, 0, 0, 0, 1, 1, 1, 2]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("grpo", [1.499997, -0.499999, -0.499999, -0.499999, 0.577349, 0.577349, -1.154699, 0]),
        ("dapo", [1.499997, -0.499999, -0.499999, -0.499999, 0.577349, 0.577349, -1.154699, 0]),
        ("gspo", [1.499997, -0.499999, -0.499999, -0.499999, 0.577349, 0.577349, -1.154699, 0]),
        ("guide_grpo", [1.499997, -0.499999, -0.499999, -0.499999, 0.577349, 0.577349, -1.154699, 0]),
        ("dr_grpo", [0.75, -0.25, -0.25, -0.25, 0.333333, 0.333333, -0.666667, 0]),
        ("rloo", [1, -0.333333, -0.333333, -0.333333, 0.5, 0.5, -1, 0]),
    ],
)
def test_advantages(make, name, expected):
    """A group of one gets 0 everywhere."""
    np.testing.assert_allclose(by_row(shaped(resolve(name), make.batch(REWARDS, groups=GROUPS))), expected, atol=2e-6)


OLD, NEW = [[-1, -0.5, -2], [-0.7, 0, 0]], [[-0.6, -0.9, -2.1], [-1.5, 0, 0]]
MASK = [[True, True, True], [True, False, False]]


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("dapo", {}, -0.313789),
        ("grpo", {"clip_high": 0.28}, -0.313789),
        ("dr_grpo", {"clip_high": 0.28}, -0.156895),  # over 2 rows and max_new = 4
        ("gspo", {"clip_low": 0.2, "clip_high": 0.28}, 0.316392),
        # the products are e^-0.1 and e^-0.8: (-0.904837 + 2 max(0.449329, 0.8)) / 2
        ("rloo", {}, 0.347581),
    ],
)
def test_losses(make, name, options, expected):
    batch = make.batch([0, 0], old=OLD, mask=MASK)
    batch = batch.replace(advantages=jnp.where(batch.completion_mask, jnp.array([[1.0], [-2.0]]), 0))
    assert float(value(resolve(name, **options), batch, NEW)[0]) == pytest.approx(expected, abs=1e-6)


def test_mean_over_sequences(make):
    method = grpo(prompts=1, group_size=2, clip_high=0.28, aggregate=sequence_mean)
    batch = make.batch([0, 0], old=OLD, mask=MASK)
    batch = batch.replace(advantages=jnp.where(batch.completion_mask, jnp.array([[1.0], [-2.0]]), 0))
    assert float(value(method, batch, NEW)[0]) == pytest.approx(0.324140, abs=1e-6)


@pytest.mark.parametrize("name", ["grpo", "dapo", "gspo", "rloo", "mc_grpo"])
def test_kl(make, name):
    """One decision at log-prob -1 against -1.5, without advantage: k3 and its gradient, times beta."""
    batch = make.batch([0], old=[[-1.0]], ref=[[-1.5]], mask=[[True]]).replace(advantages=jnp.zeros((1, 1)))
    loss, gradient = value(resolve(name, kl=0.1), batch, [[-1.0]])
    assert float(loss) == pytest.approx(0.0106531, abs=1e-7)
    assert float(gradient[0, 0]) == pytest.approx(0.0393469, abs=1e-7)
    assert resolve(name, kl=0.1).roles.keys() == {"reference"} and resolve(name).roles == {}


def test_overlong_completions(make):
    """Within the last 20 of 100 tokens the first channel's score falls by up to 1; without a buffer nothing does."""
    batch = make.batch([[1, 3], [1, 3], [1, 3], [np.nan, 3]]).replace(lengths=jnp.array([80, 90, 100, 100]))
    settings = {"prompts": 1, "group_size": 4, "max_new": 100}
    method = methods.resolve("dapo", options={"buffer": 20}, settings=settings)
    np.testing.assert_allclose(method.reward(batch, {}, None), [[1, 3], [0.5, 3], [0, 3], [np.nan, 3]])
    np.testing.assert_array_equal(
        methods.resolve("dapo", options={}, settings=settings).reward(batch, {}, None), batch.scores
    )
    with pytest.raises(ValueError, match="the last `buffer` tokens of max_new 100, got buffer 101"):
        methods.resolve("dapo", options={"buffer": 101}, settings=settings)


# ---- MC-GRPO -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "rewards", "expected", "pivot"),
    [
        ({}, [0.1, 0.9, 0.4], [-0.996678, 1.661130, 0.0], 2),
        ({}, [0, 0.2, 0.3, 0.5, 1.0], [-1.492537, -0.497512, 0, 0.995025, 3.482587], 2),
        ({}, [0, 0, 1], [0, 0, 1000], 0),
        ({}, [0.85, 0.85, 0.85], [0, 0, 0], 0),
        ({"scale": "none"}, [0.1, 0.9, 0.4], [-0.3, 0.5, 0], 2),
        ({"scale": "std", "epsilon": 1e-4}, [0.1, 0.9, 0.4], [-0.3 / 0.404245, 0.5 / 0.404245, 0], 2),
        ({"epsilon": 0.5}, [0, 0, 1], [0, 0, 2], 0),
    ],
)
def test_mc_grpo(make, options, rewards, expected, pivot):
    """Distance from the median over the median absolute deviation; one row at the median is dropped, others stay."""
    batch = shaped(resolve("mc_grpo", **options), make.batch(rewards))
    np.testing.assert_allclose(by_row(batch), expected, rtol=2e-5, atol=1e-6)
    assert np.flatnonzero(np.asarray(batch.weights) == 0).tolist() == [pivot]


def test_plain_grpo_on_the_same_rewards(make):
    np.testing.assert_allclose(
        by_row(shaped(resolve("grpo", epsilon=1e-4), make.batch([0.1, 0.9, 0.4]))),
        [-0.907040, 1.071957, -0.164916],
        atol=1e-6,
    )


def test_mc_grpo_drops_one_row_per_group(make):
    """Whatever the order of the rows; a row in no group is no pivot and has no advantage, nor has one without score."""
    rewards = [0.4, 5, 0.1, 0.9, 5, 5, np.nan, 0.3]
    batch = shaped(resolve("mc_grpo"), make.batch(rewards, groups=[0, 1, 0, 0, 1, 1, 1, -1]))
    np.testing.assert_allclose(by_row(batch), [0, 0, -0.996678, 1.661130, 0, 0, 0, 0], atol=1e-6)
    assert np.asarray(batch.weights).tolist() == [0, 0, 1, 1, 1, 1, 1, 1]


# ---- Guide-GRPO ----------------------------------------------------------------------------------------------------

HINTED = {"old": [-1, -0.5, -2, -0.2], "new": [-1.4, -0.9, -1.6, -0.3], "advantage": 1.2}
BARE = {"old": [-1.2, -0.5, -1.1, -0.3], "new": [-0.9, -0.6, -1.1, -0.4], "advantage": -0.7}


def guided(make, *rows):
    batch = make.batch(
        np.zeros(len(rows)),
        old=[r["old"] for r in rows],
        mask=np.ones((len(rows), 4), bool),
        plain=[r is BARE for r in rows],
    )
    return batch.replace(advantages=jnp.array([[r["advantage"]] * 4 for r in rows], jnp.float32))


def test_guide_grpo(make):
    method = resolve("guide_grpo")
    loss, gradient = value(method, guided(make, HINTED), [HINTED["new"]])
    assert float(loss) == pytest.approx(-0.484161, abs=1e-6)
    np.testing.assert_allclose(gradient[0], [-0.067080, -0.067080, -0.074705, -0.072432], atol=1e-6)
    loss, _ = value(method, guided(make, BARE), [BARE["new"]])
    assert float(loss) == pytest.approx(0.727918, abs=1e-6)
    batch = guided(make, HINTED, BARE)
    assert float(value(method, batch, [HINTED["new"], BARE["new"]])[0]) == pytest.approx(0.121879, abs=1e-6)
    _, reported = method.objective(Decisions(logps=jnp.array([HINTED["new"], BARE["new"]])), batch, {})
    np.testing.assert_allclose(reported["ratio"][0], [0.670320, 0.670320, 1.491825, 0.904837], atol=1e-6)
    np.testing.assert_allclose(reported["ratio"][1], [1.349859, 0.904837, 1, 0.904837], atol=1e-6)
    assert np.asarray(reported["guided"]).tolist() == [[True] * 4, [False] * 4]


def test_guide_grpo_takes_the_quantile_of_what_is_trained(make):
    """Padding and given decisions do not enter gamma, however large their ratio."""
    batch = guided(make, HINTED)
    wide = make.batch([0], old=[HINTED["old"] + [-9, -9]], mask=[[True] * 4 + [False] * 2], plain=[False])
    wide = wide.replace(advantages=jnp.full((1, 6), 1.2))
    narrow, broad = (
        value(resolve("guide_grpo"), b, [n]) for b, n in ((batch, HINTED["new"]), (wide, HINTED["new"] + [0, 0]))
    )
    assert float(narrow[0]) == pytest.approx(float(broad[0]), abs=1e-7)
    np.testing.assert_allclose(broad[1], [[*np.asarray(narrow[1])[0], 0, 0]], atol=1e-7)


# ---- DisCO -----------------------------------------------------------------------------------------------------------

RIGHT = [1, 0, 0, 1]
DISCO_OLD = [[-0.25, -0.4, -0.5, 0], [-0.5, -0.35, 0, 0], [-0.9, -0.7, -0.8, -0.6], [-0.12, -0.3, -0.2, 0]]
DISCO_MASK = np.arange(4) < np.array([3, 2, 4, 3])[:, None]
CASE_A = [[-0.2, -0.4, -0.6, 0], [-0.5, -0.3, 0, 0], DISCO_OLD[2], [-0.1, -0.3, -0.2, 0]]
CASE_B = np.array(DISCO_OLD) - np.array([[0.03], [0.01], [0.02], [0.02]])


@pytest.mark.parametrize(
    ("new", "options", "expected", "slopes"),
    [
        (CASE_A, {}, -0.273469, [-0.166667, 0.254375, 0.122813, -0.166667]),
        (CASE_A, {"tau": 0.5}, -0.244981, None),
        (CASE_A, {"score": "Lratio"}, 0.016848, None),
        (CASE_A, {"tau": np.inf}, -0.275000, None),
        (CASE_B, {}, 0.150847, [-1.894444, -1.473591, -1.604871, -1.894444]),
        (CASE_B, {"penalty": 0.0}, -0.281097, None),
        (CASE_B, {"score": "Lratio"}, 0.441759, None),
        (CASE_B, {"score": "Lratio", "penalty": 0.0}, 0.009814, None),
        (CASE_B, {"divergence": "low_var_kl"}, -0.281065, None),
    ],
)
def test_disco(make, new, options, expected, slopes):
    batch = make.batch(RIGHT, old=DISCO_OLD, mask=DISCO_MASK)
    loss, gradient = value(resolve("disco", **options), batch, new)
    assert float(loss) == pytest.approx(expected, abs=2e-6)
    if slopes is not None:
        np.testing.assert_allclose(gradient, np.where(DISCO_MASK, np.array(slopes)[:, None], 0), atol=2e-5)


def test_disco_counts_groups_that_teach_nothing(make):
    """A group of right answers alone halves J, and adds its drift to D."""
    batch = make.batch(
        RIGHT + [1, 1],
        groups=[0, 0, 0, 0, 1, 1],
        old=DISCO_OLD + DISCO_OLD[:2],
        mask=np.vstack([DISCO_MASK, DISCO_MASK[:2]]),
    )
    loss, gradient = value(resolve("disco"), batch, np.vstack([CASE_A, DISCO_OLD[:2]]))
    assert float(loss) == pytest.approx(-0.273469 / 2, abs=1e-6)
    assert not np.asarray(gradient[4:]).any()
    only_right = make.batch([1, 1], old=DISCO_OLD[:2], mask=DISCO_MASK[:2])
    loss, _ = value(resolve("disco"), only_right, np.array(DISCO_OLD[:2]) - 0.02)
    assert float(loss) == pytest.approx(1e3 * (0.02 - 1e-4) * 0.02, rel=1e-4)


def test_disco_does_not_see_rows_of_weight_zero(make):
    """Without its right answers a question teaches nothing; rows of weight 2 count twice."""
    batch = make.batch(RIGHT, old=DISCO_OLD, mask=DISCO_MASK, weights=[0, 1, 1, 0])
    loss, gradient = value(resolve("disco", penalty=0.0), batch, CASE_A)
    assert float(loss) == 0.0 and not np.asarray(gradient).any()
    batch = make.batch(RIGHT, old=DISCO_OLD, mask=DISCO_MASK, weights=[2, 1, 1, 1])
    loss, _ = value(resolve("disco", penalty=0.0, tau=np.inf), batch, CASE_A)
    assert float(loss) == pytest.approx(-((-0.4 * 2 - 0.2) / 3 - (-0.4 - 0.75) / 2), abs=1e-6)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"score": "logl"}, r"score is one of \('logL', 'Lratio'\), got 'logl'"),
        ({"divergence": "k1"}, "divergence is one of"),
        ({"tau": 0.0}, "tau is a temperature above 0 .*, got 0.0"),
    ],
)
def test_disco_refuses(options, said):
    with pytest.raises(ValueError, match=said):
        resolve("disco", **options)


# ---- supervised ------------------------------------------------------------------------------------------------------


def test_sft_is_the_mean_negative_log_likelihood(make):
    batch = shaped(resolve("sft"), make.batch([0, 0], mask=MASK))
    loss, gradient = value(resolve("sft"), batch, NEW)
    assert float(loss) == pytest.approx((0.6 + 0.9 + 2.1 + 1.5) / 4, rel=1e-6)
    np.testing.assert_allclose(gradient, np.where(MASK, -0.25, 0))
