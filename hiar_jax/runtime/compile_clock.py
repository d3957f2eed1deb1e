"""How long this process has traced, lowered and compiled programs of jax."""

from typing import Any

import jax

_seconds = 0.0
_started = False


def start() -> None:
  """Counts from the first call on."""
  global _started
  if not _started:
    _started = True
    jax.monitoring.register_event_duration_secs_listener(_on_event)


def seconds() -> float:
  """Counted so far; 0 before `start`."""
  return _seconds


def _on_event(event: str, duration_secs: float, **unused: Any) -> None:
  global _seconds
  if event.startswith('/jax/core/compile/'):
    _seconds += duration_secs
