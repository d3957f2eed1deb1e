"""What is alive at a program's peak, of programs short enough to count."""

import pytest

from hiar_jax.planning import hlo, peak


def at_peak(text):
  found = peak.at_peak(hlo.parse(text))
  return [held.what for held in found], sum(held.num_bytes for held in found)


def test_what_nobody_takes_any_more_is_gone():
  text = """
ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %a = f32[8,8]{1,0} broadcast(%x), dimensions={0}
  %b = f32[8,4]{1,0} slice(%a), slice={[0:8], [0:4]}
  %c = f32[8,7]{1,0} slice(%b), slice={[0:8], [0:4]}
  ROOT %d = f32[8]{0} reduce(%c)
}
"""
  # a and b, and neither b and c nor the argument.
  assert at_peak(text) == (['f32[8,8]', 'f32[8,4]'], 4 * (64 + 32))


def test_a_result_in_the_place_of_an_argument_takes_no_room():
  text = """HloModule jit_f, input_output_alias={ {1}: (0, {}, may-alias) }, x=1

ENTRY %main (x: f32[8]) -> (f32[4], f32[8]) {
  %x = f32[8]{0} parameter(0)
  %a = f32[8]{0} negate(%x)
  %b = f32[4]{0} slice(%a), slice={[0:4]}
  ROOT %t = (f32[4]{0}, f32[8]{0}) tuple(%b, %a)
}
"""
  assert at_peak(text) == (['f32[4]'], 4 * 4)


LOOP = """
%body (s: (s32[], f32[100], f32[8])) -> (s32[], f32[100], f32[8]) {
  %s = (s32[], f32[100]{0}, f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %ring = f32[100]{0} get-tuple-element(%s), index=1
  %x = f32[8]{0} get-tuple-element(%s), index=2
  %wide = f32[8,9]{1,0} broadcast(%x), dimensions={0}
  %y = f32[8]{0} reduce(%wide)
  %new = f32[100]{0} dynamic-update-slice(%ring, %y, %i)
  ROOT %t = (s32[], f32[100]{0}, f32[8]{0}) tuple(%i, %new, %y)
}

%more (s: (s32[], f32[100], f32[8])) -> pred[] {
  %s = (s32[], f32[100]{0}, f32[8]{0}) parameter(0)
  ROOT %p = pred[] constant(true)
}

ENTRY %main (x: f32[8]) -> f32[100] {
  %x = f32[8]{0} parameter(0)
  %zero = s32[] constant(0)
  %ring = f32[100]{0} broadcast(%zero), dimensions={}
  %first = f32[8]{0} negate(%x)
  %t = (s32[], f32[100]{0}, f32[8]{0}) tuple(%zero, %ring, %first)
  %w = (s32[], f32[100]{0}, f32[8]{0}) while(%t), condition=%more, body=%body
  ROOT %out = f32[100]{0} get-tuple-element(%w), index=1
}
"""


def test_what_goes_round_a_loop_is_there_once_and_beside_its_inside():
  kinds, size = at_peak(LOOP)
  # The ring is changed in place; what is new of x lies where it was.
  assert kinds == ['f32[100]', 'f32[8,9]', 'f32[8]', 's32[]']
  assert size == 4 * (100 + 72 + 8 + 1)


def test_arrays_of_the_same_sizes_are_told_together():
  text = """
ENTRY %main (x: f32[9]) -> f32[9] {
  %x = f32[9]{0} parameter(0)
  %a = f32[1000,9]{1,0} broadcast(%x), dimensions={1}
  %b = f32[1000,9]{1,0} negate(%a)
  ROOT %c = f32[9]{0} reduce(%a, %b)
}
"""
  said = peak.largest(hlo.parse(text), 1)
  assert said == '0.00 GB: 2 x f32[1000,9]'


@pytest.mark.parametrize(
  ('layout', 'num_bytes'),
  [
    ('{1,0}', 2 * 10 * 3),
    # To 8 rows and 128 columns; the innermost axis is the first one named.
    ('{1,0:T(8,128)(2,1)}', 2 * 16 * 128),
    ('{0,1:T(8,128)(2,1)}', 2 * 128 * 8),
  ],
)
def test_a_tile_is_held_whole(layout, num_bytes):
  (array,) = hlo.arrays(f'bf16[10,3]{layout}')
  assert array.held_bytes == num_bytes and array.num_bytes == 60
