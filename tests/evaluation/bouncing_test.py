"""The evaluation: true videos are near perfect, every fault has its number."""

import numpy as np
import pytest
import scipy.ndimage

from hiar_jax.codecs import linear, pixels
from hiar_jax.data import bouncing, small_worlds
from hiar_jax.evaluation import bouncing as evaluation_bouncing
from hiar_jax.evaluation import bouncing_frames

CFG = bouncing.WorldConfig()
COUNT = 16


@pytest.fixture(scope='module')
def scenes():
  return [bouncing.sample_scene(CFG, 5, index) for index in range(COUNT)]


@pytest.fixture(scope='module')
def videos(scenes):
  return np.stack([bouncing.render(scene, CFG) for scene in scenes])


@pytest.fixture(scope='module')
def prompts(scenes):
  return [full_caption(scene) for scene in scenes]


def full_caption(scene):
  return (
    f'a {scene.size} {scene.colour} {scene.shape} drifting {scene.motion} '
    f'over {scene.background}'
  )


def make_video(shape='disc', colour='red', background='black', **kwargs):
  """A shape that drifts right at 1 px a frame."""
  num_frames = kwargs.get('num_frames', 16)
  speed = kwargs.get('speed', 1.0)
  positions = np.stack(
    [np.full(num_frames, 30.3), 14 + speed * np.arange(num_frames)], axis=1
  )
  cover = bouncing.coverage(
    shape, positions, kwargs.get('radius', 10.0), height=64, width=64
  )
  return bouncing.composite(
    cover, bouncing.PALETTE[colour], bouncing.BACKGROUNDS[background]
  )


PROMPT = 'a small red disc drifting slowly over black'


def test_held_out_captions_say_everything_and_stay_the_same():
  scenes = evaluation_bouncing.held_out_scenes(CFG, 30)
  assert len(scenes) == 30
  for scene in scenes:
    for term in (scene.shape, scene.colour, scene.background):
      assert term in scene.caption
  again = evaluation_bouncing.held_out_scenes(CFG, 2)
  assert [s.caption for s in again] == [s.caption for s in scenes[:2]]
  assert scenes[0].positions[0].tolist() not in [
    bouncing.sample_scene(CFG, 1, i).positions[0].tolist() for i in range(99)
  ]


def test_true_videos_score_near_perfect(videos, prompts):
  result = evaluation_bouncing.evaluate_prompts(videos, prompts)
  assert result['visible'] == 1.0
  assert result['background_error'] < 0.01
  assert result['colour_error'] < 0.01
  assert result['shape_correct'] > 0.99
  assert result['motion_correct'] == 1.0
  assert result['steadiness'] > 0.9
  assert result['ideal_db'] > 50
  assert abs(result['ideal_db_drift']) < 1.5
  assert abs(result['motion_drift']) < 0.2


def test_codec_round_trip_scores_as_well_as_the_codec_allows(videos, prompts):
  codec = linear.fit_linear_codec(
    bouncing.videos(CFG, seed=0, num=50), channels=16
  )
  latents = codec.encode(pixels.to_float(videos))
  decoded = np.asarray(pixels.from_float(codec.decode(latents)))
  result = evaluation_bouncing.evaluate_prompts(decoded, prompts)
  assert result['visible'] == 1.0
  assert result['background_error'] < 0.01
  assert result['colour_error'] < 0.03
  assert result['shape_correct'] > 0.97
  assert result['motion_correct'] == 1.0
  assert result['steadiness'] > 0.9
  assert result['ideal_db'] > 27


def test_measured_place_and_colours_are_the_scene_s(scenes, videos):
  for scene, video in zip(scenes, videos, strict=True):
    frames = bouncing_frames.measure_frames(video)
    np.testing.assert_allclose(frames.centre_F2, scene.positions, atol=0.3)
    np.testing.assert_array_equal(frames.colour_F3, [scene.rgb] * 21)
    np.testing.assert_array_equal(
      frames.background_F3, [scene.background_rgb] * 21
    )


@pytest.mark.parametrize('speed', [0.5, 1.0, 2.5])
def test_motion_is_measured_in_pixels_per_frame(speed):
  score = evaluation_bouncing.evaluate_video(make_video(speed=speed), PROMPT)
  np.testing.assert_allclose(score.motion, speed, atol=0.03)
  np.testing.assert_allclose(score.motion_by_quarter, speed, atol=0.06)
  assert score.steadiness == 1.0


