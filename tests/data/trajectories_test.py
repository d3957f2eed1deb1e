"""Trajectories: the public code's numbers, exact levels, whole files."""

import dataclasses
import functools
import json
import re
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from array_record.python import array_record_module

from hiar_jax import noise_schedule
from hiar_jax.data import (
  bouncing,
  shard_files,
  sources,
  trajectories,
  trajectory_files,
)
from hiar_jax.denoiser import Denoiser
from hiar_jax.models import sharding
from hiar_jax.models.config import WanConfig
from hiar_jax.sampling import trajectories as sampling_trajectories
from hiar_jax.text import word_hash
from hiar_jax.training import inputs
from hiar_jax.weights import tables

STUDENT = noise_schedule.warped_levels((1000, 750, 500, 250), 5.0)
CONFIG = trajectories.TrajectoryConfig(num_steps=3, shift=5.0, guidance=2.0)
PROMPTS = bouncing.Captions(
  bouncing.WorldConfig(num_frames=2), seed=1, length=64
)
STATES = inputs.PromptStates(
  PROMPTS, word_hash.WordHashEncoder(dim=8, length=4)
)
NEGATIVE = np.zeros((1, 4, 8), np.float32)
DENOISER = Denoiser(
  WanConfig(
    dim=12,
    ffn_dim=16,
    num_heads=2,
    num_layers=1,
    latent_height=4,
    latent_width=4,
    channels=2,
    freq_dim=8,
    text_dim=8,
    text_len=4,
  )
)


@functools.cache
def network():
  # Not `init`: a new head is zero, and with it every flow.
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32),
    jax.eval_shape(DENOISER.init, jax.random.key(0)),
  )


def manifest(config=CONFIG, **kwargs):
  settings = dict(num=7, shard_size=3, seed=5, num_frames=2) | kwargs
  return trajectories.make_manifest(
    config,
    STUDENT,
    DENOISER.config,
    network(),
    prompts=PROMPTS.identity(),
    num_prompts=len(PROMPTS),
    **settings,
  )


def make(directory, info=None, **kwargs):
  settings = dict(denoiser=DENOISER, params=network(), batch_size=2) | kwargs
  return sampling_trajectories.make(
    directory,
    info or manifest(),
    prompts=PROMPTS,
    states=STATES,
    negative_1LD=NEGATIVE,
    **settings,
  )


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """A complete set, not to be changed."""
  directory = tmp_path_factory.mktemp('whole')
  make(directory)
  return directory


@pytest.fixture
def copied(whole, tmp_path):
  """A complete set to be damaged."""
  for path in whole.iterdir():
    (tmp_path / path.name).write_bytes(path.read_bytes())
  return tmp_path


def contents(directory):
  return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_sampler_matches_the_public_code(golden):
  stored = golden('forward_kl')
  sizes = json.loads(str(stored['config']))['w_teacher']
  denoiser = Denoiser(
    WanConfig(latent_height=4, latent_width=6, channels=4, **sizes)
  )
  params = tables.convert_state_dict(
    {
      name.removeprefix('w_teacher/'): array
      for name, array in stored.items()
      if name.startswith('w_teacher/')
    },
    tables.WAN_RULES,
    jax.eval_shape(denoiser.init, jax.random.key(0)),
  )
  config = trajectories.TrajectoryConfig(points='indices')
  levels, kept = trajectories.solver_levels(config, STUDENT)
  assert kept == (0, 12, 24, 36, 48)
  # The public code turns flow into x0 with the nearest of 1000 levels and back
  # with the level itself, so its flow is up to 0.7 % off.
  table = noise_schedule.sampling_sigmas(1000, config.shift)[:-1]
  own = np.array(levels[:-1])
  nearest = table[np.abs(table - own[:, None]).argmin(axis=1)]
  ratios = jnp.asarray(nearest / own, jnp.float32)

  def snapped_flow(params, x, sigma, *args):
    flow = denoiser.guided_flow(params, x, sigma, *args)
    return flow * ratios[jnp.abs(own - sigma).argmin()]

  sampler = jax.jit(
    functools.partial(
      sampling_trajectories.sample,
      types.SimpleNamespace(guided_flow=snapped_flow),
      levels=levels,
      save_indices=kept,
      guidance=config.guidance,
    )
  )
  points = sampler(
    params,
    denoiser.project_text(params, stored['in/context'][:1]),
    denoiser.project_text(params, stored['in/neg_context'][:1]),
    np.moveaxis(stored['in/teacher_noise'], 2, -1),
  )
  np.testing.assert_allclose(
    np.moveaxis(points, -1, 3),
    stored['out/teacher_ode/trajectory'],
    rtol=0,
    atol=1e-4,
  )


