"""What is seen in single frames of the drifting world.

Every frame is read on its own, whatever the prompt and the frames before it:
the shape (where, how large, what hue), the plane of chroma behind it and the
luma of the texture.

F frames, H height, W width, P = H W pixels.
"""

import dataclasses
import functools

import numpy as np
import scipy.ndimage

from hiar_jax.data import drifting

# Half of what there is between the world's shapes and what is behind them.
_MIN_CONTRAST = 0.5 * (drifting.OBJECT_LUMA - drifting.GROUND_LUMA)
# Of the world's own range, how far an area may be off before it is no shape.
TOLERANCE = 1.5
_YCC_OF_RGB = np.linalg.inv(drifting.RGB_OF_YCC)


@dataclasses.dataclass(frozen=True, eq=False)
class Frames:
  """What is seen in each frame.

  Attributes:
    visible_F: whether there is one part of a shape's contrast and area.
    centre_F2: of the shape, (y, x) in px; NaN where none is visible.
    area_F: px that it covers; NaN likewise.
    chroma_F2: of its inside, (Cb, Cr); NaN likewise.
    cover_FHW: share of each pixel that it covers.
    ground_FHW: bool, pixels that are surely not the shape's.
    plane_FHW2: the plane of chroma that fits the ground best.
    texture_FHW: the ground's luma without its mean, 0 on the shape.
    sharpness_F: variance of the Laplacian of the luma, 0..255 squared.
  """

  visible_F: np.ndarray
  centre_F2: np.ndarray
  area_F: np.ndarray
  chroma_F2: np.ndarray
  cover_FHW: np.ndarray
  ground_FHW: np.ndarray
  plane_FHW2: np.ndarray
  texture_FHW: np.ndarray
  sharpness_F: np.ndarray


def measure(video_FHWC: np.ndarray, cfg: drifting.WorldConfig) -> Frames:
  """Reads a uint8 [F, H, W, 3] of the world's size.

  Raises:
    ValueError: if it is of another type or size.
  """
  video_FHWC = np.asarray(video_FHWC)
  if video_FHWC.dtype != np.uint8 or video_FHWC.shape[1:] != (
    *(cfg.height, cfg.width, 3),
  ):
    raise ValueError(
      f'a video must be uint8 [F, {cfg.height}, {cfg.width}, 3], not '
      f'{video_FHWC.dtype} {list(video_FHWC.shape)}'
    )
  ycc = video_FHWC.astype(np.float64) / 255 @ _YCC_OF_RGB.T
  luma, chroma = ycc[..., 0], ycc[..., 1:]
  low, high = _areas(cfg)
  visible, covers, near = [], [], []
  for frame in luma:
    behind = np.median(frame)
    # The smallest shape covers 4 % of a frame: this is its inside.
    front = np.quantile(frame, 0.98)
    share = np.clip((frame - behind) / max(front - behind, 1e-6), 0, 1)
    part = _largest_part(share > 0.5)
    around = scipy.ndimage.binary_dilation(part, np.ones((3, 3)))
    cover = np.where(around, share, 0)
    seen = front - behind > _MIN_CONTRAST and low < cover.sum() < high
    visible.append(seen)
    covers.append(cover if seen else np.zeros_like(frame))
    near.append(
      scipy.ndimage.binary_dilation(around, np.ones((3, 3)))
      if seen
      else np.zeros_like(part)
    )
  visible_F, cover_FHW = np.array(visible), np.stack(covers)
  ground_FHW = ~np.stack(near)
  hidden = np.where(visible_F, 1.0, np.nan)
  area_F = cover_FHW.sum((1, 2)) * hidden
  grid_HW2 = np.moveaxis(np.mgrid[: cfg.height, : cfg.width] + 0.5, 0, -1)
  inside_FHW = cover_FHW > 0.9
  return Frames(
    visible_F=visible_F,
    centre_F2=np.einsum('fhw,hwc->fc', cover_FHW, grid_HW2) / area_F[:, None],
    area_F=area_F,
    chroma_F2=_masked_mean(chroma, inside_FHW) * hidden[:, None],
    cover_FHW=cover_FHW,
    ground_FHW=ground_FHW,
    plane_FHW2=_planes(chroma, ground_FHW, grid_HW2),
    texture_FHW=ground_FHW
    * (luma - _masked_mean(luma[..., None], ground_FHW)[:, None]),
    sharpness_F=_sharpness(255 * luma),
  )


def hue_distance(chroma_F2: np.ndarray, hue: np.ndarray | float) -> np.ndarray:
  """Between a measured chroma and a hue in turns: degrees, 0..180."""
  seen = np.arctan2(chroma_F2[..., 1], chroma_F2[..., 0]) / (2 * np.pi)
  return 360 * np.abs((seen - hue + 0.5) % 1 - 0.5)


