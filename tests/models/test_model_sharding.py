"""The table from logical axes to mesh axes."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from grpo_jax.models import TransformerConfig, abstract, create, logical_axes, merge, shardings
from grpo_jax.models.sharding import PARAMETERS

CONFIG = TransformerConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8
)


def mesh(**axes):
    count = int(np.prod(list(axes.values())))
    return jax.make_mesh(
        tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes), devices=jax.devices()[:count]
    )


def specs(config, mesh):
    return jax.tree.map(lambda s: s.spec, shardings(logical_axes(config), mesh))


def test_axes_name_every_dimension_and_know_its_size():
    axes = jax.tree.leaves(logical_axes(CONFIG), is_leaf=lambda x: isinstance(x, tuple))
    shapes = jax.tree.leaves(abstract(CONFIG)[1])
    assert [tuple(a.size for a in names) for names in axes] == [leaf.shape for leaf in shapes]
    assert {str(name) for names in axes for name in names} == PARAMETERS.keys() - {"experts"}
    assert logical_axes(CONFIG)["layers"]["attention"]["query"] == ("layers", "embed", "heads", "head_dim")


def test_table():
    got = specs(CONFIG, mesh(data=2, fsdp=2, tensor=2))
    assert got["embedding"] == PartitionSpec("tensor", "fsdp")
    assert got["norm"] == PartitionSpec()
    attention, mlp = got["layers"]["attention"], got["layers"]["mlp"]
    assert attention["query"] == attention["key"] == PartitionSpec(None, "fsdp", "tensor")
    assert attention["output"] == PartitionSpec(None, "tensor", None, "fsdp")
    assert attention["key_bias"] == PartitionSpec(None, "tensor")
    assert mlp["gate"] == PartitionSpec(None, "fsdp", "tensor")
    assert mlp["down"] == PartitionSpec(None, "tensor", "fsdp")


def test_axes_that_the_mesh_lacks_are_replicated():
    assert specs(CONFIG, mesh(data=4))["layers"]["mlp"]["gate"] == PartitionSpec()
    assert specs(CONFIG, mesh(fsdp=4))["layers"]["mlp"]["gate"] == PartitionSpec(None, "fsdp")


def test_few_key_value_heads_and_an_odd_vocabulary_are_replicated():
    got = specs(dataclasses.replace(CONFIG, vocab_size=61), mesh(data=1, fsdp=2, tensor=4))
    assert got["layers"]["attention"]["key"] == PartitionSpec(None, "fsdp")
    assert got["layers"]["attention"]["query"] == PartitionSpec(None, "fsdp", "tensor")
    assert got["embedding"] == PartitionSpec(None, "fsdp")


@pytest.mark.parametrize(
    "change, axes, message",
    [
        (
            {"num_heads": 6},
            {"tensor": 4},
            r"layers.attention.\w+: axis 'heads' of size 6 .* mesh axis tensor of size 4; the nearest .* is 3",
        ),
        ({"intermediate_size": 50}, {"tensor": 4}, r"layers.mlp.\w+: axis 'mlp' of size 50 .* is 5"),
        ({"hidden_size": 36}, {"fsdp": 8}, r"axis 'embed' of size 36 .* mesh axis fsdp of size 8; .* is 9"),
    ],
)
def test_uneven_dimensions_name_parameter_axis_and_the_nearest_size_that_works(change, axes, message):
    with pytest.raises(ValueError, match=message):
        shardings(logical_axes(dataclasses.replace(CONFIG, **change)), mesh(**axes))


def test_unknown_axis():
    with pytest.raises(ValueError, match="parameter a.b: unknown logical axis 'time'; known: layers, vocab"):
        shardings({"a": {"b": ("time",)}}, mesh(fsdp=2))


def test_forward_on_a_mesh_equals_one_device():
    graphdef, params = create(CONFIG, jax.random.key(0))
    contexts, rows = (np.random.default_rng(0).integers(0, 64, shape) for shape in ((4, 6), (4, 2, 5)))
    lengths = np.array([6, 3, 0, 5])
    run = jax.jit(lambda p: merge(graphdef, p)(contexts, lengths, rows))
    placed = jax.device_put(params, shardings(logical_axes(CONFIG), mesh(data=1, fsdp=2, tensor=4)))
    assert not placed["layers"]["mlp"]["gate"].sharding.is_fully_replicated
    np.testing.assert_allclose(run(placed), run(params), atol=1e-5)
