"""Costs read from a compiled program's text, against sums done by hand."""

from benchmarks.compiled import Cost, Program

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
  ROOT %out = (s32[], f32[8,16,128]{2,1,0:T(8,128)}) tuple(%i, %next)
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

ENTRY %main (start: (s32[], f32[8,16,128])) -> f32[5,3] {
  %start = (s32[], f32[8,16,128]{2,1,0:T(8,128)}) parameter(0)
  %fixed = (s32[], f32[8,16,128]{2,1,0:T(8,128)}) while(%start), condition=%until, body=%body
  %open = (s32[], f32[8,16,128]{2,1,0:T(8,128)}) while(%fixed), condition=%asked, body=%body
  ROOT %k = f32[5,3]{1,0} custom-call(%open), backend_config={"cost_estimate": {"flops": "7", "bytes_accessed": "11"}}
}
"""

SLICE = 16 * 128 * 4


def test_a_turn_of_a_loop_costs_the_slice_it_takes_and_the_slice_it_puts():
    program = Program(TEXT)
    indices = 2 * 4  # two scalars are read
    assert program.cost("body") == Cost(2 * SLICE + indices, 2 * 16 * 16 * 128)


def test_loops_count_as_often_as_they_run_and_kernels_as_they_say():
    program = Program(TEXT)
    turn = program.cost("body")
    assert program.steps() == ["body"]
    assert program.total(loops=3) == turn.times(8 + 3) + Cost(11, 7)


def test_small_arrays_count_with_the_padding_of_their_tile():
    text = "ENTRY %e (x: bf16[5,3]) -> bf16[5,3] {\n  %x = bf16[5,3]{1,0:T(8,128)(2,1)} parameter(0)\n"
    text += "  ROOT %y = bf16[5,3]{1,0:T(8,128)(2,1)} negate(%x)\n}\n"
    assert Program(text).total() == Cost(2 * 8 * 128 * 2)
