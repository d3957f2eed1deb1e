"""The small world's whole training in minutes: does everything run here?

  for phase in codec_start codec; do
    hiar-jax train --config=bouncing_smoke:$phase
  done
  hiar-jax encode videos --config=bouncing_smoke:teacher_start
  hiar-jax encode videos --config=bouncing_smoke:teacher_last
  for phase in teacher_start teacher teacher_last; do
    hiar-jax train --config=bouncing_smoke:$phase
  done
  hiar-jax trajectories --config=bouncing_smoke
  for phase in student_start distill; do
    hiar-jax train --config=bouncing_smoke:$phase
  done
  hiar-jax export --config=bouncing_smoke --out=runs/bouncing_smoke/student
  hiar-jax generate --pipeline=runs/bouncing_smoke/student \
    --prompt "a large red disc drifting fast over dark blue" --num_blocks=3

The phases, networks and programs are those of configs/bouncing.py, small and
with few iterations: videos come out grey. Of one's own first try the same
numbers are to be changed in all phases.
"""

import ml_collections

from hiar_jax.configs import bouncing

PHASES = bouncing.PHASES
_RUNS = 'runs/bouncing_smoke'
# Of every phase; of the critic in those of the distillation.
_ITERATIONS = 8


def get_config(phase: str = 'distill') -> ml_collections.ConfigDict:
  """The config of a phase, as in `bouncing`."""
  c = bouncing.get_config(phase)
  _move(c)
  c.name = 'bouncing_smoke'
  c.iterations = _ITERATIONS
  c.batch_size = 2
  c.log_every = 4
  c.checkpoint_every = 4
  c.world.num_frames = 21
  c.vae.update(base_dim=4, dim_mult=(1, 2, 2))
  c.model.update(dim=32, ffn_dim=64, num_layers=2, unroll=1, freq_dim=16)
  if 'clips' in c:
    c.clips.num_frames = 9
  # The same in both parts of codec and teacher, which then are one program.
  if c.optimiser.name == 'muon':
    c.optimiser.update(learning_rate=3e-3, adam_learning_rate=1e-3, warmup=2)
  if 'latents' in c:
    c.latents.update(num=16, shard_size=16, batch_size=4)
  if 'trajectories' in c:
    c.trajectories.update(
      num=8, num_frames=6, shard_size=8, batch_size=4, num_steps=6
    )
    c.rollout.window = 6
  if 'rollout_blocks' in c:
    c.rollout_blocks = (2, 2)
    c.distill.update(generator_every=2, ema_start=2)
  return c


def _move(section: ml_collections.ConfigDict) -> None:
  """Puts everything that the phases leave into a folder of its own."""
  for key, value in section.items():
    if isinstance(value, ml_collections.ConfigDict):
      _move(value)
    elif isinstance(value, str) and value.startswith('runs/bouncing/'):
      section[key] = value.replace('runs/bouncing', _RUNS, 1)
