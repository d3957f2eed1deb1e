"""Measures of sampled videos: named in a config, the small world's or any."""

import sys
import types

import ml_collections
import numpy as np
import pytest

from hiar_jax.data import bouncing
from hiar_jax.evaluation import measures, statistics
from tests.evaluation import made_videos

_WORLD = bouncing.WorldConfig(num_frames=16)


def config(**keys):
  return ml_collections.ConfigDict(keys)


def test_without_a_name_they_are_those_of_any_video():
  chosen = measures.open_measures(config())
  assert chosen.prompts(4) == ()
  video = made_videos.perfect()[None, :10]
  seen = chosen.measure(video, ())
  assert seen['motion'] > 0
  # Drift is not looked at without what it must be read beside.
  assert {'drift', 'motion', 'sharpness', 'contrast'} <= seen.keys()
  assert chosen.measure(video[:, : statistics.MIN_FRAMES - 1], ()) == {}


def test_the_small_worlds_know_unseen_captions_and_score_against_them():
  world = dict(num_frames=16)
  chosen = measures.open_measures(
    config(measures='bouncing', world=world, world_seed=3)
  )
  prompts = chosen.prompts(2)
  scenes = [bouncing.sample_scene(_WORLD, 4, index) for index in range(2)]
  assert prompts == tuple(scene.caption for scene in scenes)
  true = np.stack([bouncing.render(scene, _WORLD) for scene in scenes])
  assert chosen.measure(true, prompts)['ideal_db'] > 35
  assert chosen.measure(true, prompts[::-1])['ideal_db'] < 30
  assert chosen.measure(true[:, :, :32], prompts) == {}
  assert chosen.measure(true[:, :7], prompts) == {}


def test_the_small_worlds_score_true_videos_above_their_mix_up():
  scores = measures.open_scores(
    config(measures='bouncing', world=dict(num_frames=9))
  )
  prompts = scores.prompts(2)
  assert scores.true_videos(2, None).shape == (2, 9, 64, 64, 3)
  true = scores.true_videos(2, 16)
  rows = {
    'true': scores.score(true, prompts),
    'mixed up': scores.score(true, prompts[::-1]),
  }
  assert rows['true']['ideal_db'] > 35 > 30 > rows['mixed up']['ideal_db']
  assert [line.split()[0] for line in scores.table(rows).splitlines()] == [
    *('visible', 'true', 'mixed')
  ]


def test_measures_that_know_no_prompts_have_no_scores():
  with pytest.raises(ValueError, match=r"'statistics' is not one of \['bounc"):
    measures.open_scores(config())


def test_anyones_module_can_be_named(monkeypatch):
  own = types.ModuleType('own_measures')
  own.open_measures = lambda config: ('mine', config['x'])
  package = types.ModuleType('own')
  package.__path__ = []
  own.__spec__ = types.SimpleNamespace(name='own.own_measures')
  monkeypatch.setitem(sys.modules, 'own', package)
  monkeypatch.setitem(sys.modules, 'own.own_measures', own)
  assert measures.open_measures(config(measures='own.own_measures', x=1)) == (
    'mine',
    1,
  )


@pytest.mark.parametrize(
  ('keys', 'message'),
  [
    (
      dict(measures='vbench'),
      r"measures='vbench' is not one of \['bouncing', ",
    ),
    (dict(measures='bouncing'), "needs the small world's world and world_seed"),
  ],
)
def test_a_name_or_a_config_that_does_not_fit_is_refused(keys, message):
  with pytest.raises(ValueError, match=message):
    measures.open_measures(config(**keys))
