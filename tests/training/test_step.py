"""The train step: whatever the cut, the mesh, the padding and the order, the loss, the gradient and the parameters."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax import losses, methods, models
from grpo_jax.methods import grpo as plain
from grpo_jax.training.deal import Layout, lay_out
from grpo_jax.training.mesh import make_mesh, replicate, shards
from grpo_jax.training.step import Policy, begin, evaluate_all, train_step, with_old
from grpo_jax.types import Batch, Contexts

ONE = make_mesh(data=1, devices=jax.devices()[:1])
RATE = 0.5
SGD = optax.sgd(RATE)
FORMS = {  # a loss per decision with every term, and a scalar that sees whole groups
    "per decision": plain.grpo(prompts=6, group_size=4, kl=0.1),
    "scalar": methods.resolve("disco", options={"tau": 0.3}, settings={"prompts": 6, "group_size": 4}),
}
LAYOUTS = {
    "one micro-batch": (12, 4, 1),
    "two": (3, 4, 1),
    "four, groups cut": (3, 2, 1),
    "more room than rows": (4, 3, 8),
}


PROGRAMS = {}  # compiled once for all tests; the objects that a key names stay alive in it


@pytest.fixture(autouse=True)
def quick_to_compile(request):
    """Without most optimizations, unless a test asks for them: what is exact must stay so."""
    optimized = "optimized" in request.fixturenames
    jax.config.update("jax_disable_most_optimizations", not optimized)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def optimized():
    PROGRAMS.clear()


@pytest.fixture(params=FORMS)
def method(request):
    return FORMS[request.param]


@cache
def published(name, **options):
    return methods.resolve(name, options=options, settings={"prompts": 6, "group_size": 4, "max_new": 6})


def program(make, *parts):
    key = (make.__name__, *map(id, parts))
    if key not in PROGRAMS:
        PROGRAMS[key] = jax.jit(make(*parts)), parts
    return PROGRAMS[key][0]


def cells(batch, layout, rows=None):
    contexts, width, capacity = layout
    rows = np.arange(len(batch)) if rows is None else np.asarray(rows, int)
    shape = Layout(contexts, width, 1, batch.completions.shape[1])
    return lay_out(np.asarray(batch.trained_under), rows, shape, capacity=capacity)


def run(method, toy, batch, layout=(12, 4, 1), *, rows=None, first=True, optimizer=SGD, policy=None):
    """One train step; the policy before is untouched."""
    policy = begin(toy.parameters(), optimizer, ONE) if policy is None else policy
    part = cells(batch, layout, rows)
    return program(one_step, method, toy.evaluate, optimizer, first)(policy, batch, part.order, np.int32(part.count))


def one_step(method, evaluate, optimizer, first):
    step = partial(train_step, method, partial(evaluate, wants=method.wants), optimizer, ONE, first=first)
    return lambda policy, batch, order, count: step(policy, batch, None, order, count)


def whole(method, toy, batch, params, first=True):
    """Loss and gradient of the batch in one piece, every row with a context of its own; nothing of the step's code."""
    tokens = batch.contexts.tokens[batch.trained_under]
    rows = batch.replace(contexts=Contexts(tokens=tokens, lengths=jnp.ones(len(batch), jnp.int32)))
    return program(plain_gradient, method, toy.evaluate, first)(params, rows)


def plain_gradient(method, evaluate, first):
    def objective(params, rows):
        new = evaluate(params, rows)
        same = (rows.sampled_under == rows.trained_under)[:, None] & first
        old = jnp.where(same, jax.lax.stop_gradient(new.logps), rows.old.logps)
        loss, _ = method.objective(new, rows.replace(old=rows.old.replace(logps=old)), None)
        return loss if loss.shape == () else losses.weighted_sum(loss, method.aggregate(rows))

    return jax.value_and_grad(objective)


def same(got, expected, rtol=2e-5, atol=2e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), got, expected)


def identical(got, expected):
    jax.tree.map(np.testing.assert_array_equal, got, expected)


# ---- one answer, however it is computed ------------------------------------------------------------------


