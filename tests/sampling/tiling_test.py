"""Tiles that nobody asked for: as few as fit beside the stream."""

import dataclasses

import jax
import pytest

from hiar_jax.models import vae, vae_bands
from hiar_jax.sampling import memory, modes, streaming, tiling
from tests.sampling import stream_decoding_test


def chosen(pipe, monkeypatch, free, decodes_alone=False):
  """Tiles on a device with so many bytes left beside the stream."""
  engine = streaming.Engine(pipe.denoiser, pipe.rollout, 'serial')
  stream = modes.estimate_memory(engine, pipe.params, 1)
  taken = 0 if decodes_alone else stream.total - stream.weights
  stats = {
    'bytes_limit': int((free + taken + stream.weights + 1) / modes.USABLE) + 1,
    'bytes_in_use': stream.weights,
  }
  monkeypatch.setattr(memory, 'account', lambda device: stats)
  return tiling.fitting(pipe).codec.bands.in_turn


def test_as_few_tiles_as_fit_are_taken(monkeypatch, capsys):
  pipe = stream_decoding_test.pipe()
  # Frames of four rows are small beside the margins of bands.
  monkeypatch.setattr(
    vae_bands, 'decode_bytes', lambda cfg, bands, **sizes: 10**5 // bands.count
  )
  assert chosen(pipe, monkeypatch, 10**5) == 1
  assert not capsys.readouterr().err
  assert chosen(pipe, monkeypatch, 99_000) == 2
  assert 'decoded in 2 tiles: whole, that takes' in capsys.readouterr().err
  assert chosen(pipe, monkeypatch, 30_000) == 4
  # What fits nowhere is tried with as many as there may be.
  assert chosen(pipe, monkeypatch, 3_000) == 4


def test_a_device_that_decodes_alone_has_room_for_more(monkeypatch):
  pipe = stream_decoding_test.pipe()
  monkeypatch.setattr(
    vae_bands, 'decode_bytes', lambda cfg, bands, **sizes: 10**5 // bands.count
  )
  other = jax.device_put(pipe.codec, jax.devices()[3])
  alone = dataclasses.replace(pipe, codec=other)
  assert chosen(alone, monkeypatch, 10**5, decodes_alone=True) == 1
  assert chosen(pipe, monkeypatch, 60_000, decodes_alone=True) > 1


def test_where_memory_is_not_told_frames_stay_whole():
  pipe = stream_decoding_test.pipe()
  assert tiling.fitting(pipe) is pipe


@pytest.mark.parametrize(
  ('tiles', 'planned'), [(1, 17.0), (4, 7.92), (8, 6.30)]
)
def test_the_estimate_is_what_the_plan_says(tiles, planned):
  # State and temporaries of docs/tpu.md: v5p whole, v5e in tiles.
  found = vae_bands.decode_bytes(
    *(vae.VAEConfig.wan(), vae_bands.Bands(tiles)),
    frames=3,
    latent_height=60,
    latent_width=104,
  )
  assert found / 1e9 == pytest.approx(planned, rel=0.03)
