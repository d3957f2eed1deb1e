"""Ours equals the classes of diffusers and transformers."""

import pathlib
import re

import numpy as np
import pytest

# Before the modules under test, whose functions import them.
torch = pytest.importorskip('torch')
pytest.importorskip('diffusers')
pytest.importorskip('transformers')

from tests.parity import (  # noqa: E402
  peers,
  peers_lib,
  peers_networks,
  peers_solvers,
)

_PAGE = pathlib.Path(__file__).parents[2] / 'docs' / 'parity.md'

# torch and its companions are not written for warnings that are errors.
pytestmark = pytest.mark.filterwarnings('default')


def check(comparisons):
  """Every float32 result passes; bfloat16 is no worse than the peer's own."""
  seen = list(comparisons)
  assert seen
  for comparison in seen:
    assert np.abs(comparison.theirs).max() > 0.1, comparison
    assert comparison.passes(), (str(comparison), comparison.errors())
    low = comparison.errors('ours_low')
    if low is not None:
      assert 1e-4 < low[1] < 3 * comparison.errors('theirs_low')[1]


@pytest.mark.parametrize('num_steps', [1, 2, 3, 20])
def test_solvers_equal_the_schedulers(num_steps):
  check(peers_solvers.solver_comparisons(num_steps=num_steps, shift=5.0))


def test_transformer_equals_the_peer():
  check(
    peers_networks.transformer_comparisons(
      'DiT', num_heads=2, ffn_dim=96, text_dim=16, text_len=6
    )
  )


def test_umt5_equals_the_peer():
  check(peers_networks.umt5_comparisons(dim=64, num_heads=2, num_layers=2))


@pytest.mark.slow
def test_vae_equals_the_peer():
  check(peers_networks.vae_comparisons(base_dim=8))


@pytest.mark.slow
def test_text_to_video_equals_the_peer():
  check(
    peers_networks.sampler_comparisons(num_heads=2, ffn_dim=96, num_steps=4)
  )


@pytest.mark.slow
def test_every_row_of_the_page_holds_at_its_own_size():
  """Minutes, and 4 GB: the released widths, 50 steps of the solvers."""
  page, seen = _PAGE.read_text(), 0
  for comparison in peers.comparisons(small=False):
    start = [comparison.part, comparison.output, comparison.peer]
    assert f'| {" | ".join(start)} |' in page, comparison
    assert comparison.passes(), (str(comparison), comparison.errors())
    seen += 1
  assert seen == len(_rows(page))


def test_the_page_says_what_is_allowed():
  rows = _rows(_PAGE.read_text())
  assert len(rows) > 10
  for cells in rows:
    assert float(cells[4]) <= peers_lib.FLOAT32, cells


def _rows(page: str) -> list[list[str]]:
  """Cells of the table of peers."""
  table = re.search(r'\n## Peers\n.*?\n\|---[^\n]*\n(.*?)\n\n', page, re.S)[1]
  return [line.strip('| ').split(' | ') for line in table.splitlines()]


def test_a_difference_is_told():
  theirs = np.float32([3.0, 4.0])
  near, far = theirs + 1e-6, theirs + np.float32([0, 0.5])
  comparison = peers_lib.Comparison('a', 'b', 'c', near, theirs, far, far)
  assert comparison.passes()
  assert comparison.errors('ours_low') == (0.5, 0.125)
  assert not peers_lib.Comparison('a', 'b', 'c', far, theirs).passes()
  assert not peers_lib.Comparison('a', 'b', 'c', near * np.nan, theirs).passes()
  with pytest.raises(ValueError, match='a, c: ours has shape'):
    peers_lib.Comparison('a', 'b', 'c', near[:1], theirs)


def test_random_weights_leave_nothing_at_rest():
  module = torch.nn.Sequential(torch.nn.LayerNorm(64), torch.nn.Linear(64, 32))
  module._keep_in_fp32_modules = ['0']
  peers_lib.randomise(module, seed=0)
  for parameter in module.parameters():
    assert parameter.std() > 0.05
  peers_lib.to_bfloat16(module)
  assert module[0].weight.dtype == torch.float32
  assert module[1].weight.dtype == torch.bfloat16
