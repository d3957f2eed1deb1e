"""`hiar-jax encode videos` as people run it: killed, resumed, mistaken."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from hiar_jax.data import latents
from hiar_jax.runtime import stopping, video_io
from hiar_jax.weights import conversion, releases
from tests import fake_release, forked_runs

_ROOT = pathlib.Path(__file__).parents[2]
_PROGRAM = str(_ROOT / 'launch' / 'encode_videos.py')
_NUM = 16
_IMPORTS = 'import hiar_jax.training.inputs\n'

_CONFIG = """
import ml_collections

def get_config():
  c = ml_collections.ConfigDict()
  c.name = c.phase = 'videos'
  c.videos = dict(
    source='folder', path={videos!r}, fps=8, num_frames=5, height=16, width=16
  )
  c.codec = dict(folder={folder!r})
  c.latents = dict(dir={latents!r}, num=0, shard_size=2, batch_size=1)
  return c
"""


@pytest.fixture(scope='module')
def inputs(tmp_path_factory):
  """A folder with a converted release, videos and a config."""
  root = tmp_path_factory.mktemp('encode')
  fake_release.write_release(root / 'wan', 'wan')
  conversion.to_ours(
    releases.find(root / 'wan'),
    root / 'ours',
    name='tiny',
    options=conversion.Options(latent_size=(4, 4), compute_dtype='float32'),
  )
  (root / 'videos').mkdir()
  frames = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8)
  video_io.write_video(root / 'videos' / '00.mp4', frames, fps=8)
  whole = (root / 'videos' / '00.mp4').read_bytes()
  for index in range(_NUM):
    path = root / 'videos' / f'{index:02d}.mp4'
    path.write_bytes(b'broken' if index == 4 else whole)
    path.with_suffix('.txt').write_text(f'video {index}')
  video_io.write_video(root / 'videos' / '09.mp4', frames[:3], fps=8)
  paths = dict(
    videos=str(root / 'videos'),
    folder=str(root / 'ours'),
    latents=str(root / 'latents'),
  )
  (root / 'config.py').write_text(_CONFIG.format(**paths))
  return root


@pytest.fixture(scope='module')
def start(inputs, tmp_path_factory):
  """Starts the program."""
  environment = os.environ | {
    'PYTHONPATH': str(_ROOT),
    'JAX_COMPILATION_CACHE_DIR': str(tmp_path_factory.mktemp('programs')),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
  }

  def run(*arguments):
    config = f'--config={inputs / "config.py"}'
    return subprocess.Popen(
      [sys.executable, _PROGRAM, config, *arguments],
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )

  return run


def contents(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope='module')
def whole(start):
  """What a run to which nothing happened printed; its files are there."""
  run = start()
  output, _ = run.communicate(timeout=300)
  assert run.returncode == 0, output
  return output


def test_videos_that_are_left_out_are_named_and_counted(whole):
  output = whole
  assert f'{_NUM} of {_NUM} videos to encode; share 0 of 1' in output
  assert 'left out: ' in output and '04.mp4 cannot be decoded' in output
  assert '09.mp4 is too short: it has 0.38 s' in output
  assert f'2 of {_NUM} videos were left out' in output


@pytest.mark.parametrize(
  ('ending', 'status'),
  [
    (signal.SIGKILL, -signal.SIGKILL),
    (signal.SIGTERM, stopping.SIGTERM_STATUS),
  ],
)
def test_an_ended_run_goes_on_to_the_same_files(
  ending, status, whole, inputs, start, tmp_path
):
  out = tmp_path / 'latents'
  where = f'--config.latents.dir={out}'
  run = start(where)
  while len(list(out.glob('latents-*.array_record'))) < 2:
    assert run.poll() is None, run.stdout.read()
    time.sleep(0.001)
  run.send_signal(ending)
  output, _ = run.communicate()
  assert run.returncode == status, output
  assert 'Traceback' not in output
  assert len(list(out.glob('latents-*.array_record'))) < _NUM // 2
  run = start(where)
  output, _ = run.communicate(timeout=300)
  assert run.returncode == 0, output
  assert contents(out) == contents(inputs / 'latents')
  output, _ = start(where, '--verify').communicate()
  assert f'{out}: {_NUM - 2} videos, whole; 2 could not be read' in output
  source = latents.EncodedVideos(out)
  assert source[0].shape == source.manifest.shape
  assert source.captions[4] == 'video 5'


def test_a_users_mistakes_are_one_line_each(inputs, tmp_path):
  out = tmp_path / 'out'
  bare, alone = tmp_path / 'bare', tmp_path / 'alone'
  for folder in (bare, alone):
    folder.mkdir()
  (bare / 'a.mp4').write_bytes(b'')
  (alone / 'a.mp4').write_bytes(b'')
  (alone / 'captions.jsonl').write_text('{"file": "b.mp4", "caption": "b"}\n')
  mistakes = {
    '--config.videos.path=none': 'no videos at none: no such folder',
    f'--config.videos.path={bare}': f'1 of 1 videos in {bare} have no caption',
    f'--config.videos.path={alone}': 'has captions of 1 videos that are not in',
    '--config.videos.source=none': "videos.source='none' is not one of",
    '--config.videos.num_frames=6': 'videos of 6 frames do not divide',
    '--config.videos.height=17': 'videos of height=17 do not divide',
    '--config.codec.folder=none': 'none/config.json',
    '--config.latents.batch_size=0': 'latents.batch_size=0 is not at least 1',
    '--config.latents.num=99': f'latents.num=99 is more than the {_NUM} videos',
    '--verify': 'hiar-jax encode videos makes them',
  }
  where = [f'--config={inputs / "config.py"}', f'--config.latents.dir={out}']
  driven = subprocess.run(
    [
      *(sys.executable, '-c', _IMPORTS + forked_runs.DRIVER, _PROGRAM),
      *(json.dumps([*where, argument]) for argument in mistakes),
    ],
    env=os.environ | {'PYTHONPATH': str(_ROOT)},
    capture_output=True,
    text=True,
    check=True,
  )
  results = json.loads(driven.stdout)
  for (argument, message), (status, text) in zip(mistakes.items(), results):
    assert status == 2, (argument, text)
    assert text.startswith('error: ') and message in text, (argument, text)
    assert text.count('\n') == 1, text
  assert not out.exists()
