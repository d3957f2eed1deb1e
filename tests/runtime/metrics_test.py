"""Numbers on the host survive a restart and read the same everywhere."""

import io
import json
import re
import time

import jax
import jax.numpy as jnp
import pytest

from hiar_jax.runtime import compile_clock, metrics


class _Clock:
  """A clock that the test sets."""

  seconds = 0.0

  def __call__(self) -> float:
    return self.seconds


def test_resuming_drops_lines_beyond_the_restored_step(tmp_path):
  path = tmp_path / 'run' / 'metrics.jsonl'
  with metrics.MetricsFile(path) as file:
    for step in (10, 20, 30):
      file.write(step, {'loss': step / 10})
  with metrics.MetricsFile(path, restored_step=20) as file:
    file.write(30, {'loss': 7.0})
  assert [(r['step'], r['loss']) for r in metrics.read_metrics(path)] == [
    (10, 1.0),
    (20, 2.0),
    (30, 7.0),
  ]


def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text('{"step": 10, "loss": 1.0}\n{"step": 20, "lo')
  with metrics.MetricsFile(path, restored_step=30) as file:
    file.write(30, {'loss': 3.0})
  assert [r['step'] for r in metrics.read_metrics(path)] == [10, 30]


def test_a_file_that_is_no_metrics_file_is_left_alone(tmp_path):
  path = tmp_path / 'notes.txt'
  path.write_text('dear diary\nend\n')
  with pytest.raises(ValueError, match='line 1 of .* is not JSON'):
    metrics.MetricsFile(path)
  assert path.read_text() == 'dear diary\nend\n'


def test_every_line_is_strict_json(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  with metrics.MetricsFile(path) as file:
    file.write(
      jnp.int32(1),
      {'nan': float('nan'), 'array': jnp.array([1.0, jnp.inf]), 'text': 'x'},
    )

  def refuse(constant):
    raise AssertionError(constant)

  assert json.loads(path.read_text(), parse_constant=refuse) == {
    'step': 1,
    'nan': None,
    'array': [1.0, None],
    'text': 'x',
  }


def test_means_are_over_the_iterations_that_had_the_key():
  records = [{'loss': 1.0, 'critic': 4.0}, {'loss': 3.0}]
  assert metrics.means(records) == {'loss': 2.0, 'critic': 4.0}
  assert metrics.means([]) == {}


def test_means_can_be_apart_for_each_exit_step():
  records = [
    {'step': 3, 'loss': 1.0},
    {'step': 0, 'loss': 5.0},
    {'step': 3, 'loss': 2.0, 'other': 7.0},
    {'loss': 100.0},
  ]
  assert metrics.means_by(records, 'step', ['loss'], suffix='_exit') == {
    'loss_exit0': 5.0,
    'loss_exit3': 1.5,
  }


def test_a_log_gets_a_line_now_and_then_with_rate_and_time_left():
  clock, stream = _Clock(), io.StringIO()
  progress = metrics.Progress(
    100,
    start=20,
    label='teacher',
    seconds_between_lines=10,
    stream=stream,
    clock=clock,
  )
  for step in range(21, 61):
    clock.seconds += 0.5
    progress.update(step, {'loss': 1 / step})
  assert stream.getvalue().splitlines() == [
    'teacher 40/100  2.00 it/s  0:30 left  loss 0.025',
    'teacher 60/100  2.00 it/s  0:20 left  loss 0.01667',
  ]


def test_steps_that_were_compiled_in_tell_nothing_of_those_to_come():
  clock, stream, compiled = _Clock(), io.StringIO(), [0.0]
  progress = metrics.Progress(
    20,
    unit='block',
    seconds_between_lines=10,
    stream=stream,
    clock=clock,
    compiling=lambda: compiled[0],
  )
  clock.seconds += 150
  compiled[0] += 140
  progress.update(1)
  for step in range(2, 12):
    clock.seconds += 2
    progress.update(step)
  assert stream.getvalue().splitlines() == [
    '1/20  150.00 s/block  ? left',
    '6/20  2.00 s/block  0:28 left',
    '11/20  2.00 s/block  0:18 left',
  ]


def test_a_bar_takes_no_time_left_from_compiling():
  class Terminal(io.StringIO):
    def isatty(self):
      return True

  stream, compiled = Terminal(), [0.0]
  with metrics.Progress(
    100, stream=stream, compiling=lambda: compiled[0]
  ) as progress:
    time.sleep(2)
    compiled[0] = 2.0
    progress.update(1)
    time.sleep(0.2)
    progress.update(3)
    time.sleep(0.2)
    progress.update(5)
  # 95 steps at 0.1 s, not at 0.4 s.
  left = re.findall(r'<00:(\d\d)', stream.getvalue())
  assert left and max(map(int, left[-2:])) < 20


def test_programs_of_jax_are_counted_while_they_are_compiled():
  compile_clock.start()
  before = compile_clock.seconds()
  jax.jit(lambda x: x * 3 + 1)(1.0).block_until_ready()
  assert compile_clock.seconds() > before


def test_a_terminal_gets_one_bar():
  class Terminal(io.StringIO):
    def isatty(self):
      return True

  stream = Terminal()
  with metrics.Progress(4, unit='block', stream=stream) as progress:
    for step in range(1, 5):
      progress.update(step, {'loss': 0.5})
  assert '4/4' in stream.getvalue()
  assert 'loss 0.5' in stream.getvalue()
  assert stream.getvalue().count('\n') == 1


@pytest.mark.parametrize(
  ('seconds', 'text'),
  [(41, '0:41'), (725, '12:05'), (12000, '3:20:00'), (float('inf'), '?')],
)
def test_durations_read_like_a_clock(seconds, text):
  assert metrics._duration(seconds) == text
