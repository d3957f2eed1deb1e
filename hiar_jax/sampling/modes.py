"""Which mode a stream runs in: what it needs of memory, and what there is."""

import os
from typing import Any

import jax

from hiar_jax import rollout
from hiar_jax.denoiser import Denoiser
from hiar_jax.sampling import memory, meshes, shared_pipeline, streaming

AUTO = 'auto'  # `choose_mode` decides.

# Of a device's memory; the rest is XLA's own and lost between arrays.
_USABLE = 0.9
_GB = 1e9


def estimate_memory(
  engine: streaming.Engine, params: dict, batch_size: int
) -> memory.Memory:
  """What the turns of a stream hold at a time, decoding left out.

  Weights and caches are counted, the temporaries are those of
  `memory.pass_temporaries` times the passes that run at a time. Stages one
  after the other copy the past of the one under way, stages as a batch all of
  them, as XLA compiles it. For 1.3B with one stage a chip that is 2.2 GB of
  temporaries; XLA makes do with 1.8 to 2.1 GB there (docs/tpu.md).
  """
  model, config = engine.denoiser.config, engine.config
  stages = engine.stages
  devices = 1 if stages is None else stages.num_devices
  num_stages = config.num_steps if stages is None else stages.num_stages
  pasts = 1 if engine.mode == 'block_first' else config.num_steps
  if isinstance(stages, shared_pipeline.SharedPipeline):
    assert stages.passes is not None
    pasts = stages.passes * num_stages
  past = memory.past_bytes(model, config, batch_size)
  one_pass = memory.pass_temporaries(model, config, batch_size)
  in_turn = engine.mode == 'serial' or stages is None
  at_a_time = 1 if in_turn else num_stages // devices
  caches = past * pasts // devices
  copied = 0
  if in_turn:
    copied = past
  elif at_a_time > 1:
    copied = caches
  # Each of the devices of a pass has some heads, and some of the work.
  heads = 1
  if engine.mesh is not None and meshes.divides(engine.mesh):
    heads = engine.mesh.shape['tensor']
  return memory.Memory(
    weights=memory.weights_bytes(params, model) // heads,
    caches=caches // heads,
    temporaries=one_pass * at_a_time // meshes.num_parts(engine.mesh)
    + copied // heads,
  )


def device_memory(device: jax.Device) -> int:
  """Bytes of memory of a device; of the machine where it keeps no account."""
  stats = memory.account(device)
  if 'bytes_limit' in stats:
    return stats['bytes_limit']
  return os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')


def choose_mode(
  denoiser: Denoiser,
  config: rollout.RolloutConfig,
  params: dict,
  batch_size: int,
  mesh: Any = None,
  order: str = 'step_first',
) -> tuple[str, str]:
  """The fastest mode that fits, of the method that the weights are for.

  Stages as a batch are faster than one after the other: an accelerator has more
  to do at a time, and a CPU took 0.8 of the processor time for the small world.

  Args:
    denoiser: network.
    config: how blocks are denoised.
    params: of the network; only their sizes are looked at.
    batch_size: videos that are streamed together.
    mesh: see `Engine`; memory is that of one of its devices.
    order: that the weights are run in.

  Returns:
    One of streaming.MODES, and why, for people.

  Raises:
    ValueError: if the order is that of no stream, or the device has no room
      for any mode, see `memory.check_fits`.
  """
  device = jax.local_devices()[0]
  if mesh is not None:
    device = mesh.local_devices[0]

  def need(mode: str) -> memory.Memory:
    engine = streaming.Engine(denoiser, config, mode, mesh)
    return estimate_memory(engine, params, batch_size)

  def check(mode: str) -> str:
    memory.check_fits(need(mode), denoiser.config, config, device)
    return mode

  if order == 'hybrid':
    raise ValueError("no stream has order 'hybrid': its blocks come last")
  if order == 'block_first':
    return check('block_first'), 'the weights are for the block-first order'
  if config.context == 'shared':
    return check('shared'), 'the weights are for shared context'
  total, room = need('batched').total, device_memory(device)
  fits = total <= _USABLE * room
  return 'batched' if fits else check('serial'), (
    f'stages as a batch {"fit" if fits else "do not fit"}: about '
    f'{total / _GB:.2g} of {room / _GB:.3g} GB ({device.device_kind})'
  )
