"""`hiar-jax export`: what it does not read of a config is refused."""

import pathlib
import subprocess
import sys

_PROGRAM = pathlib.Path(__file__).parents[2] / 'launch' / 'export.py'


def test_an_override_that_would_change_nothing_is_refused(tmp_path):
  for override, told in (
    ('--config.batch_size=3', '--config.batch_size would change nothing'),
    (f'--config.workdir={tmp_path / "no_run"}', 'no_run'),
  ):
    done = subprocess.run(
      [
        *(sys.executable, _PROGRAM, '--config=bouncing', override),
        f'--out={tmp_path / "out"}',
      ],
      cwd=tmp_path,
      capture_output=True,
      text=True,
      check=False,
    )
    assert done.returncode == 2
    # The last line: on its oldest jaxlib grain warns when it is imported.
    last = done.stderr.splitlines()[-1]
    assert last.startswith('error: ')
    assert told in last
    assert not (tmp_path / 'out').exists()


def test_what_its_codecs_videos_are_drawn_from_may_be_said(tmp_path):
  """Of a codec that is fitted; the one of `bouncing` reads no world."""
  for config, told in (
    ('bouncing', '--config.world.height would change nothing'),
    ('bouncing_linear', 'student_start'),
  ):
    done = subprocess.run(
      [
        *(sys.executable, _PROGRAM, f'--config={config}:distill'),
        *('--config.world.height=32', f'--out={tmp_path / "out"}'),
        f'--config.workdir={tmp_path / "student_start"}',
      ],
      cwd=tmp_path,
      capture_output=True,
      text=True,
      check=False,
    )
    assert done.returncode == 2
    assert told in done.stderr.splitlines()[-1]
