"""umT5 as Wan2.1 uses it: prompts to text states, behind the seam of `text`.

B batch, L tokens, D width.
"""

import functools
import html
import os
import pathlib
import re
from collections.abc import Callable, Sequence

import jax
import numpy as np

from hiar_jax import checkpoint
from hiar_jax.models import umt5

LENGTH = 512  # tokens of Wan2.1, padding included

# Text -> ids, the end-of-text token included, not padded.
Tokenize = Callable[[str], list[int]]


class UMT5TextEncoder:
  """Cleans, tokenizes and encodes prompts; rows at padding are zero.

  Unlike the small world's encoder it gives the empty prompt the states of the
  end-of-text token, as Wan2.1 does.

  The weights (11 GB in bfloat16) are read when the first prompt comes and stay
  until `release`. States of the last prompts are kept, so that the same prompt
  is encoded once.

  Attributes:
    length: tokens L, padding included.
    dim: width D of the states.
  """

  def __init__(
    self,
    config: umt5.UMT5Config,
    weights: str | os.PathLike | umt5.Params,
    tokenize: Tokenize,
    *,
    length: int = LENGTH,
    keep_prompts: int = 16,
  ):
    """Prepares an encoder; reads nothing.

    Args:
      config: of the network.
      weights: its parameters, or a file of them.
      tokenize: see `load_tokenizer`.
      length: tokens of a prompt; more are cut off, before the last one.
      keep_prompts: how many prompts' states are kept.
    """
    self.config, self.length, self.dim = config, length, config.dim
    self._weights, self._tokenize = weights, tokenize
    self._params = None if isinstance(weights, str | os.PathLike) else weights
    self._encode_one = functools.lru_cache(keep_prompts)(self._encode_new)

  def encode(self, captions: Sequence[str]) -> np.ndarray:
    """Encodes captions: float32 [B, L, D]."""
    if isinstance(captions, str):
      raise ValueError(
        f'captions must be a sequence of strings, not one: {captions!r}'
      )
    # One at a time: a batch of long ones would need room beside the weights.
    return np.stack([self._encode_one(clean(text)) for text in captions])

  def release(self) -> None:
    """Lets go of the weights; a new prompt reads them again.

    Raises:
      ValueError: if they were not read from a file.
    """
    if not isinstance(self._weights, str | os.PathLike):
      raise ValueError('these weights come from no file and cannot be re-read')
    self._params = None

  def ids(self, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of a clean text and their mask, int32 [L] each."""
    tokens = self._tokenize(text)
    if len(tokens) > self.length:
      # The end-of-text token stays.
      tokens = [*tokens[: self.length - 1], tokens[-1]]
    if max(tokens, default=0) >= self.config.vocab_size:
      raise ValueError(
        f'token {max(tokens)} of {text!r} is not in the vocabulary of '
        f'{self.config.vocab_size}: the tokenizer is of another model'
      )
    ids, mask = np.zeros((2, self.length), np.int32)
    ids[: len(tokens)], mask[: len(tokens)] = tokens, 1
    return ids, mask

  def _encode_new(self, text: str) -> np.ndarray:
    if self._params is None:
      self._params = _load_params(self._weights, self.config)
    ids, mask = self.ids(text)
    states = _encode(self._params, ids[None], mask[None], config=self.config)
    states_LD = np.asarray(states[0], np.float32)
    states_LD.setflags(write=False)  # Handed out again.
    return states_LD


def clean(text: str) -> str:
  """A prompt as Wan2.1 cleans it: HTML entities undone, one space for many.

  ftfy, where it is installed, mends text that was decoded wrongly first.
  """
  try:
    import ftfy
  except ImportError:
    pass
  else:
    text = ftfy.fix_text(text)
  # Twice: text from the web is often escaped twice.
  text = html.unescape(html.unescape(text))
  return re.sub(r'\s+', ' ', text).strip()


def load_tokenizer(folder: str | os.PathLike) -> Tokenize:
  """The tokenizer in a folder: tokenizer.json, or a sentencepiece model.

  Raises:
    FileNotFoundError: if there is neither.
    ValueError: if the package that reads it is not installed.
  """
  folder = pathlib.Path(folder)
  fast = folder / 'tokenizer.json'
  if fast.is_file():
    return _fast_tokenizer(fast)
  for name in ('spiece.model', 'tokenizer.model'):
    if (folder / name).is_file():
      return _sentencepiece(folder / name)
  raise FileNotFoundError(
    f'no tokenizer in {folder}: it has neither tokenizer.json nor spiece.model'
  )


def _fast_tokenizer(path: pathlib.Path) -> Tokenize:
  try:
    import tokenizers
  except ImportError:
    raise ValueError(
      f"{path} needs tokenizers: pip install 'hiar_jax[convert]'"
    ) from None
  tokenizer = tokenizers.Tokenizer.from_file(str(path))
  # Both are the encoder's business, and a file may ask for other lengths.
  tokenizer.no_padding()
  tokenizer.no_truncation()
  return lambda text: tokenizer.encode(text).ids


def _sentencepiece(path: pathlib.Path) -> Tokenize:
  try:
    import sentencepiece
  except ImportError:
    raise ValueError(
      f"{path} needs sentencepiece: pip install 'hiar_jax[convert]'"
    ) from None
  pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
  return lambda text: [*pieces.encode(text), pieces.eos_id()]


def _load_params(path: str | os.PathLike, config: umt5.UMT5Config):
  """Weights in the dtype that they are computed in, on the device."""
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  abstract = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, config.dtype, sharding=device),
    jax.eval_shape(lambda: umt5.init(config, jax.random.key(0))),
  )
  return checkpoint.load_weights(path, abstract)


@functools.partial(jax.jit, static_argnames='config')
def _encode(params, ids_BL, mask_BL, *, config):
  return umt5.encode(config, params, ids_BL, mask_BL)
