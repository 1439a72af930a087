"""The contract of a backend: start a runtime process with the resources asked for, hand back its byte stream.

Everything else, from the handshake to retries and maps, is the client's and is the same for every backend.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from flowfn_runtime.errors import ConfigError

if TYPE_CHECKING:
    from flowfn.backends.jobs import Jobs
    from flowfn.plan import Draft
    from flowfn.spec import FunctionSpec
    from flowfn_runtime import wire


class Exit(NamedTuple):
    """How a worker's process ended."""

    exitcode: int | None = None  # exit status; -n: signal n killed it; None: nobody knows
    limit_bytes: int | None = None  # the memory limit that it went over, if it did
    peak_bytes: int | None = None  # its highest use of memory that was seen
    output: tuple[str, str] = ("", "")  # what it printed last and could not send itself: standard output and error
    detail: str = ""  # more words, such as the last lines of standard error

    @property
    def by_itself(self) -> bool:
        """Whether the function did it (it would do it again): an exit status or a crash, not a kill from outside."""
        from_outside = (None, 0, -1, -9, -15)  # lost without a trace, or SIGHUP, SIGKILL, SIGTERM
        return self.limit_bytes is not None or self.exitcode not in from_outside


class Connection(ABC):
    """One running worker: its byte stream, and the two things that can be done to its process."""

    stream: wire.Stream
    label: str  # where it is, for people: "local pid 4711", "ssh gpu7 pid 99"

    @abstractmethod
    def kill(self) -> None:
        """End the worker's process and everything it started, now. Safe to repeat, from any thread."""

    @abstractmethod
    def exit(self, timeout: float) -> Exit:
        """How the process ended; waits for the end at most `timeout` seconds."""

    def hello(self) -> Mapping[str, Any]:
        """What the client's HELLO says to the worker beside versions: env, unset, sys_path, cwd, shm."""
        return {}

    def close(self) -> None:
        """Let go of the worker: it ends as soon as it has nothing to do."""
        self.stream.close()


class Backend(ABC):
    """Where workers run. Made once for each way it is configured, and shared by all pools that use it."""

    name: str
    ships_project = False  # workers get a copy of the project's files; when these change, new workers are needed

    def begin(self) -> None:  # noqa: B027 - most backends have nothing to do ahead
        """Workers will be asked for in a moment: start what takes long, and return at once. Raises nothing."""

    @abstractmethod
    def connect(self, spec: FunctionSpec) -> Connection:
        """Start a worker with the resources, environment, mounts and image of `spec`; return when it may be spoken to.

        Raises BackendUnavailable, ResourceUnavailable, SandboxError or a DataError.
        """

    @abstractmethod
    def slots(self, spec: FunctionSpec) -> int:
        """How many workers of this kind make sense at most, unless the user says `max_workers=`.

        Raises ResourceUnavailable if not even one can be had.
        """

    def has_room(self, spec: FunctionSpec) -> bool:
        """Whether a worker with the GPUs of `spec` can start now. If not, idle ones of other shapes are ended first."""
        return True

    def jobs(self) -> Jobs | None:
        """Who runs tasks for this backend (`fn.submit`, commands); None: this host. Raises ConfigError if nobody does.

        See `flowfn.backends.jobs`.
        """
        raise ConfigError(
            f"the {self.name} backend can't run tasks",
            hint='submit them with backend="local", or use .remote(), .spawn() or .map()',
        )

    def box(self, draft: Draft) -> str | dict[str, Any]:
        """What tasks run in that this host runs for this backend (see `flowfn_runtime.taskbox`)."""
        return "sandbox"

    @classmethod
    def jobs_at(cls, place: Mapping[str, Any]) -> Jobs:
        """The same in a later process, from what `Jobs.place` said."""
        raise ConfigError(f"the {cls.name} backend can't run tasks")

    def describe(self) -> str:
        """What there is, in a line for people: nodes, cores, GPUs. Starts no worker.

        Raises ConfigError, BackendUnavailable or ResourceUnavailable if it can't be used from here, with the reason.
        """
        return ""

    def close(self) -> None:  # noqa: B027 - most backends keep nothing
        """Free what the backend keeps beside its workers."""
