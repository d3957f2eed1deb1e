"""The bouncing world: reproducible, true to its own numbers and captions."""

import hashlib

import numpy as np
import pytest

from hiar_jax.data import bouncing, bouncing_words, small_worlds

CFG = bouncing.WorldConfig()


def scenes(count, cfg=CFG, seed=0):
  return [bouncing.sample_scene(cfg, seed, index) for index in range(count)]


def test_a_scene_does_not_depend_on_what_was_drawn_before():
  alone = bouncing.sample_scene(CFG, 3, 17)
  after = scenes(18, seed=3)[17]
  assert alone.caption == after.caption
  np.testing.assert_array_equal(alone.positions, after.positions)


def test_seed_and_index_both_matter():
  positions = [
    bouncing.sample_scene(CFG, seed, index).positions[0]
    for seed, index in [(0, 0), (0, 1), (1, 0)]
  ]
  assert len(np.unique(positions, axis=0)) == 3


def test_scene_choices_are_the_same_on_every_machine():
  # Captions only: the last bit of a position may depend on the machine's sine.
  captions = '\n'.join(scene.caption for scene in scenes(64))
  digest = hashlib.sha256(captions.encode()).hexdigest()
  assert digest[:16] == '1efa50acfa4495b4'


def test_shape_stays_wholly_inside_for_ten_thousand_frames():
  cfg = bouncing.WorldConfig(num_frames=10_000)
  for scene in scenes(20, cfg):
    assert scene.positions.min() >= scene.radius - 1e-6
    assert scene.positions.max() <= 64 - scene.radius + 1e-6


def test_shape_moves_at_its_speed_between_bounces():
  for scene in scenes(50):
    steps = np.diff(scene.positions, axis=0)
    straight = (
      np.abs(np.abs(steps) - np.abs(scene.velocity)).max(axis=-1) < 1e-9
    )
    # A frame in which the shape meets a wall covers less ground, never more.
    assert (np.linalg.norm(steps, axis=-1) <= scene.speed + 1e-9).all()
    assert straight.mean() > 0.5
    np.testing.assert_allclose(np.linalg.norm(scene.velocity), scene.speed)


def test_reflection_is_elastic():
  cfg = bouncing.WorldConfig(num_frames=400)
  for scene in scenes(20, cfg):
    steps = np.diff(scene.positions, axis=0)
    for axis in range(2):
      whole = np.isclose(np.abs(steps[:, axis]), abs(scene.velocity[axis]))
      assert whole.mean() > 0.7
      signs = np.sign(steps[whole, axis])
      # Slow axes may never reach a wall; fast ones must have turned round.
      if abs(scene.velocity[axis]) > 0.5:
        assert set(signs) == {-1.0, 1.0}


@pytest.mark.parametrize('shape', small_worlds.SHAPES)
def test_rendered_centroid_is_the_position(shape):
  positions = np.array([[20.0, 30.0], [31.3, 40.8], [44.5, 19.25]])
  cover = bouncing.coverage(shape, positions, 11.3, height=64, width=64)
  grid = np.arange(64) + 0.5
  mass = cover.sum(axis=(1, 2))
  y = (cover.sum(axis=2) * grid).sum(axis=1) / mass
  x = (cover.sum(axis=1) * grid).sum(axis=1) / mass
  np.testing.assert_allclose(np.stack([y, x], -1), positions, atol=0.06)


@pytest.mark.parametrize(
  ('shape', 'area'),
  [
    ('disc', np.pi),
    ('ring', np.pi * 0.75),
    ('square', 4 * 0.85**2),
    ('triangle', 0.75 * np.sqrt(3)),
  ],
)
def test_coverage_has_the_area_of_the_shape(shape, area):
  cover = bouncing.coverage(
    shape, np.array([[31.7, 32.2]]), 12.0, height=64, width=64
  )
  np.testing.assert_allclose(cover.sum(), area * 144, rtol=0.01)


def test_a_video_holds_only_blends_of_its_two_colours():
  scene = bouncing.sample_scene(CFG, 0, 5)
  video = bouncing.render(scene, CFG)
  assert video.shape == (21, 64, 64, 3)
  assert video.dtype == np.uint8
  low = np.minimum(scene.rgb, scene.background_rgb)
  high = np.maximum(scene.rgb, scene.background_rgb)
  assert ((video >= low) & (video <= high)).all()
  colours = np.unique(video.reshape(-1, 3), axis=0).tolist()
  assert list(scene.rgb) in colours
  assert list(scene.background_rgb) in colours


def test_shape_and_background_colours_are_far_apart():
  for rgb in bouncing.PALETTE.values():
    for other in bouncing.BACKGROUNDS.values():
      assert np.linalg.norm(np.subtract(rgb, other)) > 100


def test_every_caption_names_its_scene():
  free = 0
  for scene in scenes(400):
    terms = bouncing_words.parse_prompt(scene.caption)
    assert terms.shape == scene.shape, scene.caption
    assert terms.colour == scene.colour, scene.caption
    assert terms.background == scene.background, scene.caption
    assert terms.size in (None, scene.size), scene.caption
    assert terms.motion in (None, scene.motion), scene.caption
    free += 'drifting' not in scene.caption or terms.size is None
  assert 0.3 < free / 400 < 0.5


@pytest.mark.parametrize(
  ('prompt', 'expected'),
  [
    (
      'A big RED circle, quickly, on the dark blue.',
      ('disc', 'red', 'dark blue', 'large', 'fast'),
    ),
    ('a dark blue disc on black', ('disc', 'blue', 'black', None, None)),
    ('blue box over dark blue', ('square', 'blue', 'dark blue', None, None)),
    ('red square, dark green', ('square', 'red', 'dark green', None, None)),
    ('a disc on blue', ('disc', None, None, None, None)),
    ('a disc over blue', ('disc', None, None, None, None)),
    ('gray background, cyan ball', ('disc', 'cyan', 'grey', None, None)),
    # A shape that evaluation knows, and this world does not have.
    ('a blue ring', (None, 'blue', None, None, None)),
    ('a horse', (None,) * 5),
    ('', (None,) * 5),
  ],
)
def test_a_free_prompt_is_understood(prompt, expected):
  assert bouncing_words.parse_prompt(prompt) == bouncing_words.PromptTerms(
    *expected
  )


def test_synonyms_become_the_words_of_the_captions():
  assert bouncing.reword('An Box, a BIG ball, quickly against the gray') == (
    'a square, a large disc, fast over a grey'
  )
  assert bouncing.reword('a boxer and a bigger circles') == (
    'a boxer and a bigger circles'
  )


def test_no_caption_is_reworded_or_has_an_unknown_word():
  for scene in scenes(400):
    assert bouncing.reword(scene.caption) == scene.caption
    assert bouncing.unknown_words(scene.caption) == []


def test_every_word_that_was_not_taught_is_named_once():
  (note,) = bouncing.unknown_words('a red disc and two discs left over pink')
  assert note.endswith('not taught: and, two, discs, left, pink')
  assert bouncing.unknown_words('a tiny red box over the dark blue') == []


def test_a_shape_too_large_for_the_frame_is_refused():
  with pytest.raises(ValueError, match=r'30\.8 px wide .* 24x64'):
    bouncing.WorldConfig(height=24)


def test_a_negative_index_is_refused():
  with pytest.raises(ValueError, match='index=-1'):
    bouncing.sample_scene(CFG, 0, -1)
