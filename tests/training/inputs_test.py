"""Config sections to prompts, text states and videos."""

import ml_collections
import numpy as np
import pytest

from configs import bouncing as bouncing_config
from hiar_jax.codecs import pixels
from hiar_jax.data import bouncing, latents, sources, text_states
from hiar_jax.text import word_hash
from hiar_jax.training import inputs

SEED = 1


@pytest.fixture
def config():
  c = bouncing_config.get_config('teacher_start')
  c.world = dict(height=32, width=32, num_frames=5)
  del c.latents
  return c


def test_the_small_worlds_text_is_that_of_its_captions(config):
  encoder = inputs.open_text(config)
  prompts = inputs.open_prompts(config)
  source = inputs.open_states(config, prompts, encoder)
  batch = next(sources.batches(source, batch_size=3, seed=0))
  text = source.finish(batch)['text']
  world = bouncing.WorldConfig(**config.world)
  wanted = word_hash.WordHashEncoder(dim=64, length=16).encode(
    [bouncing.sample_scene(world, SEED, i).caption for i in batch['index']]
  )
  np.testing.assert_array_equal(text, wanted)


def test_videos_come_with_their_text_or_that_of_the_empty_caption(config):
  config.caption_dropout = 0.5
  source = inputs.open_videos(config, inputs.open_text(config))
  elements = [source[i] for i in range(32)]
  dropped = [not element['text'].any() for element in elements]
  assert 4 < sum(dropped) < 28
  world = bouncing.WorldConfig(**config.world)
  for i in (0, dropped.index(False)):
    scene = bouncing.sample_scene(world, SEED, i)
    np.testing.assert_array_equal(
      elements[i]['video'], bouncing.render(scene, world)
    )
  config.caption_dropout = 0.0
  source = inputs.open_videos(config, inputs.open_text(config))
  assert all(source[i]['text'].any() for i in range(32))


def test_guidance_leads_away_from_the_encoders_prompt_or_the_configs(config):
  encoder = inputs.open_text(config)
  assert not inputs.negative_states(config, encoder).any()
  config.negative_prompt = 'a blurred disc'
  np.testing.assert_array_equal(
    inputs.negative_states(config, encoder), encoder.encode(['a blurred disc'])
  )
  del config.negative_prompt
  assert inputs.negative_prompt(config, encoder) == ''


def test_identities_tell_other_prompts_and_encoders_apart(config):
  def identity():
    encoder = inputs.open_text(config)
    prompts = inputs.open_prompts(config)
    return inputs.open_states(config, prompts, encoder).identity()

  first = identity()
  config.world_seed = 2
  second = identity()
  config.text.seed = 5
  assert first['prompts'] != second['prompts']
  assert first['encoder'] == second['encoder'] != identity()['encoder']


@pytest.mark.parametrize(
  'change, message',
  [
    ({'prompts': None}, "no section 'prompts'"),
    ({'prompts': dict(sorce='bouncing')}, "section 'prompts' .* no source"),
    ({'prompts': dict(source='none')}, "prompts.source='none' is not one of"),
    ({'text': dict(encoder='none')}, "text.encoder='none' is not one of"),
    ({'caption_dropout': 1.5}, 'caption_dropout=1.5'),
  ],
)
def test_what_does_not_fit_is_named(config, change, message):
  settings = config.to_dict() | change
  settings = {k: v for k, v in settings.items() if v is not None}
  config = ml_collections.ConfigDict(settings)
  with pytest.raises(ValueError, match=message):
    inputs.open_prompts(config)
    inputs.open_videos(config, inputs.open_text(config))


@pytest.fixture
def encoded(config, tmp_path):
  """The small world's config with its first 6 videos encoded, linearly."""
  del config.vae
  config.codec = dict(
    path=str(tmp_path / 'codec.npz'),
    channels=8,
    whitening=0.5,
    num_videos=8,
    videos=dict(source='bouncing', seed=0),
  )
  config.model.update(latent_height=4, latent_width=4)
  config.latents = dict(
    dir=str(tmp_path / 'latents'), num=6, shard_size=4, batch_size=2
  )
  codec = inputs.open_codec(config)
  videos = inputs.open_bare_videos(config)
  latents.make(
    config.latents.dir,
    inputs.latents_manifest(config, videos, codec),
    videos,
    pixels.encoder(codec),
    batch_size=2,
  )
  return config