@pytest.mark.parametrize('num_steps, shift', [(1, 5.0), (24, 5.0), (48, 8.0)])
def test_kept_points_lie_exactly_at_the_students_levels(num_steps, shift):
  config = trajectories.TrajectoryConfig(num_steps=num_steps, shift=shift)
  levels, kept = trajectories.solver_levels(config, STUDENT)
  assert tuple(levels[i] for i in kept) == STUDENT
  assert trajectories.point_levels(config, STUDENT) == STUDENT
  assert (levels[0], levels[-1]) == (1.0, 0.0)
  assert max(np.diff(levels)) < -trajectories._SAME_LEVEL
  own = noise_schedule.sampling_sigmas(num_steps, shift)
  assert all(min(abs(np.array(levels) - s)) <= 1e-6 for s in own)


def test_a_common_level_is_stepped_through_once():
  # Multiples of 4 steps of the shift-5 schedule hold all of the student's.
  config = trajectories.TrajectoryConfig(num_steps=24, shift=5.0)
  levels, _ = trajectories.solver_levels(config, STUDENT)
  assert len(levels) == 25


@pytest.mark.parametrize(
  'levels',
  [(1.0,), (1.0, 0.5), (1.2, 0.5, 0.0), (0.5, 1.0, 0.0), (1.0, 0.5, 0.5, 0.0)],
)
def test_bad_student_levels_are_refused(levels):
  with pytest.raises(ValueError, match='must fall from at most 1 to 0'):
    trajectories.solver_levels(CONFIG, levels)


def test_bad_configs_are_refused():
  for settings, message in (
    (dict(num_steps=0), 'num_steps=0'),
    (dict(points='all'), "points='all' is not one of"),
    (dict(points='indices', num_steps=24), 'must rise from 0 to num_steps=24'),
    (dict(points='indices', indices=(0, 24, 12, 48)), 'must rise'),
  ):
    with pytest.raises(ValueError, match=message):
      trajectories.TrajectoryConfig(**settings)
  with pytest.raises(ValueError, match='5 indices .* for 3 student levels'):
    trajectories.solver_levels(
      trajectories.TrajectoryConfig(points='indices'), (1.0, 0.5, 0.0)
    )
  with pytest.raises(ValueError, match='num=65 is more than the 64 prompts'):
    manifest(num=65)
  with pytest.raises(ValueError, match='shard_size=0'):
    manifest(shard_size=0)


@pytest.mark.parametrize('solver', trajectories.SOLVERS)
def test_a_straight_flow_is_integrated_exactly(solver):
  noise = jax.random.normal(jax.random.key(0), (2, 3, 4, 4, 2))
  clean = jax.random.normal(jax.random.key(1), noise.shape)
  straight = types.SimpleNamespace(
    guided_flow=lambda params, x, *args: noise - clean
  )
  levels, kept = trajectories.solver_levels(CONFIG, STUDENT)
  points = sampling_trajectories.sample(
    straight,
    {},
    None,
    None,
    noise,
    levels=levels,
    save_indices=kept,
    guidance=2.0,
    solver=solver,
  )
  assert points.shape == (2, 5, 3, 4, 4, 2)
  for i, sigma in enumerate(STUDENT):
    np.testing.assert_allclose(
      points[:, i],
      noise_schedule.add_noise(clean, noise, jnp.full((2, 1), sigma)),
      atol=2e-6,
    )


def test_a_trajectory_follows_from_its_index(whole):
  source = trajectories.TrajectorySource(whole, STUDENT)
  assert len(source) == 7
  element = source[4]
  assert element['latents'].shape == (5, 2, 4, 4, 2)
  assert element['latents'].dtype == element['text'].dtype == np.float32
  noise = jax.random.normal(
    jax.random.fold_in(jax.random.key(5), 4), (2, 4, 4, 2)
  )
  np.testing.assert_array_equal(
    element['latents'][0], np.float16(noise).astype(np.float32)
  )
  np.testing.assert_array_equal(element['text'], STATES[4]['text'])
  assert source.caption(4) == PROMPTS[4]
  # The prompt reaches the network: with another one the end differs.
  points = sampling_trajectories.sample(
    DENOISER,
    network(),
    DENOISER.project_text(network(), STATES[6]['text'][None]),
    DENOISER.project_text(network(), np.zeros((1, 4, 8), np.float32)),
    noise[None],
    levels=source.manifest.levels,
    save_indices=(len(source.manifest.levels) - 1,),
    guidance=2.0,
  )
  assert abs(points[0, 0] - element['latents'][-1]).max() > 1e-2


