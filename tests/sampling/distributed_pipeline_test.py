"""The pipeline over processes makes what the step-first rollout makes.

Run as a program, this file is one of the processes:

  python tests/sampling/distributed_pipeline_test.py \\
    HOST:PORT PROCESSES ID DEVICES
"""

import dataclasses
import json
import pathlib
import socket
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from hiar_jax import noise_schedule, rollout
from hiar_jax.codecs import pixels
from hiar_jax.denoiser import Denoiser
from hiar_jax.models.config import WanConfig
from hiar_jax.runtime import distributed
from hiar_jax.sampling import pipeline, streaming

_ROOT = pathlib.Path(__file__).parents[2]
LEVELS = noise_schedule.warped_levels((1000, 750, 500, 250), 5.0)

# (batch, blocks, fused)
CASES = ((1, 1, False), (3, 7, False), (1, 7, True))


def _free_port() -> int:
  with socket.create_server(('127.0.0.1', 0)) as server:
    return server.getsockname()[1]


def _run_processes(count: int, devices: int) -> list[dict]:
  """Starts the processes; what each has printed."""
  address = f'127.0.0.1:{_free_port()}'
  started = [
    subprocess.Popen(
      [sys.executable, __file__, address, str(count), str(i), str(devices)],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      cwd=_ROOT,
    )
    for i in range(count)
  ]
  try:
    ended = [process.communicate(timeout=400) for process in started]
  finally:
    for process in started:
      process.kill()
      process.wait()
  for process, (_, stderr) in zip(started, ended):
    assert process.returncode == 0, stderr[-3000:]
  return [json.loads(stdout.splitlines()[-1]) for stdout, _ in ended]


@pytest.mark.slow
@pytest.mark.parametrize(('count', 'devices'), [(2, 1), (2, 2), (4, 1)])
def test_stages_over_processes_equal_the_step_first_rollout(count, devices):
  for i, report in enumerate(_run_processes(count, devices)):
    print(report)
    assert report['devices'] == count * devices
    assert report['holds_last_stage'] == (i == count - 1)
    assert len(report['errors']) == len(CASES)
    assert max(report['errors']) < 1e-5
    # Shared context in four steps has no four stages.
    modes = ['batched', 'shared'] if count * devices == 2 else ['batched']
    assert sorted(report['stream_errors']) == modes
    assert max(report['stream_errors'].values()) < 1e-5


def _processes(count: int, i: int, port: int) -> distributed.Processes:
  return distributed.Processes(f'127.0.0.1:{port}', count, i)


def test_a_process_without_its_coordinator_ends_in_time():
  port = _free_port()
  with pytest.raises(
    TimeoutError, match=f'process 1 of 2: .*127.0.0.1:{port} was not there'
  ):
    distributed.start(_processes(2, 1, port), timeout=0.3)


def test_the_coordinator_names_the_processes_that_did_not_come():
  port = _free_port()
  errors = []

  def second():
    try:
      distributed.start(_processes(4, 2, port), timeout=5.0)
    except TimeoutError as error:
      errors.append(str(error))

  thread = threading.Thread(target=second)
  thread.start()
  with pytest.raises(TimeoutError, match=r'process 0 of 4: \[1, 3\] did not'):
    distributed.start(_processes(4, 0, port), timeout=1.5)
  thread.join()
  assert 'gave up' in errors[0]


def test_processes_are_read_from_the_environment():
  full = {
    'JAX_COORDINATOR_ADDRESS': 'host:1234',
    'JAX_NUM_PROCESSES': '2',
    'JAX_PROCESS_ID': '1',
  }
  assert distributed.from_environment({}) is None
  assert distributed.from_environment(full) == distributed.Processes(
    'host:1234', 2, 1
  )
  for name, value, message in (
    ('JAX_NUM_PROCESSES', 'two', "JAX_NUM_PROCESSES='two'"),
    ('JAX_PROCESS_ID', '', "JAX_PROCESS_ID=''"),
    ('JAX_PROCESS_ID', '2', r'process_id=2 is not in 0..1'),
    ('JAX_COORDINATOR_ADDRESS', 'host', "'host' is not HOST:PORT"),
  ):
    with pytest.raises(ValueError, match=message):
      distributed.from_environment(full | {name: value})


