"""Rooflines: what a program's text says that it does, counted by hand."""

import pytest

from hiar_jax.planning import chips, hlo, roofline

# A chip whose rates are easy to count with; no GPU: one rate for all numbers.
CHIP = chips.Chip(hbm=1e9, peak=1e12, bandwidth=1e9, link=1e6)

PROGRAM = """
HloModule toy, is_scheduled=true

%moved (p.0: bf16[4,8,16], p.1: s32[]) -> bf16[8,16] {
  %p.0 = bf16[4,8,16]{2,1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %ds = bf16[1,8,16]{2,1,0} dynamic-slice(%p.0, %p.1, %zero, %zero), \
dynamic_slice_sizes={1,8,16}
  ROOT %b = bf16[8,16]{1,0} bitcast(%ds)
}

%written (p.0: bf16[4,8,16], p.1: bf16[1,8,16], p.2: s32[]) -> bf16[4,8,16] {
  %p.0 = bf16[4,8,16]{2,1,0} parameter(0)
  %p.1 = bf16[1,8,16]{2,1,0} parameter(1)
  %p.2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %u = bf16[4,8,16]{2,1,0} dynamic-update-slice(%p.0, %p.1, %p.2, %zero)
}

%body (t: (s32[], bf16[4,8,16])) -> (s32[], bf16[4,8,16]) {
  %t = (s32[], /*index=1*/bf16[4,8,16]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %w = bf16[4,8,16]{2,1,0} get-tuple-element(%t), index=1
  %one = bf16[8,16]{1,0} fusion(%w, %i), kind=kLoop, calls=%moved
  %y = bf16[8,8]{1,0} dot(%one, %one), lhs_contracting_dims={1}, \
rhs_contracting_dims={1}, metadata={op_name="jit(f)/layers/ffn_in/dot_general"}
  %s = f32[8,8]{1,0} exponential(%y)
  %n = bf16[1,8,16]{2,1,0} bitcast(%one)
  %new = bf16[4,8,16]{2,1,0} fusion(%w, %n, %i), kind=kLoop, calls=%written
  ROOT %out = (s32[], bf16[4,8,16]{2,1,0}) tuple(%i, %new)
}

%cond (t: (s32[], bf16[4,8,16])) -> pred[] {
  %t = (s32[], bf16[4,8,16]{2,1,0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}

ENTRY %main (w: bf16[4,8,16]) -> bf16[4,8,16] {
  %w = bf16[4,8,16]{2,1,0} parameter(0)
  %i = s32[] constant(0)
  %t = (s32[], bf16[4,8,16]{2,1,0}) tuple(%i, %w)
  %loop = (s32[], bf16[4,8,16]{2,1,0}) while(%t), condition=%cond, body=%body\
TRIPS
  ROOT %r = bf16[4,8,16]{2,1,0} get-tuple-element(%loop), index=1
}
"""
KNOWN = PROGRAM.replace(
  'TRIPS', ', backend_config={"known_trip_count":{"n":"30"}}'
)
UNKNOWN = PROGRAM.replace('TRIPS', '')


def test_a_loops_work_counts_as_often_as_it_runs():
  known = roofline.roofline(KNOWN, CHIP)
  linear = known.classes[roofline.LINEAR]
  assert linear.flops == 30 * 2 * 8 * 8 * 16
  assert linear.num_bytes == 30 * 2 * (2 * 8 * 16 + 8 * 8)
  # The memory is slower than the products.
  assert linear.seconds == pytest.approx(linear.num_bytes / 1e9)
  thrice = roofline.roofline(UNKNOWN, CHIP, unknown_trips=3)
  assert thrice.total.flops == known.total.flops / 10
  assert (thrice * 10).total == pytest.approx(known.total)


def test_of_a_slice_the_slice_moves_and_not_what_it_is_taken_from():
  copies = roofline.roofline(KNOWN, CHIP).classes[roofline.COPIES]
  index, frame = 4, 2 * 8 * 16
  # Out of the stack, read and written, and into it again.
  assert copies.num_bytes == 30 * (2 * frame + 2 * frame + index)
  assert not copies.flops


def test_the_rest_is_element_by_element():
  found = roofline.roofline(KNOWN, CHIP)
  rest = found.classes[roofline.ELEMENTWISE]
  assert rest.num_bytes == 30 * 8 * 8 * (2 + 4)
  assert set(found.classes) == {
    *(roofline.LINEAR, roofline.COPIES, roofline.ELEMENTWISE)
  }
  sums = [work.seconds for work in found.classes.values()]
  assert found.total.seconds == pytest.approx(sum(sums))
  head, *rows = found.rows()
  assert 'not measured' in head[0] and len(rows) == 3


