"""The main job at the command line: a video, or one line that says why not."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from hiar_jax.codecs import linear
from hiar_jax.configs import bouncing_linear
from hiar_jax.data import bouncing
from hiar_jax.denoiser import Denoiser
from hiar_jax.models.config import WanConfig
from hiar_jax.runtime import video_io
from hiar_jax.sampling import loading
from tests.forked_runs import DRIVER

_ROOT = pathlib.Path(__file__).parents[2]
_PROGRAM = _ROOT / 'launch' / 'generate.py'
_CONFIG = f'--config={_ROOT / "configs" / "bouncing_linear.py"}'


def _export(folder):
  """The small world's pipeline with weights that were never trained."""
  config = bouncing_linear.get_config().to_dict()
  denoiser = Denoiser(WanConfig(**config['model']))
  params = jax.tree.map(
    lambda leaf: np.full(leaf.shape, 0.01, leaf.dtype),
    jax.eval_shape(lambda: denoiser.init(jax.random.key(0))),
  )
  codec = linear.fit_linear_codec(
    bouncing.videos(bouncing.WorldConfig(num_frames=3), seed=0, num=8),
    channels=config['model']['channels'],
  )
  loading.export(folder, config=config, params=params, codec=codec)


@pytest.fixture(scope='module')
def pipeline(tmp_path_factory):
  folder = tmp_path_factory.mktemp('pipeline')
  _export(folder)
  return folder


@pytest.mark.slow
def test_one_command_makes_the_videos_and_their_sheets(pipeline, tmp_path):
  (tmp_path / 'prompts.txt').write_text('a red disc on grey\n\na cat\n')
  done = subprocess.run(
    [
      *(sys.executable, _PROGRAM, _CONFIG, f'--weights={pipeline}'),
      *('--prompts_file=prompts.txt', '--out=video.mp4', '--scale=2'),
      *('--num_blocks=2', '--fps=5', '--order=block_first'),
    ],
    cwd=tmp_path,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  for i in range(2):
    frames, fps = video_io.read_video(tmp_path / f'video-{i}.mp4')
    assert fps == 5 and frames.shape == (6, 128, 128, 3)
    with Image.open(tmp_path / f'video-{i}.png') as sheet:
      assert sheet.width > 256
  assert sorted(path.name for path in tmp_path.iterdir()) == [
    'prompts.txt',
    *('video-0.mp4', 'video-0.png', 'video-1.mp4', 'video-1.png'),
  ]
  *written, times = done.stdout.splitlines()
  assert written == [
    'wrote video-0.mp4 and video-0.png, seed 0',
    f'wrote video-1.mp4 and video-1.png, seed {2**64}',
  ]
  for name in ('import', 'load', 'compile', 'sample, decode and encode'):
    assert f'{name} ' in times
  assert "'a cat' names no shape" in done.stderr
  assert "'a red disc on grey'" not in done.stderr


@pytest.mark.slow
def test_what_is_made_stays_when_the_rest_is_stopped(pipeline, tmp_path):
  (tmp_path / 'prompts.txt').write_text('a red disc on grey\n' * 20)
  command = [
    *(sys.executable, _PROGRAM, _CONFIG, f'--weights={pipeline}'),
    *('--prompts_file=prompts.txt', '--scale=1', '--num_blocks=2'),
  ]
  process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE)
  assert b'wrote video-0.mp4' in process.stdout.readline()
  process.send_signal(signal.SIGTERM)
  process.communicate()
  assert process.returncode == 143
  made = sorted(tmp_path.glob('video-*.mp4'))
  assert made and len(made) < 20 and not list(tmp_path.glob('.*'))
  times = {path: path.stat().st_mtime_ns for path in made}
  done = subprocess.run(
    command, cwd=tmp_path, capture_output=True, text=True, check=True
  )
  left = [line for line in done.stdout.splitlines() if 'is there' in line]
  assert len(left) >= len(made) - 1  # One may lack its sheet.
  assert done.stdout.count('wrote ') == 20 - len(left)
  for path in made[: len(left)]:
    assert path.stat().st_mtime_ns == times[path]


