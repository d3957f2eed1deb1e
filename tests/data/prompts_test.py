"""Prompts of a file: every one of them, in order, by number."""

import json
import tracemalloc

import pytest

from hiar_jax.data import prompts, sources

TEXTS = ['a red disc', '一只猫在雪地里', 'naïve 🎈 kite', 'a "quoted" \\ dog']


@pytest.mark.parametrize('mark', [b'', b'\xef\xbb\xbf'])
@pytest.mark.parametrize('end', ['\n', '\r\n', '\n\n', '\r\n \t\r\n'])
@pytest.mark.parametrize('last', [True, False])
def test_marks_line_ends_and_blank_lines_make_no_difference(
  tmp_path, mark, end, last
):
  plain, path = tmp_path / 'plain.txt', tmp_path / 'prompts.txt'
  plain.write_bytes('\n'.join(TEXTS).encode())
  path.write_bytes(mark + (end.join(TEXTS) + end * last).encode())
  found = prompts.FilePrompts(path)
  assert [found[i] for i in range(len(found))] == TEXTS
  assert found.identity() == prompts.FilePrompts(plain).identity()


def test_objects_of_json_have_the_prompt_in_a_field(tmp_path):
  path = tmp_path / 'prompts.jsonl'
  texts = [*TEXTS, 'two\nlines']
  lines = [json.dumps({'id': i, 'prompt': t}) for i, t in enumerate(texts)]
  path.write_text('\n\n'.join(lines))
  found = prompts.FilePrompts(path)
  assert [found[i] for i in range(len(found))] == texts
  path.write_text(path.read_text().replace('"prompt"', '"text"'))
  assert prompts.FilePrompts(path, field='text').identity() == found.identity()


def test_identity_is_of_the_content_and_of_its_order(tmp_path):
  def identity(*texts):
    path = tmp_path / f'{len(list(tmp_path.iterdir()))}.txt'
    path.write_text('\n'.join(texts))
    return prompts.FilePrompts(path).identity()

  first = identity('a', 'bc')
  assert identity('a', 'bc') == first
  for others in (('bc', 'a'), ('ab', 'c'), ('a', 'bc', 'd'), ('abc',)):
    assert identity(*others) != first


def test_the_file_is_not_loaded(tmp_path):
  path = tmp_path / 'prompts.txt'
  num = 20_000
  path.write_text('\n'.join(f'{i} {"long " * 100}' for i in range(num)))
  tracemalloc.start()
  found = prompts.FilePrompts(path)
  kept, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert path.stat().st_size > 10_000_000
  assert kept < 20 * num + 100_000 and peak < 40 * num + 200_000
  assert [found[i].split()[0] for i in (0, num - 1)] == ['0', str(num - 1)]


def test_hosts_of_another_number_go_on_with_the_same_prompts(tmp_path):
  path = tmp_path / 'prompts.txt'
  path.write_text('\n'.join(map(str, range(20))))
  found = prompts.FilePrompts(path)

  def reader(shard_index, num_shards):
    return sources.batches(
      found,
      batch_size=4,
      seed=1,
      shard_index=shard_index,
      num_shards=num_shards,
    )

  alone = reader(0, 1)
  wanted = [list(next(alone)) for _ in range(6)]
  first = [reader(i, 2) for i in range(2)]
  seen = [[p for r in first for p in next(r)] for _ in range(3)]
  state = first[0].get_state()
  later = [reader(i, 4) for i in range(4)]
  for r in later:
    r.set_state(state)
  seen += [[p for r in later for p in next(r)] for _ in range(3)]
  assert seen == wanted


@pytest.mark.parametrize(
  'name, content, message',
  [
    ('a.txt', b'', r'a.txt has no prompts'),
    ('a.txt', b'\xef\xbb\xbf \r\n\n', r'a.txt has no prompts'),
    (
      'a.txt',
      b'good\n\nb\xe4d\n',
      r'a.txt is not UTF-8: byte 2 of line 3 .*e4',
    ),
    ('a.txt', 'good'.encode('utf-16'), r'not UTF-8: byte 1 of line 1 is 0xff'),
    (
      'a.jsonl',
      b'{"prompt": "a"}\n{"text": "b"}',
      r"line 2 .* no text 'prompt'",
    ),
    ('a.jsonl', b'{"prompt": " "}', r"line 1 of .* has no text 'prompt'"),
    ('a.jsonl', b'{"prompt": 3}', r"line 1 of .* has no text 'prompt'"),
    ('a.jsonl', b'["a"]', r"line 1 of .* has no text 'prompt'"),
    ('a.jsonl', b'\n{"prompt": "a"\n', r'line 2 of .* is not JSON'),
  ],
)
def test_what_is_no_prompt_is_named(tmp_path, name, content, message):
  path = tmp_path / name
  path.write_bytes(content)
  with pytest.raises(ValueError, match=message):
    prompts.FilePrompts(path)


def test_a_file_of_another_kind_is_refused(tmp_path):
  for name, content in (
    ('a.json', b'["a cat"]'),
    ('a.csv', b'prompt,seed'),
    ('a.TSV', b'prompt'),
  ):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f'{name} is no list of prompts'):
      prompts.FilePrompts(tmp_path / name)
  for content, message in (
    ('a cat'.encode('utf-16'), 'begins as UTF-16 does; save it as UTF-8'),
    (b'a cat\ra dog\r', 'line 1 of .* has a carriage return inside'),
  ):
    (tmp_path / 'a.txt').write_bytes(content)
    with pytest.raises(ValueError, match=message):
      prompts.FilePrompts(tmp_path / 'a.txt')


def test_json_lines_are_told_by_capitals_too(tmp_path):
  (tmp_path / 'A.JSONL').write_bytes(b'{"prompt": "a cat"}\n')
  assert list(prompts.FilePrompts(tmp_path / 'A.JSONL')) == ['a cat']


def test_a_missing_file_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match='no prompts at .*none.txt'):
    prompts.open_prompts({'path': str(tmp_path / 'none.txt')}, {})
  with pytest.raises(ValueError, match='prompts.path is missing'):
    prompts.open_prompts({}, {})


def test_a_source_may_say_which_words_a_model_lacks():
  notes = prompts.not_taught('bouncing', 'a red cat over black')
  assert len(notes) == 2
  assert notes[0].startswith("'a red cat over black' names no shape ")
  assert notes[1].endswith('not taught: cat')
  assert prompts.reworded('bouncing', 'a box') == 'a square'
  assert prompts.not_taught('bouncing', 'a red disc') == []
  for source in (None, 'file', 'prompts', 'nowhere', 'os.path'):
    assert prompts.not_taught(source, 'a cat') == []
    assert prompts.reworded(source, 'a box') == 'a box'
