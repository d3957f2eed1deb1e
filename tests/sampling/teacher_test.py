"""Teacher sampling: guidance, independence of samples, the command."""

import dataclasses
import pathlib
import re
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax.runtime import video_io
from hiar_jax.sampling import loading, seeds, solvers
from hiar_jax.sampling import teacher as sampling_teacher
from hiar_jax.sampling import trajectories as sampling_trajectories
from hiar_jax.weights import layouts, networks
from tests import toy_network

_ROOT = pathlib.Path(__file__).parents[2]
CONFIG = sampling_teacher.SamplingConfig(num_steps=3, shift=5.0, guidance=2.0)
NULL = np.zeros((1, 3, 4), np.float32)


def keys(*videos):
  videos = np.asarray(videos)
  return seeds.sample_keys(np.uint32(3), 0 * videos, videos)


def sample(config=CONFIG, videos=(0, 1), negative=NULL, states=None, **kwargs):
  if states is None:
    states = toy_network.text_states(2)[np.asarray(videos)]
  return sampling_teacher.sample(
    toy_network.DENOISER,
    toy_network.params(),
    config,
    keys(*videos),
    states,
    negative,
    **({'num_frames': 3} | kwargs),
  )


@pytest.mark.parametrize('solver', solvers.SOLVERS)
def test_a_video_depends_on_its_own_key_and_prompt_alone(solver):
  config = dataclasses.replace(CONFIG, solver=solver)
  both = sample(config)
  assert both.shape == (2, 3, *toy_network.FRAME_SHAPE)
  assert both.dtype == np.float32
  np.testing.assert_allclose(sample(config, videos=(1,)), both[1:], atol=1e-5)
  assert abs(both[0] - both[1]).max() > 0.1


def test_no_guidance_ignores_the_negative_prompt():
  config = dataclasses.replace(CONFIG, guidance=1.0)
  np.testing.assert_array_equal(
    sample(config), sample(config, negative=NULL + 1)
  )


def test_guidance_away_from_the_prompt_itself_is_none():
  states = toy_network.text_states(2)
  plain = sample(dataclasses.replace(CONFIG, guidance=1.0))
  np.testing.assert_allclose(sample(negative=states), plain, atol=1e-5)
  assert abs(sample() - plain).max() > 1e-2
  assert abs(sample(negative=NULL + 1) - sample()).max() > 1e-2


def test_euler_ends_where_the_trajectory_does():
  config = dataclasses.replace(CONFIG, solver='euler')
  denoiser, params = toy_network.DENOISER, toy_network.params()
  noise = jax.vmap(
    lambda key: jax.random.normal(key, (3, *toy_network.FRAME_SHAPE))
  )(keys(0, 1))
  points = sampling_trajectories.sample(
    denoiser,
    params,
    denoiser.project_text(params, toy_network.text_states(2)),
    denoiser.project_text(params, jnp.asarray(NULL)),
    noise,
    levels=config.levels.tolist(),
    save_indices=(0, config.num_steps),
    guidance=config.guidance,
  )
  np.testing.assert_allclose(sample(config), points[:, -1], atol=1e-5)


def test_steps_are_reported():
  told = []
  sample(report=told.append)
  assert told == [1, 1, 1]


def test_all_settings_share_one_program(monkeypatch):
  chex.clear_trace_counter()
  step = sampling_teacher._guided_step.__wrapped__
  once = jax.jit(
    chex.assert_max_traces(step, 1), static_argnames=('denoiser', 'solver')
  )
  monkeypatch.setattr(sampling_teacher, '_guided_step', once)
  sample()
  sample(dataclasses.replace(CONFIG, num_steps=5, shift=2.0, guidance=7.0))


def test_wan_samples_as_published():
  config = sampling_teacher.SamplingConfig()
  assert config == sampling_teacher.SamplingConfig('unipc', 50, 5.0, 5.0)
  # 0.999 and 0.01998, the last of 50 steps, after shift 5.
  np.testing.assert_allclose(
    config.levels[[0, 49, 50]], [4.995 / 4.996, 0.0999 / 1.07992, 0], atol=1e-9
  )


