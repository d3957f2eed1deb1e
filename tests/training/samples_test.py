"""Videos of the student are made while it trains, in both orders."""

import json
import pathlib

import jax
import numpy as np
import pytest

from hiar_jax.evaluation import statistics
from hiar_jax.models import vae
from hiar_jax.runtime import video_io
from hiar_jax.training import codec as training_codec
from hiar_jax.training import loop as training_loop
from hiar_jax.training import phases, samples
from hiar_jax.training.loop_config import LoopConfig
from hiar_jax.weights import networks
from tests import tiny


@pytest.fixture(scope='module')
def inputs(tmp_path_factory):
  root = tmp_path_factory.mktemp('inputs')
  tiny.write_inputs(root)
  return root


@pytest.mark.slow
def test_a_run_samples_both_orders_and_measures_them(
  inputs, tmp_path, monkeypatch
):
  config = tiny.config('student_start', inputs)
  config.workdir = str(tmp_path)
  config.iterations = 4
  config.log_every = 4
  config.loop = dict(sample_every=2, sample_blocks=3)
  # The network that is trained changes nothing here; the step is saved.
  build = phases.build

  def without_training(config):
    phase = build(config)
    object.__setattr__(phase, 'step', lambda state, *_: (state, {'loss': 1.0}))
    return phase

  monkeypatch.setattr(phases, 'build', without_training)
  training_loop.train(config)
  names = [f'{i:07d}_{order}' for i in (2, 4) for order in samples.ORDERS]
  folder = tmp_path / 'samples'
  assert {path.name for path in folder.iterdir()} == {
    f'{name}{suffix}' for name in names for suffix in ('.mp4', '.png')
  }
  frames, fps = video_io.read_video(folder / '0000002_step_first.mp4')
  # Four prompts side by side, 3 blocks of 3 frames.
  assert len(frames) == 9 and fps == config.generate.fps
  assert frames.shape[2] == 4 * frames.shape[1]
  other, _ = video_io.read_video(folder / '0000002_block_first.mp4')
  assert not np.array_equal(frames, other)
  lines = [
    json.loads(line)
    for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()
  ]
  # Samples are due more often than lines, and bring their own.
  assert [line['step'] for line in lines] == [2, 4]
  for name in ('step_first/motion', 'block_first/ideal_db_drift'):
    assert name in lines[0]
  # The same noise: what was not trained looks as before.
  assert lines[0]['step_first/ideal_db'] == lines[1]['step_first/ideal_db']


def test_short_videos_are_not_measured(inputs, tmp_path):
  config = tiny.config('distill', inputs)
  config.workdir = str(tmp_path)
  loop = LoopConfig(
    sample_every=1, sample_blocks=1, sample_prompts=('a red disc',)
  )
  params = tiny.random_params(
    samples.Denoiser(samples.WanConfig(**config.model)), 0
  )
  values, sheets = samples.Sampler(config, loop).sample(params, 7)
  assert values == {}
  assert sheets['step_first'] == tmp_path / 'samples/0000007_step_first.png'
  assert all(path.exists() for path in sheets.values())


@pytest.fixture
def others(tmp_path):
  """A config with a prompts file and the video VAE, of no known world."""
  config = tiny.config('distill', tmp_path)
  config.workdir = str(tmp_path / 'run')
  del config.world, config.world_seed, config.measures
  prompts = tmp_path / 'prompts.txt'
  prompts.write_text('a cat\nzwei Hunde\n')
  config.prompts = dict(source='file', path=str(prompts))
  config.text.encoder = 'word_hash'
  codec = tiny.config('codec', tmp_path)
  config.codec = codec.codec
  config.vae = codec.vae
  path = pathlib.Path(config.codec.path)
  path.parent.mkdir()
  networks.save_weights(
    path,
    training_codec.init(vae.VAEConfig(**config.vae), jax.random.key(0)),
  )
  return config


@pytest.mark.slow
def test_videos_of_others_are_decoded_by_the_vae_and_measured(others):
  loop = LoopConfig(sample_every=1, sample_blocks=2)
  params = tiny.random_params(
    samples.Denoiser(samples.WanConfig(**others.model)), 0
  )
  values, sheets = samples.Sampler(others, loop).sample(params, 1)
  frames, _ = video_io.read_video(sheets['step_first'].with_suffix('.mp4'))
  # Two prompts side by side; 6 latent frames, of four each but the first.
  assert frames.shape[0] == 21
  assert frames.shape[2] == 2 * frames.shape[1]
  for order in samples.ORDERS:
    assert {f'{order}/{name}' for name in statistics.SAMPLED} <= values.keys()
  assert all(np.isfinite(list(values.values())))


def test_prompts_are_ones_own_or_the_measures_or_the_first(others, inputs):
  loop = LoopConfig(sample_every=1)
  assert samples.Sampler(others, loop)._prompts == ('a cat', 'zwei Hunde')
  chosen = LoopConfig(sample_every=1, sample_prompts=('a fox',))
  assert samples.Sampler(others, chosen)._prompts == ('a fox',)
  world = tiny.config('distill', inputs)
  assert len(samples.Sampler(world, loop)._prompts) == 4


def test_prompts_without_states_are_refused_at_the_start(others, monkeypatch):
  class Stored:
    def encode(self, captions):
      raise ValueError(f'no states of {captions[0]!r}')

  monkeypatch.setattr(samples.inputs, 'open_text', lambda config: Stored())
  with pytest.raises(ValueError, match="sampled: no states of 'a cat'"):
    samples.Sampler(others, LoopConfig(sample_every=1))
