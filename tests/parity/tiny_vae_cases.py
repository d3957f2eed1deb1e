"""The tiny VAE against TAEHV's, whole and streamed."""

import functools
import json
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from hiar_jax.models import tiny_vae
from tests.parity.golden_lib import FORWARD, cases, load

# Of frames in [0, 1] that come of numbers up to 34. The stored ones are off by
# 2.1e-5 from float64 and by 3.4e-5 from the same class streamed.
FRAMES = 5e-5


def state_dict() -> dict[str, np.ndarray]:
  """The weights of the stored run, which are made from their names."""
  names = json.loads(json.loads(str(load('tiny_vae')['config']))['names'])
  weights = {}
  for name, shape in names.items():
    rng = np.random.Generator(np.random.Philox(key=zlib.crc32(name.encode())))
    w = rng.random(shape) * 2 - 1
    w = w * (np.sqrt(4.5 / np.prod(shape[1:])) if len(shape) > 1 else 0.1)
    weights[name] = w.astype(np.float32)
  return weights


def params() -> dict[str, jax.Array]:
  return {
    name: jnp.asarray(w.transpose(2, 3, 1, 0) if w.ndim == 4 else w)
    for name, w in state_dict().items()
  }


@functools.cache
def _run():
  golden, weights = load('tiny_vae'), params()
  video, latents = (
    jnp.moveaxis(jnp.asarray(golden[f'in/{name}']), 2, -1)
    for name in ('video', 'latents')
  )
  decode = jax.jit(tiny_vae.decode)
  raw, _ = decode(weights, latents)
  parts, state = [], None
  for i in range(latents.shape[1]):
    part, state = decode(weights, latents[:, i : i + 1], state)
    parts.append(part)
  ours = {
    'raw': raw,
    'frames': jnp.clip(raw, 0, 1)[:, tiny_vae.LEAD :],
    'frames_stream': jnp.clip(jnp.concatenate(parts, 1), 0, 1)[
      :, tiny_vae.LEAD :
    ],
    'encoded': jax.jit(tiny_vae.encode)(weights, video),
  }
  return {
    f'out/{name}': np.moveaxis(np.asarray(x), -1, 2) for name, x in ours.items()
  }


CASES = [
  *cases('tiny_vae', _run, ['out/encoded'], FORWARD),
  *cases('tiny_vae', _run, ['out/raw'], FORWARD, relative=True),
  *cases('tiny_vae', _run, ['out/frames', 'out/frames_stream'], FRAMES),
]
