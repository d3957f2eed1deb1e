"""A run's own words go to the files and services that were asked for."""

import json
import sys
import types

import numpy as np
import pytest
from PIL import Image

from hiar_jax.runtime import errors, provenance
from hiar_jax.training import loop_config, run_log
from tests import late_values

_CONFIG = {'name': 'bouncing', 'phase': 'teacher', 'iterations': 9}


def open_log(folder, step=0, **settings):
  loop = loop_config.LoopConfig(**settings)
  return run_log.RunLog(folder, _CONFIG, loop, restored_step=step)


def test_speed_is_kept_apart_from_what_was_computed(tmp_path):
  with open_log(tmp_path) as log:
    log.progress(3, {})
    log.write(4, {'loss': 0.5, 'skipped': 0})
  lines = {
    name: json.loads((tmp_path / name).read_text())
    for name in (run_log.METRICS, run_log.SPEED)
  }
  assert lines[run_log.METRICS] == {'step': 4, 'loss': 0.5, 'skipped': 0}
  speed = lines[run_log.SPEED]
  assert speed['step'] == 4 and speed['iterations_per_second'] > 0
  assert speed['host_memory_gib'] > 0.01
  assert not (tmp_path / 'tensorboard').exists()


def test_the_bar_shows_what_has_finished_and_not_what_was_started(
  tmp_path, capsys
):
  under_way = late_values.LateValues()
  with open_log(tmp_path) as log:
    for step in range(1, 8):
      log.progress(step, {'loss': under_way if step > 2 else 0.5})
  under_way.finish()
  assert capsys.readouterr().err.startswith('teacher 2/9  ')


def test_the_bar_goes_no_step_back_after_a_line(tmp_path, capsys):
  under_way = late_values.LateValues()
  with open_log(tmp_path) as log:
    log.progress(3, under_way)
    log.write(4, {'loss': 0.5})
    under_way.finish()
  assert capsys.readouterr().err.startswith('teacher 4/9  ')


def events(folder):
  loader = pytest.importorskip(
    'tensorboard.backend.event_processing.event_file_loader'
  )
  return [
    event
    for path in sorted(folder.glob('events.*'))
    for event in loader.EventFileLoader(str(path)).Load()
  ]


@pytest.mark.filterwarnings('ignore')  # Of protobuf and TensorBoard.
def test_tensorboard_gets_scalars_and_sheets(tmp_path):
  pytest.importorskip('tensorboardX')
  picture = tmp_path / 'sheet.png'
  Image.fromarray(np.full((4, 6, 3), 200, np.uint8)).save(picture)
  with open_log(tmp_path, tensorboard=True) as log:
    log.write(4, {'loss': 0.5, 'motion': np.nan, 'skipped_iterations': [3]})
    log.sheet(4, 'samples/step_first', picture)
  values = {
    value.tag: (event.step, value.tensor)
    for event in events(tmp_path / 'tensorboard')
    for value in event.summary.value
  }
  assert values['loss'][0] == 4
  assert list(values['loss'][1].float_val) == [0.5]
  assert 'speed/iterations_per_second' in values
  assert not values.keys() & {'motion', 'skipped_iterations'}
  width, height, png = values['samples/step_first'][1].string_val
  assert (width, height, png[:4]) == (b'6', b'4', b'\x89PNG')


@pytest.mark.filterwarnings('ignore')
def test_tensorboard_hides_what_a_cut_run_repeats(tmp_path):
  pytest.importorskip('tensorboardX')
  for restored in (0, 4):
    with open_log(tmp_path, restored, tensorboard=True) as log:
      log.write(6, {'loss': 1.0})
  starts = [
    e.step for e in events(tmp_path / 'tensorboard') if e.session_log.status
  ]
  # Readers drop events of earlier files from this step on.
  assert starts == [5]


def test_wandb_gets_finite_scalars_under_one_name_for_each_workdir(
  tmp_path, monkeypatch
):
  calls = []

  class Run:
    def log(self, values, step):
      calls.append(('log', step, values))

    def finish(self, exit_code):
      calls.append(('finish', exit_code))

  def init(**settings):
    calls.append(('init', settings))
    return Run()

  module = types.ModuleType('wandb')
  module.init, module.Image = init, lambda path: ('image', path)
  monkeypatch.setitem(sys.modules, 'wandb', module)
  for restored in (0, 4):
    with open_log(tmp_path / 'run', restored, wandb=True) as log:
      log.write(5, {'loss': 0.5, 'motion': np.nan})
      log.sheet(5, 'samples', tmp_path / 'a.png')
  first, second = (c[1] for c in calls if c[0] == 'init')
  assert first['id'] == second['id'] and first['resume'] == 'allow'
  assert (first['project'], first['name']) == ('bouncing', 'run')
  _, step, values = calls[1]
  assert step == 5 and values['loss'] == 0.5 and 'motion' not in values
  assert calls[2] == ('log', 5, {'samples': ('image', str(tmp_path / 'a.png'))})
  assert calls[3] == ('finish', 0)


def test_a_service_that_is_not_installed_is_named(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'wandb', None)
  with pytest.raises(ValueError) as caught:
    open_log(tmp_path, wandb=True)
  assert errors.users_mistake(caught.value) == (
    "config.loop.wandb=True needs the package 'wandb': "
    "pip install 'hiar_jax[wandb]'"
  )


@pytest.mark.parametrize(
  ('name', 'value'),
  [('keep_last', 0), ('max_skipped', 0), ('sample_every', -1), ('best', 'low')],
)
def test_a_setting_that_does_not_fit_is_named(name, value):
  with pytest.raises(ValueError, match=f'loop.{name}={value!r}'):
    loop_config.LoopConfig(**{name: value})


# The commit is read from git's own files.

_A, _B = 'a' * 40, 'b' * 40


@pytest.mark.parametrize(
  ('files', 'commit'),
  [
    ({'HEAD': _A}, _A),
    ({'HEAD': 'ref: refs/heads/main\n', 'refs/heads/main': f'{_B}\n'}, _B),
    (
      {
        'HEAD': 'ref: refs/heads/main\n',
        'packed-refs': f'# pack\n{_A} refs/heads/old\n{_B} refs/heads/main\n',
      },
      _B,
    ),
    (
      {
        'HEAD': 'ref: refs/heads/main\n',
        'commondir': '../shared\n',
        '../shared/refs/heads/main': f'{_A}\n',
      },
      _A,
    ),
    ({'HEAD': 'ref: refs/heads/unborn\n'}, ''),
    ({}, ''),
  ],
)
def test_the_commit_of_a_checkout(files, commit, tmp_path):
  git = tmp_path / '.git'
  git.mkdir()
  for name, content in files.items():
    (git / name).parent.mkdir(parents=True, exist_ok=True)
    (git / name).write_text(content)
  assert provenance.commit_of(git) == commit
  # A linked worktree has a file that names the folder.
  linked = tmp_path / 'linked'
  linked.mkdir()
  (linked / '.git').write_text(f'gitdir: {git}\n')
  assert provenance.commit_of(linked / '.git') == commit


def test_versions_are_text_by_name():
  versions = provenance.code_version()
  assert versions['hiar_jax'] == '0.1.0'
  assert {'jax', 'optax', 'commit'} < versions.keys()
  assert all(isinstance(value, str) for value in versions.values())
