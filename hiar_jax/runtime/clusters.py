"""Who takes part, as a cluster tells each of its processes.

By hand, because jax tells what it detects only by joining: then one process
that is missing ends the others with a stack trace, so `distributed` calls the
roll before, and programs that only share out their work never join. What is
read are the variables and metadata that Slurm, GKE and Google's TPU VMs
document.
"""

import glob
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import NamedTuple

_SLURM = (
  *('SLURM_JOB_ID', 'SLURM_STEP_NODELIST', 'SLURM_NTASKS'),
  *('SLURM_PROCID', 'SLURM_LOCALID'),
)
_TPU_PORT = 8482
_METADATA = 'http://metadata.google.internal/computeMetadata/v1/instance/'


class Found(NamedTuple):
  """coordinator 'host:port', how many processes, which one, its devices."""

  coordinator: str
  num_processes: int
  process_id: int
  local_device_ids: tuple[int, ...] | None


def find(environ: Mapping[str, str]) -> Found | None:
  """What the cluster says of this process; None if there is no cluster.

  Args:
    environ: os.environ.

  Raises:
    OSError: if there is a cluster that does not answer, or not as it should.
  """
  try:
    if all(name in environ for name in _SLURM):
      return _slurm(environ)
    if not _has_tpu():
      return None
    names = environ.get('TPU_PROCESS_ADDRESSES') or environ.get(
      'TPU_WORKER_HOSTNAMES'
    )
    if names is not None:
      index = int(environ['TPU_WORKER_ID'])
      return _slices(names.split(','), index, environ.get)
    if 'TPU_SKIP_MDS_QUERY' in environ:
      return None
    return _tpu_vm(environ)
  except (KeyError, ValueError) as error:
    raise OSError(f'the cluster names no processes: {error!r}') from error


def _slurm(environ: Mapping[str, str]) -> Found:
  """A task of a step, with one device of its host."""
  job, nodes, count, index, local = (environ[name] for name in _SLURM)
  # 'node[07-09],other1' begins with node07.
  first = re.match(r'([^,[]+)(?:\[([^],-]+))?', nodes)
  if not first:
    raise ValueError(f'SLURM_STEP_NODELIST={nodes!r}')
  # As jax picks it: the last 4096 ports, by the job.
  port = 65536 - 4096 + int(job) % 4096
  host = first[1] + (first[2] or '')
  return Found(f'{host}:{port}', int(count), int(index), (int(local),))


def _slices(
  hosts: list[str], index: int, variable: Callable[[str], str | None]
) -> Found:
  """A worker of a TPU slice, or of several."""
  first = variable('MEGASCALE_COORDINATOR_ADDRESS') or hosts[0]
  slices = int(variable('MEGASCALE_NUM_SLICES') or 1)
  index += int(variable('MEGASCALE_SLICE_ID') or 0) * len(hosts)
  coordinator = f'{first.partition(":")[0]}:{_TPU_PORT}'
  return Found(coordinator, slices * len(hosts), index, None)


def _tpu_vm(environ: Mapping[str, str]) -> Found | None:
  """A worker that its virtual machine's metadata knows."""
  index = _metadata('attributes/agent-worker-number')
  if index is None:
    return None
  workers = _metadata('attributes/worker-network-endpoints') or ''
  # 'host,host' or 'name:id:ip,name:id:ip'.
  hosts = [worker.rpartition(':')[2] for worker in workers.split(',')]
  if not all(hosts):
    raise ValueError(f'worker-network-endpoints {workers!r}')
  lines = (_metadata('attributes/tpu-env') or '').splitlines()
  told = {
    name.strip(): value.strip().strip("'")
    for name, colon, value in (line.partition(':') for line in lines)
    if colon
  }
  return _slices(hosts, int(index), (told | dict(environ)).get)


def _has_tpu() -> bool:
  return bool(glob.glob('/dev/accel[0-9]*') or glob.glob('/dev/vfio/[0-9]*'))


def _metadata(name: str) -> str | None:
  """Of this virtual machine; None if it has no such entry."""
  request = urllib.request.Request(
    _METADATA + name, headers={'Metadata-Flavor': 'Google'}
  )
  try:
    with urllib.request.urlopen(request, timeout=10) as answer:
      return answer.read().decode()
  except urllib.error.HTTPError as error:
    if error.code == 404:
      return None
    raise
  except urllib.error.URLError:
    # No metadata server: not a virtual machine of Google's.
    return None
