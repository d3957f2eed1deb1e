"""umT5 as Wan2.1 uses it: prompts to text states, behind the seam of `text`.

An embeddings file has the states of one prompt, as safetensors: `states` [n, D]
without the padding, and in the header as text the cleaned prompt, the length L
and the identity of the encoder.

B batch, L tokens, n tokens without padding, D width.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from hiar_jax.models import umt5
from hiar_jax.text import tokens as text_tokens
from hiar_jax.text import umt5_batches
from hiar_jax.weights import layouts, networks, safetensors_io

LENGTH = 512  # tokens of Wan2.1, padding included
# What `load_encoder` takes beside the path of embeddings.
CHOICES = ('keep', 'release')

# Of each array, for telling weights apart.
_IDENTITY_BYTES = 4096


class UMT5TextEncoder:
  """Cleans, tokenizes and encodes prompts; rows at padding are zero.

  Unlike the small world's encoder it gives the empty prompt the states of the
  end-of-text token, as Wan2.1 does.

  The weights (11 GB in bfloat16) are read when the first new prompt comes and
  stay until `release`. States of the last prompts are kept, and with a cache
  those of all prompts on disk, so that the same prompt is encoded once.

  Attributes:
    length: tokens L, padding included.
    dim: width D of the states.
    negative_prompt: that of Wan2.1.
  """

  negative_prompt = text_tokens.WAN_NEGATIVE_PROMPT

  def __init__(
    self,
    config: umt5.UMT5Config,
    weights: str | os.PathLike | umt5.Params,
    tokenize: text_tokens.Tokenize,
    *,
    length: int = LENGTH,
    keep_weights: bool = True,
    keep_prompts: int = 64,
    cache: str | os.PathLike | None = None,
  ):
    """Prepares an encoder; reads nothing.

    Args:
      config: of the network.
      weights: its parameters, or a file of them.
      tokenize: see `text_tokens.load_tokenizer`.
      length: tokens of a prompt; more are cut off, before the last one.
      keep_weights: False: `release` after every call of `encode`.
      keep_prompts: how many prompts' states are kept.
      cache: folder of embeddings files, made if it does not exist; shared by
        any number of encoders and processes.

    Raises:
      ValueError: if weights that come from no file are not to be kept.
    """
    self.config, self.length, self.dim = config, length, config.dim
    self._weights, self._tokenize = weights, tokenize
    self._params = None if isinstance(weights, str | os.PathLike) else weights
    self._keep_weights = keep_weights
    self._encode_one = functools.lru_cache(keep_prompts)(self._encode_new)
    self._cache = None if cache is None else pathlib.Path(cache)
    if not keep_weights:
      self._check_file()

  def encode(self, captions: Sequence[str]) -> np.ndarray:
    """Encodes captions: float32 [B, L, D]."""
    # One at a time: a batch of long ones would need room beside the weights.
    states = _stack(captions, self._encode_one, self.length)
    if not self._keep_weights:
      self.release()
    return states

  def release(self) -> None:
    """Frees the device's memory of the weights; a new prompt reads them again.

    Raises:
      ValueError: if they were not read from a file.
    """
    self._check_file()
    # Not left to the garbage collector: the video starts at once.
    for array in jax.tree.leaves(self._params):
      array.delete()
    self._params = None

  def ids(self, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of a clean text and their mask, int32 [L] each."""
    ids = text_tokens.cut(self._tokenize(text), self.length)
    text_tokens.check(ids, self.config.vocab_size, text)
    return text_tokens.padded(ids, self.length)

  @functools.cached_property
  def identity(self) -> str:
    """Differs between encoders whose states differ, by config and weights.

    Weights are told apart by a part of them, see `safetensors_io.Reader`.
    """
    digest = hashlib.sha256(repr(self.config).encode())
    if isinstance(self._weights, str | os.PathLike):
      digest.update(networks.open_weights(self._weights).digest().encode())
    else:
      for path, leaf in jax.tree_util.tree_leaves_with_path(self._weights):
        digest.update(f'{jax.tree_util.keystr(path)} {leaf.dtype}'.encode())
        first = np.asarray(leaf[0] if leaf.ndim else leaf)
        digest.update(first.tobytes()[:_IDENTITY_BYTES])
    return digest.hexdigest()[:32]

  def _encode_new(self, text: str) -> np.ndarray:
    """States [n, D] of a clean text."""
    ids, mask = self.ids(text)
    path = None
    if self._cache is not None:
      # The ids as well, so that another tokenizer is another encoder.
      told = json.dumps([self.identity, self.length, ids.tolist(), text])
      name = hashlib.sha256(told.encode()).hexdigest()[:32]
      path = self._cache / f'{name}.safetensors'
      if path.exists():
        return read_embeddings(path).states
    if self._params is None:
      self._params = _load_params(self._weights, self.config)
    states = _encode(self._params, ids[None], mask[None], config=self.config)
    states_nD = np.array(states[0, : mask.sum()], np.float32)
    states_nD.setflags(write=False)  # Handed out again.
    if path is not None:
      embeddings = Embeddings(text, self.length, self.identity, states_nD)
      write_embeddings(path, embeddings)
    return states_nD

  def _check_file(self) -> None:
    if not isinstance(self._weights, str | os.PathLike):
      raise ValueError('these weights come from no file and cannot be re-read')


