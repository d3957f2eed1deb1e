"""The program over devices of two processes makes the frames of one device."""

import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

av = pytest.importorskip('av')

_PROGRAM = pathlib.Path(__file__).parents[2] / 'launch' / 'generate.py'
_WANTED = (
  *('--config=bouncing', '--num_blocks=4', '--seed=3', '--scale=1'),
  '--prompt=a large red disc drifting fast over dark blue',
)


def _free_port() -> int:
  with socket.socket() as server:
    server.bind(('127.0.0.1', 0))
    return server.getsockname()[1]


def _start(folder, *flags, devices=1):
  return subprocess.Popen(
    [sys.executable, str(_PROGRAM), *_WANTED, *flags],
    cwd=folder,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    env=os.environ
    | {
      'JAX_PLATFORMS': 'cpu',
      'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
    },
  )


def _frames(path):
  with av.open(str(path)) as container:
    return np.stack(
      [f.to_ndarray(format='rgb24') for f in container.decode(video=0)]
    ).astype(int)


@pytest.mark.slow
@pytest.mark.parametrize(
  'flags', [('--mesh=stage=4',), ('--mesh=stage=2,tensor=2', '--stream')]
)
def test_two_processes_make_the_video_of_one_device(tmp_path, flags):
  one = _start(tmp_path, '--out=one.mp4')
  said = one.communicate(timeout=300)[0]
  assert one.returncode == 0, said
  port = _free_port()
  both = [
    _start(
      tmp_path,
      *(*flags, f'--coordinator=127.0.0.1:{port}', '--num_processes=2'),
      *(f'--process_id={i}', '--out=two.mp4'),
      devices=2,
    )
    for i in range(2)
  ]
  for process, said in zip(both, [p.communicate(timeout=500)[0] for p in both]):
    assert process.returncode == 0, said
  # Process 0 alone writes, and what it writes is the same video.
  assert {f.name for f in tmp_path.iterdir()} == {
    *('one.mp4', 'one.png', 'two.mp4', 'two.png'),
  }
  off = np.abs(_frames(tmp_path / 'one.mp4') - _frames(tmp_path / 'two.mp4'))
  # Rounding, and what the encoder makes of it.
  assert off.max() <= 4
