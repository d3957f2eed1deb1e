"""The video VAE against Wan2.1's, whole and streamed."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np

from hiar_jax.models import vae
from hiar_jax.weights import tables, vae_tables
from tests.parity.golden_lib import (
  FORWARD,
  cases,
  from_model,
  load,
  state_dict,
  stored,
  to_model,
)


def _run():
  golden = load('vae')
  sizes = json.loads(str(golden['config']))
  config = vae.VAEConfig(
    base_dim=sizes['dim'],
    z_dim=sizes['z_dim'],
    dim_mult=sizes['dim_mult'],
    num_res_blocks=sizes['num_res_blocks'],
    temporal_downsample=sizes['temperal_downsample'],
    mean=golden['in/mean'].tolist(),
    std=golden['in/std'].tolist(),
  )
  params = tables.convert_state_dict(
    state_dict('vae'),
    vae_tables.VAE_RULES,
    jax.eval_shape(functools.partial(vae.init, config), jax.random.key(0)),
  )
  video, z = (
    jnp.asarray(from_model(golden[f'in/{n}'])) for n in ('video', 'z')
  )
  encode, decode = (
    functools.partial(
      jax.jit(f, static_argnums=0, static_argnames='first'), config, params
    )
    for f in (vae.encode_block, vae.decode_block)
  )
  start, cache = decode(None, z[:, :3], first=True)
  rest, _ = decode(cache, z[:, 3:], first=False)
  out = {
    'encode_mu': encode(None, video, first=True)[0],
    'encode_mu_1frame': encode(None, video[:, :1], first=True)[0],
    'decode_3latents': start,
    'decode_1latent': decode(None, z[:, :1], first=True)[0],
    'cached_decode_chunk0': start,
    'cached_decode_chunk1': rest,
  }
  return {f'out/{name}': to_model(np.asarray(x)) for name, x in out.items()}


CASES = cases('vae', _run, stored('vae', 'out/'), FORWARD)