@pytest.mark.parametrize(("layout", "first"), [(name, True) for name in LAYOUTS] + [("four, groups cut", False)])
def test_micro_batches_do_not_matter(method, toy, layout, first):
    """Loss, gradient norm and parameters equal those of the plain computation on the whole batch."""
    batch = toy.batch(toy.rollout(hinted=(1, 4)))
    params = toy.parameters()
    loss, gradient = whole(method, toy, batch, params, first)
    policy, metrics = run(method, toy, batch, LAYOUTS[layout], first=first)
    assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-5, abs=1e-6)
    assert float(metrics["grad_norm"]) == pytest.approx(float(optax.global_norm(gradient)), rel=1e-5)
    assert float(metrics["grad_norm"]) > 1e-2
    same(policy.params, jax.tree.map(lambda p, g: p - RATE * g, params, gradient))


def test_a_mini_batch_is_smaller_than_the_batch(method, toy):
    """Its group ids may be beyond its own number of rows; the result is that of its rows alone."""
    batch = toy.batch(toy.rollout())
    batch = batch.replace(group_ids=len(batch) - 1 - batch.group_ids)
    rows = np.flatnonzero(np.isin(np.asarray(batch.group_ids), [20, 19, 18]))
    assert batch.group_ids[rows].min() > 12
    alone = jax.tree.map(lambda x: x[rows], batch.replace(contexts=None)).replace(contexts=batch.contexts)
    alone = alone.replace(group_ids=20 - alone.group_ids)
    loss, gradient = whole(method, toy, alone, toy.parameters())
    for layout in ((3, 4, 1), (3, 2, 1)):
        policy, metrics = run(method, toy, batch, layout, rows=rows)
        assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-5, abs=1e-6)
        same(policy.params, jax.tree.map(lambda p, g: p - RATE * g, toy.parameters(), gradient))


def test_naive_splitting_of_a_scalar_is_wrong(toy):
    """What the two passes are for: the mean of the gradients of halves points elsewhere when groups are cut."""
    method, batch, params = FORMS["scalar"], toy.batch(toy.rollout()), toy.parameters()
    halves = [np.arange(len(batch))[i::2] for i in range(2)]
    parts = [jax.tree.map(lambda x, h=h: x[h], batch.replace(contexts=None)) for h in halves]
    gradients = [whole(method, toy, p.replace(contexts=batch.contexts), params)[1] for p in parts]
    naive = jnp.concatenate([((a + b) / 2).ravel() for a, b in zip(*map(jax.tree.leaves, gradients))])
    true = jnp.concatenate([g.ravel() for g in jax.tree.leaves(whole(method, toy, batch, params)[1])])
    assert float(jnp.linalg.norm(naive - true) / jnp.linalg.norm(true)) > 0.2


def test_padding_and_row_order_do_not_matter(method, toy, first=False):
    batch = toy.batch(toy.rollout(hinted=(2,)))
    policy, metrics = run(method, toy, batch, (3, 2, 1), first=first)
    n, t = batch.completions.shape
    order = np.random.default_rng(0).permutation(n)
    shuffled = jax.tree.map(lambda x: x[order], batch.replace(contexts=None)).replace(contexts=batch.contexts)
    garbage = {"bool": False, "int32": 3, "float32": np.nan}
    wider = {
        name: jnp.pad(x, ((0, 0), (0, 4)), constant_values=garbage[str(x.dtype)])
        for name, x in batch.replace(contexts=None).__dict__.items()
        if hasattr(x, "shape") and x.shape == (n, t)
    }
    old, ref = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 4)), constant_values=jnp.nan), (batch.old, batch.ref))
    wider = batch.replace(**wider, old=old, ref=ref)
    for other in (shuffled, wider):
        moved, numbers = run(method, toy, other, (3, 2, 1), first=first)
        same(moved.params, policy.params)
        same({k: numbers[k] for k in ("loss", "grad_norm")}, {k: metrics[k] for k in ("loss", "grad_norm")})
    after = jax.tree.map(lambda x: jnp.concatenate([x, x[:3]]), batch.replace(contexts=None))
    after = after.replace(contexts=batch.contexts, prompt_ids=after.prompt_ids.at[n:].set(-1))
    moved, _ = run(method, toy, after, (5, 2, 1), rows=np.arange(n), first=first)
    same(moved.params, policy.params)


MESHES = [
    {"data": 8},
    {"data": 2, "fsdp": 4},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"dcn_data": 2, "fsdp": 4},
    {"fsdp": 2, "sequence": 2, "tensor": 2},
]


