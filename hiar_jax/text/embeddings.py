"""States of prompts in files: what an encoder made, in the encoder's place.

An embeddings file has the states of one prompt, as safetensors: `states` [n, D]
without the padding, and in the header as text the cleaned prompt, the length L
and the identity of the encoder.

B batch, L tokens, n tokens without padding, D width.
"""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hiar_jax.text import tokens as text_tokens
from hiar_jax.weights import networks, safetensors_io


@dataclasses.dataclass(frozen=True, eq=False)
class Embeddings:
  """What an embeddings file has in it.

  Attributes:
    prompt: cleaned.
    length: L.
    encoder: `encoders.Encoder.identity`, or another name of what made it.
    states: float32 [n, D].
  """

  prompt: str
  length: int
  encoder: str
  states: np.ndarray


class EmbeddedPrompts:
  """An encoder that knows prompts whose states are in files, and no others.

  Attributes:
    length: tokens L, padding included.
    dim: width D of the states.
    encoder: identity of what made the states.
    negative_prompt: that of Wan2.1.
  """

  negative_prompt = text_tokens.WAN_NEGATIVE_PROMPT

  def __init__(self, path: str | os.PathLike):
    """Reads the headers, and states when they are asked for.

    Args:
      path: an embeddings file or a folder of them, as an encoder's cache is.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: if a file is none, or they are of several encoders.
    """
    path = pathlib.Path(path)
    files = sorted(path.glob('*.safetensors')) if path.is_dir() else [path]
    if not files or not path.exists():
      raise FileNotFoundError(f'no text embeddings at {path}')
    self._path = path
    self._files: dict[str, pathlib.Path] = {}
    kinds: set[Any] = set()
    for file in files:
      reader = _open(file)
      fields = reader.metadata
      kind = (
        int(fields['length']),
        reader.entries['states'].shape[1],
        fields['encoder'],
      )
      if kinds and kind not in kinds:
        raise ValueError(
          f'{path} has embeddings of several text encoders in it, for example '
          f'{files[0].name} and {file.name}; keep those of one'
        )
      kinds.add(kind)
      self._files[fields['prompt']] = file
    ((self.length, self.dim, self.encoder),) = kinds

  def encode(self, captions: Sequence[str]) -> np.ndarray:
    """States of captions: float32 [B, L, D].

    Raises:
      ValueError: naming a caption that no file has.
    """
    return stack(captions, self._read, self.length)

  def _read(self, text: str) -> np.ndarray:
    if text not in self._files:
      known = ', '.join(map(repr, sorted(self._files)[:3]))
      more = ', ...' if len(self._files) > 3 else ''
      raise ValueError(
        f'{self._path} has no embeddings of {text!r}, only of {known}{more}'
      )
    return read(self._files[text]).states


def write(path: str | os.PathLike, embeddings: Embeddings) -> None:
  """Writes an embeddings file, in one move."""
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  networks.save_weights(
    path,
    {'states': np.asarray(embeddings.states, np.float32)},
    metadata={
      'prompt': embeddings.prompt,
      'length': str(embeddings.length),
      'encoder': embeddings.encoder,
    },
  )


def read(path: str | os.PathLike) -> Embeddings:
  """Reads an embeddings file.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if it is none, or damaged.
  """
  reader = _open(path)
  states = reader.read('states')
  states.setflags(write=False)
  fields = reader.metadata
  return Embeddings(
    fields['prompt'], int(fields['length']), fields['encoder'], states
  )


def _open(path: str | os.PathLike) -> safetensors_io.Reader:
  """An embeddings file whose header was checked."""
  reader = safetensors_io.Reader(path)
  fields, entry = reader.metadata, reader.entries.get('states')
  if (
    entry is None
    or len(entry.shape) != 2
    or entry.dtype != np.float32
    or not {'prompt', 'encoder'} <= fields.keys()
    or not fields.get('length', '').isdecimal()
    or entry.shape[0] > int(fields['length'])
  ):
    raise ValueError(f'{path} has no text embeddings in it')
  return reader


def stack(
  captions: Sequence[str], encode_one: Callable[[str], np.ndarray], length: int
) -> np.ndarray:
  """States of captions as one array [B, L, D].

  Args:
    captions: as people write them.
    encode_one: a cleaned caption to its states [n, D].
    length: L.
  """
  if isinstance(captions, str):
    raise ValueError(
      f'captions must be a sequence of strings, not one: {captions!r}'
    )
  states = [encode_one(text_tokens.clean(text)) for text in captions]
  return np.stack([np.pad(s, ((0, length - len(s)), (0, 0))) for s in states])
