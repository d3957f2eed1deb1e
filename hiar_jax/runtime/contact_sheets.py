"""A video at a glance: evenly spaced frames in one PNG."""

import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from hiar_jax.runtime import files, video_io

# F frames, H height, W width; pixels are uint8 RGB, [F, H, W, 3].


def write(
  path: str | pathlib.Path,
  videos: np.ndarray | Sequence[np.ndarray],
  *,
  captions: str | Sequence[str] = (),
  columns: int = 7,
  scale: int = 2,
  texts: Mapping[str, str] = {},
) -> None:
  """Saves evenly spaced, numbered frames of each video as one PNG.

  Args:
    path: of the PNG.
    videos: uint8 [F, H, W, 3], or a list of them, or [B, F, H, W, 3]; a video
      fills up to four rows, fewer if it has fewer frames.
    captions: a line above each video.
    columns: frames in a row, >= 1.
    scale: whole factor of enlargement of a frame.
    texts: kept in the PNG by keyword, beside the captions.

  Raises:
    ValueError: if nothing is given, or captions and videos differ in number.
    OSError: if the file cannot be written.
  """
  if isinstance(videos, np.ndarray) and videos.ndim == 4:
    videos = [videos]
  captions = [captions] if isinstance(captions, str) else list(captions)
  if not len(videos) or any(not len(video) for video in videos):
    raise ValueError('a contact sheet needs at least one frame')
  if captions and len(captions) != len(videos):
    raise ValueError(f'{len(captions)} captions for {len(videos)} videos')
  video_io.check_writable(path)
  strips = [
    _strip(np.asarray(video), caption, columns, scale)
    for video, caption in zip(videos, captions or [''] * len(videos))
  ]
  width = max(strip.width for strip in strips)
  height = sum(strip.height for strip in strips)
  sheet = Image.new('RGB', (width, height), 'white')
  top = 0
  for strip in strips:
    sheet.paste(strip, (0, top))
    top += strip.height
  kept = PngImagePlugin.PngInfo()
  described = {'Description': '\n'.join(captions)} if captions else {}
  for keyword, text in (described | dict(texts)).items():
    # Half a character, of a text that was cut, has no place in a file.
    kept.add_itxt(keyword, text.encode(errors='replace').decode())
  with files.whole_file(path) as partial:
    sheet.save(partial, format='PNG', pnginfo=kept)


def _strip(
  video: np.ndarray, caption: str, columns: int, scale: int
) -> Image.Image:
  """One video's rows of frames, its caption above."""
  num_frames, height, width = video.shape[:3]
  shown = min(num_frames, 4 * columns)
  columns = min(columns, shown)
  picked = np.linspace(0, num_frames - 1, shown).round().astype(int)
  gap, label = 4, 14
  title = _wrap(caption, columns * (width * scale + gap))
  head = 18 * len(title)
  rows = -(-shown // columns)
  cell = (width * scale + gap, height * scale + label + gap)
  strip = Image.new(
    'RGB', (columns * cell[0] + gap, head + rows * cell[1] + gap), 'white'
  )
  draw = ImageDraw.Draw(strip)
  for line, text in enumerate(title):
    draw.text((gap, 2 + 18 * line), text, 'black', ImageFont.load_default(14))
  for place, frame in enumerate(picked):
    left = gap + place % columns * cell[0]
    top = gap + head + place // columns * cell[1]
    image = Image.fromarray(video[frame]).resize(
      (width * scale, height * scale), Image.Resampling.NEAREST
    )
    strip.paste(image, (left, top))
    draw.text(
      (left, top + height * scale + 1),
      str(frame),
      'gray',
      ImageFont.load_default(10),
    )
  return strip


def _wrap(text: str, width: int) -> list[str]:
  """Words in lines that fit `width` pixels."""
  font = ImageFont.load_default(14)
  lines: list[str] = []
  for word in text.split():
    if lines and font.getlength(f'{lines[-1]} {word}') <= width:
      lines[-1] += f' {word}'
    else:
      lines.append(word)
  return lines
