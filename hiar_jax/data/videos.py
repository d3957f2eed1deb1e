"""Videos with captions, by number."""

from typing import Any, Protocol

import numpy as np

from hiar_jax.data import prompts

# F frames, H W height and width

# Told apart from other streams of the same seed.
_DROPOUT_STREAM = 1


class Videos(Protocol):
  """A source of captioned videos of one size.

  Attributes:
    captions: caption i is that of video i.
    shape: (F, H, W, 3) of every video.
  """

  captions: prompts.Prompts
  shape: tuple[int, int, int, int]

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> np.ndarray:
    """Video `index`: uint8 [F, H, W, 3].

    Raises:
      ValueError: if its file is broken or too short, naming it.
    """

  def identity(self) -> dict[str, Any]:
    """What these videos are, by content and not by place; JSON."""


def drops_caption(seed: int, index: int, share: float) -> bool:
  """Whether element `index` goes without its caption; by seed and index only.

  Args:
    seed: in [0, 2**64).
    index: in [0, 2**64).
    share: of the elements that do, in [0, 1].
  """
  bits = np.random.Philox(
    key=np.array([seed, index], np.uint64),
    counter=np.array([0, 0, 0, _DROPOUT_STREAM], np.uint64),
  )
  return np.random.Generator(bits).random() < share
