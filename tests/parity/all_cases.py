"""Every comparison with the public code, in one list."""

from tests.parity import (
  losses_cases,
  rollout_cases,
  scheduler_cases,
  tiny_vae_cases,
  training_rollout_cases,
  transformer_cases,
  umt5_cases,
  vae_cases,
)
from tests.parity.golden_lib import stored

CASES = [
  *losses_cases.CASES,
  *rollout_cases.CASES,
  *scheduler_cases.CASES,
  *tiny_vae_cases.CASES,
  *training_rollout_cases.CASES,
  *transformer_cases.CASES,
  *umt5_cases.CASES,
  *vae_cases.CASES,
]


def uncompared(file: str) -> set[str]:
  """Stored results that no case compares."""
  compared = {case.array for case in CASES if case.file == file}
  return set(stored(file, 'out/')) - compared
