"""The phases with one network: the teacher on videos, the student's start."""

from typing import Any

import jax

from hiar_jax.codecs import pixels
from hiar_jax.denoiser import Denoiser
from hiar_jax.models import flops, sharding
from hiar_jax.models.config import WanConfig
from hiar_jax.training import (
  adapters,
  inputs,
  network_files,
  phase_parts,
  regression,
)
from hiar_jax.training import flops as training_flops
from hiar_jax.training.phase_parts import Config, Phase


def build_teacher(config: Config) -> Phase:
  """Flow matching on captioned videos."""
  denoiser = Denoiser(WanConfig(**config.model))
  adapted = adapters.config_of(config, denoiser)
  if adapted is not None and not config.start_weights:
    raise ValueError('lora: adapters are for start_weights, which is empty')
  num_parts = _num_parts(config)
  mesh = phase_parts.open_mesh(
    config, {'model': denoiser.config}, microbatches=num_parts
  )
  optimiser = phase_parts.make_optimiser(config.optimiser, config.iterations)
  encoder = inputs.open_text(config, mesh)
  source = inputs.open_videos(config, encoder)
  codec = None if 'latents' in config else inputs.open_codec(config)
  update = regression.teacher_step(
    denoiser,
    optimiser,
    timestep_shift=config.timestep_shift,
    ema_decay=config.ema_decay,
    num_parts=num_parts,
    adapters=adapted,
  )
  key = jax.random.key(config.seed)

  def step(state, batch, iteration, base):
    if codec is not None:
      latents = codec.encode(pixels.to_float(batch['video']))
      batch = {'latents': latents, 'text': batch['text']}
    return update(state, batch, jax.random.fold_in(key, iteration), base)

  batches = phase_parts.open_batches(config, source, mesh)
  base = None
  if config.start_weights:
    params, base = adapters.start(
      *(config, 'start', network_files.find_student(config, 'start')),
      *(adapted, adapters.Bases(mesh), mesh),
    )
  elif mesh is None:
    params = denoiser.init(key)
  else:
    params = sharding.make(denoiser.init, mesh, key)
  frames = inputs.latent_frames(source.videos, codec)
  one = flops.forward_flops(denoiser.config, frames, frames)
  iteration = config.batch_size * training_flops.trained(
    denoiser.config, frames, one, adapted
  )
  return _phase(
    *(params, base, adapted, denoiser.config),
    *(optimiser, step, batches, source.finish, mesh),
    flops=iteration,
    tokens=config.batch_size * frames * denoiser.config.tokens_per_frame,
  )


def build_student_start(config: Config) -> Phase:
  """ODE regression from the teacher's weights, or others."""
  student = network_files.find_student(config, 'student', 'teacher')
  denoiser = student.denoiser
  adapted = adapters.config_of(config, denoiser)
  num_parts = _num_parts(config)
  mesh = phase_parts.open_mesh(
    config, {'model': denoiser.config}, microbatches=num_parts
  )
  optimiser = phase_parts.make_optimiser(config.optimiser, config.iterations)
  update = regression.student_start_step(
    denoiser,
    optimiser,
    phase_parts.rollout_config(config),
    context=config.start_context,
    ema_decay=config.ema_decay,
    num_parts=num_parts,
    adapters=adapted,
  )
  key = jax.random.key(config.seed)

  def step(state, batch, iteration, base):
    batch = {'trajectory': batch['latents'], 'text': batch['text']}
    return update(state, batch, jax.random.fold_in(key, iteration), base)

  params, base = adapters.start(
    *(config, 'student', student, adapted, adapters.Bases(mesh), mesh)
  )
  encoder = inputs.open_text(config, mesh)
  source = phase_parts.trajectory_source(config, encoder)
  batches = phase_parts.open_batches(config, source, mesh)
  frames = source.manifest.latents_shape[1]
  iteration = config.batch_size * training_flops.student_start_flops(
    denoiser.config,
    phase_parts.rollout_config(config),
    frames,
    config.start_context,
    adapted,
  )
  finish = lambda batch: batch
  return _phase(
    *(params, base, adapted, denoiser.config),
    *(optimiser, step, batches, finish, mesh),
    flops=iteration,
    tokens=config.batch_size * frames * denoiser.config.tokens_per_frame,
  )


def _num_parts(config: Config) -> int:
  """`microbatches` of the config, 1 unless given.

  Raises:
    ValueError: if it is out of range.
  """
  num_parts = config.get('microbatches', 1)
  if num_parts < 1 or config.batch_size % num_parts:
    raise ValueError(
      f'microbatches={num_parts} is not a divisor of batch_size='
      f'{config.batch_size}'
    )
  return num_parts


def _phase(
  params,
  base,
  adapted,
  model,
  optimiser,
  step,
  batches,
  finish,
  mesh,
  **known,
):
  state: Any = phase_parts.regression_state(params, optimiser, mesh)
  compiled = sharding.jit_step(step, state, mesh)

  def run(state, batch, iteration):
    batch = finish(sharding.put_batch(batch, mesh))
    return compiled(state, batch, iteration, base)

  return Phase(
    state=state,
    step=run,
    batches=batches,
    weights=lambda state: adapters.whole(state.ema, base, adapted, mesh),
    save_adapters=adapters.saver(adapted, model, mesh),
    **known,
  )
