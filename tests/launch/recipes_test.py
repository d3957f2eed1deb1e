"""The launch recipes: what they would run, and what happens when it fails.

gcloud, srun and scontrol are stand-ins that run the commands here.
"""

import contextlib
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

_ROOT = pathlib.Path(__file__).parents[2]
_LAUNCH = _ROOT / 'launch'
_SCRIPTS = ('pod.sh', 'retry.sh', 'slurm.sbatch')
_SHELLCHECK = pathlib.Path(sys.executable).with_name('shellcheck')

# Runs a command of `ssh` in the home of a worker; `scp` is not for it.
_GCLOUD = """#!/usr/bin/env bash
while (($#)) && [[ "$1" != --command ]]; do shift; done
cd "$WORKER_HOME" && HOME=$WORKER_HOME exec bash -c "$2"
"""
# A stand-in for .venv/bin/python: fails once, then saves when it is told to.
_PYTHON = """#!/usr/bin/env bash
echo "arguments: $*"
if [[ ! -f failed ]]; then touch failed; exit 134; fi
trap 'echo saved; exit 0' TERM
echo goes on
while true; do sleep 0.05; done
"""


def run(*command, cwd=_ROOT, **variables):
  environment = {
    k: v
    for k, v in os.environ.items()
    if not k.startswith('SLURM_') and k not in ('NAME', 'ZONE', 'BUCKET')
  }
  return subprocess.run(
    command,
    env=environment | variables,
    cwd=cwd,
    capture_output=True,
    text=True,
    timeout=60,
  )


def executable(path, text):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text)
  path.chmod(0o755)
  return path


def jobset():
  return yaml.safe_load((_LAUNCH / 'gke_jobset.yaml').read_text())


def container():
  job = jobset()['spec']['replicatedJobs'][0]['template']['spec']
  return job['template']['spec']['containers'][0]


@pytest.mark.parametrize('name', _SCRIPTS)
def test_scripts_are_bash_without_complaint(name):
  assert run('bash', '-n', str(_LAUNCH / name)).returncode == 0
  checked = run(str(_SHELLCHECK), str(_LAUNCH / name))
  assert checked.returncode == 0, checked.stdout


def test_the_jobset_is_a_slice_whose_hosts_have_all_its_chips(tmp_path):
  assert jobset()['kind'] == 'JobSet'
  job = jobset()['spec']['replicatedJobs'][0]['template']['spec']
  pod = job['template']['spec']
  topology = pod['nodeSelector']['cloud.google.com/gke-tpu-topology']
  chips = math.prod(map(int, topology.split('x')))
  assert job['parallelism'] == job['completions']
  per_host = container()['resources']['limits']['google.com/tpu']
  assert job['parallelism'] * per_host == chips
  # Kubernetes takes a pod's policy only of jobs whose pods it never restarts.
  assert pod['restartPolicy'] == 'Never' and job['backoffLimit'] == 0
  rule = job['podFailurePolicy']['rules'][0]['onExitCodes']
  assert rule['containerName'] == container()['name'] and rule['values'] == [2]
  mounts = {mount['name'] for mount in container()['volumeMounts']}
  assert mounts == {volume['name'] for volume in pod['volumes']}

  script = executable(tmp_path / 'run.sh', container()['args'][0])
  checked = run(str(_SHELLCHECK), '--shell=bash', str(script))
  assert checked.returncode == 0, checked.stdout
  named = {
    variable['name']: variable['value'] for variable in container()['env']
  }
  assert named['DRY_RUN'] == '0'
  assert (_ROOT / named['PROGRAM'].split()[0]).exists()
  dry = run('bash', str(script), **named | {'DRY_RUN': '1'})
  assert dry.returncode == 0
  assert dry.stdout.splitlines()[-1] == f'exec python -u {named["PROGRAM"]}'


def retry(*command, **variables):
  return run(
    str(_LAUNCH / 'retry.sh'), *command, RETRY_SECONDS='0', **variables
  )


def test_a_failed_run_is_tried_again_and_a_mistake_is_not(tmp_path):
  """The command counts its runs and ends as the n-th argument says."""
  counting = executable(
    tmp_path / 'counting',
    '#!/usr/bin/env bash\necho x >>runs\nshift $(($(wc -l <runs) - 1))\n'
    'exit "$1"\n',
  )

  def runs(*statuses, **variables):
    (tmp_path / 'runs').unlink(missing_ok=True)
    ended = retry(str(counting), *statuses, cwd=tmp_path, **variables)
    return ended.returncode, len((tmp_path / 'runs').read_text().split())

  assert runs('0') == (0, 1)
  assert runs('1', '134', '0') == (0, 3)
  assert runs('1', '2', '0') == (2, 2)
  assert runs('3', '3', '3', '0', RETRIES='2') == (3, 3)
  assert retry().returncode == 2
  assert retry('a b', 'c', DRY_RUN='1').stdout == 'a\\ b c \n'


@pytest.fixture
def worker(tmp_path):
  """Variables that send gcloud's commands to a home with a checkout."""
  home = tmp_path / 'home'
  executable(home / 'hiar_jax/.venv/bin/python', _PYTHON)
  (home / 'hiar_jax/launch').mkdir()
  shutil.copy(_LAUNCH / 'retry.sh', home / 'hiar_jax/launch')
  executable(tmp_path / 'bin/gcloud', _GCLOUD)
  yield {
    'NAME': 'slice',
    'ZONE': 'zone',
    'WORKER_HOME': str(home),
    'PATH': f'{tmp_path / "bin"}:{os.environ["PATH"]}',
    'RETRY_SECONDS': '0',
  }
  pid = home / 'hiar_jax/run.pid'
  if pid.exists():
    with contextlib.suppress(ProcessLookupError):
      os.kill(int(pid.read_text()), signal.SIGTERM)


