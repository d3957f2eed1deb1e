"""Makes videos from text, with a contact sheet beside each.

  hiar-jax generate --config=bouncing \
    --prompt "a large red disc drifting fast over dark blue" \
    --num_blocks 28 --out video.mp4

With --pipeline FOLDER in place of --config it runs what hiar_jax.load reads:
weights of `hiar-jax export` or `hiar-jax convert`, or published ones.
Several videos are written as video-0.mp4, video-1.mp4, ... batch by batch. The
seed that is printed beside each makes it again alone. What was stopped is
started again: a video that is there and was made with the same settings, as its
contact sheet tells, is left alone (--overwrite makes it again).

With --stream the video is written as it is made, in constant memory; it ends
after --num_blocks (0: never) or at Ctrl-C, which is not a failure: the block
under way is finished, the file plays, the exit status is 0. Before the first
block there is nothing to keep, and the status is 130 as for any program.
--prompt_at 14:"..." changes the prompt from block 14 on; blocks count from 0.

With --mesh=stage=4,tensor=2 the work is divided over devices, also those of
several processes, all started with the same flags (--coordinator, ..., or as
the cluster says, docs/multihost.md); process 0 writes the files.

With published weights the text encoder (11 GB) is let go of when the prompts
are encoded (--text_encoder=keep holds it). --text_cache=FOLDER keeps what came
of them, and --text_encoder=FOLDER makes do with that.

--continue_from FILE goes on from an image, or from a video's last
--continue_frames, read at the rate and the size of the weights' videos; what
does not fit is cut off at the edges, and a line says so.
"""
# ruff: noqa: E402

import time

# Before the imports: they are a good part of the time that is accounted for.
_STARTED = time.monotonic()

import atexit
import contextlib
import dataclasses
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from absl import flags

from hiar_jax.data import clips, given_frames
from hiar_jax.data import prompts as data_prompts
from hiar_jax.runtime import (
  config_flag,
  contact_sheets,
  distributed,
  errors,
  interrupts,
  metrics,
  stopwatch,
  video_io,
)
from hiar_jax.sampling import (
  calls,
  choice_flags,
  loading,
  modes,
  seeds,
  streaming,
  video,
  video_files,
  video_pipeline,
)
from hiar_jax.weights import layouts, lora_files, student_files

