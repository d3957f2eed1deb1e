"""What makers state of their chips, and how jax describes chips not at hand.

A TPU's compiler is libtpu (the extra `tpu`), a GPU's is in jax's CUDA plug-in
(`plan-cuda`); both compile on machines that have neither chip nor driver.
"""

import dataclasses
import importlib
import importlib.util
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from hiar_jax.models import flops

_GB = 1e9
# The release that the compiler is told of, major minor patch: the oldest with
# flash attention for all GPUs below.
_CUDNN = (9, 8, 0)


@dataclasses.dataclass(frozen=True)
class GPU:
  """What the compiler asks of a GPU beside its memory.

  Attributes:
    name: as the driver gives it.
    capability: compute capability.
    cores: streaming multiprocessors.
    clock: GHz, boosted.
    l2: bytes of the common cache.
    shared: bytes of shared memory of a multiprocessor.
    threads: that a multiprocessor may hold.
  """

  name: str
  capability: tuple[int, int]
  cores: int
  clock: float
  l2: int
  shared: int
  threads: int = 2048


@dataclasses.dataclass(frozen=True)
class Chip:
  """What the maker states of a chip.

  Attributes:
    hbm: bytes of memory, counted in 10^9.
    peak: FLOP a second in bfloat16, dense.
    bandwidth: bytes a second between chip and memory.
    link: bytes a second that it sends over all its links to other chips.
    gpu: what else is to be known of a GPU; None: a TPU.
  """

  hbm: float
  peak: float
  bandwidth: float
  link: float
  gpu: GPU | None = None


# TPUs: the specifications in the Google Cloud TPU documentation (links of 1600,
# 4800 and 3200 Gbit/s). GPUs: Nvidia's data sheets and the white papers of
# their architectures (Ampere, Ada, Hopper, Blackwell); NVLink counted one way,
# half of what is advertised, and PCIe 4.0 x16 where there is none.
CHIPS = {
  'v5e': Chip(16 * _GB, flops.PEAKS['TPU v5e'], 819e9, 200e9),
  'v5p': Chip(95 * _GB, flops.PEAKS['TPU v5p'], 2765e9, 600e9),
  'v6e': Chip(32 * _GB, flops.PEAKS['TPU v6e'], 1640e9, 400e9),
  'a100': Chip(
    *(80 * _GB, flops.PEAKS['NVIDIA A100-SXM4-80GB'], 2039e9, 300e9),
    GPU('NVIDIA A100-SXM4-80GB', (8, 0), 108, 1.41, 40 << 20, 164 << 10),
  ),
  'h100': Chip(
    *(80 * _GB, flops.PEAKS['NVIDIA H100 80GB HBM3'], 3350e9, 450e9),
    GPU('NVIDIA H100 80GB HBM3', (9, 0), 132, 1.98, 50 << 20, 228 << 10),
  ),
  'h200': Chip(
    *(141 * _GB, flops.PEAKS['NVIDIA H200'], 4800e9, 450e9),
    GPU('NVIDIA H200', (9, 0), 132, 1.98, 50 << 20, 228 << 10),
  ),
  'b200': Chip(
    *(180 * _GB, flops.PEAKS['NVIDIA B200'], 7700e9, 900e9),
    GPU('NVIDIA B200', (10, 0), 148, 1.965, 126 << 20, 228 << 10),
  ),
  'l40s': Chip(
    *(48 * _GB, flops.PEAKS['NVIDIA L40S'], 864e9, 32e9),
    GPU('NVIDIA L40S', (8, 9), 142, 2.52, 96 << 20, 100 << 10, 1536),
  ),
  'rtx4090': Chip(
    *(24 * _GB, flops.PEAKS['NVIDIA GeForce RTX 4090'], 1008e9, 32e9),
    GPU(
      'NVIDIA GeForce RTX 4090', (8, 9), 128, 2.52, 72 << 20, 100 << 10, 1536
    ),
  ),
}


def chip_of(topology: str) -> Chip:
  """The chip that a topology such as 'v5e:2x2' is made of."""
  return CHIPS[topology.partition(':')[0]]


