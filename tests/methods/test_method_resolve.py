"""Methods by name: errors that name the nearest, no option without an effect, and one method through the train step."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax import methods
from grpo_jax.methods.grpo import sequence_mean
from grpo_jax.training.deal import Layout, lay_out
from grpo_jax.training.mesh import make_mesh
from grpo_jax.training.step import begin, train_step
from grpo_jax.types import Decisions, Method, Prompt


def resolve(name, **options):
    return methods.resolve(name, options=options, settings={"prompts": 4, "group_size": 4, "max_new": 9})


def test_every_file_is_a_method():
    assert methods.names() == sorted(methods.names()) and {"grpo", "mc_grpo", "guide_grpo", "disco"} <= set(
        methods.names()
    )
    for name in methods.names():
        settings = {"prompts": 4, "group_size": 6, "max_new": 9, "steps": 5}
        assert isinstance(methods.resolve(name, options={}, settings=settings), Method)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("grppo", r"no method 'grppo'; did you mean 'grpo'\? Known: .*disco.*, or path/to/file.py:function"),
        ("xyzzy", r"no method 'xyzzy'\. Known"),
        ("nowhere.py:mine", "there is no file 'nowhere.py'"),
    ],
)
def test_unknown_methods(name, said):
    with pytest.raises(ValueError, match=said):
        resolve(name)


@pytest.mark.parametrize(
    ("name", "option", "said"),
    [
        (
            "grpo",
            "epsilom",
            r"'grpo' has no option 'epsilom'; did you mean 'epsilon'\? Its options are \['clip_high', ",
        ),
        ("dapo", "clip_hihg", "did you mean 'clip_high'"),
        ("rloo", "clip_low", "'rloo' has no option 'clip_low'; did you mean 'clip'"),
        ("guide_grpo", "kl", "'guide_grpo' has no option 'kl'"),
        ("dr_grpo", "epsilon", "'dr_grpo' has no option 'epsilon'"),
        ("grpo", "aggregate", "'grpo' has no option 'aggregate'"),
        ("grpo", "group_size", "'grpo' has no option 'group_size'"),
    ],
)
def test_unknown_options(name, option, said):
    with pytest.raises(ValueError, match=said):
        resolve(name, **{option: 1})


def test_a_method_from_a_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from grpo_jax.methods.grpo import grpo\n\n\n"
        "def halved(*, prompts, group_size, share: float = 0.5):\n"
        "    method = grpo(prompts=prompts, group_size=group_size)\n"
        "    return method.replace(reward=lambda batch, arrays, key: batch.scores * share)\n"
    )
    method = methods.resolve(
        f"{file}:halved", options={"share": 0.25}, settings={"prompts": 1, "group_size": 2, "max_new": 4}
    )

    class Scores:
        scores = 8.0

    assert method.reward(Scores, None, None) == 2.0 and method.group_size == 2
    with pytest.raises(ValueError, match="has no function 'other'"):
        methods.resolve(f"{file}:other", options={}, settings={})
    with pytest.raises(ValueError, match="did you mean 'share'"):
        methods.resolve(f"{file}:halved", options={"shape": 1}, settings={"prompts": 1, "group_size": 2})


# An option that is accepted and ignored is worse than one that is refused.
OPTIONS = {
    "grpo": {"clip_low": 0.01, "clip_high": 0.01, "kl": 0.5, "epsilon": 0.5},
    "dr_grpo": {"clip_low": 0.01, "clip_high": 0.01, "kl": 0.5},
    "dapo": {"clip_low": 0.01, "clip_high": 0.01, "kl": 0.5, "epsilon": 0.5, "buffer": 9, "max_rounds": 1},
    "rloo": {"clip": 0.01, "kl": 0.5},
    "gspo": {"clip_low": 0.2, "clip_high": 0.2, "kl": 0.5, "epsilon": 0.5},
    "mc_grpo": {"clip_low": 0.01, "clip_high": 0.01, "kl": 0.5, "epsilon": 0.5, "scale": "none", "compensate": True},
    "guide_grpo": {
        "clip_low": 0.01,
        "clip_high": 0.01,
        "epsilon": 0.5,
        "quantile": 0.1,
        "hint_column": "clue",
        "hint": "{hint}",
        "solvable": 0.3,
        "max_rounds": 1,
    },
    "disco": {"score": "Lratio", "tau": 0.1, "divergence": "low_var_kl", "budget": -1.0, "penalty": 1.0},
    "sft": {"completion_column": "clue"},
    "bnpo": {"clip_low": 0.01, "clip_high": 0.01, "kl": 0.5, "low": -9.0, "high": 9.0, "limit": 0.1},
    "cispo": {"clip_low": 0.01, "clip_high": 0.01, "epsilon": 0.5},
    "drpo": {"lam": 1.0, "tau": 0.1, "divergence": "low_var_kl", "budget": -1.0, "penalty": 1.0},
    "gdpo": {
        "clip_low": 0.01,
        "clip_high": 0.01,
        "kl": 0.5,
        "whitening": "decisions",
        "conditions": {"channel 0": ["channel 0", 0.5]},
    },
    "gmpo": {"clip_low": 0.01, "clip_high": 0.01, "epsilon": 0.5},
    "grpo_lambda": {"clip_low": 0.01, "clip_high": 0.01, "kl": 0.5, "epsilon": 0.5, "fraction": 1.0, "alpha": 0.1},
    "ngrpo": {"clip_low": 0.01, "clip_high": 0.01, "kl": 0.5, "epsilon": 0.5, "r_max": 3.0, "n_v": 4, "max_rounds": 1},
    "pref_grpo": {"clip_low": 0.01, "clip_high": 0.01, "kl": 0.5, "epsilon": 0.5, "whiten": True, "bound": 0.1},
    "reg_grpo": {"kl": 0.5, "epsilon": 0.5, "ratio_epsilon": 0.5},
    "reinforce_plus_plus": {"clip_low": 0.01, "clip_high": 0.01, "kl": 0.5, "gamma": 0.5, "group_baseline": True},
    "sapo": {"tau_positive": 3.0, "tau_negative": 3.0, "epsilon": 0.5},
    "tempo": {"clip_low": 0.01, "clip_high": 0.01, "kl": 0.5},
    "unlikeliness": {
        "clip_low": 0.01,
        "clip_high": 0.01,
        "kl": 0.5,
        "epsilon": 0.5,
        "penalty": 0.9,
        "form": "paper",
        "buffer": 4,
        "max_rounds": 1,
    },
}


ELSEWHERE = {"bnpo": ["decompose"]}  # needs several channels, and is tested in its own file
BINARY = ("bnpo", "disco", "drpo", "grpo_lambda", "unlikeliness")


def footprint(make, method, binary):
    """All that an option can move: requests of two rounds, rewards, advantages, weights, loss, gradient."""
    data = make.ragged(3, binary=binary)
    batch = data.batch().replace(lengths=jnp.asarray(data.lengths))
    batch = batch.replace(rewards=method.reward(batch, {}, None))
    batch, _ = method.advantage(batch, {}, None)

    def loss(logps):
        each, _ = method.objective(Decisions(logps=logps), batch, {})
        return jnp.sum(
            each if each.shape == () else jnp.where(batch.completion_mask, each, 0) * method.aggregate(batch)
        )

    new = data.old + 4 * (data.new - data.old) - 2 * binary  # far off, and for DisCO beyond its budget
    numbers = jax.jit(jax.value_and_grad(loss))(jnp.asarray(new, jnp.float32))
    columns = {"hint": "h", "clue": "c", "completion": "d"}
    ids = iter(range(1000))
    plan = method.plan(method.init(None), lambda state, n: [Prompt(next(ids), "?", columns) for _ in range(n)], None)
    asked, answer = [], None
    try:
        while True:
            ask = plan.send(answer)
            if isinstance(ask, list):
                asked.append(repr(ask))
                n = [r.prompt.id for r in ask for _ in range(r.count)]
                answer = make.rollout(n, group_ids=np.repeat(np.arange(len(ask)), [r.count for r in ask]))
            else:
                shares = np.array([[0.0, 0.0], [0.2, 0.2], [1.0, 1.0], [0.0, 1.0]])  # none, some, all; or by turns
                share = shares[ask.prompt_ids % 4, np.arange(len(ask)) % 2][:, None]
                answer = ask.replace(scores=share.astype(np.float32), channels=("exact",))
    except StopIteration:
        pass
    return jax.tree.map(np.asarray, (batch.rewards, batch.advantages, batch.weights, numbers)), asked


@pytest.mark.parametrize("name", OPTIONS)
def test_no_option_is_ignored(make, name):
    with pytest.raises(ValueError, match="has no option '?zzz") as error:
        resolve(name, zzz=1)
    known = str(error.value).split("Its options are ")[1]
    assert sorted({*OPTIONS[name], *ELSEWHERE.get(name, ())}) == eval(known)
    arrays, asked = footprint(make, resolve(name), name in BINARY)
    for option, value in OPTIONS[name].items():
        others, again = footprint(make, resolve(name, **{option: value}), name in BINARY)
        moved = any(not np.array_equal(a, b, equal_nan=True) for a, b in zip(*map(jax.tree.leaves, (arrays, others))))
        assert moved or asked != again, f"{option} of {name} changes nothing"
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(arrays[3]))


def test_an_aggregate_from_python():
    from grpo_jax.methods.dapo import dapo
    from grpo_jax.methods.mc_grpo import mc_grpo

    assert mc_grpo(prompts=2, group_size=4, aggregate=sequence_mean).aggregate is sequence_mean
    assert dapo(prompts=2, group_size=4, max_new=3, aggregate=sequence_mean).aggregate is sequence_mean


def test_mc_grpo_through_the_train_step(make):
    """The step's loss and gradient are those of a batch without the pivots, denominators included."""
    mesh, optimizer, method = (
        make_mesh(data=1, devices=jax.devices()[:1]),
        optax.sgd(1.0),
        resolve("mc_grpo", clip_high=0.3),
    )
    data = make.ragged(1)
    data.plain[:] = True
    batch, _ = method.advantage(data.batch(), {}, None)
    pivots = np.flatnonzero((np.asarray(batch.weights) == 0) & (data.weights != 0))
    assert len(pivots) >= 4
    params = {"logps": jnp.asarray(data.new, jnp.float32)}  # the policy says of row i what stands in row i

    def evaluate(params, rows):
        return Decisions(logps=params["logps"][jnp.maximum(rows.prompt_ids, 0)])

    step = jax.jit(partial(train_step, method, evaluate, optimizer, mesh, first=False))
    results = []
    for rows in (np.arange(len(batch)), np.setdiff1d(np.arange(len(batch)), pivots)):
        part = lay_out(np.zeros(len(batch), int), rows, Layout(2, 3, 1, 6), capacity=4)
        policy, metrics = step(begin(params, optimizer, mesh), batch, {}, part.order, part.count)
        results.append((np.asarray(policy.params["logps"]) - data.new, float(metrics["loss"])))
    (moved, loss), (expected, same) = results
    np.testing.assert_allclose(moved, expected, atol=1e-6)
    assert loss == pytest.approx(same, rel=1e-5) and np.abs(moved).max() > 1e-2
    assert np.abs(moved[pivots]).max() < 1e-6
