"""In which order the tasks of a Ray cluster run: who waits for whom. Decisions only; it goes to the head by value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

GO, WAIT, FAIL = "go", "wait", "fail"
COMPLETED = "completed"
_VERBS = {"failed": "failed", "cancelled": "was cancelled"}


class Turn(NamedTuple):
    """What a task has to wait for before it is given to Ray."""

    number: int  # the order of submission
    name: str
    depends_on: tuple[str, ...] = ()  # ids of tasks that have to end well
    volumes: tuple[str, ...] = ()  # that one task has at a time


def rivals(task_id: str, turns: Mapping[str, Turn]) -> list[str]:
    """The tasks before this one that use one of its volumes, the oldest first."""
    own = turns[task_id]
    before = {
        other: turn.number
        for other, turn in turns.items()
        if turn.number < own.number and set(own.volumes) & set(turn.volumes)
    }
    return sorted(before, key=before.__getitem__)


def decide(task_id: str, turns: Mapping[str, Turn], ended: Mapping[str, str]) -> tuple[str, str]:
    """GO, WAIT or FAIL, and why. `ended`: how tasks have ended; those that are in `turns` only have not."""
    own = turns[task_id]
    waits = []
    for other in own.depends_on:
        if other not in turns:
            return FAIL, f"it depends on {other}, of which the cluster knows nothing any more"
        state = ended.get(other)
        if state is None:
            waits.append(other)
        elif state != COMPLETED:
            return FAIL, f"it depends on {turns[other].name} ({other}), which {_VERBS.get(state, f'is {state}')}"
    if waits:
        return WAIT, f"it waits for {', '.join(waits)}"
    before = [other for other in rivals(task_id, turns) if other not in ended]
    if len(before) == 1:
        return WAIT, f"it waits for a volume that {before[0]} has"
    return (WAIT, f"it waits for a volume; {len(before)} tasks are before it") if before else (GO, "")
