"""Videos that begin and end when they like, made as one batch.

The stages of all videos stand in one row: what a stage does is mapped over
(video, stage) as `pipeline` maps it over stages, and every entry has its own
past, tick and prompt. So a video that joins is some entries set anew, one that
pauses is some that are left as they are, and no video knows of the others: its
blocks are those of a stream of its own.

A step is two ticks: every video that takes part gets on by one block. The row
is as long as a power of two of videos needs, and is taken apart and put
together again when they come and go.

What fails for one video ends that one. A step that fails for all may leave
nothing behind, as it writes the row where it lies: then the row is begun anew,
every video from its last clean latents as if they had been given, but for the
one that fails alone as well. The blocks that were under way are made again.
"""

# V videos in the row, S stages, L = V * S, M prompts in a video's bank,
# f frames per block, F H W frames, height and width of pixels

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from hiar_jax.models.kv_cache import KVCache
from hiar_jax.models.transformer import TextKV
from hiar_jax.sampling import decoding, pipeline, streaming

_TICKS = 2  # of a step


@flax.struct.dataclass
class _Row:
  """What all videos hold between two steps.

  Attributes:
    tick_V: ticks done.
    hold_L: as in `pipeline.PipelineState`, [L, 1, f, h, w, C].
    inbox_L: likewise.
    past_L: one past for each stage of each video.
    bank_V: prompts, [V, M, ...].
    keys_V: noise keys.
  """

  tick_V: jax.Array
  hold_L: jax.Array
  inbox_L: jax.Array
  past_L: KVCache
  bank_V: TextKV
  keys_V: jax.Array


@dataclasses.dataclass(eq=False)
class Member:
  """One of the videos.

  Attributes:
    given: uint8 [F, H, W, 3], the frames that it goes on from, or None.
    entry: a row of it alone, until it joins.
    in_entry: text states that it begins with.
    decoder: its state.
    key: of its noise.
    prompts: (first block, text states) of those that blocks to come need.
    latents: float32 [1, F, h, w, C], the clean ones that its past is of.
    row: its place; None before it joined and after it left.
    steps: that it took part in since its place was last begun.
    done: blocks that are finished.
    restarts: how often its place was begun anew.
    error: that ended it, or None.
  """

  given: np.ndarray | None
  entry: Any
  in_entry: np.ndarray
  decoder: Any
  key: jax.Array
  prompts: list[tuple[int, np.ndarray]]
  latents: np.ndarray | None
  row: int | None = None
  steps: int = 0
  done: int = 0
  restarts: int = 0
  error: Exception | None = None
  # The block that was the first since then.
  first: int = 0
  # Which slot of the bank serves from which block on, counted from there.
  slots: list[tuple[int, int]] = dataclasses.field(
    default_factory=lambda: [(0, 0)]
  )

  def slot(self, block: int) -> int:
    """Slot of the prompt that serves a block."""
    return [s for first, s in self.slots if first <= max(block, 0)][-1]

  @property
  def next_block(self) -> int:
    """The next that is begun."""
    return self.first + self.steps


