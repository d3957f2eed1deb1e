"""Captions to embeddings without a network: fixed random vectors of words.

All zeros for the empty prompt, which stands for "no condition".

B batch, L words, D width.
"""

import dataclasses
import functools
import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

_PAIR_WEIGHT = 0.5
_POSITION_WEIGHT = 0.3


@dataclasses.dataclass(frozen=True)
class WordHashEncoder:
  """Fixed random word vectors: no training, no vocabulary, no files.

  Row i is the vector of word i, plus half the vector of the pair (word i - 1,
  word i), which tells the blue of 'dark blue' from that of 'a blue disc', plus
  a sinusoidal code of i. The vectors are normal numbers seeded by a hash of
  the lower-cased words, equal in every process. Case and punctuation are
  ignored; words beyond `length` are dropped; rows past the end are zero.

  Attributes:
    dim: width D of a row, even.
    length: number of rows L.
    seed: another seed gives unrelated vectors.
  """

  dim: int = 64
  length: int = 16
  seed: int = 0

  negative_prompt: ClassVar[str] = ''

  def __post_init__(self):
    if self.dim < 2 or self.dim % 2:
      raise ValueError(f'dim={self.dim} is not a positive even number')
    if self.length < 1:
      raise ValueError(f'length={self.length} is not positive')

  def encode(self, captions: Sequence[str]) -> np.ndarray:
    """Encodes captions: float32 [B, L, D]."""
    if isinstance(captions, str):
      raise ValueError(
        f'captions must be a sequence of strings, not one: {captions!r}'
      )
    rows_BLD = np.zeros((len(captions), self.length, self.dim), np.float32)
    for row_LD, caption in zip(rows_BLD, captions):
      words = _words(caption)[: self.length]
      for i, word in enumerate(words):
        before = words[i - 1] if i else ''
        row_LD[i] = _vector(word, self.dim, self.seed)
        row_LD[i] += _PAIR_WEIGHT * _vector(
          f'{before} {word}', self.dim, self.seed
        )
      row_LD[: len(words)] += (
        _POSITION_WEIGHT * _positions(self.length, self.dim)[: len(words)]
      )
    return rows_BLD

  @property
  def identity(self) -> str:
    return repr(self)

  def num_cut(self, caption: str) -> int:
    return max(0, len(_words(caption)) - self.length)

  def prepare(self, caption: str) -> dict[str, np.ndarray]:
    """{'text': float32 [L, D]}: already all that there is to do."""
    return {'text': self.encode([caption])[0]}

  def finish(self, batch: dict[str, Any]) -> dict[str, Any]:
    return batch


def open_encoder(options: Mapping[str, Any], mesh: Any) -> WordHashEncoder:
  """The encoder of these options; it has nothing to put onto a mesh."""
  del mesh
  return WordHashEncoder(**options)


def _words(caption: str) -> list[str]:
  return re.findall(r"[^\W_]+(?:['-][^\W_]+)*", caption.lower())


# Bounded: prompts come from people, and a server must not grow with them.
@functools.lru_cache(maxsize=4096)
def _vector(words: str, dim: int, seed: int) -> np.ndarray:
  digest = hashlib.blake2b(f'{seed}:{words}'.encode(), digest_size=16).digest()
  key = np.frombuffer(digest, '<u8')
  # Box-Muller on uniform numbers: their stream is fixed across numpy versions,
  # that of Generator.normal is not.
  u = np.random.Generator(np.random.Philox(key=key)).random((2, dim // 2))
  length = np.sqrt(-2 * np.log1p(-u[0]))
  angle = 2 * np.pi * u[1]
  vector = np.concatenate([length * np.cos(angle), length * np.sin(angle)])
  vector = vector.astype(np.float32)
  vector.setflags(write=False)
  return vector


@functools.lru_cache(maxsize=16)
def _positions(length: int, dim: int) -> np.ndarray:
  # Wavelengths from 2 pi to 100 words: captions are short.
  rates = (2 * np.pi / 100) ** (np.arange(dim // 2) / max(dim // 2 - 1, 1))
  angles_LK = np.arange(length)[:, None] * rates
  codes = np.concatenate([np.sin(angles_LK), np.cos(angles_LK)], axis=-1)
  codes = codes.astype(np.float32)
  codes.setflags(write=False)
  return codes
