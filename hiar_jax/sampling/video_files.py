"""Many videos to files, batch by batch: what is done stays done.

Beside each video lies a contact sheet that says what made both. A video that is
there and was made with the same settings is not made again.
"""

# B videos of a batch, F frames, H W height and width

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from hiar_jax.runtime import contact_sheets, provenance, video_io
from hiar_jax.sampling import calls, video_pipeline

# Prompts that are encoded together, so that an encoder which is released after
# each call is not read again for every batch: as many as it remembers.
_PROMPTS_AT_ONCE = 64
# Bytes of a prompt in a file's name: file systems take 255 in all.
_LONGEST_NAME = 240
_SETTINGS = 'hiar_jax'  # In the contact sheet's text.


@dataclasses.dataclass(frozen=True)
class Job:
  """A video to make.

  Attributes:
    path: of the mp4; its sheet lies beside it as .png.
    prompt: that it is to follow.
    seed: that makes it.
  """

  path: pathlib.Path
  prompt: str
  seed: int

  @property
  def sheet(self) -> pathlib.Path:
    return self.path.with_suffix('.png')


def names(
  out: str, prompts: Sequence[str], num_videos: int, *, by: str
) -> list[str]:
  """Names of files, for each prompt in turn its videos.

  Args:
    out: name of the file if there is one alone, such as 'video.mp4'.
    prompts: may be one.
    num_videos: of each prompt.
    by: 'number': video-0.mp4, video-1.mp4, ... for several; 'prompt': as
      VBench's evaluation wants them, PROMPT-0.mp4, PROMPT-1.mp4, ...

  Raises:
    ValueError: by prompt, if one can be no name, or is there twice.
  """
  stem, suffix = pathlib.Path(out).stem, pathlib.Path(out).suffix
  if by == 'prompt':
    for prompt in prompts:
      if '/' in prompt or len(prompt.encode()) > _LONGEST_NAME:
        raise ValueError(
          f'--name_by=prompt: {prompt[:60]!r} is no file name: it has a slash, '
          f'or more than {_LONGEST_NAME} bytes'
        )
    if len({*prompts}) != len(prompts):
      raise ValueError('--name_by=prompt: two prompts are the same')
    return [f'{p}-{i}{suffix}' for p in prompts for i in range(num_videos)]
  count = len(prompts) * num_videos
  if count == 1:
    return [out]
  return [f'{stem}-{i}{suffix}' for i in range(count)]


def settings(
  pipeline: video_pipeline.VideoPipeline,
  request: calls.Request,
  *,
  scale: int,
  initial_frames: np.ndarray | None = None,
  start: calls.Start | None = None,
) -> dict[str, Any]:
  """All that makes videos what they are, prompt and seed aside; JSON."""
  made_of = dataclasses.asdict(request)
  for name in ('num_videos', 'seed'):
    del made_of[name]
  given = None
  if initial_frames is not None:
    given = hashlib.sha256(initial_frames.tobytes()).hexdigest()
  begun = None
  if start is not None:
    begun = [start.step, hashlib.sha256(start.latents.tobytes()).hexdigest()]
  return provenance.jsonable(
    {
      'weights': pipeline.identity,
      'rollout': dataclasses.asdict(pipeline.rollout),
      'fps': pipeline.fps,
      'size': pipeline.frame_shape[:2],
      'scale': scale,
      'given': given,
      'start': begun,
      **made_of,
    }
  )


def is_made(job: Job, made_with: dict[str, Any]) -> bool:
  """Whether a video is there, whole, and was made with these settings."""
  if not made_with['weights'] or not job.path.is_file():
    return False
  try:
    with Image.open(job.sheet) as sheet:
      found = json.loads(sheet.text[_SETTINGS])  # type: ignore[attr-defined]
  except (OSError, AttributeError, KeyError, ValueError):
    return False
  return found == _record(job, made_with)


def write(
  pipeline: video_pipeline.VideoPipeline,
  jobs: Sequence[Job],
  request: calls.Request,
  made_with: dict[str, Any],
  *,
  initial_frames: np.ndarray | None = None,
  start: calls.Start | None = None,
  done: Callable[[Job], None] = lambda job: None,
) -> None:
  """Makes videos; in memory is one batch.

  Args:
    pipeline: makes them.
    jobs: which.
    request: of a call; its seeds and number of videos are not looked at.
    made_with: `settings` of this request.
    initial_frames: see `VideoPipeline.__call__`.
    start: see `VideoPipeline.start_from`.
    done: is told of each when its files are there.

  Raises:
    ValueError, OSError: as sampling and writing do; what was done stays.
  """
  encoded = 0
  for batch in video_pipeline.batches(len(jobs)):
    last = int(batch[-1])
    if last >= encoded:
      some = jobs[int(batch[0]) : int(batch[0]) + _PROMPTS_AT_ONCE]
      pipeline.encoder.encode(list(dict.fromkeys(job.prompt for job in some)))
      encoded = int(batch[0]) + len(some)
    latents = pipeline.sample(
      [jobs[i].prompt for i in batch],
      dataclasses.replace(
        request, num_videos=1, seed=[jobs[i].seed for i in batch]
      ),
      initial_frames=initial_frames,
      start=start,
    )
    # The last batch is filled up with copies of the last video.
    for i, latents_FhwC in zip(dict.fromkeys(batch.tolist()), latents):
      _write_one(pipeline, jobs[i], latents_FhwC, made_with)
      done(jobs[i])


def _write_one(
  pipeline: video_pipeline.VideoPipeline,
  job: Job,
  latents_FhwC: np.ndarray,
  made_with: dict[str, Any],
) -> None:
  frames = []
  with video_io.VideoWriter(
    job.path, fps=pipeline.fps, scale=made_with['scale']
  ) as writer:
    # Each block is encoded while the next one is decoded.
    for block in pipeline.decoded_blocks(latents_FhwC):
      writer.append(block)
      frames.append(block)
  # After the video: a sheet vouches for it.
  contact_sheets.write(
    job.sheet,
    np.concatenate(frames),
    captions=job.prompt,
    texts={_SETTINGS: json.dumps(_record(job, made_with))},
  )


def _record(job: Job, made_with: dict[str, Any]) -> dict[str, Any]:
  """With the bytes of the file: another one of its name is another video."""
  size = job.path.stat().st_size
  return made_with | {'prompt': job.prompt, 'seed': job.seed, 'bytes': size}