def wait_for(condition):
  deadline = time.monotonic() + 20
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.05)


def test_a_pod_runs_goes_on_and_saves_when_it_is_stopped(worker):
  pod = lambda *arguments: run(str(_LAUNCH / 'pod.sh'), *arguments, **worker)
  log = pathlib.Path(worker['WORKER_HOME']) / 'hiar_jax/run.log'
  assert 'idle' in pod('status').stdout
  started = pod('run', 'launch/train.py', '--config=a b')
  assert started.returncode == 0 and str(log) in started.stdout
  # It fails once, by itself.
  wait_for(lambda: log.exists() and 'goes on' in log.read_text())
  assert 'arguments: -u launch/train.py --config=a b' in log.read_text()
  assert 'exit status 134 at try 1; again' in log.read_text()
  assert 'runs' in pod('status').stdout
  again = pod('run', 'launch/train.py')
  assert again.returncode == 2 and 'already runs' in again.stderr
  assert pod('logs').stdout.endswith('goes on\n')
  assert pod('stop').returncode == 0
  wait_for(lambda: 'idle' in pod('status').stdout)
  assert log.read_text().endswith('saved\n')
  assert pod('resume', 'launch/train.py').returncode == 0
  wait_for(lambda: log.read_text().endswith('goes on\n'))


def test_a_dry_run_of_a_pod_prints_commands_that_bash_takes():
  for arguments, wanted in (
    (['install'], ('git -C', 'scp', '--worker=all', 'gcsfuse', 'tpu')),
    (['run', 'launch/train.py', '--config=x'], ('retry.sh', '--config=x')),
    (['logs'], ('tail',)),
    (['status'], ('idle',)),
    (['stop'], ('kill -TERM',)),
  ):
    dry = run(
      str(_LAUNCH / 'pod.sh'),
      *arguments,
      **dict(NAME='n', ZONE='z', BUCKET='b', DRY_RUN='1', PATH='/usr/bin:/bin'),
    )
    assert dry.returncode == 0, dry.stderr
    assert dry.stdout.startswith('g')
    plain = dry.stdout.replace('\\ ', ' ')
    assert all(word in plain for word in wanted), dry.stdout
    # Each script is one argument, however many words it has.
    counted = run(
      'bash', '-c', f'git() {{ :; }}\ngcloud() {{ echo $#; }}\n{dry.stdout}'
    )
    assert set(counted.stdout.split()) <= {'9', '10'}, counted.stdout


@pytest.mark.parametrize(
  ('arguments', 'variables', 'message'),
  [
    ([], dict(NAME='n', ZONE='z'), 'usage:'),
    (['run'], dict(NAME='n', ZONE='z'), 'usage:'),
    (['logs'], dict(ZONE='z'), 'NAME, of the TPU slice, is not set'),
    (['logs'], dict(NAME='n'), 'ZONE, of the TPU slice, is not set'),
    (['fly'], dict(NAME='n', ZONE='z'), "'fly' is no action"),
    (['run', 'a.py'], dict(NAME='n', ZONE='z'), "no program 'a.py'"),
  ],
)
def test_a_mistake_with_a_pod_is_one_line(arguments, variables, message):
  ended = run(str(_LAUNCH / 'pod.sh'), *arguments, **variables)
  assert ended.returncode == 2
  assert message in ended.stderr and 'unbound' not in ended.stderr


def slurm(*arguments, **variables):
  command = ('bash', str(_LAUNCH / 'slurm.sbatch'), *arguments)
  return run(*command, SLURM_JOB_ID='7', **variables)


def test_a_job_of_slurm_is_queued_again_unless_it_was_a_mistake(tmp_path):
  executable(
    tmp_path / 'srun', '#!/usr/bin/env bash\necho "srun $*"\nexit $STATUS\n'
  )
  executable(tmp_path / 'scontrol', '#!/usr/bin/env bash\necho "scontrol $*"\n')
  variables = {'PATH': f'{tmp_path}:{os.environ["PATH"]}'}
  for status, restarts, wanted, requeued in (
    ('0', '0', 0, False),
    ('2', '0', 2, False),
    ('1', '0', 0, True),
    ('143', '49', 0, True),
    ('1', '50', 1, False),
  ):
    ended = slurm(
      'launch/train.py',
      '--config=x',
      STATUS=status,
      SLURM_RESTART_COUNT=restarts,
      **variables,
    )
    assert ended.returncode == wanted, ended.stderr
    assert '-u launch/train.py --config=x' in ended.stdout
    assert ('scontrol requeue 7' in ended.stdout) == requeued


def test_a_dry_run_of_slurm_prints_its_commands():
  dry = slurm('launch/train.py', '--config=x', DRY_RUN='1')
  assert dry.returncode == 0
  assert dry.stdout.startswith('srun --label --kill-on-bad-exit=1 ')
  dry = slurm('install', DRY_RUN='1', CUDA='13')
  assert 'cuda13' in dry.stdout and 'venv' in dry.stdout
  assert slurm('nothing.py').returncode == 2
  assert slurm().returncode == 2
