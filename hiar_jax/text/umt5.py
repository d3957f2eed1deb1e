"""umT5 as Wan2.1 uses it: prompts to text states, behind the seam of `text`.

B batch, L tokens, n tokens without padding, D width.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from hiar_jax.models import umt5
from hiar_jax.text import embeddings, umt5_batches
from hiar_jax.text import tokens as text_tokens
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
    states = embeddings.stack(captions, self._encode_one, self.length)
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
        return embeddings.read(path).states
    if self._params is None:
      # Only those of a file are let go of, see `_check_file`.
      assert isinstance(self._weights, str | os.PathLike)
      self._params = _load_params(self._weights, self.config)
    states = _encode(self._params, ids[None], mask[None], config=self.config)
    states_nD = np.array(states[0, : mask.sum()], np.float32)
    states_nD.setflags(write=False)  # Handed out again.
    if path is not None:
      found = embeddings.Embeddings(text, self.length, self.identity, states_nD)
      embeddings.write(path, found)
    return states_nD

  def _check_file(self) -> None:
    if not isinstance(self._weights, str | os.PathLike):
      raise ValueError('these weights come from no file and cannot be re-read')


def open_encoder(
  options: Mapping[str, Any], mesh: jax.sharding.Mesh | None
) -> umt5_batches.BatchEncoder:
  """The encoder of batches, from a config's section `text`.

  Args:
    options: `folder`, which `hiar-jax convert` wrote; `length`, of
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
      '`hiar-jax convert` writes'
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
      f'no text encoder in {folder}; `hiar-jax convert` makes such a '
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
) -> UMT5TextEncoder | embeddings.EmbeddedPrompts:
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
    embedded = embeddings.EmbeddedPrompts(choice)
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


def _load_params(path: str | os.PathLike, config: umt5.UMT5Config) -> Any:
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
