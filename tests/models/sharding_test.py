"""A mesh changes where things lie and nothing else."""

import dataclasses
import functools
import json
import pathlib
import re
import socket
import subprocess
import sys

import chex
import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from hiar_jax.models import kv_cache, sharding
from hiar_jax.models.config import WanConfig
from hiar_jax.training import checkpoint, phases
from hiar_jax.training import state as training_state
from hiar_jax.weights import identity, networks
from tests import fake_release, sharded_update, tiny

_ROOT = pathlib.Path(__file__).parents[2]
MeshConfig = sharding.MeshConfig
_ALL_AXES = MeshConfig(1, 2, 2, 2)


def abstract_params(denoiser=sharded_update.STUDENT):
  return jax.eval_shape(denoiser.init, jax.random.key(0))


def paths(tree) -> dict[str, object]:
  """'a/b' -> leaf, dict keys alone."""
  return {
    '/'.join(e.key for e in path if hasattr(e, 'key')): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


# --- The table.


def test_every_parameter_matches_one_rule_and_no_rule_is_dead():
  transformer = paths(abstract_params())
  text_encoder = paths(
    identity.abstract_params(fake_release.CONFIGS['text_encoder'])
  )
  # Some of both are called the same and lie the same.
  names = text_encoder | transformer
  fits = {
    pattern: [n for n in names if re.fullmatch(pattern, n)]
    for pattern, _ in sharding.PARAM_RULES
  }
  assert all(fits.values())
  assert sorted(n for found in fits.values() for n in found) == sorted(names)
  for name, leaf in (*text_encoder.items(), *transformer.items()):
    assert len(sharding.param_spec(name)) <= leaf.ndim


def test_matrices_of_layers_lie_on_both_axes_of_parameters():
  for name, leaf in paths(abstract_params()).items():
    if 'layers' in name and leaf.ndim == 3 and 'modulation' not in name:
      assert {'fsdp', 'tensor'} <= set(sharding.param_spec(name)), name


def test_a_path_that_no_rule_knows_is_named():
  with pytest.raises(ValueError, match="0 sharding rules fit 'layers/new'"):
    sharding.param_spec('layers/new')


@pytest.mark.parametrize('name', ['adamw', 'muon'])
def test_states_of_optimisers_lie_where_their_parameter_does(name):
  mesh = sharding.make_mesh(MeshConfig(fsdp=4, tensor=2))
  params = abstract_params()
  config = training_state.OptimiserConfig(name, learning_rate=1e-3)
  optimiser = training_state.make_optimiser(config, 10)
  state = jax.eval_shape(optimiser.init, params)
  wanted = paths(sharding.shardings(params, mesh))
  found = jax.tree_util.tree_leaves_with_path(sharding.shardings(state, mesh))
  leaves = jax.tree.leaves(state)
  count = 0
  for (path, place), leaf in zip(found, leaves, strict=True):
    name = '/'.join(e.key for e in path if hasattr(e, 'key'))
    name = name.removeprefix('muon/').removeprefix('adam/')
    if name in wanted:
      assert place == wanted[name] and leaf.shape == paths(params)[name].shape
      count += 1
    else:
      assert place.spec == PartitionSpec()
  # One moment or two of each parameter.
  assert count >= len(wanted)


# --- What does not fit.


@pytest.mark.parametrize(
  ('sizes', 'message'),
  [
    (dict(fsdp=3), 'fsdp=3 .*does not make up 8 devices: its sizes give 3'),
    (dict(data=-1, fsdp=16), 'does not make up 8 devices'),
    (dict(data=-1, fsdp=-1), 'neither positive nor the only -1'),
    (dict(tensor=0), 'neither positive nor the only -1'),
  ],
)
def test_a_mesh_that_the_devices_do_not_make_up(sizes, message):
  with pytest.raises(ValueError, match=message):
    sharding.make_mesh(MeshConfig(**sizes))


def test_one_size_is_filled_up():
  mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=-1, context=2))
  assert dict(mesh.shape) == dict(data=2, fsdp=2, tensor=1, context=2)


