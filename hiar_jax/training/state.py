"""Training state as pytrees, and the optimisers."""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

OPTIMISERS = ('adamw', 'muon')


@dataclasses.dataclass(frozen=True)
class OptimiserConfig:
  """AdamW, or Muon for the matrices and AdamW for the rest.

  Attributes:
    name: 'adamw' or 'muon' (optax.contrib.muon; momentum 0.95, updates scaled
      to the RMS of AdamW's, so that one learning rate serves both).
    learning_rate: peak.
    adam_learning_rate: peak for what Muon leaves to AdamW; None: the same.
    b1: of AdamW; 0.0 in DMD training, which then has no first moment.
    b2: of AdamW.
    weight_decay: decoupled.
    clip_norm: global gradient norm bound.
    warmup: iterations of linear warm-up from 0.
    decay_to: share of the peak that a cosine reaches at the last iteration; 1
      keeps the learning rate constant.
  """

  name: str = 'adamw'
  learning_rate: float = 2e-6
  adam_learning_rate: float | None = None
  b1: float = 0.0
  b2: float = 0.999
  weight_decay: float = 0.01
  clip_norm: float = 10.0
  warmup: int = 0
  decay_to: float = 1.0

  def __post_init__(self):
    if self.name not in OPTIMISERS:
      raise ValueError(f'optimiser {self.name!r} is not one of {OPTIMISERS}')
    for name in ('learning_rate', 'adam_learning_rate'):
      if (rate := getattr(self, name)) is not None and rate <= 0:
        raise ValueError(f'{name}={rate} is not positive')
    if self.adam_learning_rate is not None and self.name != 'muon':
      raise ValueError(
        f'adam_learning_rate={self.adam_learning_rate} belongs to muon; '
        f'{self.name} has learning_rate alone'
      )


# Matrices that live at the edges of the network and are better left to AdamW.
_EDGES = frozenset({'patch_embedding', 'head', 'text_in', 'time_in', 'conv_in'})


def _muon_dimensions(params):
  """Which axes of each parameter are a matrix; None leaves it to AdamW."""

  def dimensions(path, leaf):
    names = [key.key for key in path]
    if not names[-1].endswith('kernel') or not _EDGES.isdisjoint(names):
      return None
    if leaf.ndim > 3:  # A convolution: all that goes into an output channel.
      return optax.contrib.MuonDimensionNumbers(
        tuple(range(leaf.ndim - 1)), leaf.ndim - 1
      )
    # Stacked layers: the leading axis is a batch of matrices.
    return optax.contrib.MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1)

  return jax.tree_util.tree_map_with_path(dimensions, params)


def make_optimiser(
  config: OptimiserConfig, iterations: int
) -> optax.GradientTransformation:
  """The optimiser of one network over `iterations` of its updates."""

  def schedule(peak):
    if not config.warmup and config.decay_to == 1.0:
      return peak
    return optax.warmup_cosine_decay_schedule(
      0.0 if config.warmup else peak,
      peak,
      config.warmup,
      max(iterations, config.warmup + 1),
      peak * config.decay_to,
    )

  rate = schedule(config.learning_rate)
  if config.name == 'muon':
    adam_rate = rate
    if config.adam_learning_rate is not None:
      adam_rate = schedule(config.adam_learning_rate)
    update = optax.contrib.muon(
      rate,
      adam_learning_rate=adam_rate,
      weight_decay=config.weight_decay,
      adam_b1=config.b1,
      adam_b2=config.b2,
      adam_weight_decay=config.weight_decay,
      muon_weight_dimension_numbers=_muon_dimensions,
      consistent_rms=0.2,
    )
  elif config.b1 == 0:
    # AdamW without a first moment, which would be the last gradient, bit for
    # bit, in memory and in every checkpoint.
    update = optax.chain(
      optax.scale_by_rms(config.b2, eps_in_sqrt=False, bias_correction=True),
      optax.add_decayed_weights(config.weight_decay),
      optax.scale_by_learning_rate(rate),
    )
  else:
    update = optax.adamw(
      rate, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay
    )
  return optax.chain(optax.clip_by_global_norm(config.clip_norm), update)


@flax.struct.dataclass
class NetState:
  """A trained network: float32 parameters and the optimiser's state."""

  params: Any
  opt_state: Any

  def update(
    self, grads: Any, optimiser: optax.GradientTransformation
  ) -> 'NetState':
    updates, opt_state = optimiser.update(grads, self.opt_state, self.params)
    return NetState(optax.apply_updates(self.params, updates), opt_state)


@flax.struct.dataclass
class RegressionState:
  """State of the phases with one network: teacher, student start.

  Attributes:
    iteration: int32, iterations done.
    net: the network.
    ema: exponential moving average of its parameters.
  """

  iteration: jax.Array
  net: NetState
  ema: Any

  def update(
    self,
    loss: jax.Array,
    grads: Any,
    optimiser: optax.GradientTransformation,
    ema_decay: jax.Array | float,
  ) -> tuple['RegressionState', dict[str, jax.Array]]:
    """One iteration; the network and the average stay if it is not finite.

    Returns:
      The next state, and the metrics `grad_norm` and `skipped`.
    """
    norm = optax.tree.norm(grads)
    finite = finite_update(loss, norm)
    net = self.net.update(grads, optimiser)
    ema = ema_update(self.ema, net.params, ema_decay)
    state = RegressionState(
      iteration=self.iteration + 1,
      net=where(finite, net, self.net),
      ema=where(finite, ema, self.ema),
    )
    return state, {'grad_norm': norm, 'skipped': ~finite}


@flax.struct.dataclass
class DistillState:
  """State of the distillation.

  Attributes:
    iteration: int32, critic updates done.
    student: generator.
    critic: fake score.
    ema: exponential moving average of the student.
  """

  iteration: jax.Array
  student: NetState
  critic: NetState
  ema: Any


def init_net(params: Any, optimiser: optax.GradientTransformation) -> NetState:
  """A network at the start of its training."""
  return NetState(params, optimiser.init(params))


def copy(tree: Any) -> Any:
  """Fresh buffers: jit refuses to donate one buffer twice."""
  return jax.tree.map(lambda x: jnp.array(x, copy=True), tree)


def finite_update(*values: jax.Array) -> jax.Array:
  """Whether an update with these losses and gradient norms may be applied."""
  return jnp.isfinite(jnp.stack(values)).all()


def where(finite: jax.Array, new: Any, old: Any) -> Any:
  """The new tree, or the old one if the update is not finite.

  A choice by `lax.cond` would read less, but GPUs ask the host which branch.
  """
  return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)


def ema_update(ema: Any, params: Any, decay: jax.Array | float) -> Any:
  """decay * ema + (1 - decay) * params."""
  return jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), ema, params)
