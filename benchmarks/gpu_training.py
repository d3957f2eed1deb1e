"""Training steps that benchmarks/gpu.py measures: adapters over one network.

Student, critic and teacher are one frozen network with random weights, as in
configs/hiar_1_3b_lora.py; one video at a time.
"""

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import gpu_programs
from benchmarks.gpu_programs import Rows, Size
from hiar_jax.denoiser import Denoiser
from hiar_jax.models import lora
from hiar_jax.training import distill_config
from hiar_jax.training import flops as training_flops
from hiar_jax.training import state as training_state
from hiar_jax.training import steps as training_steps

PARTS = ('critic', 'generator')


def step(size: Size, part: str, backend: str) -> Rows:
  """One update after the other, each with an exit step of its own."""
  model = dataclasses.replace(size.transformer, attention=backend, remat='full')
  denoiser = Denoiser(model)
  shapes = jax.eval_shape(denoiser.init, jax.random.key(0))
  adapters = lora.LoRAConfig(rank=min(64, model.dim // 2))
  optimiser = training_state.make_optimiser(
    training_state.OptimiserConfig(), 100
  )
  steps = training_steps.Distillation(
    *(denoiser, denoiser, denoiser, optimiser, optimiser),
    rollout=gpu_programs.rollout_config(size),
    config=distill_config.DistillConfig(),
    adapters=adapters,
  )
  num_blocks = size.window // steps.rollout.frames_per_block

  def net(seed):
    factors = lora.init(adapters, shapes, jax.random.key(seed))
    return training_state.init_net(factors, optimiser)

  student = net(0)
  state = training_state.DistillState(
    iteration=jnp.zeros((), jnp.int32),
    student=student,
    critic=net(1),
    ema=jax.tree.map(jnp.copy, student.params),
  )
  text = jnp.zeros((1, model.text_len, model.text_dim))
  frozen = training_steps.Frozen(
    teacher=gpu_programs.random_params(shapes), negative_text=text
  )
  batch = {'text': text}
  if part == 'generator':
    points = (1, steps.rollout.num_steps + 1, size.window)
    frame = (model.latent_height, model.latent_width, model.channels)
    batch['trajectory'] = jnp.zeros((*points, *frame), jnp.float16)
    batch['trajectory_text'] = text
  run = functools.partial(getattr(steps, f'{part}_step'), num_blocks=num_blocks)
  compiled = (
    jax.jit(run, donate_argnums=0)
    .lower(state, frozen, batch, jax.random.key(0))
    .compile()
  )
  planned = gpu_programs.planned_bytes(compiled)
  flops = training_flops.distillation_flops(
    steps, part, 1, num_blocks, recompute=True
  )
  exit_name = 'critic_exit_step' if part == 'critic' else 'exit_step'
  iteration = 0
  while True:
    key = jax.random.key(iteration)
    iteration += 1
    started = time.perf_counter()
    state, metrics = compiled(state, frozen, batch, key)
    made = int(np.asarray(metrics[exit_name])) + 1
    jax.block_until_ready(state)
    seconds = time.perf_counter() - started
    # Those of a mean exit step, with the sweeps that this one took.
    sweeps = made / ((steps.rollout.num_steps + 1) / 2)
    total = sum(flops.values()) + (sweeps - 1) * flops['rollout']
    yield {'s': seconds, 'plan': planned, 'flops': total}
