"""--stream at the command line: the file plays, however the program ends."""

import json
import os
import pathlib
import select
import signal
import subprocess
import sys
import time

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
_SMALL = {
  'dim': 16,
  'ffn_dim': 32,
  'num_heads': 1,
  'num_layers': 1,
  'unroll': 1,
}
_FRAMES = 3  # of a block
_PROMPT = '--prompt=a large red disc on dark blue'
_OTHER = 'a small green square over black'


# Runs the program with a stream that needs no network. While its fifth block is
# made, both signals arrive.
_FAKE = """
import dataclasses, os, runpy, signal, sys
import numpy as np
from hiar_jax.sampling import loading
from hiar_jax.text import word_hash
class Stream:
  mode, reason, given = 'fake', 'which makes nothing', None
  made = 0
  def send(self, prompt, at, **unused):
    print('send', at, prompt)
  def __next__(self):
    self.made += 1
    if self.made == 5:
      os.kill(os.getpid(), signal.SIGINT)
      os.kill(os.getpid(), signal.SIGTERM)
    return np.full((1, 3, 64, 64, 3), 40 * self.made, np.uint8)
@dataclasses.dataclass
class Pipeline:
  fps: float = 12.0
  frame_shape = (64, 64, 3)
  encoder, schedule = word_hash.WordHashEncoder(), {}
  def stream(self, *unused, **unused_too):
    return Stream()
loading.from_config = lambda *unused, **unused_too: Pipeline()
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
"""


def _run_fake(code, folder):
  return subprocess.run(
    [
      *(sys.executable, '-c', code, _PROGRAM, '--stream', '--num_blocks=0'),
      f'--config={_ROOT / "configs" / "bouncing_linear.py"}',
      *('--weights=none', _PROMPT, f'--prompt_at=3:{_OTHER}'),
      *('--scale=1', '--out=video.mp4'),
    ],
    cwd=folder,
    capture_output=True,
    text=True,
    check=False,
  )


@pytest.mark.slow
def test_a_ctrl_c_that_is_swallowed_while_compiling_counts(tmp_path):
  swallowing = _FAKE.replace(
    '    if self.made == 5:',
    """    if self.made == 1:
      try:
        os.kill(os.getpid(), signal.SIGINT)
      except KeyboardInterrupt:
        pass
    if self.made == 5:""",
  )
  done = _run_fake(swallowing, tmp_path)
  assert done.returncode == 130, done.stderr
  assert done.stderr.splitlines()[-1] == 'interrupted'
  assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_prompt_is_text_in_any_locale(tmp_path):
  told = _FAKE.replace(
    'def send(self, prompt, at, **unused):',
    """def send(self, prompt, at, **unused):
    prompt = ascii(prompt)""",
  )
  done = subprocess.run(
    [
      *(sys.executable, '-c', told, _PROGRAM, '--stream', '--num_blocks=0'),
      f'--config={_ROOT / "configs" / "bouncing_linear.py"}',
      *('--weights=none', '--prompt=ein roter Kreis über 黒'),
      *('--prompt_at=3:grün', '--scale=1', '--out=video.mp4'),
    ],
    cwd=tmp_path,
    capture_output=True,
    text=True,
    check=False,
    env=os.environ
    | {'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0'},
  )
  assert done.returncode == 0, done.stderr
  assert "send 3 'gr\\xfcn'" in done.stdout
  with Image.open(tmp_path / 'video.png') as sheet:
    assert sheet.text['Description'].startswith('ein roter Kreis über 黒')


@pytest.mark.slow
def test_the_block_under_way_is_the_last_one_when_stopped(tmp_path):
  done = _run_fake(_FAKE, tmp_path)
  assert done.returncode == 0, done.stderr
  assert f'send 3 {_OTHER}' in done.stdout
  frames, _ = video_io.read_video(tmp_path / 'video.mp4')
  assert len(frames) == 5 * _FRAMES
  wanted = 40 * (1 + np.arange(5).repeat(_FRAMES))
  np.testing.assert_allclose(frames.mean((1, 2, 3)), wanted, atol=3)
  with Image.open(tmp_path / 'video.png') as sheet:
    assert sheet.text['Description'] == (
      f'{_PROMPT.partition("=")[2]}; from block 3 on: {_OTHER}'
    )
  assert sorted(path.name for path in tmp_path.iterdir()) == [
    *('video.mp4', 'video.png')
  ]


