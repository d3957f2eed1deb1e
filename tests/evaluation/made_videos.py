"""Videos with one known defect each, for tests of the measures.

A tinted, panning texture with a disc that goes round in circles, so that all
five segments see the same. What goes wrong is added to that.
"""

import numpy as np
import scipy.ndimage

SIDE, FRAMES = 64, 80
SPEED = 1.0  # px a frame, of the texture and of the disc along its circle.
_PERIOD = 16
_DISC = 16  # px, its radius.


def perfect(**changes):
  """uint8 [F, H, W, 3] without a defect, but for what is changed."""
  return _to_bytes(_draw(**changes))


def frozen():
  return np.repeat(perfect()[:1], FRAMES, axis=0)


def slowing():
  """Comes to rest evenly."""
  speed_F = np.linspace(1, 0, FRAMES)
  return perfect(time_F=np.cumsum(speed_F))


def turning_hue(turns=0.25):
  """Along a part of the colour circle, at equal luma and chroma."""
  return _to_bytes(_draw(), turn_F=np.linspace(0, 2 * np.pi * turns, FRAMES))


def greying():
  return _to_bytes(_draw(), chroma_F=np.linspace(1, 0.4, FRAMES))


def blurring():
  video = _draw()
  for frame, sigma in zip(video, np.linspace(0, 1.2, FRAMES), strict=True):
    frame[:] = scipy.ndimage.gaussian_filter(frame, (sigma, sigma, 0))
  return _to_bytes(video)


def fading():
  """Loses its contrast, around an unchanging mean colour."""
  video = _draw()
  mean = video.mean(axis=(1, 2), keepdims=True)
  kept = np.linspace(1, 0.6, FRAMES)[:, None, None, None]
  return _to_bytes(mean + kept * (video - mean))


def vanishing():
  """The disc goes within two frames in the middle and stays away."""
  disc_F = np.clip(FRAMES / 2 - np.arange(FRAMES), 0, 2) / 2
  return perfect(disc_F=disc_F)


def teleporting():
  """Everything jumps once, in the middle, and goes on from there."""
  time_F = np.arange(FRAMES) + 7.0 * (np.arange(FRAMES) >= FRAMES // 2)
  return perfect(time_F=time_F)


def _draw(time_F=None, disc_F=None):
  """float64 (luma, Cb, Cr), each in 0..255 or +-128: [F, H, W, 3]."""
  time_F = np.arange(FRAMES, dtype=float) if time_F is None else time_F
  disc_F = np.ones(FRAMES) if disc_F is None else disc_F
  y, x = np.mgrid[:SIDE, :SIDE] + 0.5
  # Whole periods fit the frame, and the texture returns with the disc.
  wave = 2 * np.pi / SIDE
  x_FHW = x - SPEED * time_F[:, None, None]
  texture = (
    np.sin(wave * (4 * x_FHW + 3 * y))
    + np.sin(wave * (8 * x_FHW - 2 * y) + 1)
    + np.sin(wave * (4 * x_FHW - 5 * y) + 2)
  )
  angle = 2 * np.pi * time_F / _PERIOD
  radius = SPEED * _PERIOD / (2 * np.pi)
  dy = y - (SIDE / 2 + radius * np.sin(angle)[:, None, None])
  dx = x - (SIDE / 2 + radius * np.cos(angle)[:, None, None])
  # Half of it bright, half dark: without it the mean is the same.
  bump = np.sin(np.pi * dx / _DISC) * np.clip(_DISC - np.hypot(dy, dx), 0, 4)
  luma = 110 + 10 * texture + 14 * disc_F[:, None, None] * bump
  return np.stack([luma, luma * 0 - 12, luma * 0 + 30], axis=-1)


def _to_bytes(video, turn_F=None, chroma_F=None):
  luma, blue, red = np.moveaxis(video, -1, 0)
  turn = np.zeros(FRAMES) if turn_F is None else turn_F
  scale = np.ones(FRAMES) if chroma_F is None else chroma_F
  cos, sin = ((scale * f(turn))[:, None, None] for f in (np.cos, np.sin))
  blue, red = cos * blue - sin * red, sin * blue + cos * red
  rgb = np.stack(
    [
      luma + 1.402 * red,
      luma - 0.344136 * blue - 0.714136 * red,
      luma + 1.772 * blue,
    ],
    axis=-1,
  )
  return np.clip(rgb.round(), 0, 255).astype(np.uint8)