@pytest.fixture(scope="module")
def transformer():
    config = models.TransformerConfig(
        family="qwen3",
        vocab_size=16,
        hidden_size=16,
        intermediate_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        query_key_norm=True,
        qkv_bias=False,
        initializer_range=0.3,
        max_length=64,
        eos_token_ids=(0,),
        pad_token_id=0,
    )
    return (config, *models.create(config, jax.random.key(0)))


def transformer_step(transformer, toy, method, mesh, layout):
    """Old log-probs of all rows and one Adam step; what comes back is on the host."""
    config, graphdef, params = transformer
    batch = toy.batch(toy.rollout(3, sizes=(4,) * 8, decisions=6))
    contexts = np.random.default_rng(1).integers(1, 16, (16, 3)).astype(np.int32)
    lengths = np.random.default_rng(2).integers(1, 4, 16).astype(np.int32)
    batch = replicate(batch.replace(contexts=Contexts(tokens=contexts, lengths=lengths)), mesh)
    params = jax.device_put(params, models.shardings(models.logical_axes(config), mesh))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2, eps=1e-3))
    evaluate = partial(models.evaluate, graphdef, wants=method.wants)
    part = cells(batch, layout)

    @jax.jit
    def both(policy, batch, order, count):
        old = evaluate_all(evaluate, policy.params, batch, batch.trained_under, order, count, mesh)
        return old, *train_step(method, evaluate, optimizer, mesh, policy, batch, None, order, count, first=True)

    assert layout[0] % shards(mesh) == 0
    policy = begin(params, optimizer, mesh)
    return jax.device_get(both(policy, batch, part.order, np.int32(part.count)))


@pytest.mark.parametrize(("form", "meshes"), [("per decision", MESHES), ("scalar", MESHES[2:3])])
def test_meshes_do_not_matter(transformer, toy, form, meshes):
    """One device, and eight in several shapes, with other micro-batches: round-off apart, the same."""
    method = FORMS[form]
    old, policy, metrics = transformer_step(transformer, toy, method, ONE, (8, 4, 1))
    moved = optax.global_norm(jax.tree.map(jnp.subtract, policy.params, transformer[2]))
    assert float(moved) > 0.05
    for sizes in meshes:
        layout = (8, 2, 1) if "fsdp" not in sizes else (4, 4, 1) if "tensor" in sizes else (8, 4, 1)
        others, after, numbers = transformer_step(transformer, toy, method, make_mesh(**sizes), layout)
        np.testing.assert_allclose(others.logps, old.logps, atol=3e-6, err_msg=str(sizes))
        for name in ("loss", "grad_norm", "entropy"):
            assert float(numbers[name]) == pytest.approx(float(metrics[name]), rel=2e-5, abs=2e-6)
        same(after.params, policy.params, rtol=1e-4, atol=2e-5)


def test_evaluate_all_keeps_the_order_of_the_batch(toy):
    """Every row under the context that is asked for, whatever the cells; rows in no cell are 0."""
    rows = toy.rollout(hinted=(0, 3))
    batch = toy.batch(rows)
    for which in ("sampled_under", "trained_under"):
        under = np.asarray(getattr(rows, which))
        some = np.arange(len(rows))[::-1][:-2]
        part = lay_out(under, some, Layout(2, 3, 1, 6), capacity=8)
        got = evaluate_all(
            toy.evaluate, toy.parameters(), batch, jnp.asarray(under), jnp.asarray(part.order), part.count, ONE
        )
        for i in range(len(rows)):
            tokens = rows.completions[i, : rows.lengths[i]]
            expected = toy.table_logps(toy.parameters(), rows.contexts.tokens[under[i], 0], tokens, rows.temperature[i])
            expected = expected if i in some else np.zeros(len(tokens))
            np.testing.assert_allclose(got.logps[i, : len(tokens)], expected, atol=2e-6)


# ---- weights ---------------------------------------------------------------------------------------------

DECAYING = optax.adamw(0.1, weight_decay=0.3)