def plane_distance(a_FHW2: np.ndarray, b_HW2: np.ndarray) -> np.ndarray:
  """Root mean square over the frame, as a share of the ground's chroma: [F]."""
  distance = np.sum((a_FHW2 - b_HW2) ** 2, -1).mean((-2, -1))
  return np.sqrt(distance) / drifting.GROUND_CHROMA


def texture_likeness(
  frames: Frames, texture_HW: np.ndarray, known_HW: np.ndarray | None = None
) -> np.ndarray:
  """Correlation with a texture over the pixels that show both: [F], -1..1.

  Args:
    frames: measured.
    texture_HW: any scale.
    known_HW: where the texture is known; None: everywhere.
  """
  both = frames.ground_FHW
  if known_HW is not None:
    both = both & known_HW
  a, b = frames.texture_FHW, np.broadcast_to(texture_HW, both.shape)
  a = both * (a - _masked_mean(a[..., None], both)[:, None])
  b = both * (b - _masked_mean(b[..., None], both)[:, None])
  power = np.sqrt(np.sum(a * a, (1, 2)) * np.sum(b * b, (1, 2)))
  return np.sum(a * b, (1, 2)) / np.maximum(power, 1e-9)


def own_texture(frames: Frames) -> tuple[np.ndarray, np.ndarray]:
  """Mean texture [H, W] of frames, and where any of them shows it."""
  count = frames.ground_FHW.sum(0)
  return frames.texture_FHW.sum(0) / np.maximum(count, 1), count > 0


def shape_likeness(
  frames: Frames, cfg: drifting.WorldConfig
) -> dict[str, np.ndarray]:
  """Overlap with each shape of the measured area at the measured place: [F].

  Intersection over union, 0..1; 0 where nothing is visible.
  """
  result = {}
  centre = np.nan_to_num(frames.centre_F2)
  for shape in drifting.SHAPES:
    radius = np.sqrt(np.nan_to_num(frames.area_F) / unit_area(shape))
    drawn = drifting.coverage(
      *(shape, centre, radius),
      height=cfg.height,
      width=cfg.width,
      edge=cfg.edge,
    )
    both = np.minimum(drawn, frames.cover_FHW).sum((1, 2))
    either = np.maximum(drawn, frames.cover_FHW).sum((1, 2))
    result[shape] = frames.visible_F * both / np.maximum(either, 1e-9)
  return result


@functools.cache
def unit_area(shape: str) -> float:
  """Area of a shape of radius 1, from a large drawing of it."""
  cover = drifting.coverage(
    shape, np.array([[64.0, 64.0]]), 60.0, height=128, width=128
  )
  return float(cover.sum()) / 60.0**2


def _areas(cfg):
  """The least and the greatest area that counts as a shape, px."""
  units = [unit_area(shape) for shape in drifting.SHAPES]
  return (
    min(units) * cfg.radius[0] ** 2 / TOLERANCE**2,
    max(units) * cfg.radius[1] ** 2 * TOLERANCE**2,
  )


def _largest_part(mask):
  parts, count = scipy.ndimage.label(mask, structure=np.ones((3, 3)))
  if count == 0:
    return mask
  sizes = np.bincount(parts.ravel())
  return parts == 1 + np.argmax(sizes[1:])


def _planes(chroma_FHW2, mask_FHW, grid_HW2):
  """Least squares of 1, y and x over the masked pixels, on the whole frame."""
  ones = np.ones(grid_HW2.shape[:2] + (1,))
  basis = np.concatenate([ones, grid_HW2 / len(grid_HW2) - 0.5], -1)
  weights = mask_FHW.astype(np.float64)
  left = np.einsum('fhw,hwi,hwj->fij', weights, basis, basis)
  right = np.einsum('fhw,hwi,fhwc->fic', weights, basis, chroma_FHW2)
  # Where hardly anything is ground the plane is level.
  fit = np.linalg.solve(left + 1e-6 * np.eye(3), right)
  return np.einsum('hwi,fic->fhwc', basis, fit)


def _masked_mean(values_FHWC, mask_FHW):
  """[F, C]; 0 where the mask is empty."""
  weights = mask_FHW[..., None].astype(np.float64)
  return np.sum(weights * values_FHWC, (1, 2)) / np.maximum(
    weights.sum((1, 2)), 1
  )


def _sharpness(luma):
  laplacian = (
    luma[:, :-2, 1:-1]
    + luma[:, 2:, 1:-1]
    + luma[:, 1:-1, :-2]
    + luma[:, 1:-1, 2:]
    - 4 * luma[:, 1:-1, 1:-1]
  )
  return laplacian.var((1, 2))
