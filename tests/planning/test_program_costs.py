"""Costs read from a compiled program's text, against sums done by hand."""

import jax
import jax.numpy as jnp
import pytest

from grpo_jax.planning.costs import Cost, Program, Rates

TEXT = """HloModule example

%sliced (p0: f32[8,16,128], p1: s32[]) -> f32[16,128] {
  %p0 = f32[8,16,128]{2,1,0:T(8,128)} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = f32[1,16,128]{2,1,0:T(8,128)} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,16,128}
  ROOT %cut = f32[16,128]{1,0:T(8,128)} bitcast(%slice)
}

%put (p0: f32[8,16,128], p1: f32[1,16,128], p2: s32[]) -> f32[8,16,128] {
  %p0 = f32[8,16,128]{2,1,0:T(8,128)} parameter(0)
  %p1 = f32[1,16,128]{2,1,0:T(8,128)S(1)} parameter(1)
  %p2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %write = f32[8,16,128]{2,1,0:T(8,128)} dynamic-update-slice(%p0, %p1, %p2, %zero, %zero)
}

%body (state: (s32[], f32[8,16,128])) -> (s32[], f32[8,16,128]) {
  %state = (s32[], f32[8,16,128]{2,1,0:T(8,128)}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %all = f32[8,16,128]{2,1,0:T(8,128)} get-tuple-element(%state), index=1
  %one = f32[16,128]{1,0:T(8,128)S(1)} fusion(%all, %i), kind=kLoop, calls=%sliced
  %square = f32[16,16]{1,0:T(8,128)S(1)} convolution(%one, %one), dim_labels=bf_oi->bf
  %grown = f32[1,16,128]{2,1,0:T(8,128)S(1)} broadcast(%square), dimensions={}
  %next = f32[8,16,128]{2,1,0:T(8,128)} fusion(%all, %grown, %i), kind=kLoop, calls=%put
  %up = s32[]{:S(6)} constant(1)
  %after = s32[]{:S(6)} add(%i, %up)
  ROOT %out = (s32[], f32[8,16,128]{2,1,0:T(8,128)}) tuple(%after, %next)
}

%until (state: (s32[], f32[8,16,128])) -> pred[] {
  %state = (s32[], f32[8,16,128]{2,1,0:T(8,128)}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %end = s32[] constant(8)
  ROOT %more = pred[] compare(%i, %end), direction=LT
}

%asked (state: (s32[], f32[8,16,128])) -> pred[] {
  %state = (s32[], f32[8,16,128]{2,1,0:T(8,128)}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  ROOT %more = pred[] compare(%i, %i), direction=LT
}

ENTRY %main (x: f32[8,16,128]) -> f32[5,3] {
  %x = f32[8,16,128]{2,1,0:T(8,128)} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], f32[8,16,128]{2,1,0:T(8,128)}) tuple(%zero, %x)
  %fixed = (s32[], f32[8,16,128]{2,1,0:T(8,128)}) while(%start), condition=%until, body=%body
  %open = (s32[], f32[8,16,128]{2,1,0:T(8,128)}) while(%fixed), condition=%asked, body=%body
  ROOT %k = f32[5,3]{1,0} custom-call(%open), backend_config={"cost_estimate": {"flops": "7", "bytes_accessed": "11"}}
}
"""

SLICE = 16 * 128 * 4


def test_a_turn_of_a_loop_costs_the_slice_it_takes_and_the_slice_it_puts():
    program = Program(TEXT)
    indices = 3 * 4  # the counter is read three times
    assert program.cost("body") == Cost(2 * SLICE + indices, 2 * 16 * 16 * 128)


def test_loops_count_as_often_as_they_run_and_kernels_as_they_say():
    program = Program(TEXT)
    turn = program.cost("body")
    assert program.steps() == ["body"]
    assert program.total(loops=3) == turn.times(8 + 3) + Cost(11, 7)


def test_a_slice_of_an_array_in_other_tiles_costs_the_slice():
    """As the TPU compiler reads bytes of int8: the copy of the whole inside a fusion is never made."""
    whole = "f32[8,16,128]{2,1,0:T(8,128)}"
    tiles = f"%tiles (t: f32[8,16,128]) -> f32[8,16,128] {{\n  %t = {whole} parameter(0)\n"
    tiles += f"  ROOT %c = {whole} copy(%t)\n}}\n\n"
    again = f"  %again = {whole} fusion(%p0), kind=kLoop, calls=%tiles\n"
    slice_ = "  %slice = f32[1,16,128]{2,1,0:T(8,128)} dynamic-slice("
    text = TEXT.replace("%sliced (p0", f"{tiles}%sliced (p0").replace(f"{slice_}%p0", f"{again}{slice_}%again")
    assert "dynamic-slice(%again" in text
    assert Program(text).cost("body") == Program(TEXT).cost("body")
    other = text.replace(" copy(%t)", " negate(%t)")
    assert Program(other).cost("body").bytes == Program(TEXT).cost("body").bytes + 7 * SLICE


def test_room_for_what_a_loop_will_write_moves_nothing():
    text = "ENTRY %e () -> f32[16,128] {\n"
    text += '  ROOT %room = f32[16,128]{1,0:T(8,128)} custom-call(), custom_call_target="AllocateBuffer"\n}\n'
    assert Program(text).total() == Cost()
    assert Program(text.replace("AllocateBuffer", "Fill")).total() == Cost(SLICE)