def test_an_update_in_which_nothing_weighs_changes_nothing(method, toy):
    """Weight decay and momentum would still move; neither does, nor does the optimiser's count."""
    batch = toy.batch(toy.rollout())
    policy, metrics = run(method, toy, batch, optimizer=DECAYING)
    assert float(metrics["applied"]) == 1.0
    for silent in (
        batch.replace(weights=jnp.zeros(len(batch))),
        batch.replace(completion_mask=jnp.zeros_like(batch.completion_mask)),
    ):
        after, metrics = run(method, toy, silent, optimizer=DECAYING, policy=policy)
        identical(after, policy)
        assert float(metrics["applied"]) == 0.0
    after, metrics = run(method, toy, batch, rows=[], optimizer=DECAYING, policy=policy)
    identical(after, policy)


def test_a_gradient_that_is_not_finite_is_not_applied(toy):
    batch = toy.batch(toy.rollout())
    batch = batch.replace(
        advantages=batch.advantages.at[0, 0].set(jnp.inf), completion_mask=batch.completion_mask.at[0, 0].set(True)
    )
    policy = begin(toy.parameters(), DECAYING, ONE)
    broken = FORMS["per decision"].replace(objective=lambda new, rows, arrays: (-rows.advantages * new.logps, {}))
    after, metrics = run(broken, toy, batch, optimizer=DECAYING, policy=policy)
    identical(after, policy)
    assert float(metrics["applied"]) == 0.0 and not np.isfinite(metrics["grad_norm"])


def test_rows_of_weight_zero_leave_no_trace(method, toy):
    """Not in the loss, nor in its denominators, nor in groups, whatever they hold."""
    batch = toy.batch(toy.rollout())
    out = np.array([0, 4, 5, 6, 9])
    kept = np.setdiff1d(np.arange(len(batch)), out)
    for layout in ((12, 4, 1), (3, 2, 1)):
        without, numbers = run(method, toy, batch, layout, rows=kept)
        silent = batch.replace(
            weights=batch.weights.at[out].set(0.0),
            advantages=batch.advantages.at[out].set(jnp.nan),
            rewards=batch.rewards.at[out].set(jnp.nan),
            old=batch.old.replace(logps=batch.old.logps.at[out].set(jnp.nan)),
        )
        after, metrics = run(method, toy, silent, layout)
        same(after.params, without.params, atol=1e-6)
        same({k: metrics[k] for k in numbers}, numbers, atol=1e-6)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "gspo", "rloo", "guide_grpo", "disco"])
def test_weight_c_is_c_rows(toy, name):
    method, batch = published(name), toy.batch(toy.rollout())
    n, copies = len(batch), np.concatenate([np.arange(len(batch)), [1, 8, 8, 12]])
    copied = jax.tree.map(lambda x: x[copies], batch.replace(contexts=None)).replace(contexts=batch.contexts)
    weighted = copied.replace(weights=copied.weights.at[np.array([1, 12])].mul(2).at[8].mul(3))
    expected, numbers = run(method, toy, copied, first=False)
    got, metrics = run(method, toy, weighted, rows=np.arange(n), first=False)
    same(got.params, expected.params)
    assert float(metrics["loss"]) == pytest.approx(float(numbers["loss"]), rel=1e-5)
    assert float(numbers["grad_norm"]) > 1e-4


# ---- what must not be seen -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["grpo", "mc_grpo", "gspo", "rloo", "guide_grpo", "disco"])
def test_garbage_under_the_mask_does_not_reach_the_gradient(toy, name):
    method = published(name, **({"kl": 0.1} if name in ("grpo", "mc_grpo", "gspo", "rloo") else {}))
    clean = toy.batch(toy.rollout(hinted=(1,)))
    fill = lambda x: jnp.where(clean.completion_mask, x, jnp.nan)  # noqa: E731
    dirty = clean.replace(
        behavior_logps=fill(clean.behavior_logps),
        sampler_logps=fill(clean.sampler_logps),
        advantages=fill(clean.advantages),
        old=clean.old.replace(logps=fill(clean.old.logps)),
        ref=clean.ref.replace(logps=fill(clean.ref.logps)),
        columns={"level": jnp.full(len(clean), jnp.nan)},
    )
    expected, _ = run(method, toy, clean, (3, 2, 1), first=False)
    got, metrics = run(method, toy, dirty, (3, 2, 1), first=False)
    identical(got.params, expected.params)
    assert float(metrics["applied"]) == 1.0


