"""Learnt judges of anyone's videos: MUSIQ, CLIP-IQA, DINOv2, LPIPS, and drift.

  hiar-jax evaluate learnt --folder=ours --out=report
  hiar-jax evaluate learnt --folder=theirs --against=ours --out=report

Writes learnt.json and learnt.csv into --out. --judges takes any metric of
pyiqa, of one frame or of two in a row. These libraries come with `pip install
"hiar_jax[learnt]"`, and fetch weights on first use. Folders and names are those
of `hiar-jax evaluate videos`. Kill it and start it again: it goes on with the
files that are missing.
"""

from absl import flags

from hiar_jax.evaluation import folder_flags, learnt, learnt_report
from hiar_jax.runtime import errors

_FOLDERS = folder_flags.FolderFlags()
_JUDGES = flags.DEFINE_list('judges', [*learnt.PAPER], 'who is asked')
_EVERY = flags.DEFINE_integer(
  'every', 4, 'one frame of so many is looked at', lower_bound=1
)
_DEVICE = flags.DEFINE_string(
  'device', '', 'of PyTorch, such as cuda:1; default: a GPU if there is one'
)


def main(argv):
  del argv
  judges = learnt.open_judges(_JUDGES.value, _DEVICE.value)
  measured = _FOLDERS.measure(
    learnt.way(judges, _EVERY.value), 'measured_learnt.jsonl'
  )
  print(learnt_report.format_table(measured))
  for path in learnt_report.write(_FOLDERS.out, measured, _EVERY.value):
    print(f'wrote {path}')


if __name__ == '__main__':
  errors.run_main(main)