_CONFIG = config_flag.define()
_PIPELINE = flags.DEFINE_string(
  'pipeline',
  None,
  'instead of --config: what hiar_jax.load takes, such as a converted folder',
)
_PROMPT = flags.DEFINE_string('prompt', None, 'what the video shows')
_PROMPTS_FILE = flags.DEFINE_string(
  'prompts_file',
  None,
  'instead of --prompt: a text file, one prompt a line, or a .jsonl file of '
  'objects with `prompt`',
)
_OUT = flags.DEFINE_string('out', 'video.mp4', 'the file to write')
_NAME_BY = flags.DEFINE_enum(
  'name_by',
  'number',
  ['number', 'prompt'],
  "of several videos: out-0.mp4, out-1.mp4, ..., or as VBench's evaluation "
  'wants them, PROMPT-0.mp4, PROMPT-1.mp4, ... in the folder of --out',
)
_NUM_BLOCKS = flags.DEFINE_integer(
  'num_blocks',
  28,
  'length of the video; with --stream, 0 is without end',
  lower_bound=0,
)
_NUM_VIDEOS = flags.DEFINE_integer(
  'num_videos', 1, 'videos of each prompt', lower_bound=1
)
_SEED = flags.DEFINE_multi_integer(
  'seed',
  [0],
  'names the noise; given as often as there are videos, each has its own',
  lower_bound=0,
)
_CHOICES = choice_flags.ChoiceFlags()
_ANCHOR_BLOCKS = flags.DEFINE_integer(
  'anchor_blocks', 0, 'order hybrid: first blocks that are finished first'
)
_BLOCK_FIRST_STEPS = flags.DEFINE_integer(
  'block_first_steps', 0, 'order hybrid: first steps that go block by block'
)
_WEIGHTS = flags.DEFINE_string(
  'weights',
  None,
  'a .safetensors file, or a folder that holds '
  f'{layouts.STUDENT_FILE}; default: those that come with the package',
)
_TEXT_ENCODER = flags.DEFINE_string(
  'text_encoder',
  'release',
  'release: free its memory when the prompts are encoded, before the video '
  'starts; keep: hold it; or a path of embeddings that --text_cache left',
)
_TEXT_CACHE = flags.DEFINE_string(
  'text_cache',
  None,
  'a folder for the states of prompts, so that each is encoded once',
)
_LORA = flags.DEFINE_multi_string(
  'lora',
  [],
  'PATH or PATH:SCALE of a LoRA file that is added to the weights; may be '
  'given several times',
)
_FPS = flags.DEFINE_float('fps', None, "frames a second; default: the config's")
_CONTINUE = flags.DEFINE_string(
  'continue_from',
  None,
  'an image or a video that the video goes on from; it comes first in it',
)
_CONTINUE_FRAMES = flags.DEFINE_integer(
  'continue_frames',
  None,
  'only the last frames of --continue_from; default: all of them',
  lower_bound=1,
)
_FIT = flags.DEFINE_enum(
  'fit',
  'crop',
  clips.FITS,
  'how --continue_from and --over are brought to the size of the videos: cut '
  'at the edges, between black bars, or in another shape',
)
_OVER = flags.DEFINE_string(
  'over',
  None,
  'a video that is made over, as far as it fills whole blocks; goes with '
  '--strength, and --num_blocks is then its length',
)
_STRENGTH = flags.DEFINE_float(
  'strength',
  None,
  'of --over: the level in (0, 1] that noise takes it to; 1 leaves nothing',
)
_SCALE = flags.DEFINE_integer(
  'scale', None, 'factor of enlargement; default: up to 512 px', lower_bound=1
)
_OVERWRITE = flags.DEFINE_bool(
  'overwrite', False, 'make videos again that are there with these settings'
)
_STREAM = flags.DEFINE_bool('stream', False, 'write the video as it is made')
distributed.define_flags()
_MODE = flags.DEFINE_enum(
  'mode',
  modes.AUTO,
  (modes.AUTO, *streaming.MODES),
  'of --stream; auto: the fastest one that fits the memory and the weights',
)
_RECACHE = flags.DEFINE_bool(
  'recache',
  False,
  'with --prompt_at and mode block_first: compute the keys of the window anew '
  'for the new prompt, as LongLive does; else they stay',
)
_PROMPT_AT = flags.DEFINE_multi_string(
  'prompt_at', [], 'with --stream: BLOCK:PROMPT, another prompt from there on'
)

_SHEET_BLOCKS = 28  # that a stream's contact sheet shows