def test_garbage_does_no_harm_to_an_objective_that_does_not_guard_itself(toy):
    """A naive ratio loss: no gradient flows through decisions that are not trained."""
    naive = FORMS["per decision"].replace(
        objective=lambda new, rows, arrays: (-rows.advantages * jnp.exp(new.logps - rows.old.logps), {})
    )
    clean = toy.batch(toy.rollout())
    fill = lambda x: jnp.where(clean.completion_mask, x, jnp.nan)  # noqa: E731
    dirty = clean.replace(advantages=fill(clean.advantages), old=clean.old.replace(logps=fill(clean.old.logps)))
    for first in (True, False):
        identical(run(naive, toy, dirty, first=first)[0].params, run(naive, toy, clean, first=first)[0].params)


def test_metrics_are_means_over_trained_decisions(toy):
    rows = toy.rollout(hinted=(2,))
    batch = toy.batch(rows)
    marks = jnp.asarray(np.random.default_rng(0).normal(size=rows.completions.shape), jnp.float32)
    method = FORMS["per decision"]

    def objective(new, rows, arrays):
        return new.logps, {"mark": rows.columns["mark"], "ratio": jnp.exp(rows.columns["mark"])}

    batch, method = batch.replace(columns={"mark": marks}), method.replace(objective=objective)
    for layout in ((12, 4, 1), (3, 2, 1)):
        _, metrics = run(method, toy, batch, layout)
        trained = rows.completion_mask & (rows.weights > 0)[:, None]
        assert float(metrics["mark"]) == pytest.approx(np.asarray(marks)[trained].mean(), abs=1e-6)
        low, high = np.quantile(np.exp(np.asarray(marks, np.float64))[trained], [0.01, 0.99])
        np.testing.assert_allclose([metrics["ratio_p01"], metrics["ratio_p99"]], [low, high], rtol=1e-5)
        drawn = trained & (rows.sampled_under == rows.trained_under)[:, None]
        gaps, divergences, entropies = [], [], []
        for i in range(len(rows)):
            tokens, context = rows.completions[i, : rows.lengths[i]], rows.contexts.tokens[rows.trained_under[i], 0]
            temperature = rows.temperature[i]
            logps = toy.table_logps(toy.parameters(), context, tokens, temperature)
            gaps += list(np.abs(logps + 1)[drawn[i, : len(tokens)]])
            divergences += list((np.exp(logps + 1) - 1 - (logps + 1))[drawn[i, : len(tokens)]])
            for t in np.flatnonzero(trained[i]):
                every = [
                    toy.table_logps(toy.parameters(), context, np.append(tokens[:t], v).astype(int), temperature)[-1]
                    for v in range(toy.vocabulary)
                ]
                entropies.append(-np.sum(np.exp(every) * every))
        assert float(metrics["gap_max"]) == pytest.approx(max(gaps), rel=1e-5)
        assert float(metrics["gap_mean"]) == pytest.approx(np.mean(gaps), rel=1e-5)
        assert float(metrics["gap_kl"]) == pytest.approx(np.mean(divergences), rel=1e-4)
        assert float(metrics["entropy"]) == pytest.approx(np.mean(entropies), rel=1e-5)


def test_shapes_that_an_objective_may_not_return(toy):
    batch = toy.batch(toy.rollout())
    base = FORMS["per decision"]
    with pytest.raises(ValueError, match=r"a scalar or one loss per decision \(48, 6\), got shape \(48,\)"):
        run(base.replace(objective=lambda new, rows, arrays: (new.logps.sum(1), {})), toy, batch)
    with pytest.raises(ValueError, match=r"reports one value per decision \(48, 6\), got {'length': \(48,\)}"):
        run(base.replace(objective=lambda new, rows, arrays: (new.logps, {"length": rows.lengths})), toy, batch)


def test_the_optimizer_lies_where_the_parameters_do():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp", "tensor"))
    policy = begin({"w": jax.device_put(jnp.zeros((4, 4)), place)}, optax.adam(1e-3), mesh)
    moments = policy.optimizer[0]
    assert moments.mu["w"].sharding == place and moments.nu["w"].sharding == place
    assert moments.count.sharding.is_fully_replicated


