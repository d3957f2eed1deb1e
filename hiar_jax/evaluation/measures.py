"""What videos that training samples are measured by: named in the config.

`measures` names a module of this room, or anyone's with dots in its name, that
has a function `open_measures(config)`. Missing, it is 'statistics': what any
video shows, whatever it shows.
"""

from typing import Protocol

import ml_collections
import numpy as np

from hiar_jax.runtime import seams

_DEFAULT = 'statistics'


class Measures(Protocol):
  """What `open_measures` gives."""

  def prompts(self, count: int) -> tuple[str, ...]:
    """Prompts to sample that training does not see; () if it knows none."""

  def measure(
    self, videos_BFHWC: np.ndarray, prompts: tuple[str, ...]
  ) -> dict[str, float]:
    """Means over videos, uint8, by name; {} if they are too short for it."""


def open_measures(config: ml_collections.ConfigDict) -> Measures:
  """The measures that `config.measures` names.

  Raises:
    ValueError: if there are none of that name, or they do not fit the config.
  """
  name = config.get('measures', _DEFAULT)
  opens = seams.function('evaluation', name, 'open_measures', key='measures')
  return opens(config)
