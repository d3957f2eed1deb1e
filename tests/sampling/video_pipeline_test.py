"""A pipeline makes what `rollout` defines, and says what is wrong."""

import dataclasses
import json
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hiar_jax
from hiar_jax import rollout
from hiar_jax.codecs import linear, pixels
from hiar_jax.denoiser import Denoiser
from hiar_jax.models.config import WanConfig
from hiar_jax.runtime import video_io
from hiar_jax.sampling import (
  calls,
  choices,
  loading,
  seeds,
  video_pipeline,
)
from hiar_jax.weights import layouts

_CONFIG = {
  'name': 'tiny',
  'model': {
    'dim': 24,
    'ffn_dim': 32,
    'num_heads': 2,
    'num_layers': 2,
    'latent_height': 4,
    'latent_width': 4,
    'channels': 4,
    'freq_dim': 16,
    'text_dim': 16,
    'text_len': 6,
  },
  'text': {'dim': 16, 'length': 6},
  'schedule': {'shift': 5.0, 'indices': (1000, 500)},
  'rollout': {'frames_per_block': 2, 'window': 6, 'sink': 1},
  'generate': {'order': 'step_first', 'fps': 12.0},
}
_PROMPT = 'a red disc over black'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A pipeline with random weights, none of them zero, in a folder."""
  path = tmp_path_factory.mktemp('pipeline') / 'tiny'
  denoiser = Denoiser(WanConfig(**_CONFIG['model']))
  params = jax.eval_shape(lambda: denoiser.init(jax.random.key(0)))
  leaves, structure = jax.tree.flatten(params)
  rng = np.random.default_rng(0)
  leaves = [0.3 * rng.standard_normal(x.shape, np.float32) for x in leaves]
  basis = np.linalg.qr(rng.standard_normal((48, 48)))[0][:, :4]
  codec = linear.LinearCodec(
    mean_P=jnp.zeros(48),
    encoder_PC=jnp.asarray(4 * basis, jnp.float32),
    decoder_CP=jnp.asarray(basis.T / 4, jnp.float32),
    spatial_stride=4,
  )
  loading.export(
    path, config=_CONFIG, params=structure.unflatten(leaves), codec=codec
  )
  return path


@pytest.fixture(scope='module')
def pipe(folder):
  return loading.load(folder)


def _with_rollout(pipe, **changes):
  config = dataclasses.replace(pipe.rollout, **changes)
  return dataclasses.replace(pipe, rollout=config)


def _defined(pipe, order, initial=None, **options):
  """Latents of `order` in one piece, by its definition in `rollout`."""

  @jax.jit
  def run(params, initial):
    text = pipe.denoiser.project_text(params, pipe.encoder.encode([_PROMPT]))
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(5), 0), 0)
    noise = rollout.named_noise(key[None], (2, 4, 4, 4))
    sampler = rollout.Sampler(pipe.denoiser, params, text, pipe.rollout)
    return getattr(rollout, order)(sampler, noise, 5, initial, **options)

  return np.asarray(run(pipe.params, initial))[0]


@pytest.mark.parametrize(
  ('order', 'context', 'options', 'num_given'),
  [
    ('step_first', 'matched', {}, 1),
    ('step_first', 'shared', {}, 0),
    ('block_first', 'matched', {}, 0),
    pytest.param(
      *('hybrid', 'matched', {'anchor_blocks': 1}, 0), marks=pytest.mark.slow
    ),
    pytest.param(
      *('hybrid', 'matched', {'block_first_steps': 1}, 0),
      marks=pytest.mark.slow,
    ),
  ],
)
def test_every_order_is_the_rollouts_own(
  pipe, order, context, options, num_given
):
  pipe = _with_rollout(pipe, context=context)
  given = initial = None
  if num_given:
    given = np.random.default_rng(1).integers(
      0, 256, (num_given, 16, 16, 3), np.uint8
    )
    initial = pipe.codec.encode(pixels.to_float(given[None]))
  video = pipe(
    _PROMPT,
    num_blocks=5,
    seed=5,
    order=order,
    initial_frames=given,
    progress=False,
    **options,
  )
  expected = _defined(pipe, order, initial, **options)
  assert video.latents.shape == (num_given + 10, 4, 4, 4)
  np.testing.assert_allclose(video.latents, expected, rtol=1e-5, atol=1e-5)
  decoded = pixels.from_float(pipe.codec.decode(expected[None]))[0]
  # A value on the edge of rounding may fall to either side.
  assert np.abs(video.frames.astype(int) - decoded).max() <= 1


def test_a_first_block_may_have_levels_of_its_own(pipe):
  own = _with_rollout(pipe, first_levels=(1.0, 0.9, 0.5, 0.0))
  video = own(_PROMPT, num_blocks=5, seed=5, order='block_first')
  np.testing.assert_allclose(
    video.latents, _defined(own, 'block_first'), rtol=1e-5, atol=1e-5
  )
  plain = pipe(_PROMPT, num_blocks=5, seed=5, order='block_first')
  assert np.abs(video.latents - plain.latents)[:2].max() > 0.1
  # Its own steps, and the others' no more than before; the last is not
  # committed.
  request = calls.Request(num_blocks=5, order='block_first')
  assert calls.num_passes(request, own.rollout) == (3 + 1) + 4 * (2 + 1) - 1
  with pytest.raises(ValueError, match="go with order 'block_first', not"):
    own(_PROMPT, num_blocks=5)


def test_sizes_and_steps_are_chosen_in_a_call(pipe):
  video = pipe(
    _PROMPT, num_blocks=2, height=8, width=24, steps=3, progress=False
  )
  assert video.shape == (4, 8, 24, 3)
  again = choices.apply(pipe, steps=(1000, 667, 333), height=8, width=24)
  np.testing.assert_array_equal(
    again(_PROMPT, num_blocks=2, progress=False).latents, video.latents
  )
  assert again.params is pipe.params


def test_context_can_be_chosen_in_the_call(pipe):
  other = _with_rollout(pipe, context='clean')
  chosen = pipe(_PROMPT, num_blocks=3, context='clean', progress=False)
  np.testing.assert_array_equal(
    chosen.latents, other(_PROMPT, num_blocks=3, progress=False).latents
  )
  matched = pipe(_PROMPT, num_blocks=3, progress=False)
  assert np.abs(chosen.latents - matched.latents).max() > 0.01


def test_a_second_or_longer_video_compiles_nothing(pipe):
  compiled = []
  jax.monitoring.register_event_duration_secs_listener(
    lambda event, _, **unused: (
      compiled.append(event)
      if event == '/jax/core/compile/backend_compile_duration'
      else None
    )
  )
  pipe = _with_rollout(pipe, window=4)  # A program that no test has run.
  pipe(_PROMPT, num_blocks=3, progress=False)
  assert compiled
  compiled.clear()
  pipe('something else', num_blocks=8, seed=1, progress=False)
  assert not compiled


def test_a_sample_does_not_depend_on_the_others(pipe, monkeypatch):
  monkeypatch.setattr(video_pipeline, 'MAX_BATCH', 2)

  def make(prompts, num_videos):
    return pipe(prompts, num_blocks=2, num_videos=num_videos, progress=False)

  many = make([_PROMPT, 'a blue ring'], 3)
  assert [v.prompt for v in many] == [_PROMPT] * 3 + ['a blue ring'] * 3
  for few, same in (
    (make([_PROMPT, 'a blue ring'], 1), (many[0], many[3])),
    (make(_PROMPT, 3), many[:3]),
    ([make(_PROMPT, 1)], many[:1]),
  ):
    assert len(few) == len(same)
    for a, b in zip(few, same):
      np.testing.assert_allclose(a.latents, b.latents, rtol=1e-5, atol=1e-5)
  assert np.abs(many[0].latents - many[1].latents).max() > 0.1
  assert np.abs(many[0].latents - many[3].latents).max() > 0.1


def test_any_video_of_a_call_is_made_again_alone_by_its_seed(pipe):
  def make(prompts, **options):
    return pipe(prompts, num_blocks=2, progress=False, **options)

  videos = make([_PROMPT, 'a blue ring'], num_videos=2, seed=7)
  assert videos[0].seed == 7
  alone = make('a blue ring', seed=videos[3].seed)
  # Batches of other sizes round differently.
  np.testing.assert_allclose(alone.latents, videos[3].latents, atol=1e-5)
  assert alone.seed == videos[3].seed
  listed = make(_PROMPT, num_videos=2, seed=[videos[1].seed, 7])
  assert [video.seed for video in listed] == [videos[1].seed, 7]
  for video, same in zip(listed, (videos[1], videos[0])):
    np.testing.assert_allclose(video.latents, same.latents, atol=1e-5)


def test_given_frames_come_first_and_matter(pipe):
  given = np.full((1, 16, 16, 3), 200, np.uint8)
  image = pipe(_PROMPT, num_blocks=2, initial_frames=given, progress=False)
  assert len(image) == 1 + 4
  seen = pipe.codec.decode(pipe.codec.encode(pixels.to_float(given[None])))
  seen = np.asarray(pixels.from_float(seen))[0].astype(int)
  assert np.abs(image.frames[:1] - seen).max() <= 1
  alone = pipe(_PROMPT, num_blocks=2, progress=False)
  assert np.abs(image.latents[1:] - alone.latents).max() > 0.01


@pytest.mark.parametrize(
  ('options', 'passes'),
  [
    # The last block of a sweep is not committed.
    ({}, 2 * (2 * 6 - 1)),
    ({'order': 'block_first'}, 3 * 6 - 1),
    ({'order': 'hybrid', 'anchor_blocks': 1}, 3 + 2 * (2 * 5 - 1)),
  ],
)
def test_progress_counts_the_network_passes(pipe, options, passes):
  request = calls.Request(num_blocks=6, **options)
  reports = []
  keys = seeds.sample_keys(np.uint32(0), np.zeros(1, int), np.zeros(1, int))
  calls.sample(
    pipe.denoiser,
    pipe.params,
    pipe.rollout,
    request,
    keys,
    pipe.encoder.encode([_PROMPT]),
    None,
    reports.append,
  )
  assert sum(reports) == passes == calls.num_passes(request, pipe.rollout)
  # After each block, not at the end.
  assert len(reports) >= 6


def test_progress_is_shown_on_request(pipe, capsys):
  pipe(_PROMPT, num_blocks=1)
  assert '2/2' in capsys.readouterr().err
  pipe(_PROMPT, num_blocks=1, progress=False)
  assert not capsys.readouterr().err


def test_a_video_saves_and_shows_itself(tmp_path):
  frames = np.zeros((5, 16, 24, 3), np.uint8)
  frames[:, 4:12, 4:12] = (230, 40, 40)
  video = video_pipeline.Video(frames, 12.0, 'a red <square>')
  assert len(video) == 5 and video.shape == (5, 16, 24, 3)
  assert repr(video) == "Video('a red <square>', [5, 16, 24, 3], fps=12)"
  video.save(tmp_path / 'video.mp4')
  read, fps = video_io.read_video(tmp_path / 'video.mp4')
  assert fps == 12 and read.shape == (5, 512, 768, 3)
  video.save(tmp_path / 'small.mp4', scale=1)
  read, _ = video_io.read_video(tmp_path / 'small.mp4')
  assert read.shape == (5, 16, 24, 3)
  sheet = video.contact_sheet(tmp_path / 'sheet.png')
  assert (tmp_path / 'sheet.png').exists()
  assert sheet.size == video.contact_sheet().size
  html = video._repr_html_()
  assert 'data:video/mp4;base64,' in html and 'a red &lt;square&gt;' in html


def test_loaded_weights_are_the_exported_ones(pipe, folder, tmp_path):
  loading.export(
    tmp_path / 'copy', config=_CONFIG, params=pipe.params, codec=pipe.codec
  )
  again = loading.load(tmp_path / 'copy')
  for name in (
    layouts.CONFIG_FILE,
    layouts.STUDENT_FILE,
    layouts.LINEAR_CODEC_FILE,
  ):
    copy = tmp_path / 'copy' / name
    assert copy.read_bytes() == (folder / name).read_bytes()
  np.testing.assert_array_equal(
    pipe(_PROMPT, num_blocks=2, progress=False).frames,
    again(_PROMPT, num_blocks=2, progress=False).frames,
  )


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'num_blocks': 0}, 'num_blocks=0 is not at least 1'),
    ({'num_blocks': 10**8}, r"GB of the host's memory .* free; .*--stream"),
    ({'num_videos': 0}, 'num_videos=0 is not at least 1'),
    ({'seed': -1}, r'seed=-1 is not a whole number in 0..2\*\*96-1'),
    ({'seed': 1.5}, 'seed=1.5 is not a whole number'),
    ({'seed': [1, 2]}, '2 seeds for 1 videos; give one seed, or one for each'),
    ({'seed': [3, 'x'], 'num_videos': 2}, "seed='x' is not a whole number"),
    ({'order': 'sideways'}, "order='sideways' is not one of"),
    ({'order': 'hybrid'}, "order 'hybrid' takes either anchor_blocks, such"),
    ({'anchor_blocks': 1}, "with order 'step_first'"),
    (
      {'order': 'hybrid', 'anchor_blocks': 9},
      'anchor_blocks=9 is not in 0..7, the number of blocks',
    ),
    (
      {'order': 'hybrid', 'block_first_steps': 3},
      'block_first_steps=3 is not in 0..2, the number of steps',
    ),
    (
      {'order': 'hybrid', 'anchor_blocks': 1, 'context': 'shared'},
      "order 'hybrid' has no context 'shared'",
    ),
    ({'context': 'murky'}, "context='murky' is not one of"),
    ({'prompt': ' '}, "prompt ' ' is not a text"),
    ({'prompt': []}, 'there is no prompt'),
    ({'prompt': ['a', 3]}, 'prompt 3 is not a text'),
    (
      {'initial_frames': np.zeros((1, 8, 16, 3), np.uint8)},
      'initial_frames must be uint8 .F, 16, 16, 3., not uint8 .1, 8, 16, 3.',
    ),
    (
      {'initial_frames': np.zeros((1, 16, 16, 3))},
      'not float64',
    ),
  ],
)
def test_a_wrong_value_is_named(pipe, options, message):
  with pytest.raises(ValueError, match=message):
    pipe(**{'prompt': _PROMPT, 'progress': False} | options)


def test_an_unknown_name_or_folder_is_named(tmp_path):
  with pytest.raises(ValueError, match="no pipeline 'bounce'"):
    loading.load('bounce')
  with pytest.raises(FileNotFoundError, match='it has no config.json'):
    loading.load(tmp_path)


def _truncated(path):
  path.write_bytes(path.read_bytes()[:-20])


def _nested(path):
  path.write_text(100_000 * '{"a":' + '1' + 100_000 * '}')


@pytest.mark.parametrize(
  ('name', 'damage', 'message'),
  [
    ('student.safetensors', pathlib.Path.unlink, 'no weights at'),
    ('student.safetensors', _truncated, 'weights .* are damaged'),
    ('codec.npz', pathlib.Path.unlink, 'no codec at'),
    ('codec.npz', _truncated, 'codec .* is damaged'),
    ('config.json', _truncated, 'is not JSON'),
    ('config.json', _nested, 'is not JSON: it is nested too deeply'),
    ('config.json', lambda p: p.write_text('{}'), "the config has no ..name'"),
  ],
)
def test_a_damaged_folder_is_named(folder, tmp_path, name, damage, message):
  for path in folder.iterdir():
    (tmp_path / path.name).write_bytes(path.read_bytes())
  damage(tmp_path / name)
  with pytest.raises((FileNotFoundError, ValueError), match=message):
    loading.load(tmp_path)


def test_weights_of_another_model_are_refused(folder):
  config = json.loads((folder / layouts.CONFIG_FILE).read_text())
  config['model']['dim'] = 36
  with pytest.raises(ValueError, match='does not fit the model'):
    loading.from_config(
      config,
      weights=folder / layouts.STUDENT_FILE,
      codec=folder / layouts.LINEAR_CODEC_FILE,
    )


def test_the_package_imports_nothing_until_it_is_used():
  done = subprocess.run(
    [
      *(sys.executable, '-c'),
      'import sys, hiar_jax; dir(hiar_jax); print("jax" in sys.modules)',
    ],
    capture_output=True,
    text=True,
    check=True,
  )
  assert done.stdout == 'False\n'


def test_the_package_hands_out_what_it_lists():
  root = pathlib.Path(hiar_jax.__file__).parent
  for name in hiar_jax.__all__:
    is_module = (root / f'{name}.py').exists() or (root / name).is_dir()
    assert is_module or getattr(hiar_jax, name), name
  assert hiar_jax.load is loading.load
  assert hiar_jax.rollout is rollout
  with pytest.raises(AttributeError, match='no attribute .hierarchy.'):
    _ = hiar_jax.hierarchy


def test_the_version_is_that_of_the_distribution():
  setup = pathlib.Path(hiar_jax.__file__).parents[1] / 'setup.py'
  version = re.search(r"version='(.*?)'", setup.read_text())[1]
  assert hiar_jax.__version__ == version
