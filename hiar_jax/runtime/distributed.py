"""Several processes as one machine: who they are, and waits that end in time.

Every process runs the same program. Who takes part is said by flags (see
`define_flags`), by variables,

  JAX_COORDINATOR_ADDRESS=host0:8476 JAX_NUM_PROCESSES=2 JAX_PROCESS_ID=1 ...

or by the cluster: Slurm, a TPU pod, a GKE JobSet, see `clusters`. After
`start`, jax.devices() are those of all processes; on CPUs, collectives run
over gloo.

The roll is called by hand: jax has no public way to learn who is there before
it joins, and ends the process with a stack trace where one is missing.
"""

import collections
import contextlib
import dataclasses
import os
import socket
import time
from collections.abc import Mapping

import jax
from absl import flags

from hiar_jax.runtime import clusters

_NAMES = ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')
_ALL_PRESENT = b'all\n'


@dataclasses.dataclass(frozen=True)
class Processes:
  """Who takes part.

  Attributes:
    coordinator: 'host:port' of process 0, with a free port.
    num_processes: how many there are.
    process_id: which of them this is, from 0.
    local_device_ids: of this host's accelerators, those of this process; None:
      all of them.

  Raises:
    ValueError: naming the value that does not fit.
  """

  coordinator: str
  num_processes: int
  process_id: int
  local_device_ids: tuple[int, ...] | None = None

  def __post_init__(self):
    host, _, port = self.coordinator.rpartition(':')
    if not host or not port.isdecimal():
      raise ValueError(f'coordinator {self.coordinator!r} is not HOST:PORT')
    if not 0 <= self.process_id < self.num_processes:
      raise ValueError(
        f'process_id={self.process_id} is not in 0..{self.num_processes - 1}'
      )

  @property
  def address(self) -> tuple[str, int]:
    host, _, port = self.coordinator.rpartition(':')
    return host, int(port)

  def __str__(self) -> str:
    return f'process {self.process_id} of {self.num_processes}'


def from_environment(environ: Mapping[str, str]) -> Processes | None:
  """What the environment names, None if it names nothing.

  Args:
    environ: os.environ.

  Raises:
    ValueError: if it names a part only, or no number.
  """
  values = [environ.get(name, '') for name in _NAMES]
  if not any(values):
    return None
  for name, value in zip(_NAMES, values):
    if not value or (name != _NAMES[0] and not value.isdecimal()):
      raise ValueError(
        f'{name}={value!r}: {", ".join(_NAMES)} go together, or the flags '
        '--coordinator, --num_processes, --process_id'
      )
  return Processes(values[0], int(values[1]), int(values[2]))


def find(
  environ: Mapping[str, str],
  *,
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
) -> Processes | None:
  """Who takes part; None if this process is alone.

  Args:
    environ: os.environ.
    coordinator: wins over the variables, as do the next two, and over the
      cluster.
    num_processes: 1 alone says that there is no one else, whatever the cluster.
    process_id: see `Processes`.

  Raises:
    ValueError: if a part only is named.
    OSError: if there is a cluster that does not answer.
  """
  given = (coordinator, num_processes, process_id)
  if num_processes == 1 and coordinator is None:
    return None
  said = dict(environ) | {
    name: str(value) for name, value in zip(_NAMES, given) if value is not None
  }
  processes = from_environment(said)
  if processes is None and (found := clusters.find(environ)) is not None:
    processes = Processes(*found)
  if processes is None or processes.num_processes == 1:
    return None
  return processes


def define_flags() -> None:
  """Gives a launch program the flags that `find_by_flags` reads."""
  flags.DEFINE_string(
    'coordinator', None, 'HOST:PORT of process 0; default: as detected.'
  )
  flags.DEFINE_integer(
    'num_processes',
    None,
    'Number of processes; default: as detected. 1: this one alone.',
    lower_bound=1,
  )
  flags.DEFINE_integer(
    'process_id', None, 'Which of them this is, from 0.', lower_bound=0
  )
  flags.DEFINE_float(
    'join_timeout',
    300.0,
    'Seconds to wait at the start for all processes.',
    lower_bound=1.0,
  )
  flags.DEFINE_integer(
    'heartbeat_timeout',
    100,
    'Seconds of silence after which a process counts as dead; the others end.',
    lower_bound=1,
  )


def find_by_flags() -> Processes | None:
  """`find` with the program's flags and environment."""
  values = flags.FLAGS
  return find(
    os.environ,
    coordinator=values.coordinator,
    num_processes=values.num_processes,
    process_id=values.process_id,
  )


def start_by_flags() -> None:
  """Joins the processes that flags, environment or cluster name, if any.

  Raises:
    ValueError, OSError: as `find` and `start`.
  """
  processes = find_by_flags()
  if processes is not None:
    start(
      processes,
      timeout=flags.FLAGS.join_timeout,
      heartbeat_timeout=flags.FLAGS.heartbeat_timeout,
    )