def test_a_dimension_that_an_axis_does_not_divide():
  mesh = sharding.make_mesh(MeshConfig(tensor=8))
  with pytest.raises(ValueError) as caught:
    sharding.shardings({'text_in': {'bias': np.zeros(12)}}, mesh)
  assert str(caught.value) == (
    'text_in/bias of shape (12,): axis 0 is not divisible by tensor=8'
  )


def test_heads_tokens_and_samples_that_do_not_divide():
  model = WanConfig.wan_1_3b()
  with pytest.raises(ValueError, match='teacher: num_heads=12 .* tensor=8'):
    sharding.check_model(
      'teacher', model, sharding.make_mesh(MeshConfig(1, 1, 8))
    )
  mesh = sharding.make_mesh(MeshConfig(2, 2, 1, 2))
  sharding.check_model('teacher', model, mesh)
  sharding.check_batch(8, 2, mesh)
  with pytest.raises(ValueError, match='batch_size=8 .*microbatches=4'):
    sharding.check_batch(8, 4, mesh)


def test_one_process_reads_all_of_a_batch():
  mesh = sharding.make_mesh(MeshConfig(data=2, tensor=4))
  assert sharding.batch_share(mesh) == (0, 1)


# --- Values.


def assert_placed(tree, places):
  same = jax.tree.map(
    lambda x, place: x.sharding.is_equivalent_to(place, x.ndim), tree, places
  )
  assert all(jax.tree.leaves(same))


@functools.cache
def unsharded():
  return sharded_update.update()


def check(errors):
  print({name: f'{error:.1e}' for name, error in errors.items()})
  assert max(errors.values()) <= 1e-4


def test_a_sharded_pass_and_its_gradient_equal_the_unsharded_ones():
  denoiser = sharded_update.STUDENT
  past = kv_cache.init_cache(denoiser.config, sharded_update.BATCH, slots=2)
  past = past.replace(k=past.k + 0.5, v=past.v - 0.5, frames=past.frames + 1)

  def loss(params, x, states):
    text = denoiser.project_text(params, states)
    flow, _ = denoiser.flow(params, x, 0.5, text, past=past)
    return jnp.mean(jnp.square(flow - x))

  batch = sharded_update.batch()
  x, states = batch['trajectory'][:, 0], batch['text']
  params = sharded_update.params(denoiser, 0)
  wanted = jax.jit(jax.value_and_grad(loss))(params, x, states)
  mesh = sharding.make_mesh(MeshConfig(1, 2, 2, 2))
  with jax.set_mesh(mesh):
    step = jax.jit(jax.value_and_grad(loss))
    lowered = step.lower(
      sharding.put(params, mesh), *sharding.put_batch((x, states), mesh)
    )
    # Tokens, queries, keys, values of the layer; text keys and values, cache.
    assert lowered.as_text().count('sdy.sharding_constraint') >= 8
    found = lowered.compile()(
      sharding.put(params, mesh), *sharding.put_batch((x, states), mesh)
    )
  errors = sharded_update.array_errors(found, wanted)
  check({'loss': errors[0], 'gradient': max(jax.tree.leaves(errors[1]))})


@pytest.mark.slow
@pytest.mark.parametrize(
  'sizes', [(1, 2, 2, 2), (2, 2, 2, 1), (2, 2, 1, 2), (1, 4, 1, 2)]
)
def test_a_sharded_update_equals_the_unsharded_one(sizes):
  mesh = sharding.make_mesh(MeshConfig(*sizes))
  state, metrics = sharded_update.update(mesh)
  assert_placed(state, sharding.shardings(state, mesh))
  kernel = state.critic.params['layers']['ffn_in']['kernel']
  assert kernel.size == (
    sizes[1] * sizes[2] * kernel.addressable_shards[0].data.size
  )
  check(sharded_update.errors((state, metrics), unsharded()))


@pytest.mark.slow
def test_microbatches_on_a_mesh():
  mesh = sharding.make_mesh(MeshConfig(2, 1, 2, 2))
  check(
    sharded_update.errors(
      sharded_update.update(mesh, microbatches=2),
      sharded_update.update(microbatches=2),
    )
  )


