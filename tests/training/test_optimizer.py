"""The optimizer: against a float64 transcription, schedules, what decays, what is float32."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax.training.optimizer import decayed, learning_rate, optimizer
from grpo_jax.training.sections import OPTIMIZER_KEYS, OptimizerSection


def parameters(seed=0, dtype=jnp.float32):
    """Names and shapes of a transformer with two stacked layers, four heads of two."""
    shapes = {
        "embedding": (12, 8),
        "final_norm": (8,),
        "head": (8, 12),
        "layers": {
            "attention": {
                "query": (2, 8, 4, 2),
                "query_bias": (2, 4, 2),
                "query_norm": (2, 2),
                "output": (2, 4, 2, 8),
                "output_bias": (2, 8),
            },
            "mlp": {"gate": (2, 8, 16), "down": (2, 16, 8), "down_bias": (2, 8)},
            "attention_norm": (2, 8),
            "sinks": (2, 4),
        },
    }
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(random.normal(size=shape), dtype), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )


def few(seed=0, dtype=jnp.float32):
    """A matrix and a vector per layer: compiles quickly."""
    layers = parameters(seed, dtype)["layers"]
    return {"layers": {"up": layers["mlp"]["gate"], "up_norm": layers["attention_norm"]}}


def section(name="adamw", **options):
    return OptimizerSection(name=name, **{"learning_rate": 1e-2, "clip_norm": None} | options)


def run(section, params, gradients, steps=50):
    transformation, _ = optimizer(section, steps)
    update = jax.jit(transformation.update)
    state = transformation.init(params)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


# ---------------------------------------------------------------------------------------------------------------------
# Schedules


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("rise", [0, 1, 2, 5])
@pytest.mark.parametrize("final", [0.0, 0.25])
def test_learning_rate_of_every_update(schedule, rise, final):
    steps, peak = 17, 3e-4
    rate = learning_rate(section(learning_rate=peak, schedule=schedule, warmup_steps=rise, final_fraction=final), steps)
    for t in range(steps + 1):
        share = (t - rise) / (steps - rise)
        after = {
            "constant": 1.0,
            "linear": 1 - (1 - final) * share,
            "cosine": final + (1 - final) * 0.5 * (1 + np.cos(np.pi * share)),
        }[schedule]
        expected = peak * ((t + 1) / rise if t < rise else after)
        assert float(rate(t)) == pytest.approx(expected, rel=1e-5, abs=1e-12), t


def test_the_optimizer_follows_its_schedule():
    """Plain gradient descent with a gradient of one moves by the learning rate."""
    chosen = section("sgd", schedule="linear", warmup_steps=3, final_fraction=0.5)
    _, rate = optimizer(chosen, 8)
    moved, _ = run(chosen, {"w": jnp.zeros(1)}, [{"w": jnp.ones(1)}] * 8, steps=8)
    assert float(moved["w"][0]) == pytest.approx(-sum(float(rate(t)) for t in range(8)), rel=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Updates


def adam_transcription(params, gradients, *, rate, b1, b2, epsilon, decay, clip):
    params = [np.asarray(p, np.float64) for p in params]
    decays = [p.ndim >= 2 for p in params]
    m, v = [np.zeros_like(p) for p in params], [np.zeros_like(p) for p in params]
    for t, gradient in enumerate(gradients, start=1):
        gradient = [np.asarray(g, np.float64) for g in gradient]
        norm = np.sqrt(sum((g**2).sum() for g in gradient))
        for i, g in enumerate(gradient):
            g = g * min(1.0, clip / norm)
            m[i] = b1 * m[i] + (1 - b1) * g
            v[i] = b2 * v[i] + (1 - b2) * g * g
            direction = (m[i] / (1 - b1**t)) / (np.sqrt(v[i] / (1 - b2**t)) + epsilon)
            params[i] = params[i] - rate * (direction + decay * decays[i] * params[i])
    return params


def test_adamw_against_a_transcription():
    random = np.random.default_rng(0)
    params = [random.normal(size=(5, 3)), random.normal(size=(4,))]
    gradients = [[10.0**-k * random.normal(size=p.shape) for p in params] for k in range(-1, 4)]
    chosen = section(b1=0.8, b2=0.95, epsilon=1e-3, weight_decay=0.3, clip_norm=0.7)
    named = lambda arrays: {"matrix": jnp.float32(arrays[0]), "vector": jnp.float32(arrays[1])}  # noqa: E731
    found, _ = run(chosen, named(params), [named(g) for g in gradients])
    expected = adam_transcription(params, gradients, rate=1e-2, b1=0.8, b2=0.95, epsilon=1e-3, decay=0.3, clip=0.7)
    np.testing.assert_allclose(found["matrix"], expected[0], rtol=2e-6, atol=1e-7)
    np.testing.assert_allclose(found["vector"], expected[1], rtol=2e-6, atol=1e-7)


def test_clipping_is_by_the_norm_of_all_gradients_and_can_be_off():
    params, gradient = {"a": jnp.zeros(1), "b": jnp.zeros(1)}, {"a": jnp.full(1, 3.0), "b": jnp.full(1, 4.0)}
    clipped, _ = run(section("sgd", learning_rate=1.0, clip_norm=1.0), params, [gradient])
    np.testing.assert_allclose([clipped["a"][0], clipped["b"][0]], [-0.6, -0.8], rtol=1e-6)
    free, _ = run(section("sgd", learning_rate=1.0), params, [gradient])
    np.testing.assert_allclose([free["a"][0], free["b"][0]], [-3.0, -4.0], rtol=1e-6)


def test_sgd_momentum_is_b1():
    moved, _ = run(section("sgd", learning_rate=1.0, b1=0.5), {"w": jnp.zeros(1)}, [{"w": jnp.ones(1)}] * 3)
    assert float(moved["w"][0]) == pytest.approx(-(1 + 1.5 + 1.75))


def test_lion_moves_by_the_sign():
    params = few()
    moved, _ = run(section("lion", learning_rate=0.5), params, [jax.tree.map(jnp.cos, params)])
    jax.tree.map(
        lambda new, old: np.testing.assert_allclose(new - old, -0.5 * np.sign(np.cos(old)), rtol=1e-5), moved, params
    )


def test_muon_orthogonalizes_each_layer():
    """Each layer's update is its gradient's U V^T, up to the Newton-Schulz spread, at the size of Adam's updates."""
    params, gradient = parameters(), parameters(seed=1)
    moved, _ = run(section("muon", learning_rate=1.0), params, [gradient])
    matrices = {"query": (8, 8), "output": (8, 8)}
    for layer in range(2):
        for (block, name), shape in {
            **{("attention", n): s for n, s in matrices.items()},
            ("mlp", "gate"): (8, 16),
            ("mlp", "down"): (16, 8),
        }.items():
            change = np.asarray(moved["layers"][block][name] - params["layers"][block][name])[layer].reshape(shape)
            g = np.asarray(gradient["layers"][block][name])[layer].reshape(shape)
            values = np.linalg.svd(change, compute_uv=False) / (0.2 * np.sqrt(max(shape)))
            assert values.max() < 1.35 and np.median(values) > 0.6, (name, values)
            u, _, vt = np.linalg.svd(g, full_matrices=False)
            assert -(change * (u @ vt)).sum() / np.linalg.norm(change) / np.sqrt(min(shape)) > 0.93, name
    for name in ("embedding", "head", "final_norm"):  # these follow Adam: about the sign of the gradient
        np.testing.assert_array_equal(np.sign(moved[name] - params[name]), -np.sign(gradient[name]))


