"""How far things move from one frame to the next, by matching blocks.

A block of 8x8 px moved by a part of a pixel if one step of least squares on the
gradients (Lucas and Kanade 1981) finds it. Else it is looked for at whole
pixels within a radius, and the step is taken from there. A flat block has no
place and counts as still; an edge has no place along itself and gets a short
displacement that explains it. A block that is found nowhere, such as one of a
thing that vanished, counts as still as well: what happened to it is no motion.
Nor is it motion to become brighter.

H height, W width, N blocks, S shifts.
"""

import numpy as np

BLOCK = 8
# Searched on each side, in px of the picture that is matched.
RADIUS = 8
# A block differs from its old place by more than this much of 255 (standard
# deviation), or it did not move: rounding and H.264 stay below.
_NOISE = 1.5
# Of the difference to the old place, what may be left where a block is found
# nearby, and at all.
_FOUND_NEAR, _FOUND = 0.2, 0.5
# A px farther has to leave less by this part of it: along an edge, or in a
# texture that repeats, many places look alike.
_FAR = 0.08
# Of a pixel's squared gradient, in levels: edges keep out of directions that
# they say nothing about.
_RIDGE = 4.0
_PAD = RADIUS + 3
# From near to far: of equally good places the first is taken.
_SHIFTS_S2 = np.array(
  sorted(
    (
      (dy, dx)
      for dy in range(-RADIUS, RADIUS + 1)
      for dx in range(-RADIUS, RADIUS + 1)
    ),
    key=lambda shift: (shift[0] ** 2 + shift[1] ** 2, shift),
  )
)


def displacements(before_HW: np.ndarray, after_HW: np.ndarray) -> np.ndarray:
  """Length of each block's displacement, in px, [N].

  Args:
    before_HW: luma in [0, 255]; at least 8x8. Rows and columns that fill no
      block, half of them on each side, are left out.
    after_HW: the next frame, of the same size.

  Raises:
    ValueError: if a frame has no block.
  """
  height, width = before_HW.shape
  rows, columns = height // BLOCK, width // BLOCK
  if not rows or not columns:
    raise ValueError(
      f'frames of {height}x{width} have no block of {BLOCK}x{BLOCK} px'
    )
  # What lies outside of a frame is like its border.
  before, after = (
    np.pad(frame.astype(np.float32), _PAD, mode='edge')
    for frame in (before_HW, after_HW)
  )
  corner = np.array([(height % BLOCK) // 2, (width % BLOCK) // 2]) + _PAD
  size = (rows * BLOCK, columns * BLOCK)
  inner = _cut(before, corner, size)
  lengths_N = np.zeros(rows * columns)

  still_N = _costs(inner, _cut(after, corner, size))
  moved = np.flatnonzero(still_N > _NOISE**2)
  corners_N2 = corner + BLOCK * np.stack(np.divmod(moved, columns), axis=1)
  still_N = still_N[moved]
  step_N2, left_N = _refine(before, after, corners_N2, 0 * corners_N2)
  near = left_N < _FOUND_NEAR * still_N
  lengths_N[moved[near]] = np.linalg.norm(step_N2[near], axis=1)

  moved, corners_N2, still_N = moved[~near], corners_N2[~near], still_N[~near]
  if len(moved):
    cost_NS = _shift_costs(before, after, corners_N2)
    cost_NS += _FAR * still_N[:, None] * np.linalg.norm(_SHIFTS_S2, axis=1)
    shift_N2 = _SHIFTS_S2[np.argmin(cost_NS, axis=1)]
    step_N2, left_N = _refine(before, after, corners_N2, shift_N2)
    found = left_N < _FOUND * still_N
    length_N = np.linalg.norm(shift_N2 + step_N2, axis=1)
    lengths_N[moved] = np.where(found, length_N, 0)
  return lengths_N


def _cut(frame, corner, size):
  (top, left), (height, width) = corner, size
  return frame[top : top + height, left : left + width]


def _costs(inner, other):
  """How each block differs from that at the same place: [N].

  The variance of the difference: all of it brighter costs nothing.
  """
  height, width = inner.shape
  blocks = (inner - other).reshape(
    height // BLOCK, BLOCK, width // BLOCK, BLOCK
  )
  mean = blocks.mean(axis=(1, 3))
  return (np.square(blocks).mean(axis=(1, 3)) - mean * mean).ravel()


def _shift_costs(before, after, corners_N2):
  """What each block costs, as in `_costs`, at every shift: [N, S]."""
  at_S = tuple((_SHIFTS_S2 + RADIUS).T)
  costs = np.empty((len(corners_N2), len(_SHIFTS_S2)), np.float32)
  # So many at once that their differences stay in the cache.
  for start in range(0, len(corners_N2), 16):
    part = slice(start, start + 16)
    old = _pick(before, corners_N2[part], 0)
    places = np.lib.stride_tricks.sliding_window_view(
      _pick(after, corners_N2[part], RADIUS), (BLOCK, BLOCK), axis=(1, 2)
    )
    apart = old[:, None, None] - places
    apart = apart.reshape(*apart.shape[:3], BLOCK**2)
    square = np.einsum('nyxk,nyxk->nyx', apart, apart) / BLOCK**2
    mean = apart @ np.full(BLOCK**2, 1 / BLOCK**2, np.float32)
    costs[part] = (square - mean * mean)[:, *at_S]
  return costs


def _refine(before, after, corners_N2, shift_N2):
  """One step of least squares from a whole shift.

  Returns:
    The step, [N, 2], at most a pixel on each axis, and the variance of the
    difference after it, [N].
  """
  old, new = (
    _pick(frame, corners, 1)
    for frame, corners in (
      (before, corners_N2),
      (after, corners_N2 + shift_N2),
    )
  )
  # Of both, so that the step is right to the second order.
  mean = (old + new) / 2
  gy = (mean[:, 2:, 1:-1] - mean[:, :-2, 1:-1]) / 2
  gx = (mean[:, 1:-1, 2:] - mean[:, 1:-1, :-2]) / 2
  old = old[:, 1:-1, 1:-1]
  change = old - new[:, 1:-1, 1:-1]
  change -= change.mean(axis=(1, 2), keepdims=True)
  yy, yx, xx, yt, xt = (
    np.sum(u * v, axis=(1, 2))
    for u, v in ((gy, gy), (gy, gx), (gx, gx), (gy, change), (gx, change))
  )
  yy, xx = yy + _RIDGE * BLOCK**2, xx + _RIDGE * BLOCK**2
  step_N2 = np.stack([xx * yt - yx * xt, yy * xt - yx * yt], axis=1)
  step_N2 = np.clip(step_N2 / (yy * xx - yx * yx)[:, None], -1, 1)

  # What is left is looked at, not believed: between pixels, bilinear.
  whole_N2 = np.floor(step_N2).astype(int)
  y, x = np.moveaxis((step_N2 - whole_N2)[:, :, None, None], 1, 0)
  new = _pick(after, corners_N2 + shift_N2 + whole_N2, 1)[:, 1:, 1:]
  new = (1 - y) * new[:, :-1] + y * new[:, 1:]
  new = (1 - x) * new[:, :, :-1] + x * new[:, :, 1:]
  return step_N2, (old - new).var(axis=(1, 2))


def _pick(frame, corners_N2, border):
  """Blocks with a border around them: [N, 8 + 2 border, 8 + 2 border]."""
  span = np.arange(-border, BLOCK + border)
  y, x = (corners_N2[:, axis, None] + span for axis in (0, 1))
  return frame[y[:, :, None], x[:, None]]
