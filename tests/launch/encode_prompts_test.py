"""`hiar-jax encode prompts` as people run it: killed, resumed, mistaken."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from hiar_jax.data import prompts as data_prompts
from hiar_jax.data import text_states
from hiar_jax.runtime import stopping
from hiar_jax.text import embeddings
from hiar_jax.weights import conversion, releases
from tests import fake_release, forked_runs

_ROOT = pathlib.Path(__file__).parents[2]
_PROGRAM = str(_ROOT / 'launch' / 'encode_prompts.py')
_NUM = 24
_IMPORTS = 'import hiar_jax.data.text_states\n'

_CONFIG = """
import ml_collections

def get_config():
  c = ml_collections.ConfigDict()
  c.name = c.phase = 'prompts'
  c.prompts = dict(source='file', path={prompts!r})
  c.text = dict(encoder='umt5', folder={folder!r}, length=8, dtype='float32')
  c.states = dict(dir={states!r}, num=0, shard_size=2, batch_size=2)
  return c
"""


@pytest.fixture(scope='module')
def inputs(tmp_path_factory):
  """A folder with a converted release, prompts and a config."""
  root = tmp_path_factory.mktemp('encode')
  fake_release.write_release(root / 'wan', 'wan')
  conversion.to_ours(
    releases.find(root / 'wan'),
    root / 'ours',
    name='tiny',
    options=conversion.Options(latent_size=(4, 4), compute_dtype='float32'),
  )
  lines = [f'a {"red " * (i % 7)}disc 猫 🎈 {i}' for i in range(_NUM)]
  (root / 'prompts.txt').write_text('\n'.join([*lines[:-1], 'dog ' * 20]))
  paths = dict(
    prompts=str(root / 'prompts.txt'),
    folder=str(root / 'ours'),
    states=str(root / 'states'),
  )
  (root / 'config.py').write_text(_CONFIG.format(**paths))
  return root


@pytest.fixture(scope='module')
def environment(tmp_path_factory):
  return os.environ | {
    'PYTHONPATH': str(_ROOT),
    'JAX_COMPILATION_CACHE_DIR': str(tmp_path_factory.mktemp('programs')),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
  }


def start(inputs, environment, *arguments):
  return subprocess.Popen(
    [
      *(sys.executable, _PROGRAM, f'--config={inputs / "config.py"}'),
      *arguments,
    ],
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def contents(folder):
  """Bytes of every file; of the texts beside the set, whose headers list their
  fields in any order, the states."""
  found = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
  for path in (folder / 'captions').iterdir():
    found[path.name] = embeddings.read(path).states.tobytes()
  return found


@pytest.fixture(scope='module')
def whole(inputs, environment):
  """What a run to which nothing happened printed; its files are there."""
  run = start(inputs, environment)
  output, _ = run.communicate(timeout=300)
  assert run.returncode == 0, output
  return output


def test_what_is_encoded_cut_and_added_is_said(whole):
  output = whole
  assert f'{_NUM} of {_NUM} prompts to encode; share 0 of 1' in output
  assert 'added 2 texts beside the prompts' in output
  # The last, and the twelve with three to six times 'red'.
  assert '13 of these prompts have more than 8 tokens and lose ' in output


@pytest.mark.parametrize(
  ('ending', 'status'),
  [
    (signal.SIGKILL, -signal.SIGKILL),
    (signal.SIGTERM, stopping.SIGTERM_STATUS),
  ],
)
def test_an_ended_run_goes_on_to_the_same_files(
  ending, status, whole, inputs, environment, tmp_path
):
  out = tmp_path / 'states'
  where = f'--config.states.dir={out}'
  run = start(inputs, environment, where)
  while len(list(out.glob('states-*.array_record'))) < 2:
    assert run.poll() is None, run.stdout.read()
    time.sleep(0.001)
  run.send_signal(ending)
  output, _ = run.communicate()
  assert run.returncode == status, output
  assert 'Traceback' not in output
  assert len(list(out.glob('states-*.array_record'))) < _NUM // 2
  output, _ = start(inputs, environment, where, '--verify').communicate()
  assert 'is missing' in output and 'problems; delete' in output
  run = start(inputs, environment, where)
  output, _ = run.communicate(timeout=300)
  assert run.returncode == 0, output
  assert contents(out) == contents(inputs / 'states')
  output, _ = start(inputs, environment, where, '--verify').communicate()
  assert output.endswith(f'{out}: {_NUM} prompts, whole\n')
  states = text_states.StoredStates(
    out, data_prompts.FilePrompts(inputs / 'prompts.txt')
  )
  assert states[_NUM - 1]['text'].any(axis=1).all()


def test_a_users_mistakes_are_one_line_each(inputs, tmp_path):
  (tmp_path / 'empty.txt').write_text('\n')
  (tmp_path / 'latin.txt').write_bytes(b'caf\xe9\n')
  (tmp_path / 'bad.jsonl').write_text('{"text": "a"}\n')
  (tmp_path / 'bare').mkdir()
  (tmp_path / 'bare' / 'config.json').write_text('{}')
  out = tmp_path / 'out'
  mistakes = {
    '--config.prompts.path=none.txt': 'no prompts at none.txt: no such file',
    f'--config.prompts.path={tmp_path}/empty.txt': 'empty.txt has no prompts',
    f'--config.prompts.path={tmp_path}/latin.txt': (
      'latin.txt is not UTF-8: byte 4 of line 1 is 0xe9'
    ),
    f'--config.prompts.path={tmp_path}/bad.jsonl': (
      f"line 1 of {tmp_path}/bad.jsonl has no text 'prompt'"
    ),
    '--config.prompts.source=none': "prompts.source='none' is not one of",
    '--config.text.encoder=none': "text.encoder='none' is not one of",
    '--config.text.folder=none': 'no text encoder in none; `hiar-jax convert`',
    f'--config.text.folder={tmp_path}/bare': 'has no text encoder',
    '--config.text.dtype=float8': "dtype='float8' is not one of",
    '--config.states.batch_size=0': 'batch_size=0 is not at least 1',
    '--config.states.num=99': f'num=99 is more than the {_NUM} prompts',
    '--shard_index=1': 'shard_index=1 must be in [0, num_shards=1)',
    '--verify': f'no text states in {out}; hiar-jax encode prompts makes them',
  }
  runs = [
    json.dumps(
      [
        f'--config={inputs / "config.py"}',
        f'--config.states.dir={out}',
        argument,
      ]
    )
    for argument in mistakes
  ]
  driven = subprocess.run(
    [sys.executable, '-c', _IMPORTS + forked_runs.DRIVER, _PROGRAM, *runs],
    env=os.environ | {'PYTHONPATH': str(_ROOT)},
    capture_output=True,
    text=True,
    check=True,
  )
  results = json.loads(driven.stdout)
  for (argument, message), (status, text) in zip(mistakes.items(), results):
    assert status == 2, (argument, text)
    assert text.startswith('error: ') and message in text, (argument, text)
    assert text.count('\n') == 1, text
  assert not out.exists()
