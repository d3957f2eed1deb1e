"""FLOPs of passes, modelled, and what devices can do.

Matrix products only: embeddings, the head, norms, RoPE and softmax are below
0.1 % of them at 1.3B. XLA's own count is of no use here, because it takes the
body of a loop once and a kernel as nothing.
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from hiar_jax.models.config import WanConfig

# Dense bfloat16 FLOP/s of one device, by jax's `device_kind`, as the makers'
# data sheets state them.
PEAKS = {
  'TPU v4': 275e12,
  'TPU v5 lite': 197e12,
  'TPU v5e': 197e12,
  'TPU v5': 459e12,
  'TPU v5p': 459e12,
  'TPU v6 lite': 918e12,
  'TPU v6e': 918e12,
  'NVIDIA A100-PCIE-40GB': 312e12,
  'NVIDIA A100-SXM4-40GB': 312e12,
  'NVIDIA A100-SXM4-80GB': 312e12,
  'NVIDIA A100 80GB PCIe': 312e12,
  'NVIDIA B200': 2250e12,
  'NVIDIA GB200': 2500e12,
  # With float32 sums, as XLA takes them: 330 without.
  'NVIDIA GeForce RTX 4090': 165.2e12,
  'NVIDIA GH200 120GB': 989e12,
  'NVIDIA GH200 480GB': 989e12,
  'NVIDIA H100 80GB HBM3': 989e12,
  'NVIDIA H100 NVL': 835e12,
  'NVIDIA H100 PCIe': 756e12,
  'NVIDIA H200': 989e12,
  'NVIDIA L40S': 362e12,
}


def peak(devices: Sequence[jax.Device]) -> float | None:
  """FLOP/s of devices together, in bfloat16; None if one is not known."""
  peaks = [PEAKS.get(device.device_kind) for device in devices]
  known = [peak for peak in peaks if peak is not None]
  return sum(known) if len(known) == len(peaks) else None


@dataclasses.dataclass(frozen=True)
class PassFlops:
  """FLOPs of one network pass; see `pass_flops`."""

  linear: float
  attention: float
  cross: float

  @property
  def total(self) -> float:
    return self.linear + self.attention + self.cross


def seen_frames(frame_mask: np.ndarray) -> float:
  """Frames of the keys that a frame sees, on average: `key_frames` below.

  What a mask hides costs nothing, see models/attention.py.
  """
  return float(frame_mask.sum() / len(frame_mask))


def pass_flops(model: WanConfig, frames: float, key_frames: float) -> PassFlops:
  """Of one pass of one video's frames over keys of so many frames.

  With T tokens in the frames, S in the keys, L of text, width D, feed-forward
  width E and N layers:

    linear     2 N T (6 D^2 + 2 D E)   q k v o, cross q and o, feed-forward
    attention  4 N T S D               scores and their product with the values
    cross      4 N T L D
  """
  rows = model.num_layers * frames * model.tokens_per_frame
  products = 6 * model.dim**2 + 2 * model.dim * model.ffn_dim
  return PassFlops(
    linear=2 * rows * products,
    attention=4 * rows * key_frames * model.tokens_per_frame * model.dim,
    cross=4 * rows * model.text_len * model.dim,
  )


def forward_flops(model: WanConfig, frames: float, key_frames: float) -> float:
  """All of `pass_flops`."""
  return float(pass_flops(model, frames, key_frames).total)


def trained(model: WanConfig, recompute: bool = False) -> int:
  """Forward passes that a forward and backward pass cost.

  Args:
    model: of the network.
    recompute: whether what remat 'full' computes again counts.
  """
  return 4 if recompute and model.remat == 'full' else 3
