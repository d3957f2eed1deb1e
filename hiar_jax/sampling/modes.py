"""Which mode a stream runs in: what it needs of memory, and what there is."""

import math
import os
from typing import Any

import jax

from hiar_jax import rollout
from hiar_jax.denoiser import Denoiser
from hiar_jax.models import flops, sharding
from hiar_jax.models.config import WanConfig
from hiar_jax.sampling import memory, meshes, streaming

AUTO = 'auto'  # `choose_mode` decides.

# Of a device's memory; the rest is XLA's own and lost between arrays.
USABLE = 0.9
# Seconds: some 30 kernels a layer, 5 microseconds each.
_LAYER_LAUNCH = 150e-6
# Times that stages as a batch move their pasts beyond reading them, as XLA
# compiles it: laid out in the batch's order and back (docs/gpu.md).
_MOVES = 3
# Platforms on whose devices passes write in place. On a CPU a pass is a loop's
# body in a few milliseconds, and what is launched for each would cost more.
IN_PLACE = ('gpu', 'tpu')
_GB = 1e9


def estimate_memory(
  engine: streaming.Engine, params: dict, batch_size: int
) -> memory.Memory:
  """What the turns of a stream hold at a time, decoding left out.

  Weights and caches are counted, the temporaries are those of
  `memory.pass_temporaries`. Beside them passes in turn keep the keys and values
  of all of them until they are written, and stages as a batch have their pasts
  copied into the order that the batch is computed in, as XLA compiles it, and
  each of them what a layer of it sees.
  docs/gpu.md holds the sum to what the compiler takes.
  """
  model, config = engine.denoiser.config, engine.config
  stages = engine.stages
  devices = 1 if stages is None else stages.num_devices
  num_stages = config.num_steps if stages is None else stages.num_stages
  past = memory.past_bytes(model, config, batch_size)
  one_pass = memory.pass_temporaries(model, config, batch_size)
  if engine.in_place:
    past = memory.window_bytes(model, config, batch_size)
    one_pass = memory.in_place_temporaries(model, config, batch_size)
  caches = past * engine.num_pasts // devices
  beside = 0
  if engine.in_place:
    pass
  elif engine.mode == 'serial' or stages is None:
    passes = config.num_steps + (stages is None)
    beside = passes * memory.new_bytes(model, config, batch_size)
  elif num_stages > devices:
    beside = caches
    if engine.mode == 'batched':
      others = num_stages // devices - 1
      beside += others * memory.seen_bytes(model, config, batch_size)
  # Each of the devices of a pass has some weights, some heads, and some of the
  # work.
  parts = heads = 1
  if engine.mesh is not None and meshes.divides(engine.mesh):
    parts = engine.mesh.shape['tensor']
    over = sharding.heads_axes(model.num_heads, engine.mesh)
    heads = math.prod(engine.mesh.shape[axis] for axis in over)
  return memory.Memory(
    weights=memory.weights_bytes(params, model) // parts,
    caches=caches // heads,
    temporaries=one_pass // meshes.num_parts(engine.mesh) + beside // heads,
    prompts=engine.bank_size * memory.prompt_bytes(model, batch_size) // parts,
  )


def on_device(
  engine: streaming.Engine, params: dict, batch_size: int
) -> streaming.Engine:
  """The engine as its device runs it best; the blocks are the same.

  On accelerators passes write their windows in place, where they can and the
  weights of layers that lie apart fit beside those that are stacked.

  Args:
    engine: of a mode that was chosen.
    params: of the network; only their sizes are looked at.
    batch_size: videos that are streamed together.
  """
  device = jax.local_devices()[0]
  if engine.mesh is not None:
    device = engine.mesh.local_devices[0]
  if device.platform not in IN_PLACE:
    return engine
  other = engine.written_in_place()
  need = estimate_memory(other, params, batch_size).total
  return other if need <= USABLE * device_memory(device) else engine


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

  Stages one after the other are faster where a pass by itself keeps an
  accelerator busy: see `_batch_pays`. A CPU took 0.8 of the processor time for
  the small world's stages as a batch.

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
  if mesh is None and not _batch_pays(
    denoiser.config, config, params, batch_size, device
  ):
    return check('serial'), (
      f'a pass by itself keeps {device.device_kind} busy, and stages as a '
      'batch would copy their pasts'
    )
  total, room = need('batched').total, device_memory(device)
  fits = total <= USABLE * room
  return 'batched' if fits else check('serial'), (
    f'stages as a batch {"fit" if fits else "do not fit"}: about '
    f'{total / _GB:.2g} of {room / _GB:.3g} GB ({device.device_kind})'
  )


def _batch_pays(
  model: WanConfig,
  config: rollout.RolloutConfig,
  params: dict,
  batch_size: int,
  device: jax.Device,
) -> bool:
  """Whether stages as a batch are faster than one after the other.

  A batch of S reads the weights once and not S times, and moves its pasts, see
  `_MOVES`. What is not known, and what a pass takes no longer than to launch
  its kernels, is taken as a batch.
  """
  rate = flops.peak([device])
  if device.platform == 'cpu' or rate is None:
    return True
  each = flops.pass_flops(model, config.frames_per_block, config.window)
  if batch_size * each.total / rate < model.num_layers * _LAYER_LAUNCH:
    return True
  weights = sum(
    math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(params)
  )
  past = memory.past_bytes(model, config, batch_size)
  steps = config.num_steps
  return (steps - 1) * weights > steps * _MOVES * past