def describe(topology: str) -> Any:
  """The devices of a topology, which need not exist, as jax describes them.

  Args:
    topology: chip and shape. 'v5e:2x2' or 'v5p:2x2x1': rows and columns of
      chips, 'v5e:1x1' or 'v5p:1x1x1' one. 'h100:1x1x4': partitions of the
      network (1 where all GPUs have NVLink to each other), hosts in each, GPUs
      in each host.

  Raises:
    ValueError: in one sentence, if the compiler is missing or the topology
      unknown.
  """
  kind, _, shape = topology.partition(':')
  if kind not in CHIPS:
    raise ValueError(
      f'topology {topology!r} does not begin with one of {sorted(CHIPS)}, as '
      "'v5e:2x2' and 'h100:1x1x4' do"
    )
  gpu = CHIPS[kind].gpu
  if gpu is None:
    return _describe_tpu(topology)
  if not re.fullmatch(r'[1-9]\d*x[1-9]\d*x[1-9]\d*', shape):
    raise ValueError(
      f'topology {topology!r} is not a chip and partitions x hosts x GPUs, as '
      f"'{kind}:1x1x4' is"
    )
  _answer_for_cudnn(topology)
  return topologies.get_topology_desc(
    platform='cuda',
    topology=shape,
    target_config=target_config(CHIPS[kind]),
  )


def _describe_tpu(topology: str) -> Any:
  if importlib.util.find_spec('libtpu') is None:
    raise ValueError(
      f'compiling for {topology!r} needs libtpu, which the extra brings: '
      "pip install 'hiar_jax[tpu]'"
    )
  # Without these libtpu looks for the metadata server of a TPU machine.
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
  # No chip is touched, so another process may use libtpu at the same time.
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  shape = {}
  if sides := re.fullmatch(r'.*?:(\d+)x(\d+)(?:x\d+)?', topology):
    # A host has 2x2 chips unless libtpu is told otherwise.
    x, y = (1 if int(side) == 1 else 2 for side in sides.groups())
    shape = {'chips_per_host_bounds': (x, y, 1)}
  try:
    return topologies.get_topology_desc(topology, 'tpu', **shape)
  except jax.errors.JaxRuntimeError as error:
    reason = str(error).splitlines()[0].rstrip('.')
    raise ValueError(
      f'libtpu knows no topology {topology!r}: {reason}'
    ) from error


def cuda_plugin() -> str | None:
  """The package of jax's CUDA plug-in, or None where it is not installed."""
  for name in ('jax_cuda13_plugin', 'jax_cuda12_plugin'):
    if importlib.util.find_spec(name) is not None:
      return name
  return None


def _answer_for_cudnn(topology: str) -> None:
  """Lets jax trace cuDNN's attention on a machine without cuDNN.

  It asks its plug-in for the version of the library first. Nothing that a
  topology is compiled for runs here, so the answer is the release that the
  compiler is told of.

  Raises:
    ValueError: if the plug-in is missing.
  """
  plugin = cuda_plugin()
  if plugin is None:
    raise ValueError(
      f"compiling for {topology!r} needs jax's CUDA plug-in, which the extra "
      "brings: pip install 'hiar_jax[plan-cuda]'"
    )
  # Any: one of its functions may be replaced.
  versions: Any = importlib.import_module(f'{plugin}._versions')
  try:
    versions.cudnn_get_version()
  except RuntimeError:
    major, minor, patch = _CUDNN
    version = 10_000 * major + 100 * minor + patch
    versions.cudnn_get_version = lambda: version


def target_config(chip: Chip) -> str:
  """A GPU as XLA's compiler wants it told: the text of a GpuTargetConfigProto.

  What is no number of the maker's is the same for all GPUs since Ampere.
  """
  gpu = chip.gpu
  assert gpu is not None, f'{chip} is no GPU'
  major, minor = gpu.capability
  versions = zip(('major', 'minor', 'patch'), _CUDNN, strict=True)
  cudnn = ' '.join(f'{name}: {number}' for name, number in versions)
  return f"""
    platform_name: "CUDA"
    device_description_str: "{gpu.name}"
    dnn_version_info {{ {cudnn} }}
    gpu_device_info {{
      cuda_compute_capability {{ major: {major} minor: {minor} }}
      core_count: {gpu.cores}
      clock_rate_ghz: {gpu.clock}
      memory_bandwidth: {chip.bandwidth:.0f}
      device_memory_size: {chip.hbm:.0f}
      l2_cache_size: {gpu.l2}
      shared_memory_per_core: {gpu.shared}
      shared_memory_per_block: {48 << 10}
      shared_memory_per_block_optin: {gpu.shared - (1 << 10)}
      registers_per_core_limit: {1 << 16}
      registers_per_block_limit: {1 << 16}
      threads_per_core_limit: {gpu.threads}
      threads_per_block_limit: 1024
      threads_per_warp: 32
      fpus_per_core: {64 if gpu.capability == (8, 0) else 128}
      block_dim_limit_x: {2**31 - 1}
      block_dim_limit_y: {2**16 - 1}
      block_dim_limit_z: {2**16 - 1}
    }}
  """