def test_a_loop_whose_count_is_not_told_is_counted_by_its_condition():
  counted = UNKNOWN.replace(
    'ROOT %yes = pred[] constant(true)',
    '%i = s32[] get-tuple-element(%t), index=0\n  %n = s32[] constant(30)\n'
    '  ROOT %lt = pred[] compare(%i, %n), direction=LT',
  )
  assert roofline.roofline(counted, CHIP) == roofline.roofline(KNOWN, CHIP)


def line(text: str, chip: chips.Chip = CHIP) -> roofline.Roofline:
  """Of a program of one instruction, with operands q, k, x and w."""
  return roofline.roofline(
    'ENTRY %main (q: bf16[1]) -> bf16[1] {\n'
    '  %q = bf16[2,6,3,8]{3,2,1,0} parameter(0)\n'
    '  %k = bf16[2,9,3,8]{3,2,1,0} parameter(1)\n'
    '  %x = f32[1,4,5,6,8]{4,3,2,1,0} parameter(2)\n'
    '  %w = f32[3,3,3,8,7]{4,3,2,1,0} parameter(3)\n'
    '  %c = bf16[64]{0:T(1024)(128)(2,1)S(1)} parameter(4)\n'
    f'  ROOT %r = {text}\n}}\n',
    chip,
  )


@pytest.mark.parametrize(
  'layer, kind',
  [
    ('layers/self_attention/cond', roofline.SELF_ATTENTION),
    ('layers/cross_attention', roofline.CROSS_ATTENTION),
  ],
)
def test_an_attention_kernel_counts_over_all_its_keys(layer, kind):
  found = line(
    '(bf16[2,3,6,8]{3,1,2,0}, u8[0]{0}) custom-call(%q, %k, %k), '
    'custom_call_target="__cudnn$fmhaSoftmax", '
    f'metadata={{op_name="jit(run)/{layer}/dot_product_attention_fwd"}}'
  )
  assert found.classes[kind].flops == 4 * (2 * 6 * 3 * 8) * 9
  assert found.classes[kind].num_bytes == 2 * (2 * 6 + 2 * 9) * 2 * 24


def test_a_tpu_kernel_is_known_by_its_name_and_may_have_several_lines():
  found = line(
    'bf16[2,6,3,8]{3,2,1,0} custom-call(%q, %k, %k), '
    'custom_call_target="tpu_custom_call", kernel_metadata={\n"block": 1\n}, '
    'metadata={op_name="jit(run)/cross_attention/splash_mha_fwd"}'
  )
  work = found.classes[roofline.CROSS_ATTENTION]
  # [.., heads, keys, width].
  assert work.flops == 4 * (2 * 6 * 3 * 8) * 3


def test_convolutions_in_float32_take_twice_as_long_on_a_gpu():
  text = (
    '(f32[1,4,5,6,7]{4,3,2,1,0}, u8[0]{0}) custom-call(%x, %w), '
    'window={size=3x3x3 pad=1_1x1_1x1_1}, dim_labels=b012f_012io->b012f, '
    'custom_call_target="__cudnn$convForward"'
  )
  gpu = chips.Chip(1e9, 1e9, 1e12, 1e6, chips.CHIPS['h100'].gpu)
  work = line(text, gpu).classes[roofline.CONVOLUTIONS]
  assert work.flops == work.float32_flops == 2 * 4 * 5 * 6 * 7 * 27 * 8
  assert work.seconds == pytest.approx(2 * work.flops / 1e9)
  assert 'in float32' in line(text, gpu).rows()[1][1]


def test_what_stays_in_a_chips_own_memory_moves_no_bytes():
  found = line('bf16[64]{0:T(1024)(128)(2,1)} copy(%c)')
  assert found.total.num_bytes == 2 * 64


def test_a_collective_takes_the_links():
  found = line(
    'bf16[2,6,3,8]{3,2,1,0} collective-permute(%q), channel_id=1, '
    'source_target_pairs={{0,1},{1,0}}'
  )
  size = 2 * 2 * 6 * 3 * 8
  assert found.classes == {
    roofline.COLLECTIVES: roofline.Work(0.0, size, size / 1e6)
  }


def test_a_program_that_is_cut_off_is_refused():
  with pytest.raises(ValueError, match='a bracket is not closed'):
    hlo.parse('ENTRY %main () -> f32[] {\n  %x = f32[] add(%a, %b')


def test_rows_of_a_long_program_have_units_to_read():
  work = roofline.Work(flops=7.14e15, num_bytes=9.996e11, seconds=8.594)
  rows = roofline.Roofline({roofline.LINEAR: work}).rows()
  assert rows[0][1] == '8.59 s, 7.14 PFLOP, 1 TB'
  short = roofline.Roofline({roofline.LINEAR: work * 1e-2}).rows()
  assert short[1] == ('- linear', '85.9 ms, 71.4 TFLOP, 10 GB')
