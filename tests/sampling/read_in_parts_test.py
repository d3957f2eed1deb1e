"""Weights are read in the parts of their place, by as many hosts as there are.

14B-shaped: 40 heads and 40 layers over meshes of eight devices.
"""

import json
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from hiar_jax.denoiser import Denoiser
from hiar_jax.models.config import WanConfig
from hiar_jax.sampling import meshes
from hiar_jax.weights import held, layouts, networks, safetensors_io
from tests import wide_pipeline

_ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('wide')
  wide_pipeline.write(folder)
  return folder


def stored_bytes(folder):
  reader = safetensors_io.Reader(folder / layouts.STUDENT_FILE)
  sizes = [entry.num_bytes for entry in reader.entries.values()]
  return sum(sizes), max(sizes)


@pytest.mark.parametrize('dtype', ['bfloat16', 'int8'])
def test_the_host_holds_a_part_and_a_device_its_own(folder, monkeypatch, dtype):
  denoiser = Denoiser(WanConfig(**wide_pipeline.CONFIG['model']))
  total, largest = stored_bytes(folder)
  for name in ('read', 'read_part'):  # What counts is put back.
    monkeypatch.setattr(
      safetensors_io.Reader, name, getattr(safetensors_io.Reader, name)
    )
  shapes = held.Held(dtype).shapes(
    jax.eval_shape(denoiser.init, jax.random.key(0)), 'bfloat16'
  )

  def load(sizes):
    reads = wide_pipeline.Reads()
    mesh = meshes.make(meshes.parse(sizes)) if sizes else None
    params = networks.load_weights(
      folder / layouts.STUDENT_FILE,
      meshes.abstract_params(denoiser, shapes, mesh),
    )
    return params, reads

  whole, _ = load('')
  params, reads = load('stage=2,tensor=4')
  jax.tree.map(np.testing.assert_array_equal, params, whole)
  on_device = wide_pipeline.device_bytes(params)
  print(
    f'{dtype}: {total / 1e6:.1f} MB in the file, {reads.largest / 1e6:.2f} at '
    f'once on the host (largest array {largest / 1e6:.2f}), '
    f'{on_device / 1e6:.1f} on a device'
  )
  # A part of a stack, or a layer of it.
  assert reads.largest <= largest / 4
  # Once, although two stages have each part.
  assert reads.total == total
  # What is no matrix of a layer is on all of them, and as it was.
  parts = 4 if dtype == 'bfloat16' else 8
  assert on_device < 1.25 * total / parts


def _run(folder, out, mesh, devices, *cluster):
  return subprocess.Popen(
    [
      *(sys.executable, '-m', 'tests.wide_pipeline'),
      *(str(folder), str(out), mesh, str(devices), *cluster),
    ],
    cwd=_ROOT,
    stdout=subprocess.PIPE,
    text=True,
  )


def _told(*processes):
  said = [process.communicate(timeout=900)[0] for process in processes]
  assert not any(process.returncode for process in processes), said
  return [json.loads(one.splitlines()[-1]) for one in said]


@pytest.mark.slow
def test_all_meshes_make_the_frames_of_one_device(folder, tmp_path):
  total, largest = stored_bytes(folder)
  outs = [tmp_path / f'{name}.npy' for name in ('one', 'eight', 'a', 'b')]
  _told(_run(folder, outs[0], 'stage=1', 1))
  (eight,) = _told(_run(folder, outs[1], 'stage=2,tensor=4', 8))
  assert eight['read'] == total
  with socket.socket() as server:
    server.bind(('127.0.0.1', 0))
    port = server.getsockname()[1]
  two = _told(
    *(
      _run(folder, out, 'tensor=8', 4, f'127.0.0.1:{port}', '2', str(i))
      for i, out in enumerate(outs[2:])
    )
  )
  for told in two:
    # Half of what is divided; vectors that are whole everywhere are few.
    assert told['read'] < 0.55 * total
    # What is no matrix of a layer may be whole.
    assert told['largest'] < largest / 6
  one, *others = (np.load(out).astype(int) for out in outs)
  off = [int(np.abs(other - one).max()) for other in others]
  print(eight, two, f'levels off at most: {off}')
  assert max(off) <= 1
  assert one.std() > 10
