"""The networks against those of diffusers and transformers.

Random weights in the full structure: heads of 128, norms over all heads, text
rows of zeros, causal convolutions that halve and double in time, a table of
positions in every layer. The widths are the caller's.
"""

# B batch, F frames, H W pixels, h w latent rows and columns, C channels,
# L tokens

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hiar_jax.denoiser import Denoiser
from hiar_jax.models import umt5, vae
from hiar_jax.models.config import WanConfig
from hiar_jax.sampling import seeds
from hiar_jax.sampling import teacher as sampling_teacher
from hiar_jax.weights import tables, umt5_tables, vae_tables
from tests.parity import peers_lib, peers_solvers
from tests.parity.golden_lib import from_model, to_model
from tests.toy_network import jit

_FRAMES = 3


def transformer_comparisons(
  part: str, *, num_heads: int, ffn_dim: int, text_dim: int, text_len: int
) -> Iterator[peers_lib.Comparison]:
  """WanTransformer3DModel, two layers, two samples at levels of their own."""
  import torch

  config = WanConfig(
    dim=128 * num_heads,
    ffn_dim=ffn_dim,
    num_heads=num_heads,
    num_layers=2,
    latent_height=8,
    latent_width=12,
    text_dim=text_dim,
    text_len=text_len,
  )
  peer, params = _transformer(config, seed=0)
  rng = np.random.default_rng(0)
  x, states = _inputs(rng, config)
  timesteps = np.float32([937.5, 250.0])

  def theirs():
    with torch.no_grad():
      return peers_lib.to_numpy(
        peer(
          peers_lib.to_torch(to_model(x), peer),
          peers_lib.to_torch(timesteps),
          peers_lib.to_torch(states, peer),
        ).sample
      )

  def ours(dtype):
    denoiser = Denoiser(dataclasses.replace(config, dtype=dtype))

    @jit
    def flow(params, x, sigma, states):
      text = denoiser.project_text(params, states)
      return denoiser.flow(params, x, sigma, text)[0]

    return to_model(flow(params, x, timesteps / 1000, states))

  yield from _compared(
    (part, 'diffusers WanTransformer3DModel'),
    peer,
    lambda: {'flow': theirs()},
    lambda dtype: {'flow': ours(dtype)},
  )


def sampler_comparisons(
  *, num_heads: int, ffn_dim: int, num_steps: int
) -> Iterator[peers_lib.Comparison]:
  """Text-to-video from start to end: network, guidance, solver, levels."""
  import torch

  config = WanConfig(
    dim=128 * num_heads,
    ffn_dim=ffn_dim,
    num_heads=num_heads,
    num_layers=2,
    latent_height=8,
    latent_width=12,
    text_dim=64,
    text_len=12,
  )
  denoiser = Denoiser(config)
  peer, params = _transformer(config, seed=1)
  _, states = _inputs(np.random.default_rng(1), config)
  keys = seeds.sample_keys(np.uint32(0), np.arange(2), np.zeros(2, int))
  shape = (_FRAMES, 8, 12, config.channels)
  noise = jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
  guidance, shift = 5.0, 5.0

  prompt = peers_lib.to_torch(states)
  schedulers = peers_solvers.schedulers(num_steps, shift)
  for solver, scheduler in schedulers.items():
    x = peers_lib.to_torch(to_model(noise))
    with torch.no_grad():
      for sigma, timestep in zip(scheduler.sigmas, scheduler.timesteps):
        level = (1000 * sigma).expand(2)
        uncond = peer(x, level, 0 * prompt).sample
        cond = peer(x, level, prompt).sample
        flow = uncond + guidance * (cond - uncond)
        x = scheduler.step(flow, timestep, x).prev_sample
    ours = sampling_teacher.sample(
      denoiser,
      params,
      sampling_teacher.SamplingConfig(solver, num_steps, shift, guidance),
      keys,
      states,
      np.zeros_like(states[:1]),
      num_frames=_FRAMES,
    )
    yield peers_lib.Comparison(
      part=f'text-to-video, {num_steps} steps, guidance {guidance:g}',
      peer=f'diffusers {type(scheduler).__name__}',
      output=f'latents ({solver})',
      ours=to_model(ours),
      theirs=peers_lib.to_numpy(x),
    )


def vae_comparisons(*, base_dim: int) -> Iterator[peers_lib.Comparison]:
  """AutoencoderKLWan: encode, decode at once and block by block."""
  import diffusers
  import torch

  config = dataclasses.replace(vae.VAEConfig.wan('float32'), base_dim=base_dim)
  peer = diffusers.AutoencoderKLWan(base_dim=base_dim).eval()
  peers_lib.randomise(peer, seed=2)
  # Frames of about unit size, for the peer clips what it decodes.
  peer.decoder.conv_out.weight.data *= 0.3
  rules = vae_tables.diffusers_rules(
    len(config.dim_mult), config.num_res_blocks
  )
  params = _converted(peer, rules, functools.partial(vae.init, config))
  rng = np.random.default_rng(2)
  video = rng.uniform(-1, 1, (2, 9, 32, 48, 3)).astype(np.float32)
  latents = rng.normal(size=(2, 5, 4, 6, 16)).astype(np.float32)
  mean, std = np.float32(config.mean), np.float32(config.std)
  streamed = 'frames, in blocks of 1, 2, 2'

  def theirs():
    with torch.no_grad():
      mode = peer.encode(peers_lib.to_torch(to_model(video), peer))
      raw = from_model(peers_lib.to_numpy(mode.latent_dist.mode()))
      frames = peer.decode(
        peers_lib.to_torch(to_model(latents * std + mean), peer)
      ).sample
    frames = peers_lib.to_numpy(frames)
    return {
      'latents': to_model((raw - mean) / std),
      'frames': frames,
      streamed: frames,
    }

  def ours(dtype):
    low = dataclasses.replace(config, dtype=dtype)
    encode, decode = (
      functools.partial(
        jit(f, static_argnums=0, static_argnames='first'), low, params
      )
      for f in (vae.encode_block, vae.decode_block)
    )
    found = {
      'latents': to_model(encode(None, video, first=True)[0]),
      'frames': _clipped(decode(None, latents, first=True)[0]),
    }
    if dtype == 'float32':
      pieces, cache = [], None
      for block in np.split(latents, (1, 3), axis=1):
        frames, cache = decode(cache, block, first=not pieces)
        pieces.append(frames)
      found[streamed] = _clipped(jnp.concatenate(pieces, 1))
    return found

  yield from _compared(
    (f'VAE, base width {base_dim}', 'diffusers AutoencoderKLWan'),
    peer,
    theirs,
    ours,
  )