def test_mesh_sizes():
    others = {"dcn_data": 1, "expert": 1, "sequence": 1, "tensor": 1}
    assert dict(make_mesh(fsdp=4).shape) == {"data": 2, "fsdp": 4, **others}
    assert dict(make_mesh(sequence=4, dcn_data=2).shape) == {
        "data": 1,
        "fsdp": 1,
        **others,
        "dcn_data": 2,
        "sequence": 4,
    }
    assert shards(make_mesh(data=2, fsdp=2, tensor=2)) == 4
    assert shards(make_mesh(dcn_data=2, expert=2, sequence=2)) == 4
    for sizes, said in (
        ({"fsdp": 3}, "a multiple of 3 devices, there are 8"),
        ({"data": 2, "fsdp": 2}, "needs 4 devices, there are 8"),
        ({"data": -1, "fsdp": -1}, "at most one is -1"),
        ({"data": 0}, "positive"),
    ):
        with pytest.raises(ValueError, match=said):
            make_mesh(**sizes)


def test_a_batch_is_a_policy_free_thing(toy):
    """Parameters may be any pytree: nothing in the step looks into them."""
    batch = toy.batch(toy.rollout())
    nested = Policy({"a": toy.parameters(), "unused": (jnp.ones(2),)})
    nested = begin(nested.params, SGD, ONE)
    method = FORMS["per decision"]
    part = cells(batch, (12, 4, 1))

    @jax.jit
    def step(policy, batch):
        evaluate = lambda p, rows: toy.evaluate(p["a"], rows, wants=("entropy",))  # noqa: E731
        return train_step(method, evaluate, SGD, ONE, policy, batch, None, part.order, 1, first=True)

    after, _ = step(nested, batch)
    expected, _ = run(method, toy, batch)
    same(after.params["a"], expected.params)
    identical(after.params["unused"], nested.params["unused"])
    assert isinstance(batch, Batch)


# ---- promise 1: on policy means ratio 1 ------------------------------------------------------------------


def reporting_ratio():
    """GRPO that reports, per decision, whether the ratio is exactly 1 and its logarithm's distance from a column."""

    def objective(new, batch, arrays):
        ratio = losses.token_ratio(new.logps, batch.old.logps)
        loss, _ = plain.clipped(ratio, new, batch, clip_low=0.2, clip_high=0.2)
        plain_row = (batch.sampled_under == batch.trained_under)[:, None]
        expected = new.logps - batch.columns["old"]
        return loss, {
            "ratio": ratio,
            "one_where_plain": jnp.where(plain_row, ratio == 1, 1.0),
            "off": jnp.abs(jnp.log(ratio) - jnp.where(plain_row & batch.columns["first"][:, None], 0, expected)),
        }

    return plain.grpo(prompts=6, group_size=4).replace(objective=objective)


@pytest.mark.parametrize("layout", ["one micro-batch", "four, groups cut"])
def test_first_update_has_ratio_exactly_one(toy, layout, optimized):
    """Though `old` holds other numbers: only rows sampled under another context, and later updates, take those."""
    batch, method = toy.batch(toy.rollout(hinted=(1, 5))), reporting_ratio()
    for first in (True, False):
        columns = {"old": batch.old.logps, "first": jnp.full(len(batch), first)}
        _, metrics = run(method, toy, batch.replace(columns=columns), LAYOUTS[layout], first=first)
        assert (float(metrics["one_where_plain"]) == 1.0) == first
        assert float(metrics["off"]) < 1e-6
        assert float(metrics["ratio_max"]) != 1.0
    for old in (batch.old, None):
        pure = toy.batch(toy.rollout()).replace(old=old)
        _, metrics = run(FORMS["per decision"], toy, pure, LAYOUTS[layout])
        assert [float(metrics[k]) for k in ("ratio_p01", "ratio_p99", "ratio_max")] == [1.0, 1.0, 1.0]


def test_old_of_a_first_update_has_no_gradient(toy):
    batch = toy.batch(toy.rollout())
    tokens = batch.contexts.tokens[batch.trained_under]
    rows = batch.replace(contexts=Contexts(tokens=tokens, lengths=batch.lengths))
    gradient = jax.grad(lambda p: with_old(rows, toy.evaluate(p, rows, wants=("entropy",)), True).old.logps.sum())
    assert not any(np.asarray(g).any() for g in jax.tree.leaves(gradient(toy.parameters())))
