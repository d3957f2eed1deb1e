"""Runs the quickstart notebook and stores it with what its cells showed.

  python tests/launch/notebook_outputs.py

Pictures are stored as JPEG, and of videos, which hold megabytes, their line of
text: who runs a cell sees the video.
"""

import base64
import hashlib
import io
import pathlib

import nbclient
import nbformat
from PIL import Image

PATH = pathlib.Path(__file__).parents[2] / 'launch' / 'quickstart.ipynb'
_WIDTH = 640  # px of a stored picture, at most


def sources(notebook: nbformat.NotebookNode) -> str:
  """Differs between notebooks with other cells of code."""
  cells = [c.source for c in notebook.cells if c.cell_type == 'code']
  return hashlib.sha256('\n\n'.join(cells).encode()).hexdigest()[:16]


def compact(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
  """Leaves of the outputs what a page can show."""
  for cell in notebook.cells:
    if cell.cell_type != 'code':
      continue
    cell.metadata.pop('execution', None)
    # Bars of progress, with times that are of no other machine.
    cell.outputs = [o for o in cell.outputs if o.get('name') != 'stderr']
    for output in cell.outputs:
      data = output.get('data', {})
      pictures = [data.pop(mime, None) for mime in ('image/jpeg', 'image/png')]
      data.pop('text/html', None)
      data.pop('application/vnd.jupyter.widget-view+json', None)
      picture = next(filter(None, pictures), None)
      if picture:
        data['image/jpeg'] = _jpeg(picture)
  notebook.metadata = {
    'kernelspec': notebook.metadata.kernelspec,
    'hiar_jax': {'sources': sources(notebook)},
  }
  return notebook


def _jpeg(picture: str) -> str:
  with Image.open(io.BytesIO(base64.b64decode(picture))) as image:
    image = image.convert('RGB')
    image.thumbnail((_WIDTH, 4 * _WIDTH))
    file = io.BytesIO()
    image.save(file, 'JPEG', quality=70)
  return base64.b64encode(file.getvalue()).decode()


def main() -> None:
  notebook = nbformat.read(PATH, as_version=4)
  client = nbclient.NotebookClient(
    notebook, timeout=900, resources={'metadata': {'path': str(PATH.parent)}}
  )
  nbformat.write(compact(client.execute()), PATH)


if __name__ == '__main__':
  main()