@pytest.mark.slow
@pytest.mark.parametrize('how', [(), ('--stream',)], ids=['offline', 'stream'])
def test_a_video_goes_on_from_an_image(pipeline, tmp_path, how):
  image = np.full((128, 128, 3), 30, np.uint8)
  image[40:90, 40:90] = 220
  Image.fromarray(image).save(tmp_path / 'image.png')
  done = subprocess.run(
    [
      *(sys.executable, _PROGRAM, f'--pipeline={pipeline}'),
      *('--prompt=a white square on black', '--continue_from=image.png'),
      *('--num_blocks=1', '--scale=1', *how),
    ],
    cwd=tmp_path,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  frames, _ = video_io.read_video(tmp_path / 'video.mp4')
  assert frames.shape == (4, 64, 64, 3)
  assert np.abs(frames[0].astype(int) - image[::2, ::2]).mean() < 10


@pytest.mark.slow
def test_each_mistake_is_one_line(pipeline, tmp_path):
  for name in ('empty.txt', 'not_text.txt'):
    (tmp_path / name).write_bytes(b'\xff\xfe' if 'not' in name else b'\n \n')
  (tmp_path / 'cut').mkdir()
  for path in pipeline.iterdir():
    (tmp_path / 'cut' / path.name).write_bytes(path.read_bytes()[:-1000])
  (tmp_path / 'folder.mp4').mkdir()
  (tmp_path / 'sheet.png').mkdir()
  weights, prompt = f'--weights={pipeline}', '--prompt=a red disc on grey'
  good = [_CONFIG, weights, prompt]
  cases = {
    'give either --config or --pipeline': [prompt],
    '--weights goes with --config': [
      *(f'--pipeline={pipeline}', weights, prompt)
    ],
    "no pipeline 'nowhere'": ['--pipeline=nowhere', prompt],
    'give either --prompt or --prompts_file': [_CONFIG, weights],
    "prompt '' is not a text": [_CONFIG, weights, '--prompt='],
    'no prompts at missing.txt': [
      _CONFIG,
      weights,
      '--prompts_file=missing.txt',
    ],
    'empty.txt has no prompts: all lines are blank': [
      *(_CONFIG, weights, '--prompts_file=empty.txt')
    ],
    'not_text.txt is not UTF-8: ': [
      *(_CONFIG, weights, '--prompts_file=not_text.txt')
    ],
    'flag --num_blocks=0': [*good, '--num_blocks=0'],
    "GB of the host's memory": [*good, '--num_blocks=100000000'],
    '2 seeds for 1 videos': [*good, '--seed=1', '--seed=2'],
    'flag --order=sideways': [*good, '--order=sideways'],
    "order 'hybrid', and no other,": [*good, '--anchor_blocks=2'],
    'takes either anchor_blocks, such as 1: ': [*good, '--order=hybrid'],
    'scale=300 makes frames of 19200x19200': [*good, '--scale=300'],
    'cannot write /nowhere/video.mp4': [*good, '--out=~/video.mp4'],
    'no image or video at /nowhere/x.png': [
      *(*good, '--continue_from=~/x.png')
    ],
    'cannot write nowhere/video.mp4': [*good, '--out=nowhere/video.mp4'],
    'cannot write folder.mp4: it is a folder': [*good, '--out=folder.mp4'],
    'cannot write sheet.png: it is a folder': [*good, '--out=sheet.mp4'],
    'video file video.avi does not end in .mp4': [*good, '--out=video.avi'],
    'no image or video at none.png': [*good, '--continue_from=none.png'],
    '--continue_frames goes with --continue_from': [
      *(*good, '--continue_frames=2')
    ],
    'fps=0.0 is not positive': [*good, '--fps=0'],
    'fps=inf is not positive': [*good, '--fps=inf'],
    'no text embeddings at nowhere': [*good, '--text_encoder=nowhere'],
    "unknown config key 'rolout'": [*good, '--config.rolout.window=9'],
    '--config.batch_size would change nothing': [
      *(*good, '--config.batch_size=3')
    ],
    'window=20 is not a positive multiple of frames_per_block=3': [
      *(*good, '--config.rollout.window=20')
    ],
    'does not fit the model': [*good, '--config.model.dim=64'],
    'no weights at missing': [*good, '--weights=missing'],
    'weights cut/student.safetensors are damaged': [*good, '--weights=cut'],
    "no weights of 'bounce' come with the package": [
      *(_CONFIG, prompt, '--config.name=bounce')
    ],
    "Unknown command line flag 'promt'": [_CONFIG, weights, '--promt=a'],
    "unexpected argument 'disc'": [*good, 'disc'],
  }
  done = subprocess.run(
    [
      *(sys.executable, '-c', DRIVER, _PROGRAM),
      *(json.dumps(arguments) for arguments in cases.values()),
    ],
    cwd=tmp_path,
    env=os.environ | {'HOME': '/nowhere'},
    capture_output=True,
    text=True,
    check=True,
  )
  for message, (status, stderr) in zip(cases, json.loads(done.stdout)):
    assert status == 2, (message, stderr)
    assert stderr.startswith('error: '), (message, stderr)
    assert message in stderr, (message, stderr)
    assert stderr.count('\n') == 1, (message, stderr)
  assert not list(tmp_path.glob('*.mp4/*')) + list(tmp_path.glob('video*'))
