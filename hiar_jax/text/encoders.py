"""The text encoder that a config names, and what every encoder can do.

`encoder` of the section is a module of this room, or anyone's, that has a
function `open_encoder(section, mesh)`.

B batch, L tokens, D width.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from hiar_jax.runtime import seams

# Folders that were exported before encoders had names are of this one.
_UNNAMED = 'word_hash'


class Encoder(Protocol):
  """Captions to the states that cross-attention reads.

  Attributes:
    dim: width D.
    length: tokens L, padding included.
    identity: differs between encoders whose states differ.
    negative_prompt: what guidance leads away from unless a config says
      otherwise.
  """

  dim: int
  length: int
  identity: str
  negative_prompt: str

  def encode(self, captions: Sequence[str]) -> np.ndarray:
    """Encodes captions: float32 [B, L, D], zeros at padding.

    With a mesh of several processes all of them call it with the same
    captions, and all get all states.
    """

  def num_cut(self, caption: str) -> int:
    """Tokens of a caption that `length` leaves no room for."""

  def prepare(self, caption: str) -> dict[str, np.ndarray]:
    """What a data source hands out for a caption; touches no device."""

  def finish(self, batch: dict[str, Any]) -> dict[str, Any]:
    """A batch of `prepare`, in its place on the mesh, with `text` [B, L, D].

    What `prepare` made for it alone is taken out; the rest stays as it is.
    """


def open_encoder(
  section: Mapping[str, Any], mesh: jax.sharding.Mesh | None = None
) -> Encoder:
  """The encoder of a config's section `text`; weights are read when needed.

  Args:
    section: `encoder`, and what that one is made of.
    mesh: that an encoder with weights is divided over; None: one device.

  Raises:
    ValueError: if there is no such encoder, or a value is out of range.
    TypeError: naming a key that is unknown.
  """
  options = dict(section)
  name = options.pop('encoder', _UNNAMED)
  opens = seams.function('text', name, 'open_encoder', key='text.encoder')
  return opens(options, mesh)
