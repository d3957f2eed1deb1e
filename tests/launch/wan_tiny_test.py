"""From a downloaded release and a text file to a student, by commands alone.

A Wan2.1 release of tiny width with random weights, and a teacher of another
size; every command is a process, as people start it.
"""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors.numpy

from hiar_jax.data import trajectories, trajectory_files
from hiar_jax.runtime import stopping, video_io
from hiar_jax.weights import safetensors_io
from tests import fake_release

_ROOT = pathlib.Path(__file__).parents[2]
_RUNS = 'runs/hiar_tiny'
# English, Chinese, emoji, more than 512 tokens.
_PROMPTS = [
  'a red disc over dark blue',
  '一只猫在雪地里奔跑',
  '🎈 a dog 🎈',
  'red cat ' * 400,
  *(f'a cat and {i} dogs' for i in range(8)),
]
# Of the largest parameter, after 6 updates of the student's start and 2 of its
# distillation; a step of the optimiser is 1e-3.
_TOLERANCE = 1e-3


def write_downloads(folder):
  """What a person has before the first command."""
  small = {
    'transformer': {'text_len': 512},
    'text_encoder': {'vocab_size': 320},
  }
  large = dict(dim=48, ffn_dim=32, num_heads=4, num_layers=3, text_len=512)
  for name, naming, changes in (
    ('Wan-small', 'wan', small),
    (
      'Wan-large',
      'diffusers',
      {'transformer': large, 'vae': None, 'text_encoder': None},
    ),
  ):
    fake_release.write_release(
      folder / name,
      naming,
      changes=changes,
      write_tokenizer=fake_release.write_pieces,
    )
  (folder / 'prompts.txt').write_text('\r\n'.join([*_PROMPTS, '']))


