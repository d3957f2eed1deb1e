"""Names of the video VAE's weights elsewhere: tables for `convert`."""

import re
from collections.abc import Iterable, Mapping

from hiar_jax.weights.tables import Rule, Shape


def _conv(foreign: str, ours: str) -> list[Rule]:
  """Rules of a convolution: its weight and its bias."""
  return [
    (f'{foreign}.weight', f'{ours}/kernel', 'conv'),
    (f'{foreign}.bias', f'{ours}/bias', 'keep'),
  ]


def _scale(foreign: str, ours: str) -> list[Rule]:
  # [C, 1, 1, 1] or [C, 1, 1] there. Like a kernel it keeps its rank here, so
  # that the way back is exact.
  return [(f'{foreign}.gamma', f'{ours}/scale', 'conv')]


def _residual(foreign: str, ours: str) -> list[Rule]:
  """Rules of a residual block as Wan2.1 names it, shortcut apart."""
  return [
    *_scale(f'{foreign}.residual.0', f'{ours}/norm1'),
    *_conv(f'{foreign}.residual.2', f'{ours}/conv1'),
    *_scale(f'{foreign}.residual.3', f'{ours}/norm2'),
    *_conv(f'{foreign}.residual.6', f'{ours}/conv2'),
  ]


def _attention(foreign: str, ours: str) -> list[Rule]:
  return [
    *_scale(f'{foreign}.norm', f'{ours}/norm'),
    *_conv(f'{foreign}.to_qkv', f'{ours}/qkv'),
    *_conv(f'{foreign}.proj', f'{ours}/proj'),
  ]


def _resample(foreign: str, ours: str) -> list[Rule]:
  return [
    *_conv(f'{foreign}.resample.1', f'{ours}/conv'),
    *_conv(f'{foreign}.time_conv', f'{ours}/time_conv'),
  ]


# Wan2.1_VAE.pth.
VAE_RULES: list[Rule] = [
  *_conv('conv1', 'encoder/quant'),
  *_conv('conv2', 'decoder/post_quant'),
  *_conv('{net}.conv1', '{net}/conv_in'),
  *_residual('encoder.downsamples.{i}', 'encoder/down_{i}'),
  *_conv('encoder.downsamples.{i}.shortcut', 'encoder/down_{i}/shortcut'),
  *_resample('encoder.downsamples.{i}', 'encoder/down_{i}'),
  *_residual('{net}.middle.{i}', '{net}/middle_{i}'),
  *_attention('{net}.middle.{i}', '{net}/middle_{i}'),
  *_residual('decoder.upsamples.{i}', 'decoder/up_{i}'),
  *_conv('decoder.upsamples.{i}.shortcut', 'decoder/up_{i}/shortcut'),
  *_resample('decoder.upsamples.{i}', 'decoder/up_{i}'),
  *_scale('{net}.head.0', '{net}/head/norm'),
  *_conv('{net}.head.2', '{net}/head/conv'),
]


def _named_residual(foreign: str, ours: str) -> list[Rule]:
  """Rules of a residual block as diffusers names it, shortcut apart."""
  return [
    *_scale(f'{foreign}.norm{{n}}', f'{ours}/norm{{n}}'),
    *_conv(f'{foreign}.conv{{n}}', f'{ours}/conv{{n}}'),
  ]


def diffusers_rules(num_levels: int, num_res_blocks: int) -> list[Rule]:
  """Rules of AutoencoderKLWan.

  The decoder's layers are counted level by level there and through here.

  Args:
    num_levels: entries of dim_mult.
    num_res_blocks: of an encoder's level; the decoder has one more.
  """
  rules = [
    *_conv('quant_conv', 'encoder/quant'),
    *_conv('post_quant_conv', 'decoder/post_quant'),
    *_conv('{net}.conv_in', '{net}/conv_in'),
    *_named_residual('encoder.down_blocks.{i}', 'encoder/down_{i}'),
    *_conv(
      'encoder.down_blocks.{i}.conv_shortcut', 'encoder/down_{i}/shortcut'
    ),
    *_resample('encoder.down_blocks.{i}', 'encoder/down_{i}'),
    *_named_residual('{net}.mid_block.resnets.0', '{net}/middle_0'),
    *_attention('{net}.mid_block.attentions.0', '{net}/middle_1'),
    *_named_residual('{net}.mid_block.resnets.1', '{net}/middle_2'),
    *_scale('{net}.norm_out', '{net}/head/norm'),
    *_conv('{net}.conv_out', '{net}/head/conv'),
  ]
  layer = 0
  for level in range(num_levels):
    block = f'decoder.up_blocks.{level}'
    for i in range(num_res_blocks + 1):
      rules += _named_residual(f'{block}.resnets.{i}', f'decoder/up_{layer}')
      rules += _conv(
        f'{block}.resnets.{i}.conv_shortcut', f'decoder/up_{layer}/shortcut'
      )
      layer += 1
    if level < num_levels - 1:
      rules += _resample(f'{block}.upsamplers.0', f'decoder/up_{layer}')
      layer += 1
  return rules


def diffusers_rules_of(names: Iterable[str]) -> list[Rule]:
  """The table for a state dict of AutoencoderKLWan, from its names alone."""
  hits = [
    match
    for name in names
    if (match := re.match(r'decoder\.up_blocks\.(\d+)\.resnets\.(\d+)\.', name))
  ]
  levels = 1 + max((int(hit[1]) for hit in hits), default=0)
  return diffusers_rules(levels, max((int(hit[2]) for hit in hits), default=0))


def infer_sizes(shapes: Mapping[str, Shape]) -> dict:
  """Arguments of VAEConfig that the shapes of its weights tell.

  Args:
    shapes: our path -> our shape.

  Returns:
    base_dim, z_dim, dim_mult, num_res_blocks, temporal_downsample.

  Raises:
    KeyError: naming a path that is missing.
    ValueError: if the layers are not those of a VAE.
  """
  base_dim = shapes['encoder/conv_in/bias'][0]
  widths: list[int] = []
  temporal: list[bool] = []
  blocks = 0
  layer = 0
  while True:
    ours = f'encoder/down_{layer}'
    if f'{ours}/conv2/bias' in shapes:
      width = shapes[f'{ours}/conv2/bias'][0]
      blocks += 1
      if len(widths) <= len(temporal):
        widths.append(width)
    elif f'{ours}/conv/bias' in shapes:
      temporal.append(f'{ours}/time_conv/bias' in shapes)
    else:
      break
    layer += 1
  if not widths or blocks % len(widths) or any(w % base_dim for w in widths):
    raise ValueError(
      f'{blocks} residual blocks of widths {widths} on {base_dim} channels '
      "are no Wan VAE's encoder"
    )
  return {
    'base_dim': base_dim,
    'z_dim': shapes['decoder/post_quant/bias'][0],
    'dim_mult': tuple(width // base_dim for width in widths),
    'num_res_blocks': blocks // len(widths),
    'temporal_downsample': tuple(temporal),
  }