def test_a_frozen_video_is_told_by_its_motion_alone(videos, prompts):
  frozen = np.repeat(videos[:, :1], 21, axis=1)
  result = evaluation_bouncing.evaluate_prompts(frozen, prompts)
  assert result['motion'] < 0.01
  assert result['motion_correct'] == 0.0
  assert result['shape_correct'] > 0.99
  assert result['ideal_db'] > 50


def test_a_wrong_speed_is_told():
  fast = evaluation_bouncing.evaluate_video(make_video(speed=2.4), PROMPT)
  slow = evaluation_bouncing.evaluate_video(make_video(speed=1.0), PROMPT)
  either = evaluation_bouncing.evaluate_video(
    make_video(speed=2.4), 'a red disc'
  )
  assert fast.motion_correct == 0.0
  assert slow.motion_correct == 1.0
  assert either.motion_correct == 1.0


def test_a_wrong_colour_is_told_and_by_how_much():
  right = evaluation_bouncing.evaluate_video(make_video(), PROMPT)
  wrong = evaluation_bouncing.evaluate_video(make_video(colour='cyan'), PROMPT)
  expected = np.linalg.norm(
    np.subtract(bouncing.PALETTE['red'], bouncing.PALETTE['cyan'])
  )
  assert right.colour_error == 0.0
  np.testing.assert_allclose(wrong.colour_error, expected / 441.67, rtol=1e-3)
  assert wrong.background_error == 0.0
  assert wrong.shape_correct == 1.0
  assert wrong.ideal_db < right.ideal_db - 20


def test_a_wrong_background_is_told():
  score = evaluation_bouncing.evaluate_video(
    make_video(background='dark red'), PROMPT
  )
  assert score.background_error > 0.2
  assert score.colour_error == 0.0
  assert score.ideal_db < 20


@pytest.mark.parametrize('radius', [8.5, 14.0])
@pytest.mark.parametrize('shape', small_worlds.SHAPES)
def test_every_shape_is_told_from_the_others(shape, radius):
  score = evaluation_bouncing.evaluate_video(
    make_video(shape, radius=radius), PROMPT
  )
  assert score.shape == shape
  assert score.shape_correct == float(shape == 'disc')
  if shape != 'disc':
    right = evaluation_bouncing.evaluate_video(
      make_video(shape, radius=radius), PROMPT.replace('disc', shape)
    )
    assert score.ideal_db < right.ideal_db - 10


def test_a_missing_object_is_told():
  video = make_video()
  video[8:] = bouncing.BACKGROUNDS['black']
  score = evaluation_bouncing.evaluate_video(video, PROMPT)
  assert score.visible == 0.5
  assert score.shape_correct == 0.5
  assert score.colour_error == 0.0
  assert score.ideal_db_by_quarter[0] > 45
  assert score.ideal_db_by_quarter[3] < 22
  np.testing.assert_allclose(score.motion_by_quarter[:2], 1.0, atol=0.06)
  assert np.isnan(score.motion_by_quarter[3])


def test_noise_and_emptiness_have_no_object():
  noise = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), np.uint8)
  for video in (noise, np.zeros_like(noise)):
    score = evaluation_bouncing.evaluate_video(video, PROMPT)
    assert score.visible == 0.0
    assert score.motion_correct == 0.0
    assert np.isnan(score.motion)


@pytest.mark.parametrize('kind', ['white', 'grey', 'smooth'])
def test_noise_is_no_video_of_this_world(kind):
  rng = np.random.default_rng(0)
  noise = rng.normal(0, 1, (24, 64, 64, 3))
  if kind == 'smooth':
    noise = scipy.ndimage.gaussian_filter(noise, (0, 4, 4, 0))
  if kind == 'grey':
    noise = noise / 4
  noise = np.clip(128 + 60 * noise / noise.std(), 0, 255)
  if kind == 'grey':
    noise = 128 + (noise - 128) / 2
  prompt = 'a large red disc drifting fast over black'
  scores = evaluation_bouncing.evaluate_prompts(
    [noise.astype(np.uint8)], [prompt]
  )
  assert scores['no_video'] == 1 and scores['motion_correct'] == 0
  assert np.isnan(scores['motion']) and np.isnan(scores['steadiness'])
  table = evaluation_bouncing.format_table({'noise': scores})
  assert table.splitlines()[-1].startswith('noise: 1 videos are none of this')


