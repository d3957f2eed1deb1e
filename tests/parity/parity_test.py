"""Ours equals the public PyTorch code on its stored numbers."""

import pytest

from tests.parity import all_cases, golden_lib

# These have tests of their own, which compare the same arrays in more ways.
_ELSEWHERE = ('umt5', 'vae')


@pytest.mark.parametrize(
  'case',
  [case for case in all_cases.CASES if case.file not in _ELSEWHERE],
  ids=str,
)
def test_ours_equals_the_public_code(case):
  assert case.error() <= case.tolerance


@pytest.mark.parametrize('file', golden_lib.files())
def test_every_stored_result_is_compared(file):
  assert not all_cases.uncompared(file)