@pytest.fixture(scope='module')
def arguments(tmp_path_factory):
  """The program with a tiny network that was never trained."""
  folder = tmp_path_factory.mktemp('pipeline')
  config = bouncing_linear.get_config()
  config.model.update(_SMALL)
  config = config.to_dict()
  denoiser = Denoiser(WanConfig(**config['model']))
  leaves, treedef = jax.tree.flatten(denoiser.init(jax.random.key(0)))
  # The head starts at zero; then no prompt would change anything.
  rng = np.random.default_rng(0)
  params = treedef.unflatten(
    [np.float32(x + 0.2 * rng.normal(size=x.shape)) for x in leaves]
  )
  codec = linear.fit_linear_codec(
    bouncing.videos(bouncing.WorldConfig(num_frames=3), seed=0, num=8),
    channels=config['model']['channels'],
  )
  loading.export(folder, config=config, params=params, codec=codec)
  return [
    *(sys.executable, str(_PROGRAM), f'--weights={folder}', '--stream'),
    f'--config={_ROOT / "configs" / "bouncing_linear.py"}',
    *(f'--config.model.{name}={value}' for name, value in _SMALL.items()),
    *('--scale=1', '--fps=5', '--out=video.mp4'),
  ]


def _run(arguments, folder):
  folder.mkdir(exist_ok=True)
  done = subprocess.run(
    arguments, cwd=folder, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr
  return done, video_io.read_video(folder / 'video.mp4')[0]


@pytest.mark.slow
def test_a_prompt_shows_from_its_block_on_and_not_before(arguments, tmp_path):
  arguments = [*arguments, _PROMPT, '--num_blocks=6']
  done, before = _run(arguments, tmp_path / 'one')
  _, after = _run(
    [*arguments, f'--prompt_at=3:{_OTHER}'], tmp_path / 'switched'
  )
  assert before.shape == after.shape == (6 * _FRAMES, 64, 64, 3)
  kept, changed = np.split(np.abs(before.astype(int) - after), [3 * _FRAMES])
  # Decoded frames: x264 looks ahead, so the cut moves earlier frames a little
  # (streaming_test compares the blocks themselves, to the bit). Without a cut
  # the two files are one; how much a prompt does is a matter of the weights.
  assert kept.mean() < 2
  assert changed.mean() > 2 * kept.mean()
  assert sorted(path.name for path in (tmp_path / 'one').iterdir()) == [
    *('video.mp4', 'video.png')
  ]
  with Image.open(tmp_path / 'one' / 'video.png') as sheet:
    assert sheet.width > 256
  mode, written, times = done.stdout.splitlines()
  assert "streams in mode 'batched'" in mode
  assert written == 'wrote video.mp4 and video.png, seed 0'
  assert 'compile ' in times and 'stream ' in times


def _wait_until(seen, process, what):
  deadline = time.monotonic() + 240
  while not seen():
    assert process.poll() is None, f'ended before {what}'
    assert time.monotonic() < deadline, f'no {what}'
    time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
  'number', [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name
)
def test_a_stream_without_end_leaves_whole_blocks_when_stopped(
  arguments, tmp_path, number
):
  process = subprocess.Popen(
    [*arguments, _PROMPT, '--num_blocks=0', '--mode=serial'],
    cwd=tmp_path,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  try:
    # ffmpeg starts with the first block.
    _wait_until(
      lambda: list(tmp_path.glob('.video.mp4.*.part')), process, 'first block'
    )
    time.sleep(2)
    process.send_signal(number)
    process.send_signal(number)  # An impatient user loses nothing.
    stdout, stderr = process.communicate(timeout=120)
  finally:
    process.kill()
    process.wait()
  assert process.returncode == 0, stderr
  assert "streams in mode 'serial'" in stdout
  assert 'wrote video.mp4 and video.png, seed 0' in stdout
  assert 'Traceback' not in stderr
  frames, fps = video_io.read_video(tmp_path / 'video.mp4')
  assert fps == 5 and len(frames) and len(frames) % _FRAMES == 0
  assert sorted(path.name for path in tmp_path.iterdir()) == [
    *('video.mp4', 'video.png')
  ]


@pytest.mark.slow
def test_stopped_before_the_first_block_there_is_no_file(arguments, tmp_path):
  process = subprocess.Popen(
    [*arguments, _PROMPT],
    cwd=tmp_path,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  try:
    # The line comes before anything of the stream is compiled.
    ready, _, _ = select.select([process.stdout], [], [], 240)
    assert ready and 'streams in mode' in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
  finally:
    process.kill()
    process.wait()
  assert process.returncode == 130, stderr
  assert stderr.splitlines()[-1] == 'interrupted'
  assert not list(tmp_path.iterdir())


@pytest.fixture
def interruptible():
  """Programs get Ctrl-C, which a shell in the background has ignored."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


@pytest.mark.slow
def test_ctrl_c_at_any_moment_is_status_130_and_no_file(
  arguments, tmp_path, interruptible
):
  # While modules are imported, a network is read, programs are compiled.
  program = arguments.index('--stream')
  command = [
    *(sys.executable, '-m', 'hiar_jax', 'stream', _PROMPT, '--num_blocks=0'),
    *(arguments[program - 1], *arguments[program + 1 :]),
  ]
  environment = os.environ | {'JAX_ENABLE_COMPILATION_CACHE': 'false'}
  ends = []
  for seconds in (0.5, 1, 2, 3, 4, 6, 8, 10, 12):
    process = subprocess.Popen(
      command,
      cwd=tmp_path,
      env=environment,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
      text=True,
    )
    try:
      time.sleep(seconds)
      process.send_signal(signal.SIGINT)
      _, stderr = process.communicate(timeout=120)
    finally:
      process.kill()
      process.wait()
    if not process.returncode:  # From its first block on a stream is kept.
      assert (tmp_path / 'video.mp4').exists()
      break
    assert process.returncode == 130, (seconds, stderr)
    assert stderr.splitlines()[-1] == 'interrupted', (seconds, stderr)
    assert not list(tmp_path.iterdir()), seconds
    ends.append(seconds)
  assert len(ends) >= 3


@pytest.mark.slow
def test_each_mistake_is_one_line(arguments, tmp_path):
  (tmp_path / 'two.txt').write_text('a red disc on grey\na blue disc on grey\n')
  good = [*arguments[2:], _PROMPT]
  not_streamed = [a for a in good if a != '--stream']
  cases = {
    "--prompt_at='3' is not BLOCK:PROMPT": [*good, '--prompt_at=3'],
    "--prompt_at='3:' is not BLOCK:PROMPT": [*good, '--prompt_at=3:'],
    "--prompt_at='-1:a cat' is not": [*good, '--prompt_at=-1:a cat'],
    "--prompt_at='soon:a cat' is not": [*good, '--prompt_at=soon:a cat'],
    '--prompt_at names block 3 twice': [
      *(*good, '--prompt_at=3:a cat', '--prompt_at=3:a dog')
    ],
    "--prompt_at='28:a cat' names no block": [*good, '--prompt_at=28:a cat'],
    'flag --mode=fast': [*good, '--mode=fast'],
    'flag --num_blocks=-1': [*good, '--num_blocks=-1'],
    '--mode, --prompt_at and --recache go with --stream': [
      *(*not_streamed, '--mode=serial')
    ],
    'flag --num_blocks=0, without end,': [*not_streamed, '--num_blocks=0'],
    "no stream has order 'hybrid'": [*good, '--order=hybrid'],
    '--family goes with --pipeline': [*good, '--family=hiar'],
    'window=10 is not a positive multiple': [*good, '--window=10'],
    '--over and --strength go together': [*not_streamed, '--over=x.mp4'],
    '--num_videos and --over do not go with': [*good, '--num_videos=2'],
    '--stream makes one video, not 2': [
      *(*arguments[2:], '--prompts_file=two.txt')
    ],
    "does not go with context 'shared'": [
      *(*good, '--config.rollout.context=shared', '--mode=serial')
    ],
  }
  done = subprocess.run(
    [
      *(sys.executable, '-c', DRIVER, str(_PROGRAM)),
      *(json.dumps(case) for case in cases.values()),
    ],
    cwd=tmp_path,
    capture_output=True,
    text=True,
    check=True,
  )
  for message, (status, stderr) in zip(cases, json.loads(done.stdout)):
    errors = [a for a in stderr.splitlines() if not a.startswith('note: ')]
    assert status == 2, (message, stderr)
    assert len(errors) == 1 and errors[0].startswith('error: '), stderr
    assert message in errors[0], (message, stderr)
  assert not list(tmp_path.glob('video*'))
