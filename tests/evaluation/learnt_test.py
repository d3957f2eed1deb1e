"""Learnt judges of videos: who is asked what, and what is made of it."""

import csv
import json
import sys

import numpy as np
import pytest

from hiar_jax.evaluation import folders, learnt, learnt_report
from hiar_jax.runtime import video_io

# Of a frame, and of two: what a network would say is not the question here.
LIGHT = learnt.Judge('light', False, lambda f: f.mean(axis=(1, 2, 3)) / 255)
APART = learnt.Judge(
  'apart', True, lambda f, g: np.abs(f / 255 - g / 255).mean(axis=(1, 2, 3))
)


def fading(count, end):
  """Grey noise whose light goes from .8 to `end` of itself."""
  noise = np.random.default_rng(0).uniform(100, 200, (1, 32, 48, 3))
  share = np.linspace(0.8, 0.8 * end, count)[:, None, None, None]
  return (noise * share).astype(np.uint8)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('videos')
  video_io.write_video(folder / 'still-0.mp4', fading(25, 1.0), fps=16)
  video_io.write_video(folder / 'fading-0.mp4', fading(25, 0.25), fps=16)
  video_io.write_video(folder / 'short-0.mp4', fading(9, 1.0), fps=16)
  return folder


def measured(folder, tmp_path, judges=(LIGHT, APART), every=4):
  known = folders.Known(tmp_path / 'known.jsonl', learnt.way(judges, every))
  return folders.measure(folders.find(folder), folder.name, known)


def test_a_judges_drift_is_of_the_video_that_changes(folder, tmp_path):
  videos = measured(folder, tmp_path).videos
  still, fades = videos['still-0'], videos['fading-0']
  assert still.means.keys() == {'light', 'apart', 'saturation', 'sharpness'}
  assert still.drift_parts['light'] < 0.01 < 0.2 < fades.drift_parts['light']
  assert fades.drift == pytest.approx(sum(fades.drift_parts.values()))
  # Frame 20 of 0..24 is the last that is looked at.
  first, last = fades.curves['light'][0], fades.curves['light'][-1]
  assert last == pytest.approx(first * (1 - 0.75 * 20 / 24), rel=0.1)


def test_every_fourth_frame_is_looked_at_and_pairs_are_in_a_row(
  folder, tmp_path
):
  seen, pairs = [], []

  def frame(frames):
    seen.extend(frames.mean(axis=(1, 2, 3)))
    return np.zeros(len(frames))

  def pair(frames, after):
    pairs.extend(after.mean(axis=(1, 2, 3)) - frames.mean(axis=(1, 2, 3)))
    return np.zeros(len(frames))

  judges = (learnt.Judge('a', False, frame), learnt.Judge('b', True, pair))
  way = learnt.way(judges, 4)
  way.measure(folder / 'fading-0.mp4', lambda: None)
  assert len(seen) == len(pairs) == 6  # Of 0, 4, ... 20.
  # Of frames in a row, a quarter of the way from one to the next.
  np.testing.assert_allclose(pairs[:-1], np.diff(seen) / 4, atol=1)


def test_too_few_frames_are_named(folder, tmp_path):
  failed = measured(folder, tmp_path).failed
  assert failed.keys() == {'short-0.mp4'}
  assert '2 frames to look at, one of 4; 5 are needed' in failed['short-0.mp4']


def test_other_judges_do_not_take_what_is_known(folder, tmp_path):
  first = measured(folder, tmp_path, (LIGHT,)).videos['still-0']
  second = measured(folder, tmp_path, (LIGHT, APART)).videos['still-0']
  assert 'apart' in second.means and 'apart' not in first.means


def test_the_report_has_every_video_and_the_difference(folder, tmp_path):
  one = measured(folder, tmp_path)
  other = folders.Folder('other', {'still-0': one.videos['fading-0']}, {})
  table = learnt_report.format_table([one, other])
  assert 'difference' in table and 'drift' in table.splitlines()[0]
  learnt_report.write(tmp_path, [one, other], 4)
  whole = json.loads((tmp_path / 'learnt.json').read_text())
  apart = whole['means']['difference']
  assert apart['videos'] == 1
  assert apart['light']['mean'] == pytest.approx(
    one.videos['fading-0'].means['light'] - one.videos['still-0'].means['light']
  )
  lines = (tmp_path / 'learnt.csv').read_text().splitlines()
  rows = list(csv.DictReader(lines))
  assert [(r['folder'], r['video']) for r in rows] == [
    (folder.name, 'fading-0'),
    (folder.name, 'still-0'),
    ('other', 'fading-0'),
  ]


def test_without_the_libraries_it_says_what_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, 'pyiqa', None)
  with pytest.raises(ValueError, match=r'pip install "hiar_jax\[learnt\]"'):
    learnt.open_judges(['musiq'])


@pytest.mark.parametrize('names', [[], ['lpips', 'lpips']])
def test_judges_are_different(names):
  with pytest.raises(ValueError, match='must be different names'):
    learnt.open_judges(names)


def test_metrics_of_pyiqa_are_asked_of_one_frame_or_of_two():
  pytest.importorskip('pyiqa')
  (judge,) = learnt.open_judges(['psnr'], 'cpu')
  assert judge.of_pairs
  frames = fading(3, 0.5)
  value = judge.ask(frames[:2], frames[1:])
  error = np.mean((frames[:2] / 255 - frames[1:] / 255) ** 2, axis=(1, 2, 3))
  np.testing.assert_allclose(value, -10 * np.log10(error), rtol=1e-4)
  with pytest.raises(ValueError, match='nobody is no judge; there are dinov2'):
    learnt.open_judges(['nobody'])
