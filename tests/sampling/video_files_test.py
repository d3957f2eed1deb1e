"""Videos are written as they are done, and not made twice."""

import dataclasses
import functools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hiar_jax import rollout
from hiar_jax.runtime import contact_sheets, video_io
from hiar_jax.sampling import calls, video_files

_REQUEST = calls.Request(num_blocks=2)
_ROLLOUT = rollout.RolloutConfig(levels=(1.0, 0.5, 0.0))


@dataclasses.dataclass
class _Pipeline:
  """Makes flat videos without a network, and remembers what it was asked."""

  identity: str = 'weights'
  fps: float = 8.0
  frame_shape: tuple[int, int, int] = (16, 16, 3)
  rollout: Any = _ROLLOUT
  asked: list[Any] = dataclasses.field(default_factory=list)
  encoded: list[Any] = dataclasses.field(default_factory=list)
  fails_at: int = -1

  @property
  def encoder(self):
    return SimpleNamespace(encode=self.encoded.append)

  def sample(self, prompts, request, *, initial_frames, start):
    if len(self.asked) == self.fails_at:
      raise ValueError('no room')
    self.asked.append((list(prompts), list(request.seed)))
    return np.zeros((len(prompts), 4, 2, 2, 3), np.float32)

  def decoded_blocks(self, latents):
    for _ in range(2):
      yield np.full((3, 16, 16, 3), 90, np.uint8)


def _jobs(folder, count=11):
  return [
    video_files.Job(folder / f'{i}.mp4', f'prompt {i}', i) for i in range(count)
  ]


def _write(pipeline, jobs, **options):
  made_with = video_files.settings(pipeline, _REQUEST, scale=2)
  video_files.write(pipeline, jobs, _REQUEST, made_with, **options)
  return made_with


def test_each_batch_is_written_before_the_next_one_is_made(tmp_path):
  pipeline, done = _Pipeline(fails_at=1), []
  with pytest.raises(ValueError, match='no room'):
    _write(pipeline, _jobs(tmp_path), done=done.append)
  assert [job.seed for job in done] == [0, 1, 2, 3, 4, 5]
  assert len(list(tmp_path.glob('*.mp4'))) == 6
  frames, fps = video_io.read_video(tmp_path / '5.mp4')
  assert frames.shape == (6, 32, 32, 3) and fps == 8


def test_every_video_has_its_own_prompt_and_seed_and_is_made_once(tmp_path):
  pipeline = _Pipeline()
  _write(pipeline, _jobs(tmp_path))
  (prompts, seeds), (others, other_seeds) = pipeline.asked
  assert seeds + other_seeds == [*range(11), 10]
  assert prompts + others == [f'prompt {i}' for i in seeds + other_seeds]
  # A released encoder is read once for all of them.
  assert pipeline.encoded == [[f'prompt {i}' for i in range(11)]]


def test_what_was_made_with_the_same_settings_is_told_from_the_rest(tmp_path):
  pipeline, (job,) = _Pipeline(), _jobs(tmp_path, 1)
  made_with = _write(pipeline, [job])
  assert video_files.is_made(job, made_with)

  def differs(job=job, **changes):
    return not video_files.is_made(job, made_with | changes)

  assert differs(dataclasses.replace(job, seed=5))
  assert differs(dataclasses.replace(job, prompt='another'))
  assert differs(weights='others') and differs(scale=3)
  assert not video_files.is_made(job, made_with | {'weights': ''})
  other = dataclasses.replace(_REQUEST, order='block_first')
  assert differs(**video_files.settings(pipeline, other, scale=2))
  given = np.zeros((1, 4, 4, 3), np.uint8)
  goes_on = video_files.settings(
    pipeline, _REQUEST, scale=2, initial_frames=given
  )
  assert differs(**goes_on)
  pipeline.frame_shape = (32, 16, 3)
  assert differs(**video_files.settings(pipeline, _REQUEST, scale=2))
  job.path.write_bytes(b'another video')
  assert differs()


def test_a_sheet_that_says_nothing_vouches_for_nothing(tmp_path):
  pipeline, (job,) = _Pipeline(), _jobs(tmp_path, 1)
  made_with = _write(pipeline, [job])
  contact_sheets.write(job.sheet, np.zeros((2, 8, 8, 3), np.uint8))
  assert not video_files.is_made(job, made_with)
  job.sheet.write_text('no picture')
  assert not video_files.is_made(job, made_with)
  job.sheet.unlink()
  assert not video_files.is_made(job, made_with)


def test_files_are_named_by_number_or_as_vbench_reads_them():
  two = ['a cat. It runs', 'ein Ü']
  by_number = functools.partial(video_files.names, by='number')
  assert by_number('x.mp4', two[:1], 1) == ['x.mp4']
  assert by_number('x.mp4', two, 2) == [f'x-{i}.mp4' for i in range(4)]
  assert video_files.names('x.mp4', two, 2, by='prompt') == [
    *('a cat. It runs-0.mp4', 'a cat. It runs-1.mp4'),
    *('ein Ü-0.mp4', 'ein Ü-1.mp4'),
  ]


@pytest.mark.parametrize(
  ('prompts', 'message'),
  [
    (['up/down'], "'up/down' is no file name"),
    (['long ' * 60], 'more than 240 bytes'),
    (['a cat', 'a cat'], 'two prompts are the same'),
  ],
)
def test_prompts_that_can_name_no_file_are_refused(prompts, message):
  with pytest.raises(ValueError, match=message):
    video_files.names('x.mp4', prompts, 1, by='prompt')