class Shell:
  """Runs `hiar-jax` in a folder, on some devices of some processes."""

  def __init__(self, folder, devices=1, processes=1):
    self.folder, self._processes = folder, processes
    self._environment = os.environ | {
      'PYTHONPATH': str(_ROOT),
      'JAX_PLATFORMS': 'cpu',
      'JAX_NUM_CPU_DEVICES': str(devices // processes),
      'JAX_DEFAULT_MATMUL_PRECISION': 'highest',
      'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
      'HIAR_JAX_CACHE': str(folder / 'cache'),
    }
    self._count = 0

  def start(self, *arguments, process=0, address=''):
    self._count += 1
    environment = dict(self._environment)
    if address:
      environment |= {
        'JAX_COORDINATOR_ADDRESS': address,
        'JAX_NUM_PROCESSES': str(self._processes),
        'JAX_PROCESS_ID': str(process),
      }
    log = self.folder / f'{self._count}.log'
    with log.open('w') as file:
      running = subprocess.Popen(
        [sys.executable, '-m', 'hiar_jax', *arguments],
        cwd=self.folder,
        env=environment,
        stdout=file,
        stderr=subprocess.STDOUT,
      )
    return running, log

  def run(self, *arguments, everywhere=False, status=0):
    """One command, on all processes if asked; what the first one wrote."""
    started = self._start_all(arguments, everywhere)
    try:
      for running, log in started:
        running.wait(600)
        assert running.returncode == status, log.read_text()[-3000:]
    finally:
      for running, _ in started:
        running.kill()
        running.wait()
    return started[0][1].read_text()

  def end(self, *arguments, when, by=signal.SIGKILL, everywhere=False):
    """A signal to each process as soon as when() is true; their statuses."""
    started = self._start_all(arguments, everywhere)
    try:
      while not when():
        for running, log in started:
          assert running.poll() is None, log.read_text()[-3000:]
        time.sleep(0.002)
      for running, _ in started:
        running.send_signal(by)
      return [running.wait(300) for running, _ in started]
    finally:
      for running, _ in started:
        running.kill()
        running.wait()

  def kill(self, *arguments, when, everywhere=False):
    """SIGKILL as soon as when() is true."""
    statuses = self.end(*arguments, when=when, everywhere=everywhere)
    assert set(statuses) == {-signal.SIGKILL}

  def _start_all(self, arguments, everywhere):
    count = self._processes if everywhere else 1
    address = ''
    if count > 1:
      with socket.create_server(('127.0.0.1', 0)) as server:
        address = f'127.0.0.1:{server.getsockname()[1]}'
    return [
      self.start(*arguments, process=i, address=address) for i in range(count)
    ]


def train_student(shell, config='wan_tiny'):
  """The documented commands, in their order; the student's weights."""
  size = ('--height=32', '--width=32', '--compute_dtype=float32')
  for name, out, form in (
    ('Wan-small', 'wan2.1_1.3b', 'safetensors'),
    ('Wan-large', 'wan2.1_14b', 'orbax'),
  ):
    shell.run(
      *('convert', f'--weights={name}', f'--out=weights/{out}', *size),
      f'--format={form}',
    )
  said = shell.run(
    'encode', 'prompts', f'--config={config}:prompts,.', everywhere=True
  )
  assert '1 of these prompts have more than 512 tokens' in said

  folder = shell.folder / _RUNS / 'trajectories'
  making = ('trajectories', f'--config={config}:trajectories,.')
  made = lambda: len(list(folder.glob('*.array_record')))
  shell.kill(*making, when=lambda: made() >= 1)
  left = made()
  assert 1 <= left < 4
  shell.run(*making, everywhere=True)
  said = shell.run(*making, '--verify')
  assert '8 trajectories, whole' in said

  for phase in ('student_start', 'distill'):
    shell.run('train', f'--config={config}:{phase},.', everywhere=True)
  path = shell.folder / _RUNS / 'distill' / 'weights.safetensors'
  return safetensors.numpy.load_file(path)


@pytest.fixture(scope='module')
def one_device(tmp_path_factory):
  """A folder in which all was done on one device, and its shell."""
  folder = tmp_path_factory.mktemp('one')
  write_downloads(folder)
  shell = Shell(folder)
  train_student(shell)
  return shell


@pytest.fixture(scope='module')
def videos(one_device):
  """The same, with captioned videos that were encoded by two processes."""
  shell = one_device
  folder = shell.folder / 'videos'
  folder.mkdir()
  rng = np.random.default_rng(0)
  for index in range(10):
    # Of a moving mean, so that no two are alike to the VAE.
    frames = (
      rng.integers(0, 256, (1, 16, 16, 3))
      * np.linspace(1, 0, 11)[:, None, None, None]
    )
    path = folder / f'{index}.mp4'
    video_io.write_video(path, frames.astype(np.uint8), fps=16)
    path.with_suffix('.txt').write_text(_PROMPTS[index])
  (folder / '3.mp4').write_bytes(b'no video')
  pair = Shell(shell.folder, devices=8, processes=2)
  for what in ('videos', 'prompts'):
    said = pair.run(
      'encode', what, '--config=wan_tiny:teacher,.', everywhere=True
    )
    assert 'share 0 of 2' in said
  said = shell.run(
    'encode', 'videos', '--config=wan_tiny:teacher,.', '--verify'
  )
  assert '9 videos, whole; 1 could not be read' in said
  return shell


def assert_close(actual, folder, run='distill'):
  expected = safetensors.numpy.load_file(
    folder / _RUNS / run / 'weights.safetensors'
  )
  start = safetensors.numpy.load_file(
    folder / 'weights/wan2.1_1.3b/student.safetensors'
  )
  errors = {
    name: np.abs(actual[name] - array).max() / np.abs(array).max()
    for name, array in expected.items()
  }
  worst = max(errors, key=errors.get)
  print(f'largest error {errors[worst]:.1e}, in {worst}')
  assert errors[worst] <= _TOLERANCE, worst
  # Training went somewhere: further than the tolerance.
  moved = max(
    np.abs(start[name] - array).max() / np.abs(array).max()
    for name, array in expected.items()
  )
  assert moved > 2 * _TOLERANCE


def test_a_download_becomes_a_student_that_makes_videos(one_device):
  shell = one_device
  said = shell.run('export', '--config=wan_tiny:distill,.', '--out=hiar')
  assert 'wrote hiar/student.safetensors' in said
  shell.run(
    *('generate', '--pipeline=hiar', '--prompt=一只猫', '--num_blocks=2'),
    '--out=cat.mp4',
  )
  assert (shell.folder / 'cat.mp4').stat().st_size > 500

  # Out in the words of others and in again: the same bits.
  trained = shell.folder / _RUNS / 'distill' / 'weights.safetensors'
  size = ('--height=32', '--width=32')
  for target in ('self_forcing', 'diffusers', 'wan'):
    there, back = f'to_{target}', f'from_{target}'
    shell.run('convert', '--weights=hiar', f'--to={target}', f'--out={there}')
    shell.run('convert', f'--weights={there}', f'--out={back}', *size)
    student = shell.folder / back / 'student.safetensors'
    arrays = safetensors.numpy.load_file(trained)
    found = safetensors.numpy.load_file(student)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
      np.testing.assert_array_equal(
        fake_release.bits(found[name]), fake_release.bits(array), name
      )
  names = safetensors_io.Reader(
    shell.folder / 'to_self_forcing' / 'model.safetensors'
  ).entries
  assert 'generator_ema.model.blocks.0.self_attn.q.weight' in names
  assert all(name.startswith('generator_ema.model.') for name in names)


@pytest.mark.parametrize(
  ('phase', 'flags', 'message'),
  [
    (
      'student_start',
      ['--config.negative_prompt=blurry'],
      'are of another negative prompt than training has: ',
    ),
    (
      'student_start',
      ['--config.trajectory_teacher_weights=weights/wan2.1_14b'],
      'are of another teacher than training has: ',
    ),
    (
      'distill',
      ['--config.trajectories.shift=3.0'],
      'shift: 8.0 -> 3.0',
    ),
    (
      'distill',
      ['--config.teacher_weights=weights/none'],
      'no weights at weights/none; `hiar-jax convert` makes such folders',
    ),
    (
      'distill',
      ['--config.model.latent_width=8'],
      'has latents of 4x4x16 and model of 4x8x16 ',
    ),
    (
      'distill',
      ['--config.student_weights=runs/x/student_start/weights.safetensors'],
      'the phase student_start of the config ends with them',
    ),
    ('prompts', [], "phase 'prompts' is not one of"),
  ],
)
def test_what_does_not_go_together_is_one_line(
  phase, flags, message, one_device
):
  workdir = '--config.workdir=refused'
  said = one_device.run(
    *('train', f'--config=wan_tiny:{phase},.', workdir, *flags), status=2
  )
  (line,) = [line for line in said.splitlines() if line.startswith('error:')]
  assert message in line, line
  assert 'Traceback' not in said


@pytest.mark.slow
@pytest.mark.parametrize('processes', [1, 2])
def test_eight_devices_end_where_one_does(processes, one_device, tmp_path):
  write_downloads(tmp_path)
  shell = Shell(tmp_path, devices=8, processes=processes)
  config = f'{_ROOT / "tests" / "wan_tiny_pod.py"}'
  assert_close(train_student(shell, config), one_device.folder)


@pytest.mark.slow
@pytest.mark.parametrize('processes', [1, 2])
def test_a_teacher_trains_on_eight_devices_as_on_one(processes, videos):
  """In two microbatches there, in one here."""
  folder = videos.folder
  if not (folder / _RUNS / 'teacher').exists():
    videos.run('train', '--config=wan_tiny:teacher,.')
  shell = Shell(folder, devices=8, processes=processes)
  workdir = folder / f'teacher_{processes}'
  shell.run(
    *('train', f'--config={_ROOT / "tests" / "wan_tiny_pod.py"}:teacher,.'),
    *(f'--config.workdir={workdir}', '--config.microbatches=2'),
    everywhere=True,
  )
  path = workdir / 'weights.safetensors'
  assert_close(safetensors.numpy.load_file(path), folder, 'teacher')


@pytest.mark.slow
def test_text_that_two_processes_encode_as_they_train_is_that_of_one(
  one_device,
):
  folder = one_device.folder
  pod = f'--config={_ROOT / "tests" / "wan_tiny_pod.py"}:distill,.,live'
  ones = [f'--config.mesh.{axis}=1' for axis in ('fsdp', 'tensor', 'context')]
  one_device.run('train', pod, f'--config.workdir={folder / _RUNS}/live', *ones)
  pair = Shell(folder, devices=8, processes=2)
  pair.run(
    'train', pod, f'--config.workdir={folder}/live_pair', everywhere=True
  )
  path = folder / 'live_pair' / 'weights.safetensors'
  assert_close(safetensors.numpy.load_file(path), folder, 'live')


@pytest.mark.slow
def test_longer_rollouts_on_eight_devices_end_as_on_one(one_device):
  """Up to twice the blocks that the losses see; the VAE recodes their start."""
  folder, long = one_device.folder, '--config.rollout_blocks=(2, 4)'
  one_device.run(
    *('train', '--config=wan_tiny:distill,.', long),
    f'--config.workdir={folder / _RUNS}/long',
  )
  Shell(folder, devices=8).run(
    *('train', f'--config={_ROOT / "tests" / "wan_tiny_pod.py"}:distill,.'),
    *(long, f'--config.workdir={folder}/long_pod'),
  )
  path = folder / 'long_pod' / 'weights.safetensors'
  assert_close(safetensors.numpy.load_file(path), folder, 'long')


@pytest.mark.slow
@pytest.mark.parametrize(
  'phase', ['teacher', 'student_start', 'distill', 'self_forcing']
)
def test_a_killed_phase_ends_bit_equal(phase, videos):
  shell = videos
  train = ('train', f'--config=wan_tiny:{phase},.')
  ends = []
  for name in ('whole', 'cut'):
    workdir = shell.folder / f'{name}_{phase}'
    command = (*train, f'--config.workdir={workdir}')
    if name == 'cut':
      checkpoints = workdir / 'checkpoints'
      shell.kill(*command, when=(checkpoints / '2').is_dir)
      said = shell.run(*command)
      assert 'goes on after iteration' in said
    else:
      shell.run(*command)
    ends.append((workdir / 'weights.safetensors').read_bytes())
  assert ends[0] == ends[1]


@pytest.mark.slow
def test_killed_trajectories_are_the_bytes_of_whole_ones(one_device):
  shell = one_device
  shell.run(
    *('trajectories', '--config=wan_tiny:trajectories,.', '--out=whole_set')
  )
  files = [
    {path.name: path.read_bytes() for path in folder.iterdir()}
    for folder in (
      shell.folder / 'whole_set',
      shell.folder / _RUNS / 'trajectories',
    )
  ]
  assert files[0] == files[1]


def _two_hosts(one_device):
  """Two processes of four devices, and how they sample together."""
  shell = Shell(one_device.folder, devices=8, processes=2)
  return shell, (
    'trajectories',
    f'--config={_ROOT / "tests" / "wan_tiny_pod.py"}:trajectories,.',
    '--config.trajectories.together=True',
  )


@pytest.mark.slow
def test_a_teacher_of_two_hosts_makes_the_trajectories_of_one(one_device):
  """Each has a half of it; both are killed once."""
  shell, making = _two_hosts(one_device)
  folders = [shell.folder / name for name in ('together', 'together_cut')]
  said = shell.run(*making, f'--out={folders[0]}', everywhere=True)
  assert 'share 0 of 1, devices 8' in said
  made = lambda: len(list(folders[1].glob('*.array_record')))
  cut = (*making, f'--out={folders[1]}')
  shell.kill(*cut, when=lambda: made() >= 1, everywhere=True)
  assert made() < 4
  shell.run(*cut, everywhere=True)
  whole, cut = (
    {path.name: path.read_bytes() for path in folder.iterdir()}
    for folder in folders
  )
  assert whole == cut
  alone = shell.folder / _RUNS / 'trajectories'
  assert whole['manifest.json'] == (alone / 'manifest.json').read_bytes()
  levels = trajectory_files.Manifest.read(alone).point_levels
  sets = [trajectories.TrajectorySource(f, levels) for f in (folders[0], alone)]
  for index in range(len(sets[0])):
    actual, expected = (source[index]['latents'] for source in sets)
    # Stored in float16, whose steps are 2^-11 of a value.
    error = np.abs(actual - expected).max() / np.abs(expected).max()
    assert error <= 2**-10, index


@pytest.mark.slow
def test_two_hosts_that_sample_together_stop_together(one_device):
  shell, making = _two_hosts(one_device)
  out = shell.folder / 'stopped'
  # Files that take long enough to be stopped among.
  command = (
    *(*making, f'--out={out}', '--num=12'),
    *(
      '--config.trajectories.shard_size=1',
      '--config.trajectories.num_steps=64',
    ),
  )
  made = lambda: len(list(out.glob('*.array_record')))
  statuses = shell.end(
    *command, when=lambda: made() >= 1, by=signal.SIGTERM, everywhere=True
  )
  assert statuses == [stopping.SIGTERM_STATUS] * 2
  assert 1 <= made() < 12
  shell.run(*command, everywhere=True)
  assert '12 trajectories, whole' in shell.run(*command, '--verify')
