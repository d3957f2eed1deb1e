"""Prompts in the words that a model was trained on, and a note of others.

Some models know few words. Where the source of the prompts that a model was
trained on says which (see `data.prompts`), synonyms are put into them and every
other word is named once, on stderr, whoever asks: program, script or notebook.
"""

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from hiar_jax.data import prompts as data_prompts

_REMEMBERED = 4096  # Prompts; a server must not grow with them.


class TaughtEncoder:
  """An encoder, see `text.encoders`, that is given the words it knows."""

  def __init__(self, encoder: Any, source: str | None):
    """Wraps an encoder.

    Args:
      encoder: to wrap.
      source: of the section `prompts` of the model's config; None: unknown.
    """
    self._encoder, self._source = encoder, source
    self._noted: dict[str, None] = {}

  def __getattr__(self, name: str) -> Any:
    return getattr(self._encoder, name)

  def encode(self, captions: Sequence[str]) -> np.ndarray:
    """As that of the encoder; says what the model was not taught."""
    if isinstance(captions, str):  # Refused there.
      return self._encoder.encode(captions)
    for caption in captions:
      self._note(caption)
    return self._encoder.encode(
      [data_prompts.reworded(self._source, caption) for caption in captions]
    )

  def examples(self) -> tuple[str, ...]:
    """Prompts that the model follows, if its source has some."""
    return data_prompts.examples(self._source)

  def notes(self, caption: str) -> list[str]:
    """What a prompt asks for in vain, a sentence each."""
    notes = data_prompts.not_taught(self._source, caption)
    count = getattr(self._encoder, 'num_cut', None)
    if count is not None and (cut := count(caption)):
      notes.append(
        f'{caption[:60]!r}... is too long: the model does not see its last '
        f'{cut} tokens'
      )
    return notes

  def _note(self, caption: str) -> None:
    # Guidance leads away from the empty prompt, which lacks nothing.
    if caption in self._noted or not caption.strip():
      return
    if len(self._noted) == _REMEMBERED:
      self._noted.clear()
    self._noted[caption] = None
    for note in self.notes(caption):
      print(f'note: {note}', file=sys.stderr)
