"""What `hiar-jax convert` shows of its work."""

import subprocess
import sys

_CODE = """
from hiar_jax.launch import convert_checkpoint
bar = convert_checkpoint._Bar()
for total in (3, 5):  # Two files of diffusers, of one name.
  for done in range(total):
    bar('diffusion_pytorch_model', done, total)
bar.close()
"""


def test_parts_of_one_name_have_a_bar_each():
  done = subprocess.run(
    [sys.executable, '-c', _CODE], capture_output=True, text=True, check=True
  )
  shown = [line.split()[1] for line in done.stderr.splitlines()]
  assert shown == ['3/3', '5/5']
