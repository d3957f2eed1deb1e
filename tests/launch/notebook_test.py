"""The quickstart notebook runs from top to bottom and shows what it says."""

import re

import nbclient
import nbformat
import pytest

from tests.launch import notebook_outputs

_PATH = notebook_outputs.PATH


# The same cells on fewer blocks.
_SHORTER = (
  (r'num_blocks=28', 'num_blocks=4'),
  (r'wait\(6\)', 'wait(1.5)'),
)


@pytest.fixture(
  scope='module',
  params=[False, pytest.param(True, marks=pytest.mark.slow)],
  ids=['shorter', 'whole'],
)
def executed(request):
  notebook = nbformat.read(_PATH, as_version=4)
  if not request.param:
    cells = [cell for cell in notebook.cells if cell.cell_type == 'code']
    for pattern, shorter in _SHORTER:
      count = 0
      for cell in cells:
        cell.source, found = re.subn(pattern, shorter, cell.source, flags=re.M)
        count += found
      assert count, f'the notebook has no {pattern}'
  client = nbclient.NotebookClient(
    notebook, timeout=240, resources={'metadata': {'path': str(_PATH.parent)}}
  )
  return client.execute()


def _outputs(notebook, mime):
  return [
    output['data'][mime]
    for cell in notebook.cells
    for output in cell.get('outputs', ())
    if mime in output.get('data', {})
  ]


def test_it_is_stored_with_what_its_cells_showed():
  stored = nbformat.read(notebook_outputs.PATH, as_version=4)
  # Else: python tests/launch/notebook_outputs.py
  assert stored.metadata.hiar_jax.sources == notebook_outputs.sources(stored)
  assert len(_outputs(stored, 'image/jpeg')) == 3
  assert [text for text in _outputs(stored, 'text/plain') if 'Video(' in text]
  kinds = {o.output_type for c in stored.cells for o in c.get('outputs', ())}
  assert 'error' not in kinds
  assert notebook_outputs.PATH.stat().st_size < 300_000


def test_videos_play_and_pictures_show(executed):
  videos = _outputs(executed, 'text/html')
  assert len(videos) == 2
  assert all('<video' in html and 'data:video/mp4' in html for html in videos)
  # Two contact sheets and the live preview.
  assert len(_outputs(executed, 'image/png')) == 3


def test_the_preview_is_a_picture_with_a_box_and_buttons(executed):
  widgets = executed.metadata['widgets']
  (state,) = [kind['state'] for kind in widgets.values()]
  models = [model['model_name'] for model in state.values()]
  assert {'ImageModel', 'TextModel', 'ButtonModel'} <= set(models)


def test_the_live_stream_takes_new_prompts(executed):
  printed = ''.join(
    output['text']
    for cell in executed.cells
    for output in cell.get('outputs', ())
    if output.get('name') == 'stdout'
  )
  assert printed.count('from block') == 2
  assert 'magenta' in printed
