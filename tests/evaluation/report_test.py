"""Reports on folders: what is measured, kept, compared and written."""

import csv
import dataclasses
import json
import pathlib
import re

import numpy as np
import pytest

from hiar_jax.evaluation import charts, folders, page, report, statistics
from hiar_jax.runtime import video_io

_ROW = statistics.Summary(
  num_frames=20,
  **dict.fromkeys(report.COLUMNS, 1.0),
  drift_parts=dict.fromkeys(statistics.DRIFT_WEIGHTS, 1 / 6),
)


def folder_of(name, drifts, curve=(1.0, 2.0)):
  """A folder of videos that were never read, named 0, 1, ..."""
  return folders.Folder(
    name,
    {
      str(index): folders.Measured(
        name=str(index),
        path=pathlib.Path(f'{name}/{index}.mkv'),
        fps=16.0,
        height=64,
        width=64,
        summary=dataclasses.replace(_ROW, drift=drift),
        curves={s: [*curve] for s in statistics.SERIES},
      )
      for index, drift in enumerate(drifts)
    },
    {},
  )


@pytest.fixture(scope='module')
def videos(tmp_path_factory):
  """A folder of two good videos and three that are not."""
  folder = tmp_path_factory.mktemp('videos')
  noise = np.random.default_rng(0).integers(0, 255, (1, 32, 48, 3), np.uint8)
  frames = np.concatenate([np.roll(noise, n, axis=2) for n in range(12)])
  for name in ('a <b> & "c"-0', 'd-1'):
    video_io.write_video(folder / f'{name}.mp4', frames, fps=16)
  video_io.write_video(folder / 'one.mp4', frames[:1], fps=16)
  (folder / 'empty.mp4').write_bytes(b'')
  whole = (folder / 'd-1.mp4').read_bytes()
  (folder / 'cut.mp4').write_bytes(whole[: len(whole) // 2])
  (folder / 'notes.txt').write_text('not a video')
  return folder


@pytest.fixture(scope='module')
def measured(videos, tmp_path_factory):
  known = folders.Known(
    tmp_path_factory.mktemp('known') / 'k.jsonl', folders.PIXELS
  )
  return folders.measure(folders.find(videos), 'ours', known)


def test_good_videos_are_measured_and_others_named_in_a_line(measured):
  assert list(measured.videos) == ['a <b> & "c"-0', 'd-1']
  assert measured.failed.keys() == {'one.mp4', 'empty.mp4', 'cut.mp4'}
  for name, line in measured.failed.items():
    assert name in line and '\n' not in line
  assert 'is empty' in measured.failed['empty.mp4']
  assert 'truncated' in measured.failed['cut.mp4']
  assert '1 frame; at least 10' in measured.failed['one.mp4']
  video = measured.videos['d-1']
  assert (video.height, video.width, video.fps) == (32, 48, 16)
  assert video.summary.num_frames == 12
  assert {len(c) for c in video.curves.values()} == {11}


def test_known_videos_are_not_read_again_unless_they_change(videos, tmp_path):
  read = []

  def counted(path, *rest):
    read.append(path.name)
    return folders.measure_file(path, *rest)

  way = folders.PIXELS._replace(measure=counted)
  copies = [tmp_path / 'x.mp4', tmp_path / 'y.mp4']
  for copy in copies:
    copy.write_bytes((videos / 'd-1.mp4').read_bytes())
  notes = tmp_path / 'known.jsonl'
  first = folders.measure(copies, 'v', folders.Known(notes, way))
  assert read == ['x.mp4', 'y.mp4']
  # As a kill in the middle of a line leaves it.
  cut = notes.read_text()[:-100]
  notes.write_text(cut)
  second = folders.measure(copies, 'v', folders.Known(notes, way))
  assert read == ['x.mp4', 'y.mp4', 'y.mp4']
  copies[0].write_bytes((videos / 'a <b> & "c"-0.mp4').read_bytes() + b' ')
  third = folders.measure(copies, 'v', folders.Known(notes, way))
  assert read[3:] == ['x.mp4']
  for name in ('x', 'y'):
    same = [f.videos[name].to_json() for f in (first, second)]
    assert same[0] == same[1]
  assert len(third.videos) == 2


def test_folders_without_videos_or_with_one_name_twice_are_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match='no folder of videos at'):
    folders.find(tmp_path / 'none')
  with pytest.raises(ValueError, match=r'has no file that ends in \.mp4'):
    folders.find(tmp_path)
  for name in ('a.mp4', 'a.webm'):
    (tmp_path / name).write_bytes(b'')
  with pytest.raises(ValueError, match=r'a\.mp4 and a\.webm in .* one name'):
    folders.find(tmp_path)


def test_an_interval_holds_the_mean_and_narrows_with_more_videos():
  rng = np.random.default_rng(1)
  few, many = (report.estimate(rng.normal(5, 1, n)) for n in (10, 1000))
  assert few.low < few.mean < few.high
  assert many.high - many.low == pytest.approx(4 / 1000**0.5, rel=0.1)
  assert np.isnan(report.estimate([1.0]).low)
  with pytest.raises(ValueError, match='no video'):
    report.estimate([])


def test_folders_are_compared_by_the_names_of_their_videos():
  first = folder_of('a', (0.1, 0.5, 0.9))
  second = folder_of('b', (0.2, 0.6, 1.0, 7.0))
  comparison = report.compare(first, second)
  assert comparison.names == ['0', '1', '2']
  # What differs from scene to scene is no part of it.
  np.testing.assert_allclose(comparison.columns['drift'], 0.1)
  other = dataclasses.replace(second, videos={'x': second.videos['0']})
  with pytest.raises(ValueError, match='a and b have no video of one name'):
    report.compare(first, other)


def test_drift_is_in_no_table_without_motion_and_quality(measured):
  text = report.format_table([measured])
  heading = text.splitlines()[0].split()
  for beside in ('motion', 'sharp', 'contrast'):
    assert heading.index(beside) < heading.index('drift')
  assert max(map(len, text.splitlines())) < 160


def test_curves_of_short_and_long_videos_are_at_equal_shares():
  short, long = (folder_of('a', (0,), c) for c in ((1, 3), (1, 1, 3, 3)))
  both = folders.Folder(
    'both', {'s': short.videos['0'], 'l': long.videos['0']}, {}
  )
  middle = report.curves(both)['motion'].mean
  np.testing.assert_allclose(middle, [1, 1.25, 2.75, 3])


def test_json_and_csv_have_every_video_and_no_nan(measured, tmp_path):
  single = folder_of('b', (0.25,))
  report.write(tmp_path, [measured, single], lambda: 'page')
  text = (tmp_path / 'report.json').read_text()
  data = json.loads(text, parse_constant=lambda name: pytest.fail(name))
  assert [f['name'] for f in data['folders']] == ['ours', 'b']
  assert data['folders'][1]['mean']['drift'] == {
    'mean': 0.25,
    'low': None,
    'high': None,
  }
  assert 'difference' not in data  # No name is in both.
  with (tmp_path / 'videos.csv').open() as file:
    rows = list(csv.DictReader(file))
  assert [row['video'] for row in rows] == ['a <b> & "c"-0', 'd-1', '0']
  assert float(rows[2]['drift']) == 0.25
  assert (tmp_path / 'report.html').read_text() == 'page\n'
  assert not list(tmp_path.glob('.*'))


def test_a_page_has_its_videos_in_it_or_links_them(measured, tmp_path):
  inside = page.page([measured], beside=tmp_path, embed_mb=20)
  assert inside.count('src="data:video/mp4;base64,') == 2
  linked = page.page([measured], beside=tmp_path, embed_mb=0)
  assert 'base64' not in linked
  [source] = re.findall(r'src="([^"]*d-1.mp4)"', linked)
  assert (tmp_path / source).is_file()
  for text in (inside, linked):
    assert 'http' not in text
    assert '<b> &' not in text  # A name is text, not markup.
    assert text.count('<svg') == 7
    assert all(f'<li>{line}</li>' in text for line in measured.failed.values())


def test_a_page_compares_two_folders(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  first, second = folder_of('A', (0.1, 0.2, 0.15)), folder_of('B', (0.9,) * 3)
  for folder in (first, second):
    pathlib.Path(folder.name).mkdir()
    for video in folder.videos.values():
      video.path.write_bytes(b' ')
  text = page.page([first, second], beside=pathlib.Path(), embed_mb=0)
  assert '<th>B - A</th>' in text
  assert '<b>0.750</b>' in text
  assert 'href="A/0.mkv"' in text  # No browser plays it.


@pytest.mark.parametrize(
  ('values', 'expected'),
  [
    ((0, 1), ['0.00', '0.25', '0.50', '0.75', '1.00']),
    ((3, 48), ['0', '20', '40', '60']),
    ((5, 5), ['4.950', '4.975', '5.000', '5.025', '5.050']),
  ],
)
def test_an_axis_has_round_numbers_around_the_values(values, expected):
  nan = [float('nan')] * 2
  svg = charts.chart('x', [charts.Curve('a', values, nan, nan)])
  assert re.findall(r'tick end">([^<]*)<', svg) == expected
  assert 'polygon' not in svg
