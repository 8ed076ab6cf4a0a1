"""The layer's matrix product and what a layer keeps for its backward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.models import TransformerConfig, abstract, merge
from grpo_jax.models.layers import product


@pytest.mark.parametrize("rows", [(7,), (2, 3), (2, 1, 3)])
def test_product_and_its_gradients(rows):
    rng = np.random.default_rng(0)
    x, matrix, probe = (rng.normal(size=s) for s in [(*rows, 5), (5, 4), (*rows, 4)])
    value, pull = jax.vjp(product, *(jnp.float32(a) for a in (x, matrix)))
    np.testing.assert_allclose(value, x @ matrix, rtol=1e-5, atol=1e-6)
    d_x, d_matrix = pull(jnp.float32(probe))
    np.testing.assert_allclose(d_x, probe @ matrix.T, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(d_matrix, x.reshape(-1, 5).T @ probe.reshape(-1, 4), rtol=1e-5, atol=1e-6)


def test_slopes_as_large_as_activations_are_not_transposed():
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in [(1, 96, 40), (40, 56)]]
    loss = lambda x, m: jnp.sum(jnp.sin(product(jnp.cos(x), m)))  # noqa: E731
    text = jax.jit(jax.grad(loss, (0, 1))).lower(*shapes).compile().as_text()
    assert "[96,56]" in text and "[56,96]" not in text and "[40,96]" not in text


def test_a_layer_keeps_what_its_products_made_or_only_its_input():
    """Temporary memory for each layer more: 256-wide, per token, in floats."""
    width, tokens = 256, 64
    config = dict(
        vocab_size=64, hidden_size=width, intermediate_size=4 * width, num_heads=4, num_kv_heads=1, head_dim=64
    )

    def temporary(layers, remat):
        graphdef, params = abstract(TransformerConfig(num_layers=layers, **config))
        arrays = [jax.ShapeDtypeStruct(s, jnp.int32) for s in [(2, 16), (2,), (2, 1, tokens)]]
        loss = lambda p, *a: jnp.sum(merge(graphdef, p)(*a, remat=remat) ** 2)  # noqa: E731
        return jax.jit(jax.grad(loss)).lower(params, *arrays).compile().memory_analysis().temp_size_in_bytes

    for remat, most in [
        (True, 1),
        (False, 2 * 4 + 1 + 1 + 1 + 1 + 0.5),
    ]:  # gate, up; input, between, queries, out; k, v
        per_layer = (temporary(12, remat) - temporary(4, remat)) / 8
        assert 0.9 * most < per_layer / (2 * (16 + tokens) * width * 4) < 1.2 * most + 0.2