class Together:
  """The row of videos. One thread steps, joins and leaves; any may prepare.

  Attributes:
    engine: of a stream in mode 'batched' on one device.
    places: videos at most.
  """

  def __init__(
    self,
    engine: streaming.Engine,
    params: dict,
    codec: Any,
    encode_text: Callable[[list[str]], np.ndarray],
    *,
    places: int,
  ):
    """Begins with an empty row; what a size needs is compiled at its first use.

    Args:
      engine: its programs' config.
      params: of the network.
      codec: latents to frames.
      encode_text: prompts to text states [B, L, D].
      places: videos at most.

    Raises:
      ValueError: on another mode, or a mesh.
    """
    if engine.mode != 'batched' or engine.mesh is not None:
      raise ValueError(
        f'videos are made together in mode batched on one device, not in '
        f'{engine.mode!r} on a mesh of {engine.mesh}'
      )
    self.engine, self.places = engine, places
    self._params = engine.denoiser.unstack_layers(params)
    self._codec, self._encode_text = codec, encode_text
    self._members: dict[int, Member] = {}
    self._row: _Row | None = None
    self._size = 0
    # Failures that were nobody's, since all together last succeeded.
    self._nobodys = 0

  def __len__(self) -> int:
    """Videos in the row."""
    return len(self._members)

  def prepare(
    self, prompt: str, key: jax.Array, initial: np.ndarray | None = None
  ) -> Member:
    """A video to come; takes no part yet, and no place.

    Args:
      prompt: what it shows.
      key: of its noise.
      initial: clean latents [1, F, h, w, C] that it goes on from.
    """
    engine, states = self.engine, self._encode_text([prompt])
    entry = _entry(self._params, states, initial, key, engine=engine)
    latents = None
    if initial is not None:
      latents = self._kept(None, np.asarray(initial))
    given, decoder = None, self._codec.init_decode_state(1)
    if initial is not None:
      frames, decoder = decoding.decode_blocks(
        self._codec, initial, engine.config.frames_per_block
      )
      given = frames[0]
    return Member(given, entry, states, decoder, key, [(0, states)], latents)

  def join(self, member: Member) -> None:
    """Takes a prepared video in.

    Raises:
      ValueError: if all places are taken.
    """
    if len(self) == self.places:
      raise ValueError(f'all {self.places} places are taken')
    if len(self) == self._size:
      self._resize(max(1, 2 * self._size), member.entry)
    row = next(i for i in range(self._size) if i not in self._members)
    self._row = _insert(self._row, member.entry, np.int32(row))
    member.entry, member.row = None, row
    self._members[row] = member

  def leave(self, member: Member) -> None:
    """Takes a video out; more than once does no harm."""
    if member.row is None:
      return
    del self._members[member.row]
    member.row = member.decoder = member.latents = None
    if not self._members:
      self.clear()
    elif 4 * len(self) <= self._size:  # Not at every coming and going.
      self._resize(self._size // 2)

  def clear(self) -> None:
    """Lets go of everything; who was in the row is out."""
    for member in self._members.values():
      member.row = None
    self._members.clear()
    self._row, self._size = None, 0

  def send(self, member: Member, prompt: str) -> int:
    """Changes a video's prompt; the block from which it shows."""
    streaming.check_prompts([prompt])
    at, states = member.next_block, self._encode_text([prompt])
    before = [(first, old) for first, old in member.prompts if first < at]
    member.prompts = [*before, (at, states)]
    return at

  def step(self, members: Sequence[Member]) -> list[np.ndarray | None]:
    """Takes some videos on by one block; the others stand still.

    A video that fails is out, and its `error` tells why. Any other video of
    the row may have been begun anew, as its `restarts` tell, or failed then.

    Returns:
      For each of them uint8 [F, H, W, 3], the block that was finished, or None
      while its first blocks are still on their way, or if it failed.
    """
    for member in members:
      assert member.row is not None, 'a video that has not joined'
    try:
      made = self._step(members)
    except Exception as error:
      made = {}
      self._find_out(members, error)
    else:
      self._nobodys = 0 if len(members) > 1 else self._nobodys
    for member in members:
      if member.error is not None:
        self.leave(member)
    return [made.get(member) for member in members]

  def _step(self, members: Sequence[Member]) -> dict[Member, np.ndarray]:
    """What is finished; raises what is nobody's own failure."""
    stages = self.engine.config.num_steps
    live = np.zeros(self._size, bool)
    slots = np.zeros((_TICKS, self._size, stages), np.int32)
    for member in members:
      if (text := _own(member, self._new_text, member)) is not None:
        self._change_prompt(member, text)
    going = [member for member in members if member.error is None]
    for member in going:
      live[member.row] = True
      for tick in range(_TICKS):
        blocks = self._pipeline.blocks_at(_TICKS * member.steps + tick)
        slots[tick, member.row] = [member.slot(block) for block in blocks]
    self._row, sent_V = _step(
      self._params, self._row, slots, live, engine=self.engine
    )
    coming = {}
    for member in going:
      # D(b, S - 1) runs at tick 2 b + S - 1.
      if member.steps >= (stages - 1) // _TICKS:
        given = self._codec, member.decoder, sent_V[member.row]
        coming[member] = _own(member, decoding.decode_block, *given)
    # Here what failed on the device is heard of.
    latents_V = np.asarray(sent_V)
    made = {}
    for member in going:
      member.steps += 1
      if (decoded := coming.get(member)) is None:
        continue
      if (frames := _own(member, np.asarray, decoded[0])) is None:
        continue
      made[member], member.decoder = frames[0], decoded[1]
      member.done += 1
      member.latents = self._kept(member.latents, latents_V[member.row])
    return made

  def _find_out(self, members: Sequence[Member], error: Exception) -> None:
    """After a step that failed: ends whose failure it is, for the others."""
    everybody = list(self._members.values())
    tried = [member for member in members if member.error is None]
    for member in tried:
      member.error = error if len(tried) == 1 else self._alone(member)
    if tried and all(member.error is None for member in tried):
      self._nobodys += 1
      if self._nobodys > 1:
        # Such as no memory for so many: the last that came goes.
        everybody[-1].error = error
    self._begin_anew(everybody)

  def _alone(self, member: Member) -> Exception | None:
    """How a step of one video fails without the others."""
    # What comes of it is nobody's: the video goes on with all the others.
    trial = dataclasses.replace(member)
    try:
      self._begin_anew([trial])
      self._step([trial])
    except Exception as error:
      return error
    return trial.error

  def _begin_anew(self, members: Sequence[Member]) -> None:
    """A row of videos from the clean latents that their pasts were of."""
    self.clear()
    for member in members:
      member.row = None
      if member.error is not None:
        continue
      member.steps, member.first, member.slots = 0, member.done, [(0, 0)]
      member.restarts += 1
      _own(member, self._rejoin, member)

  def _rejoin(self, member: Member) -> None:
    states = [s for first, s in member.prompts if first <= member.done][-1]
    key = jax.random.fold_in(member.key, member.restarts)
    member.entry = _entry(
      self._params, states, member.latents, key, engine=self.engine
    )
    member.in_entry = states
    self.join(member)

  def _kept(
    self, before: np.ndarray | None, new_1FhwC: np.ndarray
  ) -> np.ndarray | None:
    """Of all clean latents those that a past has."""
    slots, sink = self.engine.config.past_frames, self.engine.config.sink
    whole = new_1FhwC
    if before is not None:
      whole = np.concatenate([before, new_1FhwC], 1)
    count = whole.shape[1]
    if not slots or count <= slots:
      return whole if slots else None
    ring = whole[:, count - slots + sink :]
    return np.concatenate([whole[:, :sink], ring], 1)

  @property
  def _pipeline(self) -> pipeline.Pipeline:
    return pipeline.Pipeline(self.engine.denoiser, self.engine.config)

  def _new_text(self, member: Member) -> Any:
    """That of a prompt which begins now; None: none does."""
    states = [s for at, s in member.prompts if at == member.next_block]
    if not states or states[0] is member.in_entry:
      return None
    serving = [at for at, _ in member.prompts if at <= member.done][-1]
    member.prompts = [p for p in member.prompts if p[0] >= serving]
    return streaming.project(
      self._params, states[0], denoiser=self.engine.denoiser
    )

  def _change_prompt(self, member: Member, text: Any) -> None:
    assert member.row is not None
    size = self.engine.bank_size
    slot = (member.slots[-1][1] + 1) % size
    member.slots = [*member.slots[1 - size :], (member.steps, slot)]
    self._row = _set_prompt(
      self._row, text, np.int32(member.row), np.int32(slot)
    )

  def _resize(self, size: int, entry: Any = None) -> None:
    """Puts the row together anew, those who are in it to the front."""
    if self._row is None:
      self._row, self._size = _begin(entry, size=size), size
      return
    taken = sorted(self._members)
    rows = np.zeros(size, np.int32)
    rows[: len(taken)] = taken
    stages = self.engine.config.num_steps
    self._row = _take(self._row, rows, stages=stages)
    members = [self._members[row] for row in taken]
    self._members = dict(enumerate(members))
    for row, member in enumerate(members):
      member.row = row
    self._size = size


def _own(member: Member, act: Callable[..., Any], *arguments: Any) -> Any:
  """Of what concerns one video alone; None if it fails, which ends that one."""
  try:
    return act(*arguments)
  except Exception as error:
    member.error = error
    return None


@functools.partial(jax.jit, static_argnames='engine')
def _entry(params, states, initial, key, *, engine):
  """A row of one video."""
  text = engine.denoiser.project_text(params, states)
  stages = pipeline.Pipeline(engine.denoiser, engine.config)
  state = stages.init_state(params, text, initial)
  bank = jax.tree.map(lambda a: jnp.stack([a] * engine.bank_size)[None], text)
  return _Row(
    tick_V=state.tick[None],
    hold_L=state.hold,
    inbox_L=state.inbox,
    past_L=state.past,
    bank_V=bank,
    keys_V=key[None],
  )


@functools.partial(jax.jit, static_argnames='size')
def _begin(entry, *, size):
  """A row of copies, whose values nobody looks at."""
  return jax.tree.map(lambda a: jnp.concatenate([a] * size), entry)


@functools.partial(jax.jit, donate_argnums=0)
def _insert(row, entry, index):
  """Sets one video of a row anew."""

  def put(all_of_them, one):
    start = index * one.shape[0]
    return jax.lax.dynamic_update_slice_in_dim(all_of_them, one, start, 0)

  keys = row.keys_V.at[index].set(entry.keys_V[0])
  plain = dict(keys_V=None)
  row, entry = row.replace(**plain), entry.replace(**plain)
  return jax.tree.map(put, row, entry).replace(keys_V=keys)


@functools.partial(jax.jit, static_argnames='stages')
def _take(row, rows_V, *, stages):
  """A row of some videos of a row."""
  rows_L = (rows_V[:, None] * stages + jnp.arange(stages)[None]).reshape(-1)

  def of(tree, index):
    return jax.tree.map(lambda a: a[index], tree)

  return _Row(
    tick_V=row.tick_V[rows_V],
    hold_L=row.hold_L[rows_L],
    inbox_L=row.inbox_L[rows_L],
    past_L=of(row.past_L, rows_L),
    bank_V=of(row.bank_V, rows_V),
    keys_V=row.keys_V[rows_V],
  )


@functools.partial(jax.jit, donate_argnames='row')
def _set_prompt(row, text, index, slot):
  bank = jax.tree.map(lambda b, t: b.at[index, slot].set(t), row.bank_V, text)
  return row.replace(bank_V=bank)


@functools.partial(jax.jit, static_argnames='engine', donate_argnames='row')
def _step(params, row, slots_tVS, live_V, *, engine):
  """Two ticks of the live videos, and what each of them finished.

  Returns:
    The row, and latents [V, 1, f, h, w, C].
  """
  stages = pipeline.Pipeline(engine.denoiser, engine.config)
  count, size = engine.config.num_steps, live_V.shape[0]
  bank = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), row.bank_V)
  stage_L = jnp.tile(jnp.arange(count), size)
  video_L = jnp.repeat(jnp.arange(size), count)
  live_L = live_V[video_L]
  keys_L = row.keys_V[video_L]

  def tick(row, slots_VS):
    def one(key, tick, stage, slot, hold, inbox, past):
      return stages.stage_tick(
        *(params, bank, key[None], tick, stage, slot, hold, inbox),
        lambda: past,
      )

    slot_L = video_L * engine.bank_size + slots_VS.reshape(-1)
    hold, sent, kv, written = jax.vmap(one)(
      *(keys_L, row.tick_V[video_L], stage_L, slot_L),
      *(row.hold_L, row.inbox_L, row.past_L),
    )
    by_video = sent.reshape(size, count, *sent.shape[1:])
    inbox = jnp.roll(by_video, 1, axis=1).reshape(sent.shape)

    def chosen(new, old):
      return jnp.where(live_L.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    row = row.replace(
      tick_V=row.tick_V + live_V,
      hold_L=chosen(hold, row.hold_L),
      inbox_L=chosen(inbox, row.inbox_L),
      past_L=row.past_L.write_each(kv, written & live_L),
    )
    return row, by_video[:, -1]

  row, sent_tV = jax.lax.scan(tick, row, slots_tVS)
  # The tick at which a block leaves is the parity of the last stage.
  return row, sent_tV[(count - 1) % _TICKS]
