"""Several processes as one machine: start-up that ends in time.

Every process runs the same program, each with a number of its own:

  JAX_COORDINATOR_ADDRESS=host0:8476 JAX_NUM_PROCESSES=2 JAX_PROCESS_ID=1 ...

After `start`, jax.devices() are those of all processes; on CPUs, collectives
run over gloo.
"""

import contextlib
import dataclasses
import socket
import time
from collections.abc import Mapping

import jax

_NAMES = ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')


@dataclasses.dataclass(frozen=True)
class Processes:
  """Who takes part.

  Attributes:
    coordinator: 'host:port' of process 0, with a free port.
    num_processes: how many there are.
    process_id: which of them this is, from 0.

  Raises:
    ValueError: naming the value that does not fit.
  """

  coordinator: str
  num_processes: int
  process_id: int

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
        f'{name}={value!r} does not go with the others: {_NAMES}'
      )
  return Processes(values[0], int(values[1]), int(values[2]))


def start(processes: Processes, *, timeout: float) -> None:
  """Joins the processes; call it before anything asks for a device.

  Args:
    processes: who takes part.
    timeout: seconds to wait for the others, > 0.

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
    initialization_timeout=max(30, round(timeout)),
    # A process that fails waits this long for the others before it ends.
    shutdown_timeout_seconds=30,
  )


def _call_the_roll(processes: Processes, timeout: float) -> None:
  """Process 0 waits until every other one has named itself."""
  deadline = time.monotonic() + timeout
  missing = set(range(1, processes.num_processes))
  with contextlib.ExitStack() as stack:
    server = stack.enter_context(
      socket.create_server(('', processes.address[1]))
    )
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
        peer.sendall(b'all\n')
        peer.settimeout(5.0)
        peer.recv(1)


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
        if coordinator.recv(8):
          return
      problem = 'gave up; see its message'
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