def test_a_removed_file_is_made_again_bit_by_bit(whole, copied):
  (copied / 'shard-00001.array_record').unlink()
  with pytest.raises(FileNotFoundError, match='1 of 3 .*shard-00001'):
    trajectories.TrajectorySource(copied, STUDENT)
  counts = []
  make(copied, progress=counts.append)
  assert counts == [2, 1]
  assert contents(copied) == contents(whole)


def test_a_stop_on_request_drops_the_file_under_way(whole, tmp_path):
  counts = []
  # Three files take 2 + 2 + 1 batches.
  done = make(
    tmp_path, progress=counts.append, should_stop=lambda: len(counts) == 3
  )
  assert not done
  assert len(list(tmp_path.glob('*.array_record'))) == 1
  assert not list(tmp_path.glob('*.part'))
  assert make(tmp_path)
  assert contents(tmp_path) == contents(whole)


def test_processes_share_the_files(whole, tmp_path):
  for shard_index in (1, 0):
    make(tmp_path, shard_index=shard_index, num_shards=2)
  assert contents(tmp_path) == contents(whole)
  with pytest.raises(ValueError, match='shard_index=2'):
    make(tmp_path, shard_index=2, num_shards=2)


@pytest.mark.parametrize('sizes', [(2, 1, 1, 1), (1, 2, 2, 2)])
def test_devices_share_every_batch(sizes, whole, tmp_path):
  config = sharding.MeshConfig(*sizes)
  mesh = sharding.make_mesh(config, jax.devices()[: np.prod(sizes)])
  make(tmp_path, params=sharding.put(network(), mesh), mesh=mesh)
  one, two = (
    trajectories.TrajectorySource(folder, STUDENT)
    for folder in (whole, tmp_path)
  )
  for index in range(7):
    np.testing.assert_allclose(
      two[index]['latents'], one[index]['latents'], rtol=0, atol=2e-3
    )


def test_a_batch_that_devices_do_not_divide_is_refused(tmp_path):
  mesh = sharding.make_mesh(sharding.MeshConfig(data=3), jax.devices()[:3])
  with pytest.raises(ValueError, match='batch_size=2 is not divisible by .*3'):
    make(tmp_path, params=sharding.put(network(), mesh), mesh=mesh)


def test_every_point_of_unipc_is_closer_than_eulers():
  # Of numbers from a normal distribution the flow and its paths are known.
  mean, std = 0.7, 0.3
  noise = jax.random.normal(jax.random.key(0), (64, 1, 1, 1, 1))

  def variance(sigma):
    return jnp.square((1 - sigma) * std) + jnp.square(sigma)

  def flow(params, x, sigma, *args):
    rest = (x - (1 - sigma) * mean) / variance(sigma)
    return sigma * rest - (mean + (1 - sigma) * std**2 * rest)

  errors = {}
  for solver in trajectories.SOLVERS:
    config = dataclasses.replace(CONFIG, num_steps=8, solver=solver)
    levels, kept = trajectories.solver_levels(config, STUDENT)
    points = sampling_trajectories.sample(
      types.SimpleNamespace(guided_flow=flow),
      *({}, None, None, noise),
      levels=levels,
      save_indices=kept,
      guidance=2.0,
      solver=solver,
    )
    sigma = jnp.array(STUDENT)[None]
    true = (1 - sigma) * mean + jnp.sqrt(variance(sigma)) * noise[:, 0, 0, 0]
    errors[solver] = np.abs(points[..., 0, 0, 0, 0] - true).max(axis=0)
  assert errors['euler'][0] == errors['unipc'][0] == 0
  # The step to the end is of first order, and large.
  assert (errors['unipc'][1:-1] < 0.2 * errors['euler'][1:-1]).all(), errors
  assert errors['unipc'][-1] < errors['euler'][-1]


