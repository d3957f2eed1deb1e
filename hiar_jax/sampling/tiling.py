"""Into how many tiles frames are cut, where nobody said: as few as fit."""

import dataclasses
import sys
from typing import Any

import jax

from hiar_jax.codecs import vae as codecs_vae
from hiar_jax.models import vae_bands
from hiar_jax.sampling import memory, modes, streaming
from hiar_jax.sampling.executors import STAGE

_CHOICES = (1, 2, 4, 8, 16, 32)
_GB = 1e9


def fitting(pipeline: Any) -> Any:
  """A pipeline whose frames are decoded in tiles if the whole does not fit.

  A line says so. Where a device keeps no account of its memory, such as a CPU,
  and with codecs that know no tiles, it is the same pipeline.

  Args:
    pipeline: a VideoPipeline whose weights are on their devices.
  """
  codec = pipeline.codec
  if not isinstance(codec, codecs_vae.VAECodec):
    return pipeline
  leaves = jax.tree.leaves(codec.params)
  device = min(leaves[0].devices(), key=lambda device: device.id)
  room = _room(pipeline, device)
  if room is None:
    return pipeline
  model = pipeline.denoiser.config
  frames, height, width, _ = pipeline.rollout.block_shape(model)

  def need(tiles: int) -> int:
    return vae_bands.decode_bytes(
      *(codec.config, codec.tiled(tiles, height).bands),
      frames=frames,
      latent_height=height,
      latent_width=width,
      platform=device.platform,
    )

  rows = vae_bands.rows_where_cut(codec.config, height)
  possible = [n for n in _CHOICES if n * codec.bands.side_by_side <= rows]
  fits = [n for n in possible if need(n) <= room]
  tiles = fits[0] if fits else possible[-1]
  if tiles > 1:
    print(
      f'note: frames are decoded in {tiles} tiles: whole, that takes about '
      f'{need(1) / _GB:.3g} GB of memory, and {max(room, 0) / _GB:.3g} GB are '
      'left beside the stream (tiles=, --tiles)',
      file=sys.stderr,
    )
    codec = codec.tiled(tiles, height)
  return dataclasses.replace(pipeline, codec=codec)


def _room(pipeline: Any, device: jax.Device) -> int | None:
  """Bytes that the device which decodes has left; None if it does not tell."""
  stats = memory.account(device)
  if 'bytes_limit' not in stats:
    return None
  limit = int(modes.USABLE * stats['bytes_limit'])
  in_use = stats.get('bytes_in_use', 0)
  mesh = pipeline.mesh
  denoises = mesh.local_devices if mesh is not None else jax.local_devices()[:1]
  if device not in denoises:
    return limit - in_use
  mode = 'block_first' if pipeline.order == 'block_first' else 'serial'
  if pipeline.rollout.context == 'shared':
    mode = 'shared'
  if mode == 'block_first' and mesh is not None and mesh.shape[STAGE] > 1:
    mode = 'serial'
  stream = modes.estimate_memory(
    streaming.Engine(pipeline.denoiser, pipeline.rollout, mode, mesh),
    *(pipeline.params, 1),
  )
  # The weights are there already.
  return limit - in_use - (stream.total - stream.weights)
