"""What people install: a wheel that needs no checkout, an sdist with all of it.

The checkout's tracked files are packed into an sdist, the wheel is made from
what the sdist holds, and it runs in an environment of its own that shares
nothing with this one but the dependencies.
"""

import os
import pathlib
import subprocess
import sys
import sysconfig
import tarfile
import venv

import pytest

from hiar_jax.runtime import video_io

pytestmark = pytest.mark.slow

_ROOT = pathlib.Path(__file__).parents[1]
# Of the hosting service and of git.
_UNPACKED = ('.github/', '.gitignore')


def _run(*command, cwd):
  environment = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
  done = subprocess.run(
    list(map(str, command)),
    cwd=cwd,
    env=environment,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  return done.stdout


def _tracked():
  if not (_ROOT / '.git').exists():
    pytest.skip('not a git checkout: its files cannot be told from others')
  names = _run('git', 'ls-files', '-z', cwd=_ROOT).split('\0')
  return [name for name in names if (_ROOT / name).is_file()]


@pytest.fixture(scope='module')
def unpacked(tmp_path_factory):
  """The folder of an unpacked source distribution."""
  checkout = tmp_path_factory.mktemp('checkout')
  for name in _tracked():
    to = checkout / name
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_bytes((_ROOT / name).read_bytes())
  made = tmp_path_factory.mktemp('sdist')
  _run(
    *(sys.executable, '-c'),
    f'from setuptools import build_meta as b; b.build_sdist({str(made)!r})',
    cwd=checkout,
  )
  (archive,) = made.glob('*.tar.gz')
  with tarfile.open(archive) as tar:
    tar.extractall(made, filter='data')
  (folder,) = (path for path in made.iterdir() if path.is_dir())
  return folder


@pytest.fixture(scope='module')
def environment(unpacked, tmp_path_factory):
  """A virtual environment in which the wheel is installed."""
  made = tmp_path_factory.mktemp('wheel')
  _run(
    *(sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-deps'),
    *('--no-build-isolation', '--wheel-dir', made, unpacked),
    cwd=made,
  )
  (wheel,) = made.glob('*.whl')
  folder = tmp_path_factory.mktemp('environment')
  venv.create(folder, with_pip=False)
  python = folder / 'bin' / 'python'
  _run(
    *(sys.executable, '-m', 'pip', '--python', python, 'install', '--quiet'),
    *('--no-deps', '--no-index', wheel),
    cwd=folder,
  )
  # As plain paths: the .pth files in them, such as that of an editable
  # installation of this checkout, are not read.
  own = pathlib.Path(
    sysconfig.get_path('purelib', 'venv', vars={'base': str(folder)})
  )
  shared = [path for path in sys.path if path.endswith('-packages')]
  (own / 'dependencies.pth').write_text('\n'.join(shared) + '\n')
  return folder


def test_the_sdist_holds_every_tracked_file(unpacked):
  missing = [
    name
    for name in _tracked()
    if not name.startswith(_UNPACKED) and not (unpacked / name).is_file()
  ]
  assert not missing


def test_the_wheel_puts_one_name_into_the_environment(environment):
  (packages,) = environment.glob('lib/python3*/site-packages')
  names = {path.name for path in packages.iterdir()} - {'dependencies.pth'}
  assert {name for name in names if not name.endswith('.dist-info')} == {
    'hiar_jax'
  }
  assert (packages / 'hiar_jax' / 'py.typed').is_file()
  page = packages / 'hiar_jax' / 'serving' / 'page'
  assert (page / 'index.html').is_file() and (page / 'live.js').is_file()
  assert (packages / 'hiar_jax' / 'launch' / 'pod.sh').is_file()


def test_the_installed_wheel_makes_a_video_from_any_folder(
  environment, tmp_path
):
  where = _run(
    *(environment / 'bin' / 'python', '-c'),
    'import hiar_jax; print(hiar_jax.__file__)',
    cwd=tmp_path,
  )
  assert where.startswith(str(environment))
  _run(
    *(environment / 'bin' / 'hiar-jax', 'generate', '--config=bouncing'),
    *('--prompt=a large red disc drifting fast over dark blue',),
    *('--num_blocks=2', '--scale=1', '--out=video.mp4'),
    cwd=tmp_path,
  )
  frames, _ = video_io.read_video(tmp_path / 'video.mp4')
  assert frames.shape == (21, 64, 64, 3)
  # Red on dark blue, not noise: the packaged weights were found.
  red, _, blue = frames[-1].reshape(-1, 3).max(0)
  assert red > 150 > blue