@dataclasses.dataclass(frozen=True, eq=False)
class Embeddings:
  """What an embeddings file has in it.

  Attributes:
    prompt: cleaned.
    length: L.
    encoder: `UMT5TextEncoder.identity`, or another name of what made it.
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
    kinds = set()
    for file in files:
      reader = _open_embeddings(file)
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
    ((self.length, self.dim, _),) = kinds

  def encode(self, captions: Sequence[str]) -> np.ndarray:
    """States of captions: float32 [B, L, D].

    Raises:
      ValueError: naming a caption that no file has.
    """
    return _stack(captions, self._read, self.length)

  def _read(self, text: str) -> np.ndarray:
    if text not in self._files:
      known = ', '.join(map(repr, sorted(self._files)[:3]))
      more = ', ...' if len(self._files) > 3 else ''
      raise ValueError(
        f'{self._path} has no embeddings of {text!r}, only of {known}{more}'
      )
    return read_embeddings(self._files[text]).states


def open_encoder(
  options: Mapping[str, Any], mesh: jax.sharding.Mesh | None
) -> umt5_batches.BatchEncoder:
  """The encoder of batches, from a config's section `text`.

  Args:
    options: `folder`, which launch/convert_checkpoint.py wrote; `length`, of
      Wan2.1 unless given, and `dtype`, bfloat16 unless given.
    mesh: see `umt5_batches.BatchEncoder`.

  Raises:
    FileNotFoundError: if the folder lacks its config or the tokenizer.
    ValueError: if the folder has no text encoder, or a value does not fit.
    TypeError: naming an option that is unknown.
  """
  if 'folder' not in options:
    raise ValueError(
      'text.folder is missing: the folder of the text encoder, which '
      'launch/convert_checkpoint.py writes'
    )
  return _open_batches(mesh=mesh, **options)


def _open_batches(
  *,
  mesh: jax.sharding.Mesh | None,
  folder: str | os.PathLike,
  length: int = LENGTH,
  dtype: str = 'bfloat16',
) -> umt5_batches.BatchEncoder:
  path = pathlib.Path(folder) / layouts.CONFIG_FILE
  try:
    sizes = safetensors_io.read_json(path).get('umt5')
  except FileNotFoundError:
    raise FileNotFoundError(
      f'no text encoder in {folder}; launch/convert_checkpoint.py makes such a '
      'folder from published weights'
    ) from None
  if sizes is None:
    raise ValueError(f'{path} has no text encoder: no section umt5')
  return umt5_batches.BatchEncoder(
    dataclasses.replace(umt5.UMT5Config(**sizes), dtype=dtype),
    pathlib.Path(folder) / layouts.TEXT_ENCODER_FILE,
    pathlib.Path(folder) / layouts.TOKENIZER,
    length=length,
    mesh=mesh,
  )


def load_encoder(
  config: Mapping[str, Any],
  folder: str | os.PathLike,
  choice: str | os.PathLike = 'keep',
  cache: str | os.PathLike | None = None,
) -> UMT5TextEncoder | EmbeddedPrompts:
  """The text encoder of a converted folder, or what takes its place.

  Args:
    config: of the pipeline: its sections 'umt5' and 'model'.
    folder: has the encoder's weights and its tokenizer, see `layouts`.
    choice: 'keep' keeps the weights on the device once they were needed;
      'release' frees them when the prompts of a call are encoded, before the
      video starts; else the path of embeddings: the encoder is not needed.
    cache: see `UMT5TextEncoder`.

  Raises:
    FileNotFoundError: if the tokenizer or the embeddings are missing.
    ValueError: if the embeddings are of another encoder.
  """
  model = config['model']
  if choice not in CHOICES:
    embedded = EmbeddedPrompts(choice)
    found = (embedded.length, embedded.dim)
    if found != (model['text_len'], model['text_dim']):
      raise ValueError(
        f'{choice} has embeddings of {found[0]} tokens of width {found[1]}, '
        f'and the network takes {model["text_len"]} of {model["text_dim"]}'
      )
    return embedded
  folder = pathlib.Path(folder)
  return UMT5TextEncoder(
    umt5.UMT5Config(**config['umt5']),
    folder / layouts.TEXT_ENCODER_FILE,
    text_tokens.load_tokenizer(folder / layouts.TOKENIZER),
    length=model['text_len'],
    keep_weights=choice == 'keep',
    cache=cache,
  )


def write_embeddings(path: str | os.PathLike, embeddings: Embeddings) -> None:
  """Writes an embeddings file, in one move."""
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  states = np.asarray(embeddings.states, np.float32)
  # A folder of its own: other processes may be writing the same prompt.
  with tempfile.TemporaryDirectory(
    prefix='.', suffix='.part', dir=path.parent
  ) as folder:
    partial = pathlib.Path(folder) / path.name
    with safetensors_io.Writer(
      partial,
      {'states': (states.shape, states.dtype)},
      metadata={
        'prompt': embeddings.prompt,
        'length': str(embeddings.length),
        'encoder': embeddings.encoder,
      },
    ) as writer:
      writer.write('states', states)
    partial.replace(path)


def read_embeddings(path: str | os.PathLike) -> Embeddings:
  """Reads an embeddings file.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if it is none, or damaged.
  """
  reader = _open_embeddings(path)
  states = reader.read('states')
  states.setflags(write=False)
  fields = reader.metadata
  return Embeddings(
    fields['prompt'], int(fields['length']), fields['encoder'], states
  )


def _open_embeddings(path: str | os.PathLike) -> safetensors_io.Reader:
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


def _stack(
  captions: Sequence[str], encode_one: Callable[[str], np.ndarray], length: int
) -> np.ndarray:
  """States [n, D] of each caption as one array [B, L, D]."""
  if isinstance(captions, str):
    raise ValueError(
      f'captions must be a sequence of strings, not one: {captions!r}'
    )
  states = [encode_one(text_tokens.clean(text)) for text in captions]
  return np.stack([np.pad(s, ((0, length - len(s)), (0, 0))) for s in states])


def _load_params(path: str | os.PathLike, config: umt5.UMT5Config):
  """Weights in the dtype that they are computed in, on the device."""
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  abstract = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, config.dtype, sharding=device),
    jax.eval_shape(lambda: umt5.init(config, jax.random.key(0))),
  )
  return networks.load_weights(path, abstract)


@functools.partial(jax.jit, static_argnames='config')
def _encode(params, ids_BL, mask_BL, *, config):
  return umt5.encode(config, params, ids_BL, mask_BL)
