"""How a task is, as the place that runs it tells it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class State(NamedTuple):
    """How a task is there."""

    state: str  # one of taskdb.STATES
    reason: str = ""
    exit_code: int | None = None
    started_at: float | None = None
    ended_at: float | None = None
    attempts: int = 0


class More(NamedTuple):
    """What was added to a task's files."""

    added: Mapping[str, bytes]
    ended: bool  # the task has ended, and this is all
