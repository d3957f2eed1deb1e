"""The table of scores is of the config that was asked for."""

import json
import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

_PROGRAM = pathlib.Path(__file__).parents[2] / 'launch' / 'evaluate.py'


def _scores(folder, *overrides):
  done = subprocess.run(
    [
      *(sys.executable, _PROGRAM, '--config=bouncing', '--ways=step_first'),
      *('--num_prompts=1', '--num_blocks=2', '--out=scores.json', *overrides),
    ],
    cwd=folder,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  return json.loads((folder / 'scores.json').read_text())


def test_an_override_changes_the_scores_of_videos_and_not_of_the_codec(
  tmp_path,
):
  long = _scores(tmp_path)
  # As long as a block: nothing of the past is seen.
  short = _scores(tmp_path, '--config.rollout.window=3')
  assert short['codec'] == long['codec']
  assert short['step_first'] != long['step_first']
