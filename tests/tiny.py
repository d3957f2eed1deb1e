"""The bouncing world's phases, so small that each takes seconds.

For the tests, and a config file for the programs in launch/:

  hiar-jax train --config=tests/tiny.py:teacher,/tmp/tiny
"""

import pathlib

import jax
import ml_collections
import numpy as np

from hiar_jax.configs import bouncing, bouncing_linear
from hiar_jax.data import trajectories, trajectory_files
from hiar_jax.denoiser import Denoiser
from hiar_jax.models.config import WanConfig
from hiar_jax.training import inputs, phase_parts
from hiar_jax.training import loop as training_loop
from hiar_jax.weights import networks

PHASES = ('codec', *bouncing_linear.PHASES)

_LORA = '_lora'
# Two tokens a frame, for tests of one training step.
DENOISER = Denoiser(
  WanConfig(
    dim=12,
    ffn_dim=16,
    num_heads=2,
    num_layers=2,
    latent_height=2,
    latent_width=4,
    channels=2,
    freq_dim=8,
    text_dim=8,
    text_len=3,
  )
)


def config(phase: str, root: str | pathlib.Path) -> ml_collections.ConfigDict:
  """A phase of `configs/bouncing_linear.py` with everything below `root`.

  Two layers of width 16; 6 frames, that is 2 blocks, of 4x4 latents. The phase
  'codec' is that of `configs/bouncing.py`. 'distill_lora' and the like train
  adapters.
  """
  root = pathlib.Path(root)
  if phase.endswith(_LORA):
    c = config(phase.removesuffix(_LORA), root)
    c.workdir = str(root / phase)
    c.lora = dict(rank=4, alpha=8.0)
    return c
  if phase in ('codec_start', 'codec'):
    return _codec(bouncing.get_config(phase), phase, root)
  c = bouncing_linear.get_config(phase)
  c.workdir = str(root / phase)
  c.world = dict(height=32, width=32, num_frames=6)
  c.text = dict(dim=8, length=4)
  c.codec.update(dict(path=str(root / 'codec.npz'), channels=4, num_videos=8))
  c.model.update(
    dict(
      dim=16,
      ffn_dim=16,
      num_heads=2,
      num_layers=2,
      unroll=1,
      latent_height=4,
      latent_width=4,
      channels=4,
      freq_dim=8,
      text_dim=8,
      text_len=4,
    )
  )
  c.iterations = 6
  c.batch_size = 2
  c.checkpoint_every = 2
  c.log_every = 1
  if phase == 'teacher':
    return c
  c.rollout.window = 6
  c.teacher_weights = str(root / 'teacher' / training_loop.WEIGHTS)
  c.trajectories.update(
    dict(
      dir=str(root / 'trajectories'),
      num=4,
      num_frames=6,
      shard_size=2,
      batch_size=2,
      num_steps=2,
    )
  )
  if phase != 'student_start':
    c.student_weights = str(root / 'student_start' / training_loop.WEIGHTS)
    c.rollout_blocks = (2, 2)
    c.distill.generator_every = 2
    c.distill.ema_start = 2
  return c


def _codec(c, phase, root):
  c.workdir = str(root / phase)
  c.world = dict(height=32, width=32, num_frames=6)
  c.text = dict(dim=8, length=4)
  c.codec.path = str(root / 'codec' / training_loop.WEIGHTS)
  c.vae.update(
    dict(
      base_dim=4, z_dim=4, dim_mult=(1, 1, 1), mean=(0.0,) * 4, std=(1.0,) * 4
    )
  )
  c.clips.update(dict(crop=16, num_frames=5))
  c.codec_training.start_weights = ''
  c.iterations = 6
  c.batch_size = 2
  c.checkpoint_every = 2
  c.log_every = 1
  return c


def get_config(arguments: str) -> ml_collections.ConfigDict:
  """'phase,root' from the command line."""
  return config(*arguments.split(','))


def write_inputs(root: str | pathlib.Path) -> None:
  """What earlier phases would have left in `root`, of random numbers.

  Unlike a network that was just initialised, these predict some flow.
  """
  c = config('distill', root)
  denoiser = Denoiser(WanConfig(**c.model))
  for path, seed in ((c.teacher_weights, 0), (c.student_weights, 1)):
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    networks.save_weights(path, random_params(denoiser, seed))
  prompts = inputs.open_prompts(c)
  encoder = inputs.open_text(c)
  states = inputs.open_states(c, prompts, encoder)
  manifest = trajectories.make_manifest(
    phase_parts.trajectory_config(c),
    phase_parts.rollout_config(c).levels,
    denoiser.config,
    random_params(denoiser, 0),
    prompts=prompts.identity(),
    num_prompts=len(prompts),
    text=encoder.identity,
    num=c.trajectories.num,
    shard_size=c.trajectories.shard_size,
    seed=c.trajectories.seed,
    num_frames=c.world.num_frames,
  )
  manifest.settle(c.trajectories.dir)
  rng = np.random.default_rng(2)
  for shard in range(manifest.num_files):
    records = [
      trajectory_files.pack(
        index,
        rng.normal(size=manifest.latents_shape).astype(np.float16),
        states[index]['text'],
        prompts[index],
      )
      for index in manifest.indices(shard)
    ]
    path = trajectory_files.Manifest.path(c.trajectories.dir, shard)
    trajectory_files.write_shard(path, records)


def random_params(denoiser: Denoiser, seed: int, scale: float = 0.3) -> dict:
  """Parameters all of which matter; a new head is zero, and so is its flow."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: rng.normal(0, scale, x.shape).astype(np.float32),
    jax.eval_shape(denoiser.init, jax.random.key(0)),
  )
