"""Fused log-probs: values against float64, gradients against the plain way, memory against the compiler's account."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from grpo_jax import losses
from grpo_jax.losses.logprobs import CHUNK_BYTES, _cut


def make(rows=(3,), length=7, features=6, vocabulary=11, seed=0, dtype=jnp.float32):
    draw = np.random.default_rng(seed)
    hidden = jnp.asarray(draw.normal(size=(*rows, length, features)), dtype)
    head = jnp.asarray(draw.normal(size=(features, vocabulary)), dtype)
    return hidden, head, jnp.asarray(draw.integers(0, vocabulary, (*rows, length)), jnp.int32)


def plain(xp, hidden, head, targets, temperature=1.0, softcap=None):
    """The definition with all logits at once, in numpy or JAX."""
    logits = hidden @ head
    if softcap is not None:
        logits = softcap * xp.tanh(logits / softcap)
    logits = logits / xp.broadcast_to(xp.asarray(temperature), targets.shape[:-1])[..., None, None]
    top = logits.max(-1, keepdims=True)
    everything = logits - top - xp.log(xp.exp(logits - top).sum(-1, keepdims=True))
    logps = xp.take_along_axis(everything, targets[..., None], axis=-1)[..., 0]
    return logps, -(xp.exp(everything) * everything).sum(-1)


OPTIONS = [
    {},
    {"temperature": 0.6},
    {"softcap": 2.0},
    {"temperature": np.array([0.5, 1.0, 1.7]), "softcap": 3.0},
]


@pytest.mark.parametrize("chunk", [None, 3, 1])
@pytest.mark.parametrize("options", OPTIONS)
def test_against_float64(options, chunk):
    arrays = make()
    logps, extra = jax.jit(lambda *a: losses.chunked_logps(*a, **options, entropy=True, chunk=chunk))(*arrays)
    hidden, head, targets = (np.asarray(x, np.float64 if x.dtype == jnp.float32 else int) for x in arrays)
    expected = plain(np, hidden, head, targets, **options)
    np.testing.assert_allclose(logps, expected[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(extra["entropy"], expected[1], rtol=1e-5, atol=1e-6)
    assert logps.dtype == extra["entropy"].dtype == jnp.float32


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("entropy", [False, True])
def test_gradients(options, chunk, entropy):
    hidden, head, targets = make()
    pulls = np.random.default_rng(1).normal(size=(2, 3, 7)).astype(np.float32)

    def ours(hidden, head):
        logps, extra = losses.chunked_logps(hidden, head, targets, **options, entropy=entropy, chunk=chunk)
        return jnp.sum(pulls[0] * logps) + (jnp.sum(pulls[1] * extra["entropy"]) if entropy else 0)

    def reference(hidden, head):
        logps, entropies = plain(jnp, hidden, head, targets, **options)
        return jnp.sum(pulls[0] * logps) + (jnp.sum(pulls[1] * entropies) if entropy else 0)

    got, expected = (jax.jit(jax.grad(f, (0, 1)))(hidden, head) for f in (ours, reference))
    for a, b in zip(got, expected):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk", [None, 4])
def test_gradient_against_float64_differences(chunk):
    arrays = make()
    hidden, head = (np.asarray(x, np.float64) for x in arrays[:2])
    targets = np.asarray(arrays[2])
    way = [np.random.default_rng(2).normal(size=x.shape) for x in (hidden, head)]

    def along(step):
        logps, entropies = plain(np, hidden + step * way[0], head + step * way[1], targets, 0.7, 4.0)
        return (logps**2).sum() + entropies.sum()

    def ours(hidden, head):
        logps, extra = losses.chunked_logps(
            hidden, head, targets, temperature=0.7, softcap=4.0, entropy=True, chunk=chunk
        )
        return (logps**2).sum() + extra["entropy"].sum()

    gradient = jax.jit(jax.grad(ours, (0, 1)))(*arrays[:2])
    slope = sum(float((g * w).sum()) for g, w in zip(gradient, way))
    assert slope == pytest.approx((along(1e-6) - along(-1e-6)) / 2e-6, rel=1e-4)


@pytest.mark.parametrize("rows", [(), (2, 3)])
def test_any_leading_axes(rows):
    hidden, head, targets = make(rows)
    temperature = jnp.full(rows, 0.8)

    def run(chunk):
        def total(hidden, head):
            logps, _ = losses.chunked_logps(hidden, head, targets, temperature=temperature, chunk=chunk)
            return logps.sum(), logps

        return jax.jit(jax.grad(total, (0, 1), has_aux=True))(hidden, head)

    (gradients, logps), (others, _) = run(2), run(None)
    np.testing.assert_allclose(
        logps, plain(np, *map(np.asarray, (hidden, head, targets)), 0.8)[0], rtol=1e-5, atol=1e-6
    )
    for a, b in zip(gradients, others):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk", [None, 3])
def test_half_precision(chunk):
    """bfloat16 in: the product of the rounded inputs in float32 precision; gradients come back in bfloat16."""
    hidden, head, targets = make((4,), 8, 32, 50, dtype=jnp.bfloat16)
    wide = hidden.astype(jnp.float32), head.astype(jnp.float32)

    def ours(hidden, head):
        logps, extra = losses.chunked_logps(hidden, head, targets, entropy=True, chunk=chunk)
        return logps.sum(), (logps, extra["entropy"])

    def reference(hidden, head):
        logps, entropies = plain(jnp, hidden, head, targets)
        return logps.sum(), (logps, entropies)

    got, values = jax.jit(jax.grad(ours, (0, 1), has_aux=True))(hidden, head)
    expected, expected_values = jax.jit(jax.grad(reference, (0, 1), has_aux=True))(*wide)
    np.testing.assert_allclose(values, expected_values, rtol=1e-4, atol=1e-4)
    for a, b in zip(got, expected):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=0.02 * float(jnp.abs(b).max()))


def test_head_gradient_adds_up_in_float32():
    """1,000 equal contributions of 1/8 (before the last, 125) would stop growing at 32 in a bfloat16 sum."""
    length = 1000
    hidden, head = jnp.full((length, 1), 0.25, jnp.bfloat16), jnp.zeros((1, 2), jnp.bfloat16)
    targets = jnp.zeros(length, jnp.int32)
    gradient = jax.grad(lambda w: losses.chunked_logps(hidden, w, targets, chunk=1)[0].sum())(head)
    np.testing.assert_allclose(gradient.astype(jnp.float32), [[125.0, -125.0]])


@pytest.mark.parametrize("chunk", [None, 3])
def test_positions_without_cotangent_may_hold_anything(chunk):
    hidden, head, targets = make()
    mask = np.random.default_rng(0).random(targets.shape) < 0.6
    garbage = jnp.where(mask[..., None], hidden, np.where(np.arange(6) % 2, np.nan, np.inf))

    def loss(hidden, head):
        logps, extra = losses.chunked_logps(hidden, head, targets, entropy=True, chunk=chunk)
        return jnp.sum(jnp.where(mask, logps + 0.1 * extra["entropy"], 0))

    run = jax.jit(jax.value_and_grad(loss, (0, 1)))
    clean, dirty = run(hidden, head), run(garbage, head)
    for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(dirty)):
        np.testing.assert_array_equal(a, b)


def largest(jaxpr):
    """Elements of the largest array that any equation makes, calls and loops included; and the primitives' names."""
    sizes, names = [0], set()
    for equation in jaxpr.eqns:
        names.add(equation.primitive.name)
        sizes += [int(np.prod(out.aval.shape)) for out in equation.outvars]
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    size, inside = largest(inner)
                    sizes.append(size)
                    names |= inside
    return max(sizes), names