@pytest.mark.slow
def test_muon_on_a_mesh():
  mesh = sharding.make_mesh(MeshConfig(1, 2, 2, 2))
  check(
    sharded_update.errors(
      sharded_update.update(mesh, optimiser='muon'),
      sharded_update.update(optimiser='muon'),
    )
  )


def test_a_checkpoint_is_restored_on_fewer_devices(tmp_path):
  steps = sharded_update.steps()
  state = sharded_update.first_state(
    steps, sharding.make_mesh(MeshConfig(1, 2, 2, 2))
  )
  manager = checkpoint.make_manager(tmp_path)
  data = iter(grain.MapDataset.range(8).to_iter_dataset())
  checkpoint.save(manager, 1, state, data, {})
  manager.wait_until_finished()
  for count, sizes in ((4, (2, 2)), (1, (1, 1))):
    mesh = sharding.make_mesh(MeshConfig(*sizes), jax.devices()[:count])
    like = sharding.abstract(state, mesh)
    restored, _, _ = checkpoint.restore(manager, 1, like, data)
    chex.assert_trees_all_equal(restored, state)
    assert_placed(restored, sharding.shardings(state, mesh))
  manager.close()


# --- From a config.


@pytest.fixture(scope='module')
def config(tmp_path_factory):
  root = tmp_path_factory.mktemp('inputs')
  tiny.write_inputs(root)
  return tiny.config('distill', root)


def test_a_config_with_a_mesh_is_placed_on_it(config):
  with config.unlocked():
    config.mesh = dict(data=1, fsdp=2, tensor=2, context=-1)
  phase = phases.build(config)
  mesh = sharding.make_mesh(MeshConfig(1, 2, 2, 2))
  assert_placed(phase.state, sharding.shardings(phase.state, mesh))
  exported = phase.weights(phase.state)
  assert all(x.is_fully_replicated for x in jax.tree.leaves(exported))
  config.batch_size = 3
  with pytest.raises(ValueError, match='batch_size=3 is not divisible'):
    phases.build(config)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['teacher', 'student_start', 'distill'])
def test_a_config_with_a_mesh_trains_as_one_without(name, config, tmp_path):
  root = pathlib.Path(config.workdir).parent
  config = tiny.config(name, root)
  ends = []
  for mesh in (None, dataclasses.asdict(_ALL_AXES)):
    c = config.copy_and_resolve_references()
    with c.unlocked():
      if 'mesh' in c:
        del c.mesh
      if mesh:
        c.mesh = mesh
    phase = phases.build(c)
    ends.append(phase.step(phase.state, next(phase.batches), 0))
  errors = sharded_update.array_errors(ends[1], ends[0])
  assert_placed(
    ends[1][0], sharding.shardings(ends[1][0], sharding.make_mesh(_ALL_AXES))
  )
  check({name: max(jax.tree.leaves(errors))})
  # And goes on where there is another mesh, or none.
  manager = checkpoint.make_manager(tmp_path)
  data = iter(grain.MapDataset.range(8).to_iter_dataset())
  checkpoint.save(manager, 1, ends[1][0], data, {})
  manager.wait_until_finished()
  mesh = sharding.make_mesh(MeshConfig(1, 2, 2), jax.devices()[:4])
  for like in (
    sharding.abstract(ends[1][0], mesh),
    networks.abstract(ends[0][0]),
  ):
    restored, _, _ = checkpoint.restore(manager, 1, like, data)
    chex.assert_trees_all_equal(restored, ends[1][0])
  manager.close()


# --- Over processes.


@pytest.mark.slow
def test_an_update_over_two_processes_equals_the_unsharded_one():
  with socket.create_server(('127.0.0.1', 0)) as server:
    address = f'127.0.0.1:{server.getsockname()[1]}'
  program = [sys.executable, '-m', 'tests.sharded_update', address, '2']
  started = [
    subprocess.Popen(
      [*program, str(i), '4'],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      cwd=_ROOT,
    )
    for i in range(2)
  ]
  try:
    ended = [process.communicate(timeout=900) for process in started]
  finally:
    for process in started:
      process.kill()
      process.wait()
  for process, (stdout, stderr) in zip(started, ended):
    assert process.returncode == 0, stderr[-3000:]
    check(json.loads(stdout.splitlines()[-1]))