def start(
  processes: Processes, *, timeout: float, heartbeat_timeout: int = 100
) -> None:
  """Joins the processes; call it before anything asks for a device.

  Args:
    processes: who takes part.
    timeout: seconds to wait for the others, > 0.
    heartbeat_timeout: seconds of silence after which a process counts as dead.
      Then jax ends all others with a non-zero status, wherever they wait.

  Raises:
    TimeoutError: if they do not all come.
    OSError: if the coordinator's port cannot be had.
  """
  # When jax misses a process at start-up it aborts this one, with a stack
  # trace. So everyone is known to be there before it is asked.
  if processes.process_id:
    _report(processes, timeout)
  else:
    _call_the_roll(processes, timeout)
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  jax.distributed.initialize(
    processes.coordinator,
    processes.num_processes,
    processes.process_id,
    local_device_ids=processes.local_device_ids,
    # Everything that it could detect is known.
    cluster_detection_method='deactivate',
    initialization_timeout=max(30, round(timeout)),
    heartbeat_timeout_seconds=heartbeat_timeout,
    # A process that fails waits this long for the others before it ends.
    shutdown_timeout_seconds=30,
  )


def show_own_devices(processes: Processes) -> None:
  """Hides other processes' GPUs of this host, for those that never `start`."""
  if processes.local_device_ids is not None:
    ids = ','.join(map(str, processes.local_device_ids))
    jax.config.update('jax_cuda_visible_devices', ids)
    jax.config.update('jax_rocm_visible_devices', ids)


def is_writer() -> bool:
  """Whether this is the one process that writes what there is one of.

  Metrics, exported weights, sampled videos. Checkpoints are written by all.
  """
  return jax.process_index() == 0


# How often each barrier was used: a name may come again, as in a loop.
_uses: collections.Counter[str] = collections.Counter()


def barrier(name: str, *, timeout: float) -> None:
  """Waits until all processes are here; alone, returns at once.

  The coordination service counts them: devices are not touched, and may be at
  work. All processes must come to the barriers of a name equally often.

  Args:
    name: what is waited for; stands in the error.
    timeout: seconds, > 0.

  Raises:
    TimeoutError: if one does not come in time.
  """
  if not jax.distributed.is_initialized():
    return
  # Public, over jax's own service; jax's public barrier runs on the devices and
  # waits for ever.
  from orbax.checkpoint import multihost

  _uses[name] += 1
  try:
    multihost.get_barrier_sync_fn()(
      key=f'hiar_jax/{name}/{_uses[name]}',
      timeout_ms=max(1, round(1000 * timeout)),
    )
  except jax.errors.JaxRuntimeError as error:
    reason = ' '.join(str(error).split())
    raise TimeoutError(
      f'process {jax.process_index()} of {jax.process_count()}: the others '
      f'did not come to {name!r} within {timeout:g} s ({reason})'
    ) from error


def _call_the_roll(processes: Processes, timeout: float) -> None:
  """Process 0 waits until every other one has named itself."""
  deadline = time.monotonic() + timeout
  missing = set(range(1, processes.num_processes))
  with contextlib.ExitStack() as stack:
    server = stack.enter_context(_listen(processes.address[1]))
    present = []
    while missing:
      try:
        server.settimeout(_left(deadline))
        peer, _ = server.accept()
        stack.enter_context(peer)
        peer.settimeout(_left(deadline))
        name = peer.recv(64).decode(errors='replace').strip()
      except TimeoutError:
        raise TimeoutError(
          f'{processes}: {sorted(missing)} did not come to '
          f'{processes.coordinator} within {timeout:g} s'
        ) from None
      if name.isdecimal() and int(name) in missing:
        missing.remove(int(name))
        present.append(peer)
    for peer in present:
      # The peer closes first, so that the port is free for jax at once.
      with contextlib.suppress(OSError):
        peer.sendall(_ALL_PRESENT)
        peer.settimeout(5.0)
        peer.recv(1)


def _listen(port: int) -> socket.socket:
  """Takes calls over IPv4 and, where there is one, IPv6."""
  if socket.has_dualstack_ipv6():
    return socket.create_server(
      ('', port), family=socket.AF_INET6, dualstack_ipv6=True
    )
  return socket.create_server(('', port))


def _report(processes: Processes, timeout: float) -> None:
  """Tells process 0 who this is, and waits until it has all of them."""
  deadline = time.monotonic() + timeout
  while True:
    try:
      with socket.create_connection(
        processes.address, timeout=_left(deadline)
      ) as coordinator:
        coordinator.sendall(f'{processes.process_id}\n'.encode())
        coordinator.settimeout(_left(deadline))
        answer = coordinator.recv(len(_ALL_PRESENT))
      if answer == _ALL_PRESENT:
        return
      # Another answer is that of jax's own service, which has the port now.
      problem = (
        'is in a run that began without this process; start all of them again'
        if answer
        else 'gave up; see its message'
      )
    except TimeoutError:
      problem = f'did not call them all within {timeout:g} s'
    except OSError:  # Refused, or the name is not known yet.
      if time.monotonic() < deadline:
        time.sleep(0.1)
        continue
      problem = f'was not there for {timeout:g} s'
    raise TimeoutError(
      f'{processes}: the coordinator {processes.coordinator} {problem}'
    )


def _left(deadline: float) -> float:
  """Seconds until then; a socket takes 0 for 'do not wait'."""
  return max(deadline - time.monotonic(), 0.01)
