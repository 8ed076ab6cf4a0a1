"""The order of devices, and sizes that cannot be."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from grpo_jax.models.sharding import AXES, RULES
from grpo_jax.training.assemble import layout_of
from grpo_jax.training.configuration import parse
from grpo_jax.training.mesh import _ordered, make_mesh


def slices(count, shape=(2, 4)):
    """TPUs of several slices, in an order in which no network lies."""
    one = [
        SimpleNamespace(
            platform="tpu",
            device_kind="TPU v4",
            slice_index=s,
            coords=(x, y, 0),
            core_on_chip=0,
            process_index=0,
            id=100 * s + 10 * x + y,
        )
        for s in range(count)
        for x in range(shape[0])
        for y in range(shape[1])
    ]
    return [one[i] for i in np.random.default_rng(0).permutation(len(one))]


def test_only_dcn_data_crosses_slices_and_neighbours_along_an_axis_are_neighbours_in_a_slice():
    mesh = _ordered(slices(2), (2, 1, 4, 1, 1, 2))
    where = np.vectorize(lambda d: d.slice_index)(mesh)
    assert all(len(set(part.ravel())) == 1 for part in where) and where.ravel()[0] != where.ravel()[-1]
    for part in mesh.reshape(2, 4, 2):
        for pair in part:  # along tensor
            assert sum(abs(a - b) for a, b in zip(pair[0].coords, pair[1].coords)) == 1
        for column in part.T:  # along fsdp, a ring
            hops = [sum(abs(a - b) for a, b in zip(x.coords, y.coords)) for x, y in zip(column, column[1:])]
            assert set(hops) == {1}


def test_an_axis_that_must_cross_slices_keeps_each_slice_together():
    mesh = _ordered(slices(2), (1, 1, 16, 1, 1, 1)).ravel()
    assert len({d.slice_index for d in mesh[:8]}) == len({d.slice_index for d in mesh[8:]}) == 1


def test_the_table_names_axes_that_a_mesh_has():
    assert {axis for axes in RULES.values() for axis in axes} <= set(AXES) == set(make_mesh().axis_names)


def test_the_nearest_size_that_fits_is_named():
    with pytest.raises(ValueError, match=r"a multiple of 3 devices, there are 8; the nearest fsdp that fits is 2"):
        make_mesh(fsdp=3)
    with pytest.raises(ValueError, match=r"mesh.dcn_data is 2, but the devices form 3 slices"):
        make_mesh(dcn_data=2, devices=[d for d in slices(3) if d.coords[0] == 0])


def test_completions_that_do_not_divide_over_sequence():
    def layout(tokens, **mesh):
        config = parse(
            {
                "steps": 1,
                "model": {"path": "tiny"},
                "data": {"source": "addition", "max_prompt": 16},
                "sampling": {"max_new": 30},
                "batch": {"prompts": 2, "group_size": 2, "tokens_per_device": tokens},
                "mesh": mesh,
            }
        )
        return layout_of(config, make_mesh(**config.mesh.model_dump()), group_size=2, prompts=2)

    with pytest.raises(ValueError, match="max_new is 30.* the 4 devices of mesh.sequence; 28 and 32 do"):
        layout(64, sequence=4)
    assert layout(32, sequence=2)[:2] == (4, 1)  # two devices hold a sequence of 46 tokens that one does not
    assert layout(64, sequence=2)[:2] == (4, 2)
    with pytest.raises(ValueError, match="one prompt and one completion may take 46 tokens"):
        layout(32)
    assert jax.device_count() == 8
