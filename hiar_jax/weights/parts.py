"""Whether the parts of a pipeline go together, asked before any work."""

from collections.abc import Mapping
from typing import Any

# (part, its number, other part, its number, what both are)
_AGREE = (
  ('transformer', 'channels', 'vae', 'z_dim', 'latent channels'),
  ('transformer', 'text_dim', 'text_encoder', 'dim', 'numbers a token'),
)


def check(configs: Mapping[str, Any], names: Mapping[str, Any]) -> None:
  """Raises ValueError if two parts do not fit, naming both.

  Args:
    configs: of the parts that are there: 'transformer' has `channels` and
      `text_dim`, 'vae' has `z_dim`, 'text_encoder' has `dim`.
    names: of the parts, such as their files.
  """
  for one, number, other, another, what in _AGREE:
    if one not in configs or other not in configs:
      continue
    mine = getattr(configs[one], number)
    theirs = getattr(configs[other], another)
    if mine != theirs:
      raise ValueError(
        f'{names[one]} and {names[other]} do not go together: the {one} takes '
        f'{mine} {what}, the {other} gives {theirs}'
      )
