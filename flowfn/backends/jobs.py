"""The contract of a backend that runs tasks: start one there, and answer for it to any later process.

A task has the same id here and there, and a row in the register here, which says by `place` who is asked for it. There
it is a directory (see `flowfn_runtime.taskdir`) whose files are read: what it wrote, what came of it. Everything else
(names, listings, waiting, results, logs as lines) is the client's, and is the same for every backend.
"""

from __future__ import annotations

import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flowfn_runtime.errors import FlowError, ResourceUnavailable
from flowfn_runtime.taskstate import More as More
from flowfn_runtime.taskstate import State as State

if TYPE_CHECKING:
    from flowfn.plan import Draft

CHUNK_BYTES = 1 << 22  # how much of a file is asked for at a time


class Jobs(ABC):
    """Tasks of one place. Made by `Backend.jobs`, or in a later process by `Backend.jobs_at(place)`.

    All methods raise BackendUnavailable where the place does not answer: nothing is known of its tasks then.
    """

    label: str  # as listings name the place: "ssh://gpu7", "slurm"
    place: Mapping[str, Any]  # JSON that `jobs_at` takes; `backend` in it is the backend's name. No secrets

    def choose(self, draft: Draft) -> Jobs:
        """Who is to run this task, where there are several. Raises what is wrong with it, as far as that is known."""
        return self

    def check(self, draft: Draft) -> None:  # noqa: B027 - what is wrong may be known there only
        """Raise what `start` would raise, as far as that is known without starting anything."""

    @abstractmethod
    def start(self, draft: Draft) -> None:
        """Have the task started, detached from this process. Values of its env may lie in no file of others.

        Raises what is wrong with it. If it can't be known whether it was started: BackendUnavailable with an attribute
        `uncertain`.
        """

    def held(self, wanted: Mapping[str, Any]) -> list[str]:
        """What the volumes that the task has to itself are called, by whatever name another task may ask for them."""
        block = [volume for volume in wanted["volumes"] if volume["interface"] != "file"]
        return [volume["volume_id"] or volume["name"] for volume in block]

    @abstractmethod
    def states(self, ids: Sequence[str]) -> Mapping[str, State | FlowError]:
        """How these tasks are, by one question for all of them. Of those that are not known there nothing.

        Where only some can be told at the moment, the others have the error that is in the way.
        """

    @abstractmethod
    def read(self, task_id: str, name: str, offset: int = 0) -> bytes:
        """At most CHUNK_BYTES of one of its files, b"" at the end or if there is no such file."""

    @abstractmethod
    def end_of(self, task_id: str, name: str, lines: int) -> int:
        """Where the last `lines` lines of one of its files begin."""

    @abstractmethod
    def more(self, task_id: str, offsets: Mapping[str, int], timeout: float) -> More:
        """What was added to these files since; waits for something at most `timeout` seconds."""

    @abstractmethod
    def wait(self, task_id: str, state: str, timeout: float) -> None:
        """Return when the task may have another state than this; after `timeout` seconds at the latest."""

    @abstractmethod
    def cancel(self, task_id: str, reason: str) -> None:
        """Have it ended, with all that it started. Returns when that was asked for."""

    @abstractmethod
    def forget(self, ids: Sequence[str]) -> None:
        """Remove all that is left of tasks that have ended."""

    def address(self, task_id: str) -> str:
        """The host where a port of the task answers, as seen from here."""
        raise ResourceUnavailable(f"tasks on {self.label} have no ports that can be reached from here")

    def close(self) -> None:  # noqa: B027 - most keep nothing
        """Free what is kept beside the tasks."""


_START = """
import sys
wanted = (%s)
if sys.version_info[:2] != wanted:
    sys.exit("flow: this is Python %%d.%%d (%%s), and the task was submitted by Python %%d.%%d" %%
             (sys.version_info[:2] + (sys.executable,) + wanted) + "; say where that is with python=")
sys.path[:] = [p for p in sys.path if p]
sys.path.insert(0, sys.argv.pop(1))
from flowfn_runtime.%s import main
main()
"""


def starting(module: str, *arguments: str, python: str | None = None) -> list[str]:
    """The command line that runs a module of the runtime, by the right Python (see `loader`).

    The first argument, if not here then appended there, is where the runtime lies.
    """
    from flowfn import loader

    text = _START % (", ".join(map(str, sys.version_info[:2])), module)
    return loader.starting(text, *arguments, python=python)


def contents(jobs: Jobs, task_id: str, name: str) -> Iterator[bytes]:
    """One of a task's files, in pieces."""
    offset = 0
    while piece := jobs.read(task_id, name, offset):
        yield piece
        offset += len(piece)


def pauses(timeout: float, *, first: float = 0.1, most: float = 5.0) -> Iterator[None]:
    """Longer and longer pauses, until `timeout` seconds are over: for places that tell nobody by themselves."""
    deadline = time.monotonic() + timeout
    pause = first
    while (left := deadline - time.monotonic()) > 0:
        time.sleep(min(pause, left))
        pause = min(pause * 1.4, most)
        yield