def gradient_of(chunk=None, entropy=True):
    def loss(hidden, head, targets):
        logps, extra = losses.chunked_logps(hidden, head, targets, entropy=entropy, chunk=chunk)
        return logps.sum() + sum(jnp.sum(x) for x in extra.values())

    return jax.grad(loss, (0, 1))


def abstract(rows, length, features, vocabulary):
    return (
        jax.ShapeDtypeStruct((rows, length, features), jnp.float32),
        jax.ShapeDtypeStruct((features, vocabulary), jnp.float32),
        jax.ShapeDtypeStruct((rows, length), jnp.int32),
    )


def test_logits_of_the_batch_are_nowhere_in_the_program():
    shapes = abstract(8, 512, 64, 32_000)  # 500 MiB of logits
    size, names = largest(jax.make_jaxpr(gradient_of())(*shapes).jaxpr)
    assert "scan" in names
    assert size * 4 <= CHUNK_BYTES


def test_memory_does_not_grow_with_the_vocabulary_times_the_length():
    def scratch(length, vocabulary):
        compiled = jax.jit(gradient_of(chunk=64)).lower(*abstract(4, length, 16, vocabulary)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    everything = 4 * 512 * 8000 * 4
    assert scratch(512, 8000) < everything / 12  # the plain way holds all logits several times over
    assert scratch(512, 24_000) - scratch(512, 8000) < 3 * 16 * 16_000 * 4  # the gradient of the head


def test_small_problems_take_no_loop():
    _, names = largest(jax.make_jaxpr(gradient_of())(*abstract(64, 8, 16, 100)).jaxpr)
    assert not names & {"scan", "while"}


@pytest.mark.parametrize(
    ("features", "vocabulary", "decisions", "chunk"),
    [
        (1536, 151_936, 8192, None),
        (256, 32_000, 4096, None),
        (8192, 50_257, 10**6, None),
        (5, 11, 21, 3),
        (5, 48, 7, 20),
        (64, 400, 100, None),
    ],
)
def test_chunks_hold_every_token_once(features, vocabulary, decisions, chunk):
    cut = _cut(features, vocabulary, decisions, chunk)
    chunks = [(i * cut.size, cut.size) for i in range(cut.count)] + [(cut.count * cut.size, cut.rest)]
    seen = np.concatenate([np.asarray(cut.tokens(*at)).ravel() for at in chunks])
    assert sorted(seen.tolist()) == list(range(vocabulary))
    at_once = cut.ways * cut.size
    memory = max(CHUNK_BYTES, features * vocabulary * 4 // 8)
    assert at_once <= (chunk or max(512, memory // (4 * decisions)))
    assert vocabulary % 16 or cut.whole or cut.ways == 16  # runs that sixteen devices could divide


@pytest.mark.parametrize("chunk", [None, 3])
def test_sharded_rows(chunk):
    """Under jit with shardings and under shard_map, gradient taken outside and inside, on 8 devices."""
    arrays = make((8,))

    def loss(hidden, head, targets):
        again = hidden[..., ::-1], head[::-1] + 1
        logps, extra = losses.chunked_logps(hidden, head, targets, entropy=True, reference=again, chunk=chunk)
        return (logps**2).sum() + extra["entropy"].sum() + (extra["kl"] ** 2).sum()

    expected = jax.jit(jax.value_and_grad(loss, (0, 1)))(*arrays)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = PartitionSpec("data"), PartitionSpec()
    placed = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(arrays, (rows, whole, rows))]
    outside = jax.shard_map(
        lambda *a: jax.lax.psum(loss(*a), "data"), mesh=mesh, in_specs=(rows, whole, rows), out_specs=whole
    )

    def inside(*a):
        value, gradients = jax.value_and_grad(loss, (0, 1))(*a)
        return jax.lax.psum(value, "data"), gradients

    inside = jax.shard_map(inside, mesh=mesh, in_specs=(rows, whole, rows), out_specs=(whole, (rows, whole)))
    for function in (jax.value_and_grad(loss, (0, 1)), jax.value_and_grad(outside, (0, 1)), inside):
        for a, b in zip(jax.tree.leaves(jax.jit(function)(*placed)), jax.tree.leaves(expected)):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_a_near_certain_decision_keeps_its_digits():
    """Logits of hundreds and a log-prob of -1e-5: subtracting the normaliser from the logit would leave nothing."""
    head = jnp.array([[400.0, 388.5, 0.0]])
    logps, extra = losses.chunked_logps(jnp.ones((1, 1)), head, jnp.zeros(1, jnp.int32), entropy=True)
    expected, entropies = plain(np, np.ones((1, 1)), np.array([[400.0, 388.5, 0.0]]), np.zeros(1, int))
    np.testing.assert_allclose(logps, expected, rtol=1e-2)
    np.testing.assert_allclose(extra["entropy"], entropies, rtol=1e-2)


@pytest.mark.parametrize("spec", [PartitionSpec(), PartitionSpec(None, "tensor")])
def test_sharded_rows_and_vocabulary_stay_where_they_are(spec):
    """The compiler finds no reason to gather hidden states or logits: only sums and maxima cross devices."""
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    specs = (PartitionSpec("data"), spec, PartitionSpec("data"))
    placed = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, s))
        for x, s in zip(abstract(8, 32, 16, 512), specs)
    ]
    out = tuple(NamedSharding(mesh, s) for s in specs[:2])
    program = jax.jit(gradient_of(chunk=8), out_shardings=out).lower(*placed).compile().as_text()
    assert "all-reduce(" in program
    assert "all-gather(" not in program
    assert "all-to-all(" not in program