def test_processes_with_the_same_share_do_no_harm(whole, tmp_path, monkeypatch):
  """As when a pod is replaced while the old one still runs."""
  path = trajectory_files.Manifest.path(tmp_path, 0)
  source = trajectory_files.Manifest.path(whole, 0)
  record = [safetensors.numpy.save(r) for r in _read_records(source)]
  sync = shard_files.os.fsync

  def other_is_first(file):
    sync(file)
    with monkeypatch.context() as patch:
      patch.setattr(shard_files.os, 'fsync', sync)
      patch.setattr('socket.gethostname', lambda: 'other')
      trajectory_files.write_shard(path, record)

  monkeypatch.setattr(shard_files.os, 'fsync', other_is_first)
  trajectory_files.write_shard(path, record)
  assert [p.name for p in tmp_path.iterdir()] == [path.name]
  assert path.read_bytes() == source.read_bytes()


def _read_records(path):
  return list(trajectory_files._read_shard(path))


@pytest.mark.parametrize('where', ['write', 'close', 'kill'])
def test_a_killed_run_leaves_no_torn_file(where, whole, tmp_path, monkeypatch):
  class Killed(BaseException):
    pass

  class Writer:
    def __init__(self, path, options):
      self.inner = array_record_module.ArrayRecordWriter(path, options)
      self.path, self.count = path, 0

    def write(self, record):
      self.count += 1
      if where == 'write' and 'shard-00001' in self.path and self.count == 2:
        raise Killed
      self.inner.write(record)

    def close(self):
      self.inner.close()
      if where != 'write' and 'shard-00001' in self.path:
        raise Killed

  with monkeypatch.context() as patch:
    patch.setattr(
      trajectory_files,
      'array_record_module',
      types.SimpleNamespace(ArrayRecordWriter=Writer),
    )
    with pytest.raises(Killed):
      make(tmp_path)
  assert sorted(contents(tmp_path)) == [
    'manifest.json',
    'shard-00000.array_record',
  ]
  if where == 'kill':  # SIGKILL cleans nothing up.
    (tmp_path / 'shard-00001.array_record.1.part').write_bytes(b'torn')
  make(tmp_path)
  assert trajectory_files.verify(tmp_path) == []
  assert contents(tmp_path) == contents(whole)


def test_a_set_of_whole_files_may_grow(whole, tmp_path):
  make(tmp_path, manifest(num=6))
  make(tmp_path, manifest(num=7))
  assert contents(tmp_path) == contents(whole)
  with pytest.raises(ValueError, match='num: 7 -> 8'):
    make(tmp_path, manifest(num=8))
  with pytest.raises(ValueError, match='num: 7 -> 6'):
    make(tmp_path, manifest(num=6))


def test_verify_accepts_a_whole_set(whole):
  assert trajectory_files.verify(whole) == []


def _truncate(directory):
  path = directory / 'shard-00001.array_record'
  path.write_bytes(path.read_bytes()[:-100])


def _empty(directory):
  (directory / 'shard-00001.array_record').write_bytes(b'')


def _flip_a_bit(directory):
  path = directory / 'shard-00001.array_record'
  damaged = bytearray(path.read_bytes())
  damaged[3000] ^= 1
  path.write_bytes(damaged)


def _remove(directory):
  (directory / 'shard-00001.array_record').unlink()


def _repeat(directory):
  first = directory / 'shard-00000.array_record'
  (directory / 'shard-00001.array_record').write_bytes(first.read_bytes())


def _rewrite(directory, change):
  path = directory / 'shard-00001.array_record'
  records = _read_records(path)
  trajectory_files.write_shard(
    path,
    [safetensors.numpy.save(r) for r in change(records)],
  )


def _hole(directory):
  _rewrite(directory, lambda records: records[:-1])


def _not_finite(directory):
  def change(records):
    latents = records[1]['latents'].copy()
    latents[0, 0, 0, 0, 0] = np.inf
    return [records[0], records[1] | {'latents': latents}, records[2]]

  _rewrite(directory, change)


def _other_shape(directory):
  _rewrite(
    directory,
    lambda records: [r | {'latents': r['latents'][1:]} for r in records],
  )


def _stray(directory):
  (directory / 'shard-00009.array_record').write_bytes(b'')


