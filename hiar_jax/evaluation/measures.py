"""What videos that training samples are measured by: named in the config.

`measures` names a module of this room, or anyone's with dots in its name, that
has a function `open_measures(config)`. Missing, it is 'statistics': what any
video shows, whatever it shows. A module that knows prompts with their true
videos may have a function `open_scores(config)` besides, for the programs that
score a pipeline.
"""

from collections.abc import Mapping, Sequence
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


class Scores(Protocol):
  """What `open_scores` gives: videos against held-out prompts.

  Attributes:
    reads: what it reads of the config, sections or single values.
  """

  reads: tuple[str, ...]

  def prompts(self, count: int) -> tuple[str, ...]:
    """Prompts that no training has seen."""

  def true_videos(self, count: int, num_frames: int | None) -> np.ndarray:
    """Their videos, uint8 [count, num_frames, H, W, 3]; None: the config's."""

  def score(
    self, videos: Sequence[np.ndarray], prompts: Sequence[str]
  ) -> dict[str, float]:
    """Means over videos, uint8 [F, H, W, 3] each, by name."""

  def table(self, rows: Mapping[str, Mapping[str, float]]) -> str:
    """Results of `score` by the name of what made the videos, as text."""


class Identities(Protocol):
  """What `open_identities` gives: who a video stays, scene by scene.

  For the study, which compares arms of training on the same held-out scenes.
  """

  def prompts(self, count: int) -> tuple[str, ...]:
    """Prompts of scenes 0 .. count - 1, which no training has seen."""

  def true_videos(self, count: int, num_frames: int | None) -> np.ndarray:
    """Their videos, uint8 [count, num_frames, H, W, 3]; None: the config's."""

  def identity(
    self, video_FHWC: np.ndarray, number: int, *, parts: int, given: int
  ) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """One video, uint8, of scene `number`: numbers, and curves over its parts.

    Args:
      video_FHWC: of the scene's prompt.
      number: of the scene.
      parts: equal ones, of a curve.
      given: true frames that it began with, and is compared with the scene
        gone on; 0: none, it is compared with its own start.
    """


def open_identities(config: ml_collections.ConfigDict) -> Identities:
  """The identities that the module `config.measures` names knows.

  Raises:
    ValueError: if it has none, or they do not fit the config.
  """
  name = config.get('measures', _DEFAULT)
  opens = seams.function('evaluation', name, 'open_identities', key='measures')
  return opens(config)


def open_scores(config: ml_collections.ConfigDict) -> Scores:
  """The scores of the module that `config.measures` names.

  Raises:
    ValueError: if it has none, or they do not fit the config.
  """
  name = config.get('measures', _DEFAULT)
  opens = seams.function('evaluation', name, 'open_scores', key='measures')
  return opens(config)