def umt5_comparisons(
  *, dim: int, num_heads: int, num_layers: int
) -> Iterator[peers_lib.Comparison]:
  """UMT5EncoderModel: prompts of two lengths, padded."""
  import torch
  import transformers

  config = umt5.UMT5Config(
    vocab_size=512,
    dim=dim,
    ffn_dim=5 * dim // 2,
    num_heads=num_heads,
    attention_dim=64 * num_heads,
    num_layers=num_layers,
  )
  peer = transformers.UMT5EncoderModel(
    transformers.UMT5Config(
      vocab_size=config.vocab_size,
      d_model=dim,
      d_kv=64,
      d_ff=config.ffn_dim,
      num_layers=num_layers,
      num_heads=num_heads,
      feed_forward_proj='gated-gelu',
    )
  ).eval()
  peers_lib.randomise(peer, seed=3)
  for block in peer.encoder.block:
    # Takes the place of 1 / sqrt(head_dim), which T5 leaves to its weights.
    block.layer[0].SelfAttention.q.weight.data *= 64**-0.5
  params = _converted(
    peer, umt5_tables.TRANSFORMERS_RULES, functools.partial(umt5.init, config)
  )
  rng = np.random.default_rng(3)
  mask = np.arange(160) < np.array([[150], [23]])
  ids = np.where(mask, rng.integers(1, 512, mask.shape), 0)

  def theirs():
    with torch.no_grad():
      hidden = peer(
        input_ids=torch.from_numpy(ids),
        attention_mask=torch.from_numpy(mask.astype(int)),
      ).last_hidden_state
    return peers_lib.to_numpy(hidden) * mask[..., None]

  def ours(dtype):
    low = dataclasses.replace(config, dtype=dtype)
    encode = jit(umt5.encode, static_argnums=0)
    return np.asarray(encode(low, params, ids, mask), np.float32)

  yield from _compared(
    (
      f'umT5, {num_layers} layers, {num_heads} heads',
      'transformers UMT5EncoderModel',
    ),
    peer,
    lambda: {'hidden states': theirs()},
    lambda dtype: {'hidden states': ours(dtype)},
  )


def _transformer(config: WanConfig, seed: int) -> tuple[Any, dict]:
  """The peer of a config with random weights, and ours with the same."""
  import diffusers

  peer = diffusers.WanTransformer3DModel(
    num_attention_heads=config.num_heads,
    attention_head_dim=config.head_dim,
    ffn_dim=config.ffn_dim,
    num_layers=config.num_layers,
    text_dim=config.text_dim,
  ).eval()
  peers_lib.randomise(peer, seed)
  rules = tables.WAN_DIFFUSERS_RULES
  return peer, _converted(peer, rules, Denoiser(config).init)


def _compared(
  names: tuple[str, str],
  peer: Any,
  theirs: Callable[[], dict[str, np.ndarray]],
  ours: Callable[[str], dict[str, np.ndarray]],
) -> Iterator[peers_lib.Comparison]:
  """Both in both dtypes; afterwards the peer's weights are bfloat16."""
  full = theirs()
  peers_lib.to_bfloat16(peer)
  low = theirs()
  ours_full, ours_low = ours('float32'), ours('bfloat16')
  for output in full:
    yield peers_lib.Comparison(
      *names,
      output,
      ours=ours_full[output],
      theirs=full[output],
      ours_low=ours_low.get(output),
      theirs_low=low[output] if output in ours_low else None,
    )


def _converted(peer: Any, rules: list, init: Callable) -> dict:
  params = tables.convert_state_dict(
    peers_lib.state_dict(peer), rules, jax.eval_shape(init, jax.random.key(0))
  )
  return jax.device_put(params)


def _inputs(
  rng: np.random.Generator, config: WanConfig
) -> tuple[np.ndarray, np.ndarray]:
  """Latents and text states of two samples; the first has padding."""
  x = rng.normal(
    size=(
      *(2, _FRAMES, config.latent_height, config.latent_width),
      config.channels,
    )
  )
  states = rng.normal(size=(2, config.text_len, config.text_dim))
  states[0, config.text_len // 2 :] = 0
  return x.astype(np.float32), states.astype(np.float32)


def _clipped(frames_BFHWC: jax.Array) -> np.ndarray:
  return to_model(jnp.clip(frames_BFHWC, -1, 1))
