"""Prompts: what videos are asked for, by number."""

from typing import Any, Protocol


class Prompts(Protocol):
  """A source of captions; the same number is the same caption everywhere."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> str: ...

  def identity(self) -> dict[str, Any]:
    """What these prompts are, by content and not by place; JSON."""
