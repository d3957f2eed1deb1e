"""Names of the video VAE's weights elsewhere: tables for `convert`."""

from hiar_jax.models import convert


def _conv(foreign: str, ours: str) -> list[convert.Rule]:
  """Rules of a convolution: its weight and its bias."""
  return [
    (rf'{foreign}\.weight', f'{ours}/kernel', 'conv'),
    (rf'{foreign}\.bias', f'{ours}/bias', 'keep'),
  ]


def _scale(foreign: str, ours: str) -> list[convert.Rule]:
  # [C, 1, 1, 1] or [C, 1, 1] there. Like a kernel it keeps its rank here, so
  # that the way back is exact.
  return [(rf'{foreign}\.gamma', f'{ours}/scale', 'conv')]


# Groups: the network, down, up or middle, and the layer's number.
_LAYER = r'(encoder|decoder)\.(down|up|middle)(?:samples)?\.(\d+)'
_OURS = r'\1/\2_\3'

# Wan2.1_VAE.pth.
VAE_RULES: list[convert.Rule] = [
  *_conv(r'conv1', 'encoder/quant'),
  *_conv(r'conv2', 'decoder/post_quant'),
  *_conv(r'(encoder|decoder)\.conv1', r'\1/conv_in'),
  *_scale(rf'{_LAYER}\.residual\.0', f'{_OURS}/norm1'),
  *_conv(rf'{_LAYER}\.residual\.2', f'{_OURS}/conv1'),
  *_scale(rf'{_LAYER}\.residual\.3', f'{_OURS}/norm2'),
  *_conv(rf'{_LAYER}\.residual\.6', f'{_OURS}/conv2'),
  *_conv(rf'{_LAYER}\.shortcut', f'{_OURS}/shortcut'),
  *_scale(rf'{_LAYER}\.norm', f'{_OURS}/norm'),
  *_conv(rf'{_LAYER}\.to_qkv', f'{_OURS}/qkv'),
  *_conv(rf'{_LAYER}\.proj', f'{_OURS}/proj'),
  *_conv(rf'{_LAYER}\.resample\.1', f'{_OURS}/conv'),
  *_conv(rf'{_LAYER}\.time_conv', f'{_OURS}/time_conv'),
  *_scale(r'(encoder|decoder)\.head\.0', r'\1/head/norm'),
  *_conv(r'(encoder|decoder)\.head\.2', r'\1/head/conv'),
]
