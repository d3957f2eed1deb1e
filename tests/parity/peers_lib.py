"""Peers: other people's classes with random weights, and what ours differs.

Everything here needs the `parity` extra; torch is imported by the functions.
"""

import dataclasses
from typing import Any

import numpy as np

# Of a float32 result; bfloat16 is told beside the peer's own and not judged.
FLOAT32 = 1e-4


@dataclasses.dataclass(frozen=True, eq=False)
class Comparison:
  """One output of a peer and ours, all in the peer's layout.

  Attributes:
    part: what is compared, with its sizes.
    peer: the class.
    output: of it.
    ours: computed in float32.
    theirs: computed in float32.
    ours_low: computed in bfloat16, or None.
    theirs_low: the peer's own in bfloat16, or None.
  """

  part: str
  peer: str
  output: str
  ours: np.ndarray
  theirs: np.ndarray
  ours_low: np.ndarray | None = None
  theirs_low: np.ndarray | None = None

  def __post_init__(self):
    for name in ('ours', 'ours_low', 'theirs_low'):
      array = getattr(self, name)
      if array is not None and array.shape != self.theirs.shape:
        raise ValueError(
          f'{self}: {name} has shape {array.shape}, the peer '
          f'{self.theirs.shape}'
        )

  def __str__(self) -> str:
    return f'{self.part}, {self.output}'

  def errors(self, name: str = 'ours') -> tuple[float, float] | None:
    """Of one attribute against `theirs`: largest absolute, and relative.

    Relative is the larger of |a - b| / |b| in the 2-norm and in the maximum
    norm.
    """
    array = getattr(self, name)
    if array is None:
      return None
    theirs = self.theirs.astype(np.float64)
    difference = np.abs(array.astype(np.float64) - theirs)
    relative = max(
      np.linalg.norm(difference) / np.linalg.norm(theirs),
      difference.max() / np.abs(theirs).max(),
    )
    return float(difference.max()), float(relative)

  def passes(self) -> bool:
    # Written so that NaN does not.
    return bool(self.errors()[1] <= FLOAT32)


def randomise(module: Any, seed: int) -> None:
  """Gives every parameter a part in the result; fresh ones are 0, 1 or tiny."""
  import torch

  generator = torch.Generator().manual_seed(seed)
  for name, parameter in module.named_parameters():
    noise = torch.randn(parameter.shape, generator=generator)
    if parameter.squeeze().ndim < 2:
      centre = float('norm' in name and 'bias' not in name)
      parameter.data = centre + 0.2 * noise
    else:
      parameter.data = noise * parameter[0].numel() ** -0.5


def to_bfloat16(module: Any) -> None:
  """In place, but for what the class itself keeps in float32."""
  import torch

  kept = module._keep_in_fp32_modules or ()
  for name, parameter in module.named_parameters():
    if not set(name.split('.')) & set(kept):
      parameter.data = parameter.data.to(torch.bfloat16)


def state_dict(module: Any) -> dict[str, np.ndarray]:
  """The parameters by name, tied ones once, without a copy."""
  return {name: p.detach().numpy() for name, p in module.named_parameters()}


def to_torch(x: np.ndarray, module: Any = None) -> Any:
  """A tensor in the dtype that most of the module's weights have."""
  import torch

  x = torch.from_numpy(np.ascontiguousarray(x))
  if module is None:
    return x
  return x.to(min((p.dtype for p in module.parameters()), key=_bits))


def to_numpy(x: Any) -> np.ndarray:
  return x.detach().float().numpy()


def _bits(dtype) -> int:
  return dtype.itemsize