def _network() -> tuple[Denoiser, dict]:
  denoiser = Denoiser(
    WanConfig(
      dim=32,
      ffn_dim=64,
      num_heads=2,
      num_layers=1,
      latent_height=4,
      latent_width=4,
      channels=4,
      freq_dim=16,
      text_dim=8,
      text_len=4,
    )
  )
  leaves, treedef = jax.tree.flatten(denoiser.init(jax.random.key(0)))
  # The head starts at zero; a network that answers zero would hide faults.
  rng = np.random.default_rng(0)
  # NumPy: of arrays on one process's device a global program cannot be made.
  return denoiser, treedef.unflatten(
    [np.float32(x + 0.2 * rng.normal(size=x.shape)) for x in leaves]
  )


class _PlainCodec:
  """Hands latents out as they are, so that they can be compared."""

  def init_decode_state(self, batch_size):
    return ()

  def decode_stream(self, state, latents):
    return latents, state


jax.tree_util.register_static(_PlainCodec)


def _stream(denoiser, params, config, mode, mesh=None) -> np.ndarray:
  """Six blocks with another prompt from the fourth on."""
  if mode == 'shared':
    config = dataclasses.replace(config, context='shared')
  stream = streaming.Stream(
    streaming.Engine(denoiser, config, mode, mesh),
    params,
    _PlainCodec(),
    lambda prompts: np.full((len(prompts), 4, 8), len(prompts[0]), np.float32),
    ['a'],
    jax.random.split(jax.random.key(3), 1),
  )
  stream.send('ab', at=3)
  return np.concatenate([next(stream) for _ in range(6)], 1)


def _process(address: str, count: int, i: int, devices: int) -> None:
  """One process: runs every case and prints its largest errors."""
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', devices)
  distributed.start(distributed.Processes(address, count, i), timeout=120)
  mesh = jax.make_mesh(
    (jax.device_count(),), ('stage',), axis_types=(AxisType.Auto,)
  )
  denoiser, params = _network()
  config = rollout.RolloutConfig(levels=LEVELS, window=6, sink=1)
  errors = []
  for batch, num_blocks, fused in CASES:
    states = np.random.default_rng(1).normal(size=(batch, 4, 8))
    states = states.astype(np.float32)
    # An argument: XLA would make the noise while it compiles.
    seed = np.uint32(2)

    def expected(params, states, seed, *, num_blocks=num_blocks):
      keys = jax.random.split(jax.random.key(seed), len(states))
      text = denoiser.project_text(params, states)
      return rollout.step_first(
        rollout.Sampler(denoiser, params, text, config),
        rollout.named_noise(keys, (3, 4, 4, 4)),
        num_blocks,
      )

    def ours(params, states, seed, *, num_blocks=num_blocks, fused=fused):
      stages = pipeline.Pipeline(denoiser, config, fused=fused, mesh=mesh)
      keys = jax.random.split(jax.random.key(seed), len(states))
      text = denoiser.project_text(params, states)
      return pipeline.pipelined(stages, params, text, keys, num_blocks)

    everywhere = NamedSharding(mesh, PartitionSpec())
    made = jax.jit(ours, out_shardings=everywhere)(params, states, seed)
    wanted = jax.jit(expected)(params, states, seed)
    made = np.asarray(made.addressable_data(0))
    errors.append(float(np.abs(made - np.asarray(wanted)).max()))
  pixels.from_float = lambda latents: latents
  stream_errors = {}
  for mode in ('batched', 'shared')[: 2 if mesh.size == 2 else 1]:
    made = _stream(denoiser, params, config, mode, mesh)
    wanted = _stream(denoiser, params, config, mode)
    stream_errors[mode] = float(np.abs(made - wanted).max())
  print(
    json.dumps(
      {
        'devices': mesh.shape['stage'],
        'holds_last_stage': mesh.devices[-1].process_index == i,
        'errors': errors,
        'stream_errors': stream_errors,
      }
    )
  )


if __name__ == '__main__':
  _process(sys.argv[1], *map(int, sys.argv[2:]))
