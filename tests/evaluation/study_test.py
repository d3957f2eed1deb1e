"""Tables and the page of a study are of the files that there are."""

import json
from xml.etree import ElementTree

import numpy as np
import pytest

from hiar_jax.evaluation import study, study_page

_KIND, _LONG = study.Kind(5, 0), study.Kind(20, 1)
_COLUMNS = (
  study.Column('identity.hue', 'hue', '.1f', 'degrees'),
  study.Column('statistics.drift', 'drift', '.3f', 'slopes'),
)


def _write(folder, arm, seed, hues, kind=_KIND):
  videos = [
    {
      'number': number,
      'identity': {'hue': hue},
      'statistics': {'drift': 0.1 * hue},
      'curves': {'hue': np.array([0.0, hue])},
    }
    for number, hue in enumerate(hues)
  ]
  study.write(
    folder / f'{arm}-{seed}-{kind}.json',
    arm=arm,
    seed=seed,
    kind=kind,
    videos=videos,
  )


def _measured(folder):
  _write(folder, 'A', 0, [2.0, 3.0, 4.0, 5.0])
  _write(folder, 'A', 1, [4.0, 5.0, 6.0, 7.0])
  _write(folder, 'D', 0, [1.0, 2.0, 3.0, 4.0])
  return study.Measured(folder)


def test_seeds_are_averaged_within_a_scene(tmp_path):
  measured = _measured(tmp_path)
  assert measured.seeds('A', _KIND) == [0, 1]
  assert measured.numbers('A', _KIND, 'identity.hue') == {
    0: 3.0,
    1: 4.0,
    2: 5.0,
    3: 6.0,
  }
  assert measured.of_seed('A', _KIND, 'identity.hue') == [3.5, 5.5]


def test_arms_are_compared_scene_by_scene_in_the_seeds_of_both(tmp_path):
  measured = _measured(tmp_path)
  apart = study.differences(measured, 'A', 'D', _KIND, _COLUMNS)
  # In the seed that both have every scene differs by 1, however much the
  # scenes differ, and A's other seed.
  assert [float(v) for v in apart['identity.hue']] == [1, 1, 1]
  means = study.estimates(measured, 'A', _KIND, _COLUMNS)
  assert means['identity.hue'].low < 4.5 < means['identity.hue'].high


def test_the_table_marks_what_is_apart_and_leaves_out_what_is_not_there(
  tmp_path,
):
  text = study.table(_measured(tmp_path), ['A', 'B', 'D'], _KIND, _COLUMNS, 'D')
  lines = text.splitlines()
  assert lines[0] == '| arm | seeds | hue | drift |'
  assert len(lines) == 4
  assert lines[2].startswith('| A | 2 | 4.5 [')
  assert lines[2].count('] +') == 2
  assert '+' not in lines[3]


def test_a_number_that_is_not_there_is_left_out_of_the_mean(tmp_path):
  _write(tmp_path, 'A', 0, [1.0, float('nan'), 3.0])
  _write(tmp_path, 'D', 0, [1.0, 1.0, float('nan')])
  measured = study.Measured(tmp_path)
  assert [*measured.numbers('A', _KIND, 'identity.hue')] == [0, 2]
  apart = study.differences(measured, 'A', 'D', _KIND, _COLUMNS)
  assert float(apart['identity.hue'].mean) == 0
  curve = measured.curve('A', _KIND, 'hue')
  np.testing.assert_array_equal(curve.mean, [0, 2])


def test_what_was_asked_for_and_is_not_there_is_named(tmp_path):
  wanted = [('A', 0, _KIND), ('A', 2, _KIND), ('D', 0, _LONG)]
  assert study.missing(_measured(tmp_path), wanted) == [
    'A seed 2 5b0',
    'D seed 0 20b1',
  ]


def test_a_damaged_file_is_named(tmp_path):
  _measured(tmp_path)
  (tmp_path / 'A-7-5b0.json').write_text('{"arm": "A"')
  with pytest.raises(ValueError, match='A-7-5b0.json is damaged'):
    study.Measured(tmp_path)


def test_json_and_page_hold_every_arm_and_what_is_missing(tmp_path):
  measured = _measured(tmp_path)
  whole = study.as_json(
    measured, ['A', 'D'], [_KIND, _LONG], _COLUMNS, ['hue'], 'D'
  )
  json.dumps(whole, allow_nan=False)
  assert [(row['arm'], row['seeds']) for row in whole['rows']] == [
    ('A', [0, 1]),
    ('D', [0]),
  ]
  assert whole['rows'][0]['minus_D']['identity.hue']['mean'] == 1
  page = tmp_path / 'report.html'
  study_page.write(
    page,
    title='A <study>',
    measured=measured,
    says={'A': 'the baseline', 'D': 'ours & more'},
    kinds={'short': _KIND, 'long': _LONG},
    columns=_COLUMNS,
    curves={'hue': 'degrees off'},
    groups=(('A', 'D'),),
    against='D',
    paper={'A': {'drift': 0.355}},
    losses={'A': {'critic': [2.0, 1.0]}},
    pictures={},
    missing=['D seed 1 5b0'],
  )
  text = page.read_text()
  for part in (
    'A &lt;study&gt;',
    'ours &amp; more',
    '0.355',
    'D seed 1 5b0',
    'aria-label="degrees off"',
    'aria-label="A: critic"',
    '<b>4.5</b>',
  ):
    assert part in text
  assert '<h2>long</h2>' not in text


def test_the_picture_has_its_arms_or_is_not_made(tmp_path):
  measured = _measured(tmp_path)
  says = {'A': 'A: <clean>', 'D': 'D: matched'}
  curves = {'hue': 'hue, degrees'}
  text = study_page.picture(measured, _KIND, ('A', 'D'), curves, says)
  root = ElementTree.fromstring(text)
  words = [
    element.text for element in root.iter() if element.tag[-5:] == '}text'
  ]
  assert {'A: <clean>', 'D: matched', 'hue, degrees'} <= {*words}
  assert len(root.findall('.//{*}polyline')) == 2
  assert not study_page.picture(measured, _LONG, ('A', 'D'), curves, says)
