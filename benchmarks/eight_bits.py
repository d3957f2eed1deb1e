"""How far 8 bits take a pass of 1.3B from that in bfloat16, and their bytes.

  python benchmarks/eight_bits.py --num_layers 4

Random weights at the full width of Wan2.1-T2V-1.3B (a normal distribution of
the usual size: trained weights have larger outliers), a few of its 30 layers,
frames of a few tokens. A past of two blocks is made by passes of the same
network; what is compared is the flow of the third. No device with 8-bit
products is needed, and nothing is timed.
"""

import argparse
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from hiar_jax import noise_schedule, rollout
from hiar_jax.denoiser import Denoiser
from hiar_jax.models.config import WanConfig
from hiar_jax.sampling import memory
from hiar_jax.weights import held

_LEVELS = noise_schedule.warped_levels((1000, 750, 500, 250), 5.0)
_PLAIN = held.Held()
# Weights and products, past.
_ROWS = (
  (held.Held('int8'), None),
  (held.Held('float8'), None),
  (held.Held('int8', 'int8'), None),
  (held.Held('float8', 'float8'), None),
  (_PLAIN, 'int8'),
  (_PLAIN, 'float8'),
  (held.Held('int8', 'int8'), 'int8'),
  (held.Held('float8', 'float8'), 'float8'),
)


def main():
  """Prints the error and the bytes of each kind."""
  parser = argparse.ArgumentParser()
  parser.add_argument('--num_layers', type=int, default=4, help='of 30')
  parser.add_argument('--seed', type=int, default=0)
  args = parser.parse_args()
  config = rollout.RolloutConfig(levels=_LEVELS, window=9)
  model = WanConfig.wan_1_3b(
    num_layers=args.num_layers,
    latent_height=12,
    latent_width=20,
    remat='none',
    text_len=64,
  )
  params = _draw(model, args.seed)
  states = _normal(args.seed, 1, model.text_len, model.text_dim)
  blocks = _normal(args.seed, 3, 1, *config.block_shape(model))

  def flow(model, how, past_dtype):
    denoiser = Denoiser(model)
    weights = jax.jit(lambda p: how.put(p, model.dtype))(params)
    run = jax.jit(
      lambda weights, blocks: _third(
        denoiser,
        weights,
        states,
        blocks,
        dataclasses.replace(config, past_dtype=past_dtype),
      )
    )
    return np.asarray(run(weights, blocks))

  whole = flow(dataclasses.replace(model, dtype='float32'), _PLAIN, None)
  plain = flow(model, _PLAIN, None)
  full = WanConfig.wan_1_3b()
  window = dataclasses.replace(config, window=21)

  def bytes_of(how, past_dtype):
    shapes = how.shapes(
      jax.eval_shape(lambda: Denoiser(full).init(jax.random.key(0))), full.dtype
    )
    kept = dataclasses.replace(window, past_dtype=past_dtype)
    return (
      memory.weights_bytes(shapes, full) / 1e9,
      memory.past_bytes(full, kept, 1) / 1e9,
    )

  def row(name, how, past_dtype, found, other):
    off = np.sqrt(np.mean((found - other) ** 2)) / other.std()
    weights, past = bytes_of(how, past_dtype)
    print(f'| {name} | {100 * off:.2f} % | {weights:.2f} | {past:.2f} |')

  print(f'{args.num_layers} layers of {full.num_layers}, seed {args.seed}')
  print('| | error of a pass | weights, GB | a past, GB |')
  print('|---|---|---|---|')
  row('bfloat16, of float32', _PLAIN, None, plain, whole)
  for how, past in _ROWS:
    name = ', '.join(filter(None, [str(how), past and f'past in {past}']))
    row(name, how, past, flow(model, how, past), plain)


def _normal(seed, *shape):
  rng = np.random.default_rng([seed, *shape])
  return jnp.asarray(rng.normal(size=shape).astype(np.float32))


def _draw(model, seed):
  """Weights of which every one matters; norms are near 1."""
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    name = jax.tree_util.keystr(path)
    size = leaf.shape[-2] ** -0.5 if 'kernel' in name else 0.02
    drawn = size * rng.standard_normal(leaf.shape, np.float32)
    return drawn + ('norm' in name and 'bias' not in name)

  shapes = jax.eval_shape(Denoiser(model).init, jax.random.key(0))
  return jax.tree_util.tree_map_with_path(draw, shapes)


def _third(denoiser, params, states, blocks, config):
  text = denoiser.project_text(params, states)
  sampler = rollout.Sampler(denoiser, params, text, config)
  past = sampler.empty_past()
  for block in blocks[:2]:
    past = past.write(sampler.commit_kv(block, past, 0.0))
  return sampler.denoise(blocks[2], past, 2)[0]


if __name__ == '__main__':
  main()