def test_small_arrays_count_with_the_padding_of_their_tile():
    text = "ENTRY %e (x: bf16[5,3]) -> bf16[5,3] {\n  %x = bf16[5,3]{1,0:T(8,128)(2,1)} parameter(0)\n"
    text += "  ROOT %y = bf16[5,3]{1,0:T(8,128)(2,1)} negate(%x)\n}\n"
    assert Program(text).total() == Cost(2 * 8 * 128 * 2)


UNROLLED = """HloModule unrolled

%inner (state: (u32[], f32[16,128])) -> (u32[], f32[16,128]) {
  %state = (u32[], f32[16,128]) parameter(0)
  %i = u32[] get-tuple-element(%state), index=0
  %x = f32[16,128] get-tuple-element(%state), index=1
  %square = f32[16,16] convolution(%x, %x), dim_labels=bf_oi->bf
  %one = u32[] constant(1)
  %next = u32[] add(%i, %one)
  %after = u32[] add(%next, %one)
  ROOT %out = (u32[], f32[16,128]) tuple(%after, %x)
}

%inner_until (state: (u32[], f32[16,128])) -> pred[] {
  %state = (u32[], f32[16,128]) parameter(0)
  %i = u32[] get-tuple-element(%state), index=0
  %end = u32[] constant(9)
  ROOT %more = pred[] compare(%i, %end), direction=LT
}

%outer (state: (s32[], f32[16,128])) -> (s32[], f32[16,128]) {
  %state = (s32[], f32[16,128]) parameter(0)
  %j = s32[] get-tuple-element(%state), index=0
  %x = f32[16,128] get-tuple-element(%state), index=1
  %two = u32[] constant(2)
  %from = u32[] copy(%two)
  %begin = (u32[], f32[16,128]) tuple(%from, %x)
  %rows = (u32[], f32[16,128]) while(%begin), condition=%inner_until, body=%inner
  %y = f32[16,128] get-tuple-element(%rows), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%j, %one)
  ROOT %out = (s32[], f32[16,128]) tuple(%next, %y)
}

%outer_until (state: (s32[], f32[16,128])) -> pred[] {
  %state = (s32[], f32[16,128]) parameter(0)
  %j = s32[] get-tuple-element(%state), index=0
  %end = s32[] constant(5)
  ROOT %more = pred[] compare(%j, %end), direction=LT
}

ENTRY %main (x: f32[16,128]) -> (s32[], f32[16,128]) {
  %x = f32[16,128] parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], f32[16,128]) tuple(%zero, %x)
  ROOT %loop = (s32[], f32[16,128]) while(%start), condition=%outer_until, body=%outer
}
"""


def test_a_loop_from_2_below_9_by_two_at_a_time_turns_four_times_and_again_in_every_turn_of_the_outer_one():
    program = Program(UNROLLED)
    outer, inner = program.loops()[0], program.loops("outer")[0]
    assert (program.trips(outer), program.trips(inner)) == (5, 4)
    assert program.total().flops == 5 * 4 * 2 * 16 * 16 * 128
    assert dict(program.walk({}))["inner"] == 20


@pytest.mark.parametrize("layers, chunks", [(3, 1), (7, 5), (12, 4)])
def test_flops_of_nested_loops_of_a_jitted_program_are_those_of_the_loops_written_out(layers, chunks):
    def network(weights, x):
        def layer(x, w):
            def chunk(i, out):
                return out + jnp.tanh(x @ w) * i

            return jax.lax.fori_loop(0, chunks, chunk, x), None

        return jax.lax.scan(layer, x, weights)[0]

    shapes = jnp.zeros((layers, 32, 32)), jnp.zeros((8, 32))
    text = jax.jit(network).lower(*shapes).compile().as_text()
    per_product = 2 * 8 * 32 * 32
    # the compiler may see that the product is the same in every chunk, and take it out of the inner loop
    assert Program(text).total().flops in (layers * chunks * per_product, layers * per_product)


def test_a_loop_that_data_decide_turns_as_often_as_it_is_asked_to():
    def search(x):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 100.0, lambda x: jnp.tanh(x @ x) + x, x)

    program = Program(jax.jit(search).lower(jnp.ones((16, 16))).compile().as_text())
    (loop,) = program.loops()
    assert program.trips(loop) is None
    for turns in (0, 1, 40):
        assert program.total(loops=turns).flops == turns * 2 * 16**3
        assert program.total(loops={loop.name: turns}).flops == turns * 2 * 16**3


def test_each_instruction_takes_as_long_as_its_bytes_or_its_flops():
    text = "ENTRY %e (x: f32[64,64]) -> f32[64,64] {\n  %x = f32[64,64] parameter(0)\n"
    text += "  %y = f32[64,64] negate(%x)\n"
    text += "  ROOT %z = f32[64,64] dot(%y, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}\n}\n"
    array, product = 64 * 64 * 4, 2 * 64**3
    cost = Program(text, Rates(flops=1e6, bytes=1e6)).total()
    assert cost.seconds == pytest.approx(2 * array / 1e6 + product / 1e6)  # the one waits for memory, the other not
    assert cost[:2] == (5 * array, product)