def test_latents_on_disk_take_the_videos_place(encoded):
  source = inputs.open_videos(encoded, inputs.open_text(encoded))
  assert len(source) == 6
  codec, videos = inputs.open_codec(encoded), inputs.open_bare_videos(encoded)
  for i in range(6):
    wanted = codec.encode(pixels.to_float(videos[i][None]))[0]
    np.testing.assert_allclose(source[i]['latents'], wanted, atol=5e-3)
  captions = inputs.captions_to_encode(encoded)
  assert [captions[i] for i in range(6)] == [
    videos.captions[i] for i in range(6)
  ]
  # Without the videos and the codec the latents can be trained on alone.
  del encoded.videos, encoded.codec
  again = inputs.open_videos(encoded, inputs.open_text(encoded))
  np.testing.assert_array_equal(again[3]['latents'], source[3]['latents'])


@pytest.mark.parametrize(
  'change, message',
  [
    (lambda c: c.update(world_seed=9), 'videos.seed: 1 -> 9'),
    (
      lambda c: c.codec.update(path=c.codec.path + '2', whitening=0.4),
      'codec_',
    ),
    (lambda c: c.model.update(latent_height=6), r'\(6, 4, 8\)'),
  ],
)
def test_latents_of_something_else_are_refused_by_name(
  encoded, change, message
):
  change(encoded)
  with pytest.raises(ValueError, match=message):
    inputs.open_videos(encoded, inputs.open_text(encoded))


def test_videos_that_a_codec_does_not_take_are_named(encoded):
  class Codec:
    temporal_stride, spatial_stride, channels = 4, 8, 8

  def message(**world):
    encoded.world.update(world)
    videos = inputs.open_bare_videos(encoded)
    with pytest.raises(ValueError) as info:
      inputs.latents_manifest(encoded, videos, Codec())
    return str(info.value)

  assert 'videos of 6 frames do not divide' in message(num_frames=6)
  assert 'height=36 do not divide' in message(num_frames=5, height=36)
  encoded.latents.num = 2**21
  assert 'latents.num=2097152 is more than' in message(height=32)


@pytest.fixture
def stored(config, tmp_path):
  """The small world's config with its first 6 captions encoded."""
  config.prompts.length = 6
  config.states = dict(dir=str(tmp_path), num=0, shard_size=4, batch_size=2)
  encoder = inputs.open_encoder(config)
  prompts = inputs.open_prompts(config)
  manifest = text_states.make_manifest(prompts, encoder, num=0, shard_size=4)
  text_states.make(tmp_path, manifest, prompts, encoder, batch_size=2)
  others = inputs.other_texts(config, encoder)
  text_states.add_captions(tmp_path, encoder, others)
  return config


def test_states_on_disk_take_the_encoders_place(stored):
  encoder = inputs.open_text(stored)
  source = inputs.open_states(stored, inputs.open_prompts(stored), encoder)
  assert isinstance(source, text_states.StoredStates)
  batch = source.finish(next(sources.batches(source, batch_size=6, seed=0)))
  del stored.states
  live = inputs.open_text(stored)
  prompts = inputs.open_prompts(stored)
  same = inputs.open_states(stored, prompts, live)
  wanted = same.finish(next(sources.batches(same, batch_size=6, seed=0)))
  np.testing.assert_array_equal(batch['index'], wanted['index'])
  np.testing.assert_allclose(batch['text'], wanted['text'], rtol=2**-8)
  assert source.identity() == same.identity()
  assert encoder.identity == live.identity


def test_the_negative_prompt_has_to_be_beside_the_states(stored):
  encoder = inputs.open_text(stored)
  assert not inputs.negative_states(stored, encoder).any()
  stored.negative_prompt = 'a blurred disc'
  with pytest.raises(ValueError, match="'a blurred disc'.*encode prompts adds"):
    inputs.negative_states(stored, encoder)


@pytest.mark.parametrize(
  'change, message',
  [
    (lambda c: c.text.update(seed=9), 'states of another text encoder'),
    (lambda c: c.update(world_seed=9), 'prompts.seed: 1 -> 9'),
    (lambda c: c.model.update(text_len=17), 'takes model.text_len=17'),
  ],
)
def test_states_of_something_else_are_refused_by_name(stored, change, message):
  change(stored)
  with pytest.raises(ValueError, match=message):
    inputs.open_states(
      stored, inputs.open_prompts(stored), inputs.open_text(stored)
    )
