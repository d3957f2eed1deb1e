"""Low-rank adapters: what is trained of a network whose weights stay.

  W' = W + (alpha / rank) down up        [I, O] = [I, O] + [I, R] [R, O]

Of matrices `down` and `up` are trained, of vectors (biases, norms, modulation)
their difference. A tree of adapters has the paths of what they belong to:
'layers/ffn_in/kernel' has 'layers/ffn_in/lora_down' and '.../lora_up', and
'text_kv/k_kernel' has 'text_kv/k_lora_down'; a difference has the path of its
vector. Stacked layers have stacked adapters.

`join` puts base and adapters into one tree, which every network function takes:
a Dense layer adds the product beside its own. So adapters cost no second copy
of the network, in no pass.

Source: Hu et al. 2021 (arXiv:2106.09685).
"""

# I inputs, O outputs, R rank, N layers

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

# Projections of attention and of the feed-forward layers.
DEFAULT_TARGETS = (
  'layers/(self|cross)_attention/[qkvo]/kernel',
  'layers/ffn_(in|out)/kernel',
  'text_kv/[kv]_kernel',
)
DOWN, UP = 'lora_down', 'lora_up'
_KERNEL = 'kernel'


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
  """Which parameters have adapters, and how large they are.

  Attributes:
    rank: R of every matrix.
    alpha: the product counts alpha / rank times; None: once.
    targets: regular expressions; a parameter whose path one of them fits whole
      has an adapter.

  Raises:
    ValueError: naming the value that does not fit.
  """

  rank: int
  alpha: float | None = None
  targets: tuple[str, ...] = DEFAULT_TARGETS

  def __post_init__(self):
    object.__setattr__(self, 'targets', tuple(self.targets))
    if self.rank < 1:
      raise ValueError(f'lora.rank={self.rank} is below 1')
    if self.alpha is not None and not self.alpha > 0:
      raise ValueError(f'lora.alpha={self.alpha} is not positive')
    for target in self.targets:
      try:
        re.compile(target)
      except re.error as error:
        raise ValueError(
          f'lora.targets has {target!r}, no regular expression: {error}'
        ) from None

  @property
  def scale(self) -> float:
    return 1.0 if self.alpha is None else self.alpha / self.rank


def shapes(
  config: LoRAConfig, params: Mapping[str, Any]
) -> dict[str, tuple[int, ...]]:
  """Path -> shape of every array of the adapters.

  Args:
    config: of the adapters.
    params: of the network, or their ShapeDtypeStructs.

  Raises:
    ValueError: if the rank is more than a matrix can have, or a target fits no
      parameter.
  """
  flat = traverse_util.flatten_dict(params, sep='/')
  found, used = {}, set()
  for path, leaf in flat.items():
    fits = {t for t in config.targets if re.fullmatch(t, path)}
    if not fits:
      continue
    used |= fits
    if not path.endswith(_KERNEL):
      found[path] = tuple(leaf.shape)
      continue
    *stack, inputs, outputs = leaf.shape
    if config.rank > min(inputs, outputs):
      raise ValueError(
        f'lora.rank={config.rank} is more than {path} can have, a matrix of '
        f'{inputs} x {outputs}'
      )
    down, up = factors(path)
    found[down] = (*stack, inputs, config.rank)
    found[up] = (*stack, config.rank, outputs)
  unused = [t for t in config.targets if t not in used]
  if unused or not found:
    raise ValueError(
      f'lora.targets={unused or config.targets} fit no parameter; there are '
      f'{sorted(flat)}'
    )
  return found


def factors(path: str) -> tuple[str, str]:
  """Paths of the two factors of a matrix."""
  stem = path.removesuffix(_KERNEL)
  return stem + DOWN, stem + UP


def matrix(path: str) -> str | None:
  """Path of the matrix that a factor belongs to; None: it is no factor."""
  for name in (DOWN, UP):
    if path.endswith(name):
      return path.removesuffix(name) + _KERNEL
  return None


def init(
  config: LoRAConfig, params: Mapping[str, Any], key: jax.Array
) -> dict[str, Any]:
  """Float32 adapters that change nothing yet: `up` and differences are zero.

  `down` is uniform within 1 / sqrt(I), as PEFT draws it.

  Args:
    config: of the adapters.
    params: of the network, or their ShapeDtypeStructs.
    key: of `down`.

  Raises:
    ValueError: see `shapes`.
  """
  drawn = {}
  for i, (path, shape) in enumerate(sorted(shapes(config, params).items())):
    if path.endswith(DOWN):
      bound = shape[-2] ** -0.5
      drawn[path] = jax.random.uniform(
        jax.random.fold_in(key, i), shape, minval=-bound, maxval=bound
      )
    else:
      drawn[path] = jnp.zeros(shape)
  return traverse_util.unflatten_dict(drawn, sep='/')


def join(
  base: Mapping[str, Any], adapters: Mapping[str, Any], scale: float
) -> dict[str, Any]:
  """Base and adapters as one tree of parameters, nothing copied.

  Args:
    base: parameters of the network.
    adapters: of it.
    scale: alpha / rank.
  """
  flat = traverse_util.flatten_dict(base, sep='/')
  for path, leaf in traverse_util.flatten_dict(adapters, sep='/').items():
    if path.endswith(UP):
      flat[path] = scale * leaf
    elif path.endswith(DOWN):
      flat[path] = leaf
    else:
      flat[path] = flat[path].astype(jnp.float32) + leaf
  return traverse_util.unflatten_dict(flat, sep='/')


def merge(
  base: Mapping[str, Any], adapters: Mapping[str, Any], scale: float
) -> dict[str, Any]:
  """Parameters of the same network without adapters, in float32."""
  flat = {
    path: leaf.astype(jnp.float32)
    for path, leaf in traverse_util.flatten_dict(base, sep='/').items()
  }
  parts = traverse_util.flatten_dict(adapters, sep='/')
  for path, leaf in parts.items():
    whole = matrix(path)
    if whole is None:
      flat[path] = flat[path] + leaf
    elif path.endswith(DOWN):
      product = jnp.matmul(
        leaf, parts[factors(whole)[1]], precision=jax.lax.Precision.HIGHEST
      )
      flat[whole] = flat[whole] + scale * product
  return traverse_util.unflatten_dict(flat, sep='/')
