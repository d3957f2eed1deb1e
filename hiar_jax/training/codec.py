"""Training the video VAE.

A clip is encoded, drawn from its posterior and decoded; the loss is its error
in pixels, absolute and squared, and the posterior's divergence from a unit
normal (arXiv:1312.6114).

B batch, F frames, H W height and width, C latent channels.
"""

import functools
from collections.abc import Callable
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax

from hiar_jax.codecs import pixels
from hiar_jax.models import vae

# Outside, exp(log variance) says nothing that training could use.
_LOG_VAR_RANGE = (-20.0, 10.0)


def init(config: vae.VAEConfig, key: jax.Array) -> vae.Params:
  """First parameters: every residual branch starts as nothing.

  What is left is a chain of a few convolutions, which learns several times
  faster than one with random branches.
  """

  def start(path, leaf):
    names = [key.key for key in path]
    ends_branch = names[-2] == 'proj' or names[-2] == 'conv2'
    return jnp.zeros_like(leaf) if ends_branch else leaf

  return jax.tree_util.tree_map_with_path(start, vae.init(config, key))


def loss(
  config: vae.VAEConfig,
  params: vae.Params,
  video: jax.Array,
  key: jax.Array,
  *,
  kl_weight: float,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Loss of a batch of clips, and its parts.

  Args:
    config: with mean 0 and std 1, which `fold_statistics` brings about later.
    params: of both halves.
    video: uint8 [B, 1 + 4k, H, W, 3].
    key: names the posterior's noise.
    kl_weight: of the divergence, a mean over latents like the errors' over
      pixels.
  """
  target = pixels.to_float(video)
  mean, log_var = vae.posterior(config, params, target)
  log_var = jnp.clip(log_var, *_LOG_VAR_RANGE)
  noise = jax.random.normal(key, mean.shape)
  decoded = vae.decode(config, params, mean + jnp.exp(log_var / 2) * noise)
  square = jnp.mean(jnp.square(decoded - target))
  absolute = jnp.mean(jnp.abs(decoded - target))
  kl = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(log_var) - 1 - log_var)
  parts = {
    'absolute_error': absolute,
    'psnr': 10 * jnp.log10(4 / square),
    'kl': kl,
  }
  return absolute + square + kl_weight * kl, parts


def make_step(
  config: vae.VAEConfig,
  optimiser: optax.GradientTransformation,
  *,
  kl_weight: float,
  ema_decay: float,
) -> Callable[..., Any]:
  """A (RegressionState, clips, key) -> (state, metrics); donates the state.

  In two programs: crops and whole frames have gradients of their own, and one
  update, whose two thousand small kernels would else be compiled twice.
  """

  @jax.jit
  def gradients(params, video, key):
    return jax.value_and_grad(
      lambda params: loss(config, params, video, key, kl_weight=kl_weight),
      has_aux=True,
    )(params)

  @functools.partial(jax.jit, donate_argnums=0)
  def update(state, value, grads):
    return state.update(value, grads, optimiser, ema_decay)

  def step(state, video, key):
    (value, parts), grads = gradients(state.net.params, video, key)
    state, metrics = update(state, value, grads)
    return state, {'loss': value, **parts, **metrics}

  return step


def statistics(
  config: vae.VAEConfig,
  params: vae.Params,
  source: grain.sources.RandomAccessDataSource,
  *,
  num_videos: int,
) -> tuple[np.ndarray, np.ndarray]:
  """Mean and standard deviation [C] of the latents of a source's videos."""
  encode = jax.jit(lambda params, video: vae.posterior(config, params, video))
  means = np.concatenate(
    [
      encode(params, pixels.to_float(source[index]['video'][None]))[0]
      for index in range(num_videos)
    ]
  ).reshape(-1, config.z_dim)
  return means.mean(axis=0), means.std(axis=0)


def fold_statistics(
  params: vae.Params, mean_C: np.ndarray, std_C: np.ndarray
) -> vae.Params:
  """The same VAE with latents (z - mean) / std.

  The encoder ends and the decoder begins with a 1x1x1 convolution, which take
  the change: mean 0 and std 1 are then right for its config.
  """
  quant, post_quant = jax.tree.map(
    np.asarray, (params['encoder']['quant'], params['decoder']['post_quant'])
  )
  channels = len(mean_C)
  scale = np.concatenate([1 / std_C, np.ones(channels)])
  shift = np.concatenate([-mean_C / std_C, -2 * np.log(std_C)])
  quant = {
    'kernel': quant['kernel'] * scale,
    'bias': quant['bias'] * scale + shift,
  }
  post_quant = {
    'kernel': post_quant['kernel'] * std_C[:, None],
    'bias': post_quant['bias'] + mean_C @ post_quant['kernel'][0, 0, 0],
  }
  return {
    'encoder': params['encoder'] | {'quant': quant},
    'decoder': params['decoder'] | {'post_quant': post_quant},
  }
