"""What programs send, against programs whose messages are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from grpo_jax.planning.chips import CHIPS
from grpo_jax.planning.collectives import Ends, Wires, collectives, group_of, sent
from grpo_jax.planning.costs import Program
from grpo_jax.planning.hlo import Instruction
from grpo_jax.training.mesh import make_mesh


def instruction(rest):
    return Instruction("x", "f32[4]", "all-gather", ["y"], rest, False)


@pytest.mark.parametrize(
    "rest, group",
    [
        ("replica_groups={{0,3},{1,4},{2,5}}, dimensions={0}", [0, 3]),
        ("replica_groups=[2,4]<=[8], dimensions={0}", [0, 1, 2, 3]),
        ("replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}", [0, 4]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}", [0, 1, 2, 3]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}, dimensions={0}", [0, 4]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("replica_groups=mesh['a'=1,'b'=4,'c'=2], device_ids=([2,4]T(1,0)) {'b'}", [0, 1, 2, 3]),
        ("replica_groups=mesh['a'=1,'b'=4,'c'=2], device_ids=([2,4]T(1,0)) {'c'}", [0, 4]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}", [0, 2]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}", [0, 1]),
        ("source_target_pairs={{0,7},{1,0},{2,1}}", [0, 7]),
        ("replica_groups={}", []),
    ],
)
def test_the_group_of_the_first_device_is_read_in_every_way_that_it_is_written(rest, group):
    assert group_of(instruction(rest)) == group


def test_bytes_on_the_wire_are_the_fewest_that_do():
    ends = Ends(sent=100.0, received=800.0)
    assert sent("all-gather", ends, 8) == 700  # what the others have
    assert sent("reduce-scatter", Ends(800.0, 100.0), 8) == 700
    assert sent("all-reduce", Ends(800.0, 800.0), 8) == 1400  # a reduce-scatter and an all-gather
    assert sent("all-to-all", Ends(800.0, 800.0), 8) == 700
    assert sent("all-reduce", ends, 1) == 0


EVERYWHERE = PartitionSpec()


class Machine:
    """Virtual devices with the places of a slice."""

    def __init__(self, device, coords, slice_index):
        self.device, self.coords, self.slice_index = device, coords, slice_index


def wires(mesh, shape, slices=1):
    chip, per = CHIPS["v5e"], mesh.size // slices
    machines = [Machine(d, np.unravel_index(n % per, shape), n // per) for n, d in enumerate(mesh.devices.flat)]
    placed = np.empty(mesh.size, object)
    placed[:] = machines

    class Placed:
        devices, axis_names, size = placed.reshape(mesh.devices.shape), mesh.axis_names, mesh.size

    return Wires(Placed(), chip, shape)


def sends(mesh, function, *arguments, shape=(2, 4), slices=1, out=EVERYWHERE):
    done = jax.jit(function, out_shardings=NamedSharding(mesh, out)).lower(*arguments).compile()
    return collectives(Program(done.as_text()), wires(mesh, shape, slices), {})


def array(mesh, spec, *shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*spec)))


def test_weights_divided_over_fsdp_are_gathered_along_it_as_often_as_their_loop_turns():
    mesh = make_mesh(data=2, fsdp=4)
    layers, width = 5, 64

    def network(weights, x):
        layer = lambda x, w: (jnp.tanh(x @ jax.lax.with_sharding_constraint(w, whole)), None)  # noqa: E731
        return jax.lax.scan(layer, x, weights)[0]

    whole = NamedSharding(mesh, PartitionSpec())
    weights = array(mesh, (None, "fsdp"), layers, width, width)
    rows = PartitionSpec(("data", "fsdp"))
    (only,) = sends(mesh, network, weights, array(mesh, (("data", "fsdp"),), 16, width), out=rows)
    assert (only.kind, only.axes, only.network, only.times) == ("all-gather", ("fsdp",), "ICI", layers)
    assert only.wire == layers * width * width * 4 * 3 / 4
    # fsdp lies along the side of four, which does not close to a ring: one link
    assert only.ici_seconds == pytest.approx(only.wire / CHIPS["v5e"].link)


def test_a_product_over_a_divided_dimension_is_summed_along_it():
    mesh = make_mesh(data=1, fsdp=2, tensor=4)
    x, w = array(mesh, (None, "tensor"), 8, 64), array(mesh, ("tensor",), 64, 32)
    (only,) = sends(mesh, lambda x, w: x @ w, x, w)
    assert (only.kind, only.axes) == ("all-reduce", ("tensor",))
    assert only.wire == 2 * 8 * 32 * 4 * 3 / 4


def test_what_joins_slices_goes_over_the_network_of_the_data_center_and_what_is_inside_does_not():
    mesh = make_mesh(dcn_data=2, data=1, fsdp=4)
    x = array(mesh, (("dcn_data", "fsdp"),), 64, 32)
    (only,) = sends(mesh, lambda x: x.sum(axis=0), x, shape=(2, 2), slices=2)
    assert (only.kind, only.axes, only.network) == ("all-reduce", ("dcn_data", "fsdp"), "ICI+DCN")
    size = 32 * 4
    inside, between = 2 * size * 3 / 4, 2 * (size / 4) / 2  # summed inside first, a quarter crosses
    assert only.wire == inside + between
    assert only.dcn_seconds == pytest.approx(between / CHIPS["v5e"].dcn)


def test_a_message_spread_over_several_fusions_counts_where_it_begins():
    step = "  %part = f32[8,4] all-gather(%p), channel_id=7, replica_groups=[1,8]<=[8], dimensions={0}\n"
    fused = "%NAME (p: f32[1,4]) -> f32[8,4] {\n  %p = f32[1,4] parameter(0)\n"
    fused += step + "  ROOT %r = f32[8,4] copy(%part)\n}\n"
    loop = """%body (s: (s32[], f32[1,4])) -> (s32[], f32[1,4]) {
  %s = (s32[], f32[1,4]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[1,4] get-tuple-element(%s), index=1
  %more = f32[8,4] fusion(%x), kind=kCustom, calls=%later
  %one = s32[] constant(1)
  %n = s32[] add(%i, %one)
  ROOT %t = (s32[], f32[1,4]) tuple(%n, %x)
}
%until (s: (s32[], f32[1,4])) -> pred[] {
  %s = (s32[], f32[1,4]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %end = s32[] constant(6)
  ROOT %c = pred[] compare(%i, %end), direction=LT
}
ENTRY %main (x: f32[1,4]) -> (s32[], f32[1,4]) {
  %x = f32[1,4] parameter(0)
  %start = f32[8,4] fusion(%x), kind=kCustom, calls=%first
  %zero = s32[] constant(0)
  %t = (s32[], f32[1,4]) tuple(%zero, %x)
  ROOT %w = (s32[], f32[1,4]) while(%t), condition=%until, body=%body
}
"""
    text = fused.replace("NAME", "first") + fused.replace("NAME", "later") + loop
    (only,) = collectives(Program(text), wires(make_mesh(data=8), (2, 4)), {})
    assert (only.times, only.wire) == (1, 8 * 4 * 4 * 7 / 8)