def main(argv: Sequence[str]) -> None:
  del argv
  watch = stopwatch.Stopwatch(_STARTED)
  if (_CONFIG.value is None) == (_PIPELINE.value is None):
    raise ValueError('give either --config or --pipeline')
  distributed.start_by_flags()
  if jax.process_count() > 1 and _CHOICES.mesh is None:
    raise ValueError(
      f'{jax.process_count()} processes make one video on a mesh: give --mesh'
    )
  prompts = _prompts()
  if _STREAM.value:
    _stream(prompts, watch)
    return
  if _MODE.value != modes.AUTO or _PROMPT_AT.value or _RECACHE.value:
    raise ValueError('--mode, --prompt_at and --recache go with --stream')
  if not _NUM_BLOCKS.value:
    raise ValueError('flag --num_blocks=0, without end, goes with --stream')
  chosen = seeds.of_videos(_seed(), len(prompts), _NUM_VIDEOS.value)
  paths = _paths(
    video_files.names(
      *(_path(_OUT.value).name, prompts, _NUM_VIDEOS.value), by=_NAME_BY.value
    )
  )
  pipeline = _load(watch)
  num_blocks, start = _start(pipeline)
  request = calls.Request(
    num_blocks=num_blocks,
    order=pipeline.order,
    anchor_blocks=_ANCHOR_BLOCKS.value,
    block_first_steps=_BLOCK_FIRST_STEPS.value,
  )
  given, scale = _initial_frames(pipeline), _scale(pipeline)
  made_with = video_files.settings(
    *(pipeline, request),
    scale=scale,
    initial_frames=given,
    start=start,
  )
  jobs = [
    video_files.Job(path, prompts[i // _NUM_VIDEOS.value], chosen[i])
    for i, path in enumerate(paths)
  ]
  # Of several processes one sees the files, and all make the same.
  if not _OVERWRITE.value and jax.process_count() == 1:
    made = [job for job in jobs if video_files.is_made(job, made_with)]
    for job in made:
      print(
        f'{job.path} is there, made with these settings, seed {job.seed}; '
        '--overwrite makes it again'
      )
    jobs = [job for job in jobs if job not in made]
  if jobs:
    with watch('sample, decode and encode'):
      video_files.write(
        *(pipeline, jobs, request, made_with),
        initial_frames=given,
        start=start,
        done=_told,
      )
  print(watch)


def _told(job: video_files.Job) -> None:
  print(f'wrote {job.path} and {job.sheet.name}, seed {job.seed}', flush=True)


def _scale(pipeline: video_pipeline.VideoPipeline) -> int:
  """--scale, once it is sure that a video can have it."""
  scale = _SCALE.value
  if scale is None:
    scale = video.watchable_scale(pipeline.frame_shape[0])
  video_io.check_size(*pipeline.frame_shape[:2], scale)
  return scale


def _seed() -> int | list[int]:
  """--seed: of the call, or of each video."""
  return _SEED.value if len(_SEED.value) > 1 else _SEED.value[0]


def _load(watch: stopwatch.Stopwatch) -> video_pipeline.VideoPipeline:
  """The pipeline asked for, run as the flags say."""
  given = {
    'text_encoder': _TEXT_ENCODER.value,
    'text_cache': _TEXT_CACHE.value,
    'loras': [lora_files.parse_flag(value) for value in _LORA.value],
  }
  with watch('load'):
    if _PIPELINE.value is None:
      config = _CONFIG.value
      config_flag.refuse_overrides_but(*loading.READS, 'codec.path')
      weights, codec = student_files.find(
        config, _WEIGHTS.value, config_flag.overrides().get('codec.path')
      )
      pipeline = loading.from_config(
        config.to_dict(),
        weights=weights,
        codec=codec,
        mesh=_CHOICES.mesh,
        **_CHOICES.held,
        **given,
      )
      pipeline = _CHOICES.apply(pipeline)
    else:
      if _WEIGHTS.value is not None:
        raise ValueError('--weights goes with --config, not with --pipeline')
      pipeline = _CHOICES.load(_PIPELINE.value, **given)
  if _FPS.value is not None:
    pipeline = dataclasses.replace(pipeline, fps=_FPS.value)
  return pipeline


def _start(
  pipeline: video_pipeline.VideoPipeline,
) -> tuple[int, calls.Start | None]:
  """The number of blocks, and what they start from: --over, if given."""
  if (_OVER.value is None) != (_STRENGTH.value is None):
    raise ValueError('--over and --strength go together')
  if _OVER.value is None:
    return _NUM_BLOCKS.value, None
  height, width, _ = pipeline.frame_shape
  frames, notes = given_frames.read(
    *(_OVER.value, height, width), fps=pipeline.fps, fit=_FIT.value
  )
  for note in notes:
    print(f'note: {note}', file=sys.stderr)
  return pipeline.start_from(frames, _STRENGTH.value)


def _initial_frames(
  pipeline: video_pipeline.VideoPipeline,
) -> np.ndarray | None:
  """What --continue_from names, at the size of the pipeline's frames."""
  if _CONTINUE.value is None:
    if _CONTINUE_FRAMES.value is not None:
      raise ValueError('--continue_frames goes with --continue_from')
    return None
  height, width, _ = pipeline.frame_shape
  frames, notes = given_frames.read(
    *(_path(_CONTINUE.value), height, width),
    fps=pipeline.fps,
    last=_CONTINUE_FRAMES.value,
    fit=_FIT.value,
  )
  for note in notes:
    print(f'note: {note}', file=sys.stderr)
  return frames


def _stream(prompts: list[str], watch: stopwatch.Stopwatch) -> None:
  """Writes one video block by block until its end or Ctrl-C."""
  switches = _switches()
  if _NUM_VIDEOS.value != 1 or _OVER.value is not None:
    raise ValueError('--num_videos and --over do not go with --stream')
  if len(prompts) > 1:
    raise ValueError(
      f'--stream makes one video, not {len(prompts)}; change the prompt with '
      '--prompt_at'
    )
  (seed,) = seeds.of_videos(_seed(), 1)
  (path,) = _paths([_path(_OUT.value).name])
  pipeline = _load(watch)
  given, scale = _initial_frames(pipeline), _scale(pipeline)
  # All at once: an encoder that is released is read once.
  with watch('text'):
    pipeline.encoder.encode([*prompts, *(prompt for _, prompt in switches)])
  stream = pipeline.stream(
    prompts[0],
    seed=seed,
    num_blocks=_NUM_BLOCKS.value or None,
    mode=_MODE.value,
    initial_frames=given,
  )
  for block, prompt in switches:
    stream.send(prompt, at=block, recache=_RECACHE.value)
  print(
    f'streams in mode {stream.mode!r}, {stream.reason}; Ctrl-C ends the video',
    flush=True,
  )
  shown, limit = [], _NUM_BLOCKS.value or sys.maxsize
  with (
    watch('stream'),
    metrics.Progress(
      _NUM_BLOCKS.value or None, label='stream', unit='block'
    ) as progress,
  ):
    frames = next(stream)[0]
    interrupts.check()
    writer = video_io.VideoWriter(
      path, fps=pipeline.fps, scale=scale, keeps=True
    )
    # The writer inside: it closes before Ctrl-C is an error again.
    with _tells_what_is_kept(writer), interrupts.noted() as end, writer:
      if stream.given is not None:
        writer.append(stream.given[0])
        shown.append(stream.given[0])
      for block in range(limit):
        writer.append(frames)
        # Memory stays flat: the contact sheet shows the beginning.
        shown += [frames] if block < _SHEET_BLOCKS else []
        progress.update(block + 1)
        if end() or block + 1 == limit:
          break
        frames = next(stream)[0]
  named = [f'; from block {b} on: {p}' for b, p in switches if b <= block]
  contact_sheets.write(
    path.with_suffix('.png'),
    np.concatenate(shown),
    captions=''.join([prompts[0], *named]),
  )
  print(f'wrote {path} and {path.with_suffix(".png").name}, seed {seed}')
  print(watch)


@contextlib.contextmanager
def _tells_what_is_kept(writer: video_io.VideoWriter) -> Iterator[None]:
  """Says after an error where the video is as far as it came."""
  try:
    yield
  finally:
    if writer.kept:
      print(
        f'note: {writer.path} has what was made before the error, up to frame '
        f'{writer.num_frames}',
        file=sys.stderr,
      )


def _switches() -> list[tuple[int, str]]:
  """--prompt_at as (block, prompt), in order."""
  switches = {}
  for value in _PROMPT_AT.value:
    block, colon, prompt = value.partition(':')
    if not (colon and block.strip().isdecimal() and prompt.strip()):
      raise ValueError(
        f'--prompt_at={value!r} is not BLOCK:PROMPT with a block from 0 on'
      )
    block, prompt = int(block), _text(prompt.strip())
    if block in switches:
      raise ValueError(f'--prompt_at names block {block} twice')
    if 0 < _NUM_BLOCKS.value <= block:
      raise ValueError(
        f'--prompt_at={value!r} names no block of the video, which has '
        f'--num_blocks={_NUM_BLOCKS.value}, counted from 0'
      )
    switches[block] = prompt
  return sorted(switches.items())


def _prompts() -> list[str]:
  """The prompts asked for."""
  if (_PROMPT.value is None) == (_PROMPTS_FILE.value is None):
    raise ValueError('give either --prompt or --prompts_file')
  if _PROMPT.value is not None:
    prompts = [_text(_PROMPT.value)]
  else:
    prompts = list(data_prompts.FilePrompts(_path(_PROMPTS_FILE.value)))
  streaming.check_prompts(prompts)
  return prompts


def _text(value: str) -> str:
  # Where the locale is C, Python takes an argument for bytes without meaning.
  return os.fsencode(value).decode(errors='replace')


def _path(value: str) -> pathlib.Path:
  # In --out=~/x.mp4 a shell leaves '~' as it is.
  return pathlib.Path(value).expanduser()


def _paths(names: list[str]) -> list[pathlib.Path]:
  """Where the videos go, once it is sure that they can go there."""
  folder = _path(_OUT.value).parent
  if not distributed.is_writer():
    # It makes the same video, and has no use for it.
    unused = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, unused, ignore_errors=True)
    folder = pathlib.Path(unused)
  paths = [folder / name for name in names]
  for path in paths:
    # Starts nothing before the first frame, but checks what it is given.
    fps = 1.0 if _FPS.value is None else _FPS.value
    video_io.VideoWriter(path, fps=fps, scale=_SCALE.value or 1)
    video_io.check_writable(path.with_suffix('.png'))
  return paths


if __name__ == '__main__':
  errors.run_main(main)
