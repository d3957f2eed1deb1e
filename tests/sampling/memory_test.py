"""A video that the device has no room for is refused before it is begun."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from hiar_jax import rollout
from hiar_jax.runtime import errors
from hiar_jax.sampling import calls, memory, modes
from tests import toy_network

CONFIG = rollout.RolloutConfig(levels=(1.0, 0.5, 0.0), window=6)
DENOISER = toy_network.DENOISER


@dataclasses.dataclass
class Device:
  """What is asked of a device."""

  bytes_limit: int
  bytes_in_use: int = 0
  device_kind: str = 'A100'

  def memory_stats(self):
    return {'bytes_limit': self.bytes_limit, 'bytes_in_use': self.bytes_in_use}


def estimate(order='step_first', batch_size=2, **changes):
  return calls.estimate_memory(
    DENOISER,
    dataclasses.replace(CONFIG, **changes),
    toy_network.params(),
    calls.Request(num_blocks=2, order=order),
    batch_size,
  )


def test_the_estimate_counts_what_sampling_holds():
  need = estimate()
  params = toy_network.params()
  assert need.weights == sum(a.nbytes for a in jax.tree.leaves(params))
  text = toy_network.text(2)
  sampler = rollout.Sampler(DENOISER, params, text, CONFIG)
  held = jax.eval_shape(sampler.empty_past)
  cached = sum(a.size * a.dtype.itemsize for a in (held.k, held.v))
  assert need.caches == 2 * cached
  # Shared context has a past for each step.
  assert estimate(context='shared').caches == 2 * need.caches
  assert estimate('block_first', context='shared').caches == need.caches


def test_what_does_not_fit_is_refused_with_both_numbers():
  need = estimate()
  certain = need.total - need.temporaries // 2
  memory.check_fits(need, DENOISER.config, CONFIG, Device(certain))
  with pytest.raises(ValueError) as caught:
    memory.check_fits(need, DENOISER.config, CONFIG, Device(certain - 1))
  caught.match(r'needs about \d\S* GB \(weights .*, caches .*, temporaries ')
  caught.match('A100 has .* GB; fewer videos .* than 6 frames, .* than 2x4 lat')
  # The weights are on the device already, and no burden twice; others are.
  used = Device(certain + 9, bytes_in_use=need.weights + 9)
  memory.check_fits(need, DENOISER.config, CONFIG, used)
  used.bytes_in_use += 1
  with pytest.raises(ValueError, match='of them taken by others'):
    memory.check_fits(need, DENOISER.config, CONFIG, used)


def test_the_device_holds_the_latents_of_the_whole_video():
  short, long = (
    calls.estimate_memory(
      DENOISER, CONFIG, toy_network.params(), calls.Request(blocks), 2
    )
    for blocks in (1, 10**8)
  )
  block = jnp.zeros((2, *CONFIG.block_shape(DENOISER.config)))
  assert short.latents == block.nbytes
  assert long.total - short.total == (10**8 - 1) * block.nbytes
  with pytest.raises(ValueError, match=r'latents \d.*--stream'):
    memory.check_fits(long, DENOISER.config, CONFIG, Device(10**9))


def test_videos_that_the_host_has_no_room_for_are_refused(monkeypatch):
  latents, frames = (2, 3, 4, 4, 16), (2, 9, 32, 32, 3)
  need = 2 * 3 * 4 * 4 * 16 * 4 + 2 * (2 * 9 * 32 * 32 * 3)
  monkeypatch.setattr(memory, 'host_bytes', lambda: need)
  memory.check_host(latents, frames)
  monkeypatch.setattr(memory, 'host_bytes', lambda: need - 1)
  with pytest.raises(ValueError, match='2 videos of 9 frames .*--stream'):
    memory.check_host(latents, frames)


def test_the_hosts_memory_is_some_and_no_more_than_it_has():
  most = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
  assert 2**28 < memory.host_bytes() <= most


def test_a_container_s_limit_is_the_hosts_memory(monkeypatch, tmp_path):
  (tmp_path / 'memory.max').write_text(f'{2**28}\n')
  (tmp_path / 'none').write_text('max\n')
  limits = [str(tmp_path / name) for name in ('none', 'memory.max', 'missing')]
  monkeypatch.setattr(memory, '_CONTAINER_LIMITS', limits)
  assert memory.host_bytes() == 2**28


def test_sampling_and_streaming_ask_before_they_compile(monkeypatch):
  monkeypatch.setattr(memory, 'account', lambda device: {'bytes_limit': 1000})
  with pytest.raises(ValueError, match='needs about .* of memory'):
    calls.check_memory(
      *(DENOISER, CONFIG, toy_network.params(), calls.Request(1), 1)
    )
  for context in ('matched', 'shared'):
    config = dataclasses.replace(CONFIG, context=context)
    with pytest.raises(ValueError, match='needs about .* of memory'):
      modes.choose_mode(DENOISER, config, toy_network.params(), 1)


def test_a_device_that_runs_out_is_one_line():
  with pytest.raises(jax.errors.JaxRuntimeError) as caught:
    jnp.zeros(2**50).block_until_ready()
  message = errors.users_mistake(caught.value)
  assert message.startswith('the device has not enough memory: RESOURCE_EX')
  assert '\n' not in message
  assert errors.users_mistake(jax.errors.JaxRuntimeError('INTERNAL: x')) is None


# Runs the program as if the device had 1 MB.
_SMALL_DEVICE = """
import runpy, sys
from hiar_jax.sampling import memory
memory.account = lambda device: {'bytes_limit': 10**6}
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
"""


@pytest.mark.slow
@pytest.mark.parametrize('how', [(), ('--stream',)], ids=['offline', 'stream'])
def test_the_program_tells_it_in_one_line(tmp_path, how):
  root = pathlib.Path(__file__).parents[2]
  done = subprocess.run(
    [
      *(sys.executable, '-c', _SMALL_DEVICE, root / 'launch' / 'generate.py'),
      *('--pipeline=bouncing', '--prompt=a large red disc on grey', *how),
    ],
    cwd=tmp_path,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 2, done.stderr
  *notes, line = done.stderr.splitlines()
  assert line.startswith('error: the video needs about ')
  assert all(note.startswith('note: ') for note in notes), done.stderr
  assert not list(tmp_path.iterdir())
