"""The folders that weights lie in, ours and others': files and config.json."""

import pathlib
from collections.abc import Mapping
from typing import Any

from hiar_jax.models import umt5, vae
from hiar_jax.models.config import WanConfig

# Pipelines that come with the package, a folder each.
ASSETS = pathlib.Path(__file__).parent / 'assets'
# A folder of ours: the config, a file for each part, and the tokenizer.
CONFIG_FILE = 'config.json'
STUDENT_FILE = 'student.safetensors'
TEXT_ENCODER_FILE = 'text_encoder.safetensors'
OWN_FILES = {
  'transformer': STUDENT_FILE,
  'vae': 'vae.safetensors',
  'text_encoder': TEXT_ENCODER_FILE,
}
TOKENIZER = 'tokenizer'
# Of config.json: the transformer is Wan2.1's own, no student.
IS_BASE_MODEL = 'is_base_model'
# Any of them is a tokenizer.
TOKENIZER_FILES = ('tokenizer.json', 'spiece.model', 'tokenizer.model')
LINEAR_CODEC_FILE = 'codec.npz'
TEACHER_FILE = 'teacher.safetensors'

# Naming -> part -> file. In Wan2.1's layout the VAE and the text encoder are
# pickles; the same arrays are written as safetensors here.
FILES = {
  'wan': {
    'transformer': 'diffusion_pytorch_model.safetensors',
    'vae': 'Wan2.1_VAE.safetensors',
    'text_encoder': 'models_t5_umt5-xxl-enc.safetensors',
  },
  'diffusers': {
    'transformer': 'transformer/diffusion_pytorch_model.safetensors',
    'vae': 'vae/diffusion_pytorch_model.safetensors',
    'text_encoder': 'text_encoder/model.safetensors',
  },
}
# The transformer alone, as a training of Self-Forcing or HiAR keeps it.
SELF_FORCING_FILE = 'model.safetensors'
# That these configs are of.
_DIFFUSERS_VERSION = '0.33.0'


def codec_file(config: Mapping[str, Any]) -> str:
  """Name of the codec's file in a folder of ours with this config."""
  return OWN_FILES['vae'] if 'vae' in config else LINEAR_CODEC_FILE


def config_of(
  config: WanConfig | vae.VAEConfig | umt5.UMT5Config, naming: str
) -> dict[str, Any] | None:
  """The config.json of a network; None where the layout has none.

  Raises:
    ValueError: if the layout has no place for a value.
  """
  if isinstance(config, WanConfig):
    return _wan(config) if naming == 'wan' else _wan_diffusers(config)
  if isinstance(config, umt5.UMT5Config):
    return None if naming == 'wan' else _umt5(config)
  if naming == 'diffusers':
    return _vae(config)
  released = vae.VAEConfig.wan()
  if (config.mean, config.std) != (released.mean, released.std):
    raise ValueError(
      "Wan2.1's layout has no place for the mean and std of other latents than "
      'its own; use diffusers'
    )
  return None


def diffusers_pipeline(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
  """File -> contents that make three parts a pipeline for diffusers.

  Args:
    config: of a folder of ours.
  """
  shift = config['schedule']['shift']
  return {
    'model_index.json': {
      '_class_name': 'WanPipeline',
      '_diffusers_version': _DIFFUSERS_VERSION,
      'scheduler': ['diffusers', 'UniPCMultistepScheduler'],
      'text_encoder': ['transformers', 'UMT5EncoderModel'],
      'tokenizer': ['transformers', 'T5TokenizerFast'],
      'transformer': ['diffusers', 'WanTransformer3DModel'],
      'vae': ['diffusers', 'AutoencoderKLWan'],
    },
    'scheduler/scheduler_config.json': {
      '_class_name': 'UniPCMultistepScheduler',
      '_diffusers_version': _DIFFUSERS_VERSION,
      'flow_shift': shift,
      'num_train_timesteps': 1000,
      'prediction_type': 'flow_prediction',
      'solver_order': 2,
      'use_flow_sigmas': True,
    },
  }


def _wan(cfg: WanConfig) -> dict[str, Any]:
  if cfg.patch != (2, 2):
    raise ValueError(f"Wan2.1's layout has patches of (2, 2), not {cfg.patch}")
  return {
    '_class_name': 'WanModel',
    'model_type': 't2v',
    'dim': cfg.dim,
    'ffn_dim': cfg.ffn_dim,
    'freq_dim': cfg.freq_dim,
    'in_dim': cfg.channels,
    'out_dim': cfg.channels,
    'num_heads': cfg.num_heads,
    'num_layers': cfg.num_layers,
    'text_dim': cfg.text_dim,
    'text_len': cfg.text_len,
    'eps': cfg.eps,
  }


def _wan_diffusers(cfg: WanConfig) -> dict[str, Any]:
  return {
    '_class_name': 'WanTransformer3DModel',
    '_diffusers_version': _DIFFUSERS_VERSION,
    'attention_head_dim': cfg.head_dim,
    'cross_attn_norm': True,
    'eps': cfg.eps,
    'ffn_dim': cfg.ffn_dim,
    'freq_dim': cfg.freq_dim,
    'in_channels': cfg.channels,
    'num_attention_heads': cfg.num_heads,
    'num_layers': cfg.num_layers,
    'out_channels': cfg.channels,
    'patch_size': [1, *cfg.patch],
    'qk_norm': 'rms_norm_across_heads',
    'rope_max_seq_len': 1024,
    'text_dim': cfg.text_dim,
  }


def _vae(cfg: vae.VAEConfig) -> dict[str, Any]:
  return {
    '_class_name': 'AutoencoderKLWan',
    '_diffusers_version': _DIFFUSERS_VERSION,
    'attn_scales': [],
    'base_dim': cfg.base_dim,
    'dim_mult': list(cfg.dim_mult),
    'dropout': 0.0,
    'latents_mean': list(cfg.mean),
    'latents_std': list(cfg.std),
    'num_res_blocks': cfg.num_res_blocks,
    # Spelt as in that class.
    'temperal_downsample': list(cfg.temporal_downsample),
    'z_dim': cfg.z_dim,
  }


def _umt5(cfg: umt5.UMT5Config) -> dict[str, Any]:
  return {
    'architectures': ['UMT5EncoderModel'],
    'model_type': 'umt5',
    'd_ff': cfg.ffn_dim,
    'd_kv': cfg.head_dim,
    'd_model': cfg.dim,
    'feed_forward_proj': 'gated-gelu',
    'is_encoder_decoder': True,
    'layer_norm_epsilon': cfg.eps,
    'num_heads': cfg.num_heads,
    'num_layers': cfg.num_layers,
    'relative_attention_max_distance': cfg.max_distance,
    'relative_attention_num_buckets': cfg.num_buckets,
    'vocab_size': cfg.vocab_size,
    'eos_token_id': 1,
    'pad_token_id': 0,
  }