def test_vmap():
    hidden, head, targets = make((2, 3))
    together = jax.vmap(lambda h, t: losses.chunked_logps(h, head, t, chunk=3)[0])(hidden, targets)
    np.testing.assert_allclose(together, losses.chunked_logps(hidden, head, targets)[0], rtol=1e-5, atol=1e-6)


def test_padding_the_vocabulary_away_or_the_length_does_not_matter():
    hidden, head, targets = make()
    base = losses.chunked_logps(hidden, head, targets, chunk=2)[0]
    longer = losses.chunked_logps(jnp.pad(hidden, ((0, 2), (0, 3), (0, 0))), head, jnp.pad(targets, ((0, 2), (0, 3))))[
        0
    ]
    np.testing.assert_allclose(longer[:3, :7], base, rtol=1e-5, atol=1e-6)


def kl_plain(xp, hidden, head, there, far, temperature=1.0, softcap=None):
    """sum_v p_v (log p_v - log q_v) with all logits at once."""

    def log_softmax(hidden, head):
        logits = hidden @ head
        if softcap is not None:
            logits = softcap * xp.tanh(logits / softcap)
        logits = logits / xp.broadcast_to(xp.asarray(temperature), hidden.shape[:-2])[..., None, None]
        return (
            logits
            - logits.max(-1, keepdims=True)
            - xp.log(xp.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        )

    p, q = log_softmax(hidden, head), log_softmax(there, far)
    return (xp.exp(p) * (p - q)).sum(-1)


def second(rows=(3,), length=7, features=5, vocabulary=11):
    hidden, head, _ = make(rows, length, features, vocabulary, seed=5)
    return hidden, head


@pytest.mark.parametrize("chunk", [None, 3, 1])
@pytest.mark.parametrize("options", OPTIONS)
def test_kl_to_a_second_head(options, chunk):
    """Value against float64; gradients, together with those of log-probs and entropy, against the plain way."""
    (hidden, head, targets), reference = make(), second()
    wide = [np.asarray(x, np.float64) for x in (hidden, head, *reference)]
    expected = kl_plain(np, *wide, **options)
    pulls = np.random.default_rng(1).normal(size=(3, 3, 7)).astype(np.float32)

    def ours(hidden, head, *reference):
        logps, more = losses.chunked_logps(
            hidden, head, targets, reference=reference, entropy=True, chunk=chunk, **options
        )
        return jnp.sum(pulls[0] * logps + pulls[1] * more["entropy"] + pulls[2] * more["kl"]), more["kl"]

    def other(hidden, head):
        logps, entropies = plain(jnp, hidden, head, targets, **options)
        return jnp.sum(
            pulls[0] * logps + pulls[1] * entropies + pulls[2] * kl_plain(jnp, hidden, head, *reference, **options)
        )

    got, kl = jax.jit(jax.grad(ours, (0, 1, 2, 3), has_aux=True))(hidden, head, *reference)
    np.testing.assert_allclose(kl, expected, rtol=1e-5, atol=1e-6)
    for a, b in zip(got, jax.jit(jax.grad(other, (0, 1)))(hidden, head)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert not any(g.any() for g in got[2:]), "the reference is no variable of the loss"
    alone = losses.chunked_logps(hidden, head, targets, reference=reference, chunk=chunk, **options)[1]
    np.testing.assert_array_equal(alone["kl"].shape, targets.shape)
    np.testing.assert_allclose(alone["kl"], kl, rtol=1e-6, atol=1e-6)


def test_kl_to_itself_is_nothing_and_has_no_slope():
    hidden, head, targets = make()

    def kl(hidden):
        return losses.chunked_logps(hidden, head, targets, reference=(make()[0], head), chunk=2)[1]["kl"].sum()

    value, slope = jax.value_and_grad(kl)(hidden)
    assert value == 0 and np.abs(slope).max() < 1e-6


def test_garbage_in_a_reference_that_does_not_count():
    (hidden, head, targets), (there, far) = make(), second()
    mask = np.random.default_rng(0).random(targets.shape) < 0.6

    def loss(hidden, head, there):
        more = losses.chunked_logps(hidden, head, targets, reference=(there, far), chunk=3)[1]
        return jnp.sum(jnp.where(mask, more["kl"], 0))

    run = jax.jit(jax.value_and_grad(loss, (0, 1)))
    for a, b in zip(
        jax.tree.leaves(run(hidden, head, there)),
        jax.tree.leaves(run(hidden, head, jnp.where(mask[..., None], there, jnp.nan))),
    ):
        np.testing.assert_array_equal(a, b)


def test_errors_say_what_was_given():
    hidden, head, targets = make()
    with pytest.raises(ValueError, match=r"\[3, 7, 6\], \[11, 6\] and \[3, 7\]"):
        losses.chunked_logps(hidden, head.T, targets)
    with pytest.raises(
        ValueError, match=r"reference is .* \[3, 7, 'F'\] and \['F', 11\]; got \[3, 7, 5\] and \[5, 12\]"
    ):
        losses.chunked_logps(hidden, head, targets, reference=second(vocabulary=12))
    with pytest.raises(ValueError, match="softcap .* got 0"):
        losses.chunked_logps(hidden, head, targets, softcap=0.0)
    with pytest.raises(ValueError, match="chunk .* got 0"):
        losses.chunked_logps(hidden, head, targets, chunk=0)
    with pytest.raises(ValueError, match=r"temperature .* \[7\]"):
        losses.chunked_logps(hidden, head, targets, temperature=jnp.ones(7))
