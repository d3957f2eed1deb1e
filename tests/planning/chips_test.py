"""Chips that are not at hand: what is told of them, and to whom."""

import importlib.util

import pytest

from hiar_jax.planning import chips

needs_plugin = pytest.mark.skipif(
  chips.cuda_plugin() is None, reason='needs the extra plan-cuda'
)


@pytest.mark.parametrize('topology', ['h100:2x2', 'h100', 'h100:0x1x4'])
def test_a_topology_of_gpus_says_partitions_hosts_and_gpus(topology):
  with pytest.raises(ValueError, match=f"{topology}' is not a chip and"):
    chips.describe(topology)


def test_an_unknown_chip_is_refused_with_those_there_are():
  with pytest.raises(ValueError, match="'v9:2' does not begin with one of"):
    chips.describe('v9:2')


def test_without_the_plugin_the_extra_is_named(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ValueError, match=r'hiar_jax\[plan-cuda\]'):
    chips.describe('h100:1x1x4')


@needs_plugin
@pytest.mark.parametrize(
  'kind', [kind for kind, chip in chips.CHIPS.items() if chip.gpu]
)
def test_the_compiler_takes_what_it_is_told_of_each_gpu(kind):
  devices = chips.describe(f'{kind}:1x1x2').devices
  assert len(devices) == 2
  assert {d.device_kind for d in devices} == {chips.CHIPS[kind].gpu.name}


@pytest.mark.skipif(
  importlib.util.find_spec('libtpu') is None, reason='needs the extra tpu'
)
@pytest.mark.parametrize(
  ('topology', 'count'),
  [
    *(('v5e:1x1', 1), ('v6e:1x1', 1), ('v5p:1x1x1', 1)),
    *(('v5e:1x2', 2), ('v5e:2x1', 2), ('v5p:2x1x1', 2)),
    *(('v5e:2x2', 4), ('v5p:2x2x1', 4), ('v5e:4x4', 16)),
  ],
)
def test_less_than_a_host_of_chips_has_a_name(topology, count):
  assert len(chips.describe(topology).devices) == count
