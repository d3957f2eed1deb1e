"""A network of a few thousand weights, none of them zero, for the tests."""

# B batch, F frames, h w latent rows and columns, C channels

import functools

import jax
import jax.numpy as jnp
import numpy as np

from hiar_jax.denoiser import Denoiser
from hiar_jax.models.config import WanConfig
from hiar_jax.models.transformer import TextKV

CONFIG = WanConfig(
  dim=16,
  ffn_dim=24,
  num_heads=2,
  num_layers=2,
  latent_height=2,
  latent_width=4,
  channels=2,
  freq_dim=8,
  text_dim=4,
  text_len=3,
)
DENOISER = Denoiser(CONFIG)
FRAME_SHAPE = (2, 4, 2)

# Networks of tests are so small that compiling them is nearly all of the time,
# and unoptimised code is compiled in half of it. Not inside another jit.
jit = functools.partial(
  jax.jit, compiler_options={'xla_backend_optimization_level': 0}
)


def draw_params(denoiser: Denoiser, scale: float = 0.3) -> dict:
  """Weights that let every input reach the flow (a fresh head is zero).

  NumPy arrays: nothing is compiled, and any mesh takes them.
  """
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    centre = 1.0 if 'norm' in jax.tree_util.keystr(path) else 0.0
    return rng.normal(centre, scale, leaf.shape).astype(np.float32)

  shapes = jax.eval_shape(denoiser.init, jax.random.key(0))
  return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.cache
def params() -> dict:
  """Weights of DENOISER."""
  return jax.tree.map(jnp.asarray, draw_params(DENOISER))


def text_states(batch: int) -> jax.Array:
  """Text encoder states of different prompts."""
  rng = np.random.default_rng(1)
  shape = (4, CONFIG.text_len, CONFIG.text_dim)
  return jnp.asarray(rng.normal(size=shape)[:batch], jnp.float32)


@functools.cache
def text(batch: int) -> TextKV:
  return jit(DENOISER.project_text)(params(), text_states(batch))


def latents(batch: int, num_frames: int, seed: int = 2) -> jax.Array:
  """Standard normal, [B, F, h, w, C]."""
  rng = np.random.default_rng(seed)
  shape = (batch, num_frames, *FRAME_SHAPE)
  return jnp.asarray(rng.normal(size=shape), jnp.float32)
