"""In what weights are held in memory, and multiplied."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from hiar_jax.models import quantised

DTYPES = ('float32', 'bfloat16', *quantised.KINDS)


@dataclasses.dataclass(frozen=True)
class Held:
  """How the weights of a network are held.

  Attributes:
    weights_dtype: one of DTYPES; None: as their config says. In 8 bits are the
      matrices of the layers, with a scale for each output, all else is as the
      config says.
    products_dtype: 8 bits that products with these matrices are made in too,
      their inputs rounded token by token; None: the dtype of the passes.

  Raises:
    ValueError: naming the value that does not fit.
  """

  weights_dtype: str | None = None
  products_dtype: str | None = None

  def __post_init__(self):
    if self.weights_dtype not in (None, *DTYPES):
      raise ValueError(
        f'weights_dtype={self.weights_dtype!r} is not one of {DTYPES}'
      )
    if self.products_dtype not in (None, *quantised.KINDS):
      raise ValueError(
        f'products_dtype={self.products_dtype!r} is not one of '
        f'{quantised.KINDS}'
      )
    if self.products_dtype not in (None, self.weights_dtype):
      raise ValueError(
        f'products_dtype={self.products_dtype!r} needs weights_dtype='
        f'{self.products_dtype!r}, which is {self.weights_dtype!r}'
      )

  @property
  def kind(self) -> str | None:
    """The 8 bits, or None."""
    return self.weights_dtype if self.weights_dtype in quantised.KINDS else None

  def __str__(self) -> str:
    if self.weights_dtype is None:
      return ''
    products = '' if self.products_dtype is None else ' and their products'
    return f'weights{products} in {self.weights_dtype}'

  def shapes(self, params: Any, dtype: Any) -> Any:
    """Shapes of a network's parameters as they are held.

    Args:
      params: as they are made, or their ShapeDtypeStructs.
      dtype: as their config says.
    """
    if self.weights_dtype is not None and self.kind is None:
      dtype = self.weights_dtype
    params = jax.tree.map(
      lambda a: jax.ShapeDtypeStruct(a.shape, dtype), params
    )
    if self.kind is None:
      return params
    in_8_bits = self.products_dtype is not None
    return quantised.shapes(params, self.kind, in_8_bits=in_8_bits)

  def put(self, params: Mapping[str, Any], dtype: Any) -> Any:
    """A network's parameters brought to what they are held in."""
    wanted = self.shapes(params, dtype)
    if self.kind is not None:
      in_8_bits = self.products_dtype is not None
      params = quantised.store_params(params, self.kind, in_8_bits=in_8_bits)
    return jax.tree.map(lambda a, w: a.astype(w.dtype), params, wanted)
