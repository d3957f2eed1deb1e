"""What is told and what is heard: messages of the live server."""

import pytest

from hiar_jax.serving import protocol

_LIMITS = protocol.Limits(prompt_chars=20, video_blocks=9)


def test_a_command_is_what_it_says():
  parse = lambda text: protocol.parse_command(text, _LIMITS)
  assert parse('{"type": "start", "prompt": " a disc "}') == protocol.Start(
    'a disc'
  )
  assert parse(
    '{"type": "prompt", "prompt": "b", "hurry": true}'
  ) == protocol.Prompt('b', hurry=True)
  assert parse('{"type": "pause"}') == protocol.Pause()
  assert parse(
    '{"type": "start", "prompt": "a", "seed": 79228162514264337593543950335,'
    ' "mode": null, "format": "webp", "upload": "x"}'
  ) == protocol.Start('a', 2**96 - 1, None, 'webp', 'x')


@pytest.mark.parametrize(
  ('text', 'says'),
  [
    ('', 'not JSON'),
    ('{', 'not JSON'),
    ('[1]', 'is not a JSON object'),
    ('"start"', 'is not a JSON object'),
    ('{"type": "start", "prompt": NaN}', 'NaN is no number of JSON'),
    ('[' * 100_000, 'nested too deeply'),
    (b'\x00\x01', 'text messages'),
    ('{}', 'type null is not one of'),
    ('{"type": 3}', 'type 3 is not one of'),
    ('{"type": ["start"]}', 'is not one of'),
    ('{"type": "delete"}', 'type "delete" is not one of'),
    ('{"type": "start"}', "'prompt' is missing"),
    ('{"type": "start", "prompt": ""}', 'is not a text'),
    ('{"type": "start", "prompt": 7}', '7 is not a text'),
    ('{"type": "start", "prompt": ["a"]}', 'is not a text'),
    (
      '{"type": "start", "prompt": "%s"}' % ('a' * 21),
      'has 21 characters; 20 are allowed',
    ),
    ('{"type": "start", "prompt": "a\\u0000b"}', 'control characters'),
    ('{"type": "start", "prompt": "\\ud800"}', 'not Unicode'),
    ('{"type": "start", "prompt": "a", "seed": -1}', '-1 is not in 0..'),
    ('{"type": "start", "prompt": "a", "seed": 1.5}', 'not a whole number'),
    ('{"type": "start", "prompt": "a", "seed": true}', 'not a whole number'),
    ('{"type": "start", "prompt": "a", "seed": "1"}', 'not a whole number'),
    ('{"type": "start", "prompt": "a", "format": "png"}', '"png" is not one'),
    ('{"type": "start", "prompt": "a", "mode": 3}', 'not a short text'),
    ('{"type": "start", "prompt": "a", "sead": 1}', '"sead" is not one of'),
    ('{"type": "prompt", "prompt": "a", "hurry": 1}', 'neither true nor false'),
    ('{"type": "pause", "for": 3}', '"for" is not known'),
    ('{"type": "ping", "id": -3}', '-3 is not in'),
  ],
)
def test_a_wrong_command_is_refused_in_a_sentence(text, says):
  with pytest.raises(protocol.Refused) as told:
    protocol.parse_command(text, _LIMITS)
  assert says in str(told.value)
  assert len(str(told.value)) < 250


def test_a_whole_video_is_no_longer_than_the_limit():
  parse = lambda text: protocol.parse_video_request(text, _LIMITS)
  assert parse(b'{"prompt": "a", "num_blocks": 9}').num_blocks == 9
  for body, says in (
    (b'{"prompt": "a", "num_blocks": 10}', '10 is not in 1..9'),
    (b'\xff', 'not UTF-8'),
    (b'{"prompt": "a", "scale": 0}', '0 is not in 1..16'),
  ):
    with pytest.raises(protocol.Refused, match=says):
      parse(body)


def test_a_frame_comes_out_as_it_went_in():
  message = protocol.pack_frame(
    b'picture',
    format='mp4',
    block=3,
    frame=40,
    prompt=2,
    dropped=5,
    due_s=2.5,
    frames=12,
  )
  assert protocol.unpack_frame(message) == protocol.Frame(
    'mp4', 3, 40, 2, 5, 2.5, 12, b'picture'
  )
  with pytest.raises(ValueError, match='no frame'):
    protocol.unpack_frame(b'HIAR')
  with pytest.raises(ValueError, match='no frame of version'):
    protocol.unpack_frame(b'x' + message[1:])