@pytest.mark.slow
def test_unipc_needs_fewer_steps_than_euler_for_the_small_worlds_video():
  pipeline = loading.load('bouncing')
  denoiser = pipeline.denoiser
  params = networks.load_weights(
    layouts.ASSETS / 'bouncing' / 'teacher.safetensors', pipeline.params
  )

  def video(solver, num_steps):
    return sampling_teacher.sample(
      denoiser,
      params,
      sampling_teacher.SamplingConfig(solver, num_steps, 2.5, 2.0),
      keys(0, 1),
      pipeline.encoder.encode(['a large red disc on dark blue'] * 2),
      pipeline.encoder.encode(['']),
      num_frames=4,
    )

  fine = video('unipc', 128)
  error = {
    solver: np.sqrt(np.mean((video(solver, 32) - fine) ** 2))
    for solver in solvers.SOLVERS
  }
  assert error['unipc'] < error['euler'] / 2, error


def test_bad_values_are_refused():
  for settings, message in (
    (dict(solver='heun'), "solver='heun' is not one of .*euler"),
    (dict(num_steps=0), 'num_steps=0'),
    (dict(shift=0.0), 'shift=0.0'),
    (dict(guidance=float('nan')), 'guidance=nan'),
  ):
    with pytest.raises(ValueError, match=message):
      sampling_teacher.SamplingConfig(**settings)
  with pytest.raises(ValueError, match='num_frames=0 is not at least 1'):
    sample(num_frames=0)
  with pytest.raises(ValueError, match='2 keys, 1 prompts and 1 negative'):
    sample(states=toy_network.text_states(1))
  with pytest.raises(ValueError, match='2 keys, 2 prompts and 3 negative'):
    sample(negative=NULL.repeat(3, 0))


_CONFIG = f'--config={_ROOT / "configs" / "bouncing.py"}'


def _run(folder, *flags, program='sample_teacher'):
  return subprocess.run(
    [
      *(sys.executable, _ROOT / 'launch' / f'{program}.py'),
      *flags,
    ],
    cwd=folder,
    capture_output=True,
    text=True,
    check=False,
  )


@pytest.mark.slow
def test_one_command_samples_with_the_bundled_teacher(tmp_path):
  done = _run(
    tmp_path,
    _CONFIG,
    *('--prompt=a large red disc on dark blue', '--negative_prompt=green'),
    *('--steps=2', '--num_frames=3', '--num_videos=2', '--fps=5'),
    *('--out=video.mp4', '--scale=2'),
  )
  assert done.returncode == 0, done.stderr
  for i in range(2):
    frames, fps = video_io.read_video(tmp_path / f'video-{i}.mp4')
    assert fps == 5 and frames.shape == (9, 128, 128, 3)
    assert f'wrote video-{i}.mp4 and video-{i}.png' in done.stdout


@pytest.mark.slow
def test_one_command_scores_the_bundled_teacher(tmp_path):
  done = _run(
    tmp_path,
    _CONFIG,
    '--num_prompts=2',
    '--config.trajectories.num_steps=4',
    program='evaluate_teacher',
  )
  assert done.returncode == 0, done.stderr
  assert '2 held-out captions, 81 frames, seed 0' in done.stdout
  table = done.stdout.splitlines()
  assert [line.split()[0] for line in table[-2:]] == ['codec', 'teacher']


@pytest.mark.slow
def test_a_pipelines_own_network_can_be_sampled(tmp_path):
  done = _run(
    tmp_path,
    *('--pipeline=bouncing', '--prompt=a red disc', '--solver=euler'),
    *('--steps=1', '--num_frames=2', '--out=video.mp4'),
  )
  assert done.returncode == 0, done.stderr
  frames, fps = video_io.read_video(tmp_path / 'video.mp4')
  assert fps == 16 and frames.shape == (5, 512, 512, 3)


@pytest.mark.slow
@pytest.mark.parametrize(
  'flags, message',
  [
    ([_CONFIG, '--prompt= '], "prompt ' ' is not a text"),
    ([_CONFIG, '--prompt=x', '--steps=0'], 'num_steps=0 is not at least 1'),
    (
      [_CONFIG, '--prompt=x', '--num_frames=0'],
      'num_frames=0 is not at least 1',
    ),
    ([_CONFIG, '--prompt=x', '--weights=none'], 'no weights at none'),
    (
      [_CONFIG, '--prompt=x', '--config.name=y'],
      'no teacher at .* none of .y. comes',
    ),
    (['--prompt=x'], 'give either --config or --pipeline'),
    (['--prompt=x', '--pipeline=no'], "no pipeline 'no'"),
  ],
)
def test_each_mistake_is_one_line(tmp_path, flags, message):
  done = _run(tmp_path, *flags)
  assert done.returncode == 2
  assert done.stderr.count('\n') == 1, done.stderr
  assert re.search(message, done.stderr), done.stderr
  assert not list(tmp_path.iterdir())