@pytest.mark.parametrize(
  'damage, message',
  [
    (_truncate, 'shard-00001.array_record is (torn|damaged)'),
    (_empty, 'shard-00001.array_record is (torn|damaged)'),
    (_flip_a_bit, 'shard-00001.array_record is damaged'),
    (_remove, 'shard-00001.array_record is missing'),
    (_repeat, 'trajectory 0 is in shard-00000.array_record as well'),
    (_hole, r'shard-00001.array_record has no trajectory \[5\]'),
    (_not_finite, 'trajectory 4 is not finite'),
    (_other_shape, 'trajectory 3 has shape'),
    (_stray, 'shard-00009.array_record is not part of the set'),
  ],
)
def test_verify_finds_a_planted_fault(damage, message, copied):
  damage(copied)
  problems = trajectory_files.verify(copied)
  assert any(re.search(message, problem) for problem in problems), problems


@pytest.mark.parametrize('damage', [_truncate, _empty, _hole])
def test_a_damaged_set_is_not_opened(damage, copied):
  damage(copied)
  with pytest.raises(ValueError, match='are damaged'):
    trajectories.TrajectorySource(copied, STUDENT)


def test_a_damaged_trajectory_is_named_when_read(copied):
  _flip_a_bit(copied)
  source = trajectories.TrajectorySource(copied, STUDENT)
  with pytest.raises(ValueError, match=r'trajectory \d .* is damaged'):
    for index in range(len(source)):
      source[index]


def test_another_manifest_is_an_error_that_names_the_fields(copied):
  other = manifest(dataclasses.replace(CONFIG, guidance=3.0), seed=6)
  with pytest.raises(ValueError) as error:
    make(copied, other)
  assert 'sampler.guidance: 2.0 -> 3.0' in str(error.value)
  assert 'seed: 5 -> 6' in str(error.value)
  assert 'levels' not in str(error.value)
  (copied / 'manifest.json').write_text('{"num": 3')
  with pytest.raises(ValueError, match='manifest.json is damaged'):
    trajectory_files.Manifest.read(copied)
  (copied / 'manifest.json').write_text('{"num": 3}')
  with pytest.raises(ValueError, match='is not a manifest'):
    trajectory_files.Manifest.read(copied)


def test_other_weights_are_another_teacher():
  params = jax.tree.map(lambda x: x, network())
  params['head']['bias'] = params['head']['bias'] + 1e-3
  assert trajectories.weights_sha256(params) != manifest().weights_sha256


def test_training_at_other_levels_is_refused(whole, tmp_path):
  with pytest.raises(ValueError, match=r'0\.9375.*needs them at \(1\.0, 0\.5'):
    trajectories.TrajectorySource(whole, (1.0, 0.5, 0.0))
  with pytest.raises(FileNotFoundError, match='no trajectories in'):
    trajectories.TrajectorySource(tmp_path, STUDENT)


def test_training_refuses_what_another_sampler_made(whole):
  other = dataclasses.replace(CONFIG, num_steps=4, guidance=3.0)
  with pytest.raises(ValueError) as error:
    trajectories.TrajectorySource(whole, STUDENT, other)
  assert 'guidance: 2.0 -> 3.0; num_steps: 3 -> 4' in str(error.value)
  assert len(trajectories.TrajectorySource(whole, STUDENT, CONFIG)) == 7


def test_a_teacher_that_diverges_is_an_error(tmp_path):
  params = jax.tree.map(lambda x: x, network())
  params['head']['bias'] = params['head']['bias'] + 1e6
  with pytest.raises(ValueError, match='trajectory 0 is not finite'):
    make(tmp_path, params=params)


@pytest.mark.parametrize('num_threads', [0, 2])
def test_restored_iterator_gives_the_exact_next_batches(whole, num_threads):
  def batches():
    return sources.batches(
      trajectories.TrajectorySource(whole, STUDENT),
      batch_size=3,
      seed=0,
      num_threads=num_threads,
    )

  iterator = batches()
  for _ in range(4):
    next(iterator)
  state = iterator.get_state()
  expected = [next(iterator) for _ in range(3)]
  assert expected[0]['latents'].shape == (3, 5, 2, 4, 4, 2)
  assert expected[0]['text'].shape == (3, 4, 8)
  restored = batches()
  restored.set_state(state)
  for batch in expected:
    chex.assert_trees_all_equal(next(restored), batch)


def test_hosts_read_disjoint_trajectories(whole):
  source = trajectories.TrajectorySource(whole, STUDENT)
  seen = []
  for shard_index in range(2):
    iterator = sources.batches(
      source, batch_size=6, seed=0, shard_index=shard_index, num_shards=2
    )
    seen += [noise.tobytes() for noise in next(iterator)['latents'][:, 0]]
  assert len(set(seen)) == 6