def test_a_missing_object_costs_what_an_object_is_worth():
  cover = bouncing.coverage(
    'disc', np.array([[32.0, 32.0]] * 8), 11.75, height=64, width=64
  )
  video = bouncing.composite(cover, bouncing.PALETTE['red'], (0, 0, 0))
  empty = np.zeros_like(video)
  mse = np.mean((video.astype(float) - empty) ** 2)
  score = evaluation_bouncing.evaluate_video(empty, PROMPT)
  np.testing.assert_allclose(
    score.ideal_db, 10 * np.log10(255**2 / mse), atol=0.05
  )


def test_a_ghost_is_not_an_object():
  ghost = np.uint8(0.2 * make_video())
  assert evaluation_bouncing.evaluate_video(ghost, PROMPT).visible == 0.0


def test_a_speck_elsewhere_does_not_move_the_object():
  video = make_video()
  video[:, 58:61, 3:6] = bouncing.PALETTE['red']
  clean = bouncing_frames.measure_frames(make_video())
  speckled = bouncing_frames.measure_frames(video)
  np.testing.assert_allclose(speckled.centre_F2, clean.centre_F2, atol=1e-6)


# Warnings are errors in every test: of NumPy's "Mean of empty slice" as well.
def test_an_object_fainter_than_another_has_its_own_colour():
  video = np.uint8(0.6 * make_video())
  video[:, 48:58, 2:12] = bouncing.PALETTE['red']
  alone = bouncing_frames.measure_frames(np.uint8(0.6 * make_video()))
  beside = bouncing_frames.measure_frames(video)
  assert beside.visible_F.all()
  np.testing.assert_allclose(beside.colour_F3, alone.colour_F3, atol=1e-6)


def test_fading_shows_as_drift():
  share = np.linspace(1.0, 0.6, 16)[:, None, None, None]
  faded = np.uint8(make_video() * share + 60 * (1 - share))
  result = evaluation_bouncing.evaluate_prompts(
    [faded, make_video()], [PROMPT] * 2
  )
  faded_only = evaluation_bouncing.evaluate_prompts([faded], [PROMPT])
  assert faded_only['ideal_db_drift'] < -10
  np.testing.assert_allclose(
    faded_only['ideal_db_drift'],
    faded_only['ideal_db_q4'] - faded_only['ideal_db_q1'],
  )
  np.testing.assert_allclose(
    result['ideal_db_drift'], faded_only['ideal_db_drift'] / 2, atol=0.3
  )


def test_what_the_prompt_leaves_open_is_not_judged():
  score = evaluation_bouncing.evaluate_video(
    make_video('ring', 'cyan', 'grey', radius=13.0), 'something'
  )
  assert np.isnan(score.colour_error)
  assert np.isnan(score.background_error)
  assert np.isnan(score.shape_correct)
  assert score.shape == 'ring'
  assert score.ideal_db > 45


def test_long_videos_are_measured_as_short_ones():
  # More frames than are measured at once, and not a multiple of them.
  short = make_video(num_frames=16)
  long = np.concatenate([short, short[-2::-1]] * 5)
  one = evaluation_bouncing.evaluate_video(short, PROMPT)
  many = evaluation_bouncing.evaluate_video(long, PROMPT)
  np.testing.assert_allclose(many.ideal_db, one.ideal_db, atol=0.5)
  np.testing.assert_allclose(many.motion, one.motion, atol=0.02)


def test_table_shows_every_result_and_dashes_for_nan():
  results = {
    'true': evaluation_bouncing.evaluate_prompts([make_video()], [PROMPT]),
    'open': evaluation_bouncing.evaluate_prompts([make_video()], ['something']),
  }
  lines = evaluation_bouncing.format_table(results).splitlines()
  assert len({len(line) for line in lines}) == 1
  assert lines[1].startswith('true')
  assert lines[2].split()[:5] == ['open', '1.00', '-', '-', '-']


@pytest.mark.parametrize(
  ('video', 'message'),
  [
    (np.zeros((8, 32, 64, 3), np.uint8), r'not uint8 \[8, 32, 64, 3\]'),
    (np.zeros((8, 64, 64, 3), np.float32), 'not float32'),
    (np.zeros((5, 64, 64, 3), np.uint8), '5 frames'),
  ],
)
def test_an_unfit_video_is_refused(video, message):
  with pytest.raises(ValueError, match=message):
    evaluation_bouncing.evaluate_video(video, PROMPT)


def test_videos_without_prompts_are_refused():
  with pytest.raises(ValueError, match='1 videos for 2 prompts'):
    evaluation_bouncing.evaluate_prompts([make_video()], [PROMPT] * 2)
