"""The console program: one command for each program, found from anywhere."""

import pathlib
import subprocess
import sys

import pytest

from hiar_jax import __main__ as console
from hiar_jax.runtime import config_flag

_ROOT = pathlib.Path(__file__).parents[2]
_COMMANDS = [c for group in console.COMMANDS.values() for c in group]


def _run(*arguments, cwd):
  return subprocess.run(
    [sys.executable, '-m', 'hiar_jax', *arguments],
    cwd=cwd,
    capture_output=True,
    text=True,
    check=False,
  )


def _answer(monkeypatch, capsys, *words):
  """Status, stdout and stderr of words that start no program."""
  monkeypatch.setattr(sys, 'argv', ['hiar-jax', *words])
  with pytest.raises(SystemExit) as ended:
    console.main()
  return ended.value.code, *capsys.readouterr()


def test_every_program_has_a_command_and_every_command_a_program():
  programs = {path.stem for path in (_ROOT / 'launch').glob('*.py')}
  assert {c.program for c in _COMMANDS} == programs - {'__init__'}
  names = [c.name for c in _COMMANDS]
  assert len(names) == len(set(names))


def test_help_names_all_and_loads_no_jax(tmp_path):
  code = (
    'import sys; from hiar_jax import __main__ as m; print(m.help_page()); '
    'print({"jax", "numpy", "absl"} & set(sys.modules))'
  )
  *page, loaded = subprocess.run(
    [sys.executable, '-c', code],
    cwd=tmp_path,
    capture_output=True,
    text=True,
    check=True,
  ).stdout.splitlines()
  assert loaded == 'set()'
  assert max(map(len, page)) <= 80
  for name in (*(c.name for c in _COMMANDS), *config_flag.packaged()):
    assert any(name in line for line in page), name


def test_a_wrong_command_is_one_line_with_the_nearest(monkeypatch, capsys):
  for words, meant in {
    ('genrate',): "no command 'genrate'; did you mean 'generate'?",
    ('encode', 'vids'): "'encode vids'; did you mean 'encode ",
    ('--config=bouncing',): '--config=bouncing comes after a command',
  }.items():
    status, out, error = _answer(monkeypatch, capsys, *words)
    assert (status, out) == (2, ''), words
    assert meant in error and error.count('\n') == 1, error


def test_a_command_of_two_words_lists_its_second_ones(monkeypatch, capsys):
  status, out, _ = _answer(monkeypatch, capsys, 'encode', '--help')
  assert status == 0
  assert 'encode videos' in out and 'train' not in out
  assert _answer(monkeypatch, capsys, 'encode')[0] == 2


def test_the_words_of_a_command_choose_program_and_flags(monkeypatch):
  started = []
  monkeypatch.setattr(
    console.runpy,
    'run_module',
    lambda module, **_: started.append((module, sys.argv[1:])),
  )
  for words in ('stream --seed=1', 'evaluate --out=a', 'evaluate teacher -x'):
    monkeypatch.setattr(sys, 'argv', ['hiar-jax', *words.split()])
    console.main()
  assert started == [
    ('hiar_jax.launch.generate', ['--stream', '--seed=1']),
    ('hiar_jax.launch.evaluate', ['--out=a']),
    ('hiar_jax.launch.evaluate_teacher', ['-x']),
  ]


def test_help_of_a_command_has_its_text_and_its_own_flags(tmp_path):
  done = _run('trajectories', '--help', cwd=tmp_path)
  assert done.returncode == 0, done.stderr
  assert done.stdout.startswith('Samples the teacher')
  for flag in ('--config=NAME', '--[no]verify', '--num_shards=N'):
    assert f'\n  {flag}\n' in done.stdout
  assert 'jax_' not in done.stdout
  assert max(map(len, done.stdout.splitlines())) <= 80


def test_a_packaged_config_is_found_from_any_folder(tmp_path):
  done = _run('plan', '--config=bouncing:teacher', cwd=tmp_path)
  assert done.returncode == 2
  # The last line: on its oldest jaxlib grain warns when it is imported.
  assert done.stderr.splitlines()[-1] == (
    "error: config 'bouncing' has no section plan, as hiar_1_3b has"
  )
  assert 'Traceback' not in done.stderr