def test_weight_decay_acts_on_matrices_alone():
    expected = {
        "embedding": True,
        "final_norm": False,
        "head": True,
        "layers": {
            "attention": {
                "query": True, "query_bias": False, "query_norm": False, "output": True, "output_bias": False,
            },
            "mlp": {"gate": True, "down": True, "down_bias": False},
            "attention_norm": False,
            "sinks": False,
        },
    }  # fmt: skip
    assert decayed(parameters()) == expected
    params = few()
    still = jax.tree.map(jnp.zeros_like, params)
    for name in (n for n, keys in OPTIMIZER_KEYS.items() if "weight_decay" in keys):
        moved, _ = run(section(name, weight_decay=0.1), params, [still])

        def check(new, old, decays, name=name):
            np.testing.assert_allclose(new, old * (1 - 1e-2 * 0.1) if decays else old, rtol=1e-6, err_msg=name)

        jax.tree.map(check, moved, params, {"layers": {"up": True, "up_norm": False}})


@pytest.mark.parametrize("name", OPTIMIZER_KEYS)
def test_every_optimizer_lowers_a_loss(name):
    start, target = few(), few(seed=1)

    def loss(params):
        return sum(jnp.mean((a - b) ** 2) for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(target)))

    chosen = section(name, learning_rate=1.0 if name == "sgd" else 0.05, warmup_steps=2)
    transformation, _ = optimizer(chosen, 100)

    @jax.jit
    def descend(params):
        def body(_, carry):
            params, state = carry
            updates, state = transformation.update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, updates), state

        return jax.lax.fori_loop(0, 90, body, (params, transformation.init(params)))[0]

    assert loss(descend(start)) < 0.2 * loss(start)


@pytest.mark.parametrize("name", OPTIMIZER_KEYS)
def test_options_are_read_or_refused(name):
    """Each option that an optimizer accepts changes what it does."""
    params, gradients = few(), [few(seed=i) for i in (1, 2, 3)]
    plain, _ = run(section(name), params, gradients)
    for option, value in {"b1": 0.3, "b2": 0.4, "epsilon": 0.5, "weight_decay": 0.2}.items():
        if option not in OPTIMIZER_KEYS[name]:
            with pytest.raises(ValueError, match=f"{name} does not read {option}"):
                section(name, **{option: value})
            continue
        changed, _ = run(section(name, **{option: value}), params, gradients)
        assert any(not np.allclose(a, b) for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(changed))), option


@pytest.mark.parametrize("name", OPTIMIZER_KEYS)
def test_state_is_float32_for_bfloat16_parameters(name):
    params = few(dtype=jnp.bfloat16)
    moved, state = run(section(name), params, [few(seed=1, dtype=jnp.bfloat16)])
    assert {x.dtype for x in jax.tree.leaves(state)} <= {jnp.dtype("float32"), jnp.dtype("int32")}
    assert {x.dtype for x in jax.tree.leaves(moved)} == {jnp.dtype("bfloat16")}
