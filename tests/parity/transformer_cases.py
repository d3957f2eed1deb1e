"""The network's three uses: bidirectional, block-causal, cached."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from hiar_jax import noise_schedule
from hiar_jax.models import attention
from hiar_jax.models.kv_cache import KV, KVCache, init_cache
from tests.parity.golden_lib import (
  FORWARD,
  cases,
  from_model,
  load,
  network,
  stored,
  to_model,
)
from tests.toy_network import jit

_BLOCK = 3  # Frames.


def _sigma(timestep: np.ndarray) -> np.ndarray:
  return timestep / noise_schedule.TIMESTEPS


def _bidirectional():
  golden = load('bidirectional')
  denoiser, params = network('bidirectional')
  flow = jit(denoiser.flow)
  text = jit(denoiser.project_text)(params, golden['in/context'])
  x = from_model(golden['in/x'])
  return {
    f'out/{name}': to_model(flow(params, x, _sigma(golden[t]), text)[0])
    for name, t in (('flow', 'in/t'), ('flow_t_zero', 'in/t_zero'))
  }


def _blockwise_causal():
  golden = load('blockwise_causal')
  denoiser, params = network('blockwise_causal')

  def flow(*args, frame_mask, **kwargs):
    # Not an argument of the program: what it hides is left out of that.
    masked = functools.partial(denoiser.flow, frame_mask=frame_mask)
    return jit(masked)(*args, **kwargs)

  text = jit(denoiser.project_text)(params, golden['in/context'])
  x, clean = (from_model(golden[f'in/{n}']) for n in ('x', 'clean_x'))
  sigma = _sigma(golden['in/t'])
  causal = attention.block_causal_mask(9, _BLOCK)
  local = attention.block_causal_mask(9, _BLOCK, window=6)
  forced, _ = flow(
    params,
    np.concatenate([clean, x], 1),
    np.concatenate([0 * sigma, sigma], 1),
    text,
    positions_F=np.tile(np.arange(9), 2),
    frame_mask=attention.teacher_forcing_mask(9, _BLOCK),
  )
  flows = {
    'unlimited': flow(params, x, sigma, text, frame_mask=causal)[0],
    'local6': flow(params, x, sigma, text, frame_mask=local)[0],
    'perframe_t': flow(
      params,
      x,
      _sigma(golden['in/t_perframe']),
      text,
      frame_mask=causal,
    )[0],
    'teacher_forcing': forced[:, 9:],
  }
  return {
    'out/framemask_unlimited': causal,
    'out/framemask_local6': local,
    **{f'out/flow_{name}': to_model(x) for name, x in flows.items()},
  }


def _in_frame_order(past: KVCache, new: KV) -> KV:
  """K/V that a block sees, its own last, with the slots' order undone."""
  size = past.tokens_per_frame
  written, ring = int(past.frames), past.slots - past.sink
  slots = [
    frame if frame < past.sink else past.sink + (frame - past.sink) % ring
    for frame in range(written)
    if frame < past.sink or frame >= written - ring
  ]
  tokens = np.add.outer(np.asarray(slots, int) * size, np.arange(size)).ravel()
  return jax.tree.map(
    lambda old, own: jnp.concatenate([old[:, :, tokens], own], 2),
    KV(past.k, past.v),
    new,
  )


def _cached(name: str, batch: int, blocks: int, window: int, sink: int):
  """A D and a C pass of each block, the C pass's K/V written."""
  golden = load('kv_cache')
  denoiser, params = network('kv_cache')
  text = jit(denoiser.project_text)(params, golden['in/context'][:batch])
  past = init_cache(denoiser.config, batch, window - _BLOCK, sink)
  flow = jit(denoiser.flow)
  out = {}
  for block in range(blocks):
    for verb in 'DC':
      x = from_model(golden[f'in/x_{verb}'][block, :batch])
      v, kv = flow(params, x, _sigma(golden[f'in/t_{verb}']), text, past=past)
      out[f'flow_{verb}{block}'] = to_model(v)
    seen = _in_frame_order(past, kv)
    length = past.filled * past.tokens_per_frame + kv.k.shape[2]
    past = past.write(kv)
    total = past.frames * past.tokens_per_frame
    out[f'after_block{block}/ends'] = np.asarray([total, length])
    # The stored buffer has room for the whole window from the start.
    room = window * past.tokens_per_frame - seen.k.shape[2]
    for when in (f'after_block{block}/', 'final_'):
      for layer in range(denoiser.config.num_layers):
        for letter, x in (('k', seen.k), ('v', seen.v)):
          out[f'{when}{letter}{layer}'] = np.pad(
            x[layer], ((0, 0), (0, room), (0, 0), (0, 0))
          )
  return {f'out/{name}/{array}': x for array, x in out.items()}


_CACHES = {
  'unlimited': {'batch': 2, 'blocks': 3, 'window': 9, 'sink': 0},
  'local6_sink0': {'batch': 1, 'blocks': 6, 'window': 6, 'sink': 0},
  'local6_sink1': {'batch': 1, 'blocks': 6, 'window': 6, 'sink': 1},
}

CASES = [
  *cases(
    'bidirectional', _bidirectional, stored('bidirectional', 'out/'), FORWARD
  ),
  *cases(
    'blockwise_causal',
    _blockwise_causal,
    stored('blockwise_causal', 'out/'),
    FORWARD,
  ),
]
for _name, _sizes in _CACHES.items():
  CASES += cases(
    'kv_cache',
    functools.partial(_cached, _name, **_sizes),
    stored('kv_cache', f'out/{_name}/'),
    FORWARD,
  )
