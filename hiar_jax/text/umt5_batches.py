"""umT5 for batches: many prompts at once, on one device or over a mesh.

Training reads token ids and encodes them in its loop; `encode` serves the
programs that write states to disk. For one prompt now and then, whose states
are to be kept, there is `umt5.UMT5TextEncoder`.
"""

# B batch, L tokens, n tokens of the longest prompt, D width

import functools
import hashlib
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from hiar_jax.models import sharding, umt5
from hiar_jax.text import tokens as text_tokens
from hiar_jax.weights import networks

# Batches are padded to a multiple of it: few programs, and little is computed
# that is thrown away.
_ROUND = 64
_IDS, _MASK = 'text_ids', 'text_mask'


class BatchEncoder:
  """A frozen umT5, see `encoders.Encoder`; weights are read when needed.

  Attributes:
    length: tokens L, padding included.
    dim: width D of the states.
    negative_prompt: that of Wan2.1.
  """

  negative_prompt = text_tokens.WAN_NEGATIVE_PROMPT

  def __init__(
    self,
    config: umt5.UMT5Config,
    weights: str | os.PathLike,
    tokenizer: str | os.PathLike,
    *,
    length: int,
    mesh: jax.sharding.Mesh | None,
  ):
    """Prepares an encoder; reads the tokenizer alone.

    Args:
      config: of the network; its dtype is that of the weights as well.
      weights: a file of them, see `networks.open_weights`.
      tokenizer: a folder, see `tokens.load_tokenizer`.
      length: tokens of a prompt; more are cut off, before the last one.
      mesh: that weights and batches are divided over; None: one device.

    Raises:
      FileNotFoundError: if there is no tokenizer.
      ValueError: if the sizes do not divide over the mesh.
    """
    if mesh is not None and config.num_heads % mesh.shape['tensor']:
      raise ValueError(
        f'umt5: num_heads={config.num_heads} is not divisible by '
        f'tensor={mesh.shape["tensor"]}'
      )
    self.length, self.dim = length, config.dim
    self._config, self._mesh = config, mesh
    self._weights, self._tokenizer = weights, pathlib.Path(tokenizer)
    self._tokenize = text_tokens.load_tokenizer(tokenizer)

  @functools.cached_property
  def identity(self) -> str:
    """Of config, length, tokenizer and a part of the weights.

    Raises:
      FileNotFoundError: if the weights are missing.
    """
    digest = hashlib.sha256(repr((self._config, self.length)).encode())
    digest.update(text_tokens.file_of(self._tokenizer).read_bytes())
    digest.update(networks.open_weights(self._weights).digest().encode())
    return digest.hexdigest()[:32]

  def num_cut(self, caption: str) -> int:
    """Tokens of a caption that `length` leaves no room for."""
    ids = self._tokenize(text_tokens.clean(caption))
    return max(0, len(ids) - self.length)

  def encode(self, captions: Sequence[str]) -> np.ndarray:
    """Encodes captions: float32 [B, L, D], zeros at padding."""
    if isinstance(captions, str):
      raise ValueError(
        f'captions must be a sequence of strings, not one: {captions!r}'
      )
    rows = [self._ids(caption) for caption in captions]
    longest = max(map(len, rows))
    width = min(self.length, -(-longest // _ROUND) * _ROUND)
    ways = 1
    if self._mesh is not None:
      ways = math.prod(self._mesh.shape[axis] for axis in sharding.BATCH)
    # Every device has its part of a batch.
    rows += rows[-1:] * (-len(rows) % ways)
    ids, mask = np.stack([text_tokens.padded(r, width) for r in rows], 1)
    states = self._states(self._put(ids), self._put(mask))
    whole = np.asarray(sharding.whole(states, self._mesh))[: len(captions)]
    return np.pad(whole, ((0, 0), (0, self.length - width), (0, 0)))

  def prepare(self, caption: str) -> dict[str, np.ndarray]:
    """Token ids and their mask, int32 [L] each."""
    ids, mask = text_tokens.padded(self._ids(caption), self.length)
    return {_IDS: ids, _MASK: mask}

  def finish(self, batch: dict[str, Any]) -> dict[str, Any]:
    """Encodes the ids on the mesh, where the batch lies already."""
    text = self._states(batch[_IDS], batch[_MASK])
    return {
      name: value for name, value in batch.items() if name not in (_IDS, _MASK)
    } | {'text': text}

  def _ids(self, caption: str) -> list[int]:
    text = text_tokens.clean(caption)
    ids = text_tokens.cut(self._tokenize(text), self.length)
    text_tokens.check(ids, self._config.vocab_size, text)
    return ids

  def _put(self, array: np.ndarray) -> jax.Array | np.ndarray:
    if self._mesh is None:
      return array
    place = NamedSharding(self._mesh, PartitionSpec(sharding.BATCH))
    return jax.make_array_from_callback(
      array.shape, place, lambda index: array[index]
    )

  def _states(self, ids_BL: Any, mask_BL: Any) -> jax.Array:
    return self._run(self._params, ids_BL, mask_BL)

  @functools.cached_property
  def _params(self) -> umt5.Params:
    abstract = jax.eval_shape(
      lambda: jax.tree.map(
        lambda a: a.astype(self._config.dtype),
        umt5.init(self._config, jax.random.key(0)),
      )
    )
    if self._mesh is not None:
      abstract = sharding.abstract(abstract, self._mesh)
    else:
      place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
      abstract = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place),
        abstract,
      )
    return networks.load_weights(self._weights, abstract)

  @functools.cached_property
  def _run(self):
    def run(params, ids_BL, mask_BL):
      states = umt5.encode(self._config, params, ids_BL, mask_BL)
      return states.astype(jnp.float32)

    if self._mesh is None:
      return jax.jit(run)
    place = NamedSharding(self._mesh, PartitionSpec(sharding.BATCH))
    return jax.jit(run, out_shardings=place)
