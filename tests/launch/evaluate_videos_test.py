"""The program that measures folders of videos, as its users meet it."""

import pathlib
import subprocess
import sys

import numpy as np
import pytest

from hiar_jax.runtime import video_io

_PROGRAM = pathlib.Path(__file__).parents[2] / 'launch' / 'evaluate_videos.py'


def run(folder, *flags):
  return subprocess.run(
    [sys.executable, _PROGRAM, *flags],
    cwd=folder,
    capture_output=True,
    text=True,
    check=False,
  )


@pytest.fixture
def two_folders(tmp_path):
  ramp = np.linspace(0, 255, 48).astype(np.uint8)
  frame = np.broadcast_to(ramp[:, None], (1, 32, 48, 3))
  frames = np.concatenate([np.roll(frame, n, axis=2) for n in range(10)])
  for name in ('theirs', 'ours'):
    (tmp_path / name).mkdir()
    video_io.write_video(tmp_path / name / 'a-0.mp4', frames, fps=16)
  (tmp_path / 'ours' / 'empty.mp4').write_bytes(b'')
  return tmp_path


def test_two_folders_give_a_report_and_name_what_is_left_out(two_folders):
  done = run(two_folders, '--folder=theirs', '--against=ours', '--out=report')
  assert done.returncode == 0, done.stderr
  assert 'not measured: ours/empty.mp4 is empty' in done.stderr
  assert [line.split()[0] for line in done.stdout.splitlines()] == [
    *('videos', 'theirs', 'ours', 'difference', 'wrote', 'wrote', 'wrote')
  ]
  written = {path.name for path in (two_folders / 'report').iterdir()}
  assert written == {
    *('measured.jsonl', 'report.html', 'report.json', 'videos.csv')
  }


def test_a_mistake_is_one_line_and_writes_nothing(two_folders):
  for flags, meant in (
    (('--folder=none',), 'no folder of videos at none'),
    (('--folder=ours', '--names=a,b'), '--names=a,b must be 1 different'),
  ):
    done = run(two_folders, *flags, '--out=report')
    assert done.returncode == 2
    assert done.stderr.startswith(f'error: {meant}')
    assert done.stderr.count('\n') == 1
    assert not (two_folders / 'report').exists()
