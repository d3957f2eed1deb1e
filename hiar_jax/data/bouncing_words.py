"""The words of the bouncing world, and what a prompt says in them."""

import dataclasses
import re

PALETTE = {
  'red': (230, 40, 40),
  'green': (50, 200, 70),
  'blue': (50, 90, 240),
  'yellow': (245, 220, 50),
  'white': (245, 245, 245),
  'magenta': (230, 50, 220),
  'cyan': (50, 220, 230),
  'orange': (250, 140, 30),
}
BACKGROUNDS = {
  'black': (0, 0, 0),
  'grey': (112, 112, 112),
  'dark blue': (16, 24, 96),
  'dark green': (12, 72, 32),
  'dark red': (96, 16, 20),
  'dark purple': (64, 20, 88),
}
SHAPES = ('disc', 'square', 'triangle')
SIZES = ('small', 'large')
MOTIONS = ('slowly', 'fast')

CAPTION = 'a {size} {colour} {shape} drifting {motion} over {background}'
EXAMPLES = (
  'a large red disc drifting fast over dark blue',
  'a large cyan square drifting slowly over black',
  'a large yellow triangle drifting fast over dark purple',
  'a large magenta disc drifting slowly over dark green',
  'a small white disc drifting fast over dark red',
  'a large orange square drifting fast over grey',
)
FREE_CAPTIONS = (
  'a {colour} {shape} drifting {motion} over {background}',
  'a {size} {colour} {shape} over {background}',
  'a {size} {colour} {shape} moving {motion} over {background}',
  'a {colour} {shape} moving {motion} on {background}',
  'a {colour} {shape} on {background}',
  'a {size} {colour} {shape} on a {background} background',
  '{colour} {shape}, {pace}, {background} background',
  'on a {background} background, a {size} {colour} {shape} moving {motion}',
)


@dataclasses.dataclass(frozen=True)
class PromptTerms:
  """What a prompt names; None where it leaves the choice to the model."""

  shape: str | None = None
  colour: str | None = None
  background: str | None = None
  size: str | None = None
  motion: str | None = None


def examples() -> tuple[str, ...]:
  """Prompts that show what there is."""
  return EXAMPLES


def reword(prompt: str) -> str:
  """A prompt with synonyms in the words that the captions have.

  An encoder of single words knows only those that were trained on.
  """
  return _SYNONYM.sub(lambda found: _SYNONYMS[found[0].lower()], prompt)


def parse_prompt(prompt: str) -> PromptTerms:
  """Finds what a prompt names in the words of this world.

  A colour after 'on' or 'over', or before 'background', is the
  background's; so is a background's name that stands alone ('red disc, dark
  blue'), but not one that is said of the shape ('a dark blue disc').
  """
  text = ' '.join(re.findall(r'[a-z]+|,', reword(prompt).lower()))
  background = None
  marked = _MARKED_BACKGROUND.search(text)
  if marked:
    background = marked.group(1) or marked.group(2)
    text = f'{text[: marked.start()]} , {text[marked.end() :]}'
  else:
    alone = _LONE_BACKGROUND.search(text)
    if alone:
      background = alone.group(1)
      text = f'{text[: alone.start()]} , {text[alone.end() :]}'
  words = text.split()
  return PromptTerms(
    shape=_first_named(words, {name: name for name in SHAPES}),
    colour=_first_named(words, {name: name for name in PALETTE}),
    background=background if background in BACKGROUNDS else None,
    size=_first_named(words, {name: name for name in SIZES}),
    motion=_first_named(words, {'slow': 'slowly'} | {m: m for m in MOTIONS}),
  )


_SYNONYMS = {
  **dict.fromkeys(('circle', 'ball', 'disk'), 'disc'),
  'box': 'square',
  **dict.fromkeys(('little', 'tiny'), 'small'),
  **dict.fromkeys(('big', 'huge'), 'large'),
  **dict.fromkeys(('quickly', 'quick', 'rapidly'), 'fast'),
  'gray': 'grey',
  'against': 'over',
  **dict.fromkeys(('an', 'the'), 'a'),
}
_SYNONYM = re.compile(rf'\b(?:{"|".join(_SYNONYMS)})\b', re.IGNORECASE)
# Every word of a caption.
_WORDS = frozenset(
  word
  for text in (
    *(re.sub(r'{.*?}', '', c) for c in (CAPTION, *FREE_CAPTIONS)),
    *('slow', *SHAPES, *PALETTE, *BACKGROUNDS, *SIZES, *MOTIONS),
  )
  for word in re.findall(r'[a-z]+', text)
)
_COLOUR_NAMES = '|'.join((*BACKGROUNDS, *PALETTE))
_MARKED_BACKGROUND = re.compile(
  rf'\b(?:on|over) (?:a )?({_COLOUR_NAMES})\b'
  rf'|\b({_COLOUR_NAMES}) background\b'
)
_LONE_BACKGROUND = re.compile(
  rf'\b({"|".join(BACKGROUNDS)})\b(?! (?:{"|".join(SHAPES)})\b)'
)


def unknown_words(prompt: str) -> list[str]:
  """What a prompt lacks for a model of this world, a sentence each."""
  terms = parse_prompt(prompt)
  notes = [
    f'{prompt!r} names no {name} that the model was taught: {", ".join(known)}'
    for value, name, known in (
      (terms.shape, 'shape', SHAPES),
      (terms.colour, 'colour', PALETTE),
    )
    if value is None
  ]
  words = re.findall(r"[^\W_]+(?:['-][^\W_]+)*", reword(prompt).lower())
  unknown = [word for word in dict.fromkeys(words) if word not in _WORDS]
  if unknown:
    notes.append(
      f'{prompt!r} has words that the model was not taught: '
      + ', '.join(unknown)
    )
  return notes


def _first_named(words: list[str], meaning: dict[str, str]) -> str | None:
  return next((meaning[word] for word in words if word in meaning), None)
