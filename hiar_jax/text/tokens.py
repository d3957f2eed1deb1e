"""Prompts to token ids: how Wan2.1 cleans a text, and tokenizers in files."""

import html
import os
import pathlib
import re
from collections.abc import Callable, Sequence

import numpy as np

from hiar_jax.weights import wrong_files

# What Wan2.1's guidance leads away from unless it is told otherwise: part of
# the model, for its training captions are in this language.
WAN_NEGATIVE_PROMPT = (
  '色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，'
  '整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，'
  '画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，'
  '静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走'
)

# Text -> ids, the end-of-text token included, not padded.
Tokenize = Callable[[str], list[int]]


def clean(text: str) -> str:
  """A prompt as Wan2.1 cleans it before it is tokenized.

  Text that was decoded wrongly is mended and curly quotes are made straight
  (ftfy), HTML entities are undone, and runs of white space become one space.
  """
  import ftfy

  text = ftfy.fix_text(text)
  # Twice: text from the web is often escaped twice.
  text = html.unescape(html.unescape(text))
  return re.sub(r'\s+', ' ', text).strip()


def cut(ids: Sequence[int], length: int) -> list[int]:
  """At most `length` ids; the last one, which ends a text, stays."""
  return list(ids) if len(ids) <= length else [*ids[: length - 1], ids[-1]]


def check(ids: Sequence[int], vocab_size: int, text: str) -> None:
  """Raises a ValueError if an id of a text is not in the vocabulary."""
  if max(ids, default=0) >= vocab_size:
    raise ValueError(
      f'token {max(ids)} of {text!r} is not in the vocabulary of '
      f'{vocab_size}: the tokenizer is of another model'
    )


def padded(ids: Sequence[int], length: int) -> tuple[np.ndarray, np.ndarray]:
  """Ids and their mask, int32 [length] each, zeros at padding."""
  rows, mask = np.zeros((2, length), np.int32)
  rows[: len(ids)], mask[: len(ids)] = ids, 1
  return rows, mask


def load_tokenizer(folder: str | os.PathLike) -> Tokenize:
  """The tokenizer in a folder: tokenizer.json, or a sentencepiece model.

  Raises:
    FileNotFoundError: if there is neither.
    ValueError: if it is something else, or the package that reads it is not
      installed.
  """
  path = file_of(folder)
  wrong_files.check_tokenizer(path)
  return (_fast_tokenizer if path.suffix == '.json' else _sentencepiece)(path)


def file_of(folder: str | os.PathLike) -> pathlib.Path:
  """The file of the tokenizer in a folder.

  Raises:
    FileNotFoundError: if there is none.
  """
  for name in ('tokenizer.json', 'spiece.model', 'tokenizer.model'):
    path = pathlib.Path(folder) / name
    if path.is_file():
      return path
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
