"""`Task`: the handle of a command, or a call made durable, that runs under a supervisor of its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, overload

from flowfn_runtime import taskdb, tasksql
from flowfn_runtime.errors import CallCancelled, FlowError, TaskError, TaskFailed, WorkerLost

from . import config as configuration
from . import places

if TYPE_CHECKING:
    from .spec import FunctionSpec


@dataclass(frozen=True)
class Instance:
    """One node of a task."""

    rank: int
    host: str
    address: str


class Task:
    """A task, here or elsewhere. It runs whether or not anybody holds its handle; any process gets it by `Task.get`."""

    def __init__(self, row: taskdb.TaskRow) -> None:
        self._place = places.place_of(row)

    @property
    def _row(self) -> taskdb.TaskRow:
        return self._place.row

    @classmethod
    def get(cls, task: str) -> Task:
        """The task of this id (or beginning of an id, or name) of the configured project; else `TaskNotFound`."""
        return cls(taskdb.find(task, configuration.load().project))

    # -- what it is

    @property
    def task_id(self) -> str:
        """Its id, unique on this host."""
        return self._row.id

    id = task_id

    @property
    def name(self) -> str:
        """Its name; unique among the project's active tasks."""
        return self._row.name

    @property
    def backend(self) -> str:
        """The backend that runs it: "local", "ssh://gpu7", "slurm" and so on."""
        return self._row.backend

    @property
    def command(self) -> str:
        """The beginning of its command, in one line."""
        return self._row.command

    @property
    def status(self) -> Literal["pending", "running", "completed", "failed", "cancelled"]:
        """What it is doing now: asked for anew each time, until it has ended.

        Where the place that runs it does not answer, it is what was known last, and `reason` says so.
        """
        return self.refresh()._row.state  # type: ignore[return-value]

    state = status

    @property
    def reason(self) -> str:
        """Why it is in that state, where there is more to say: what it waits for, or how it failed."""
        return self.refresh()._row.reason

    @property
    def exit_code(self) -> int | None:
        """The command's exit code (128 + n: killed by signal n); None if it hasn't ended, or never started."""
        return self.refresh()._row.exit_code

    @property
    def created_at(self) -> float:
        """When it was submitted, in seconds since the epoch."""
        return self._row.created_at

    @property
    def started_at(self) -> float | None:
        """When its command was first started, in seconds since the epoch."""
        return self.refresh()._row.started_at

    @property
    def ended_at(self) -> float | None:
        """When it ended, in seconds since the epoch."""
        return self.refresh()._row.ended_at

    @property
    def is_terminal(self) -> bool:
        """Whether it has ended."""
        return not self.refresh()._row.active

    @property
    def num_instances(self) -> int:
        """How many nodes it has."""
        return self._row.nodes

    def refresh(self) -> Task:
        """Look at the task anew, unless it has ended; returns itself."""
        self._place.refresh()
        return self

    def to_dict(self) -> dict[str, Any]:
        """What is known of it, JSON-able."""
        fields = self.refresh()._row.to_dict()
        endpoints = {str(port): self.endpoint(port) for port in self._row.ports} if self._reachable else {}
        return fields | {"endpoints": endpoints}

    @property
    def _reachable(self) -> bool:
        return not self._row.place or self._row.active

    def __repr__(self) -> str:
        row = self._row
        return f"<Task {row.id} {row.name!r} {row.state}{f': {row.reason}' if row.reason else ''}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Task) and other._row.id == self._row.id

    def __hash__(self) -> int:
        return hash(self._row.id)

    # -- waiting

    def wait(self, timeout: float | None = None) -> Task:
        """Sleep until it has ended; returns itself. Raises `TimeoutError` after `timeout` seconds."""
        if not self._place.wait(taskdb.ACTIVE, timeout):
            raise TimeoutError(f"task {self.name} is still {self._row.state} after {timeout:g} s")
        return self

    def wait_started(self, timeout: float | None = None) -> Task:
        """Sleep until its command runs, or it has ended; returns itself. Raises `TimeoutError`."""
        if not self._place.wait((taskdb.PENDING,), timeout):
            raise TimeoutError(f"task {self.name} is still pending after {timeout:g} s: {self._row.reason}")
        return self

    def result(self, timeout: float | None = None) -> Any:
        """What came of it, once it has ended; any number of times, from any process.

        Of a call: the value that the function returned, or its exception is raised. Of a command: its exit code, 0.
        Raises `TaskFailed` (with `exit_code`) if the command failed, `CallCancelled`, `WorkerLost` if the call's
        process died, `TimeoutError` after `timeout` seconds.
        """
        row = self.wait(timeout)._row
        if row.state == taskdb.CANCELLED:
            raise CallCancelled(f"task {row.name} was cancelled" + (f": {row.reason}" if row.reason else ""))
        if self._place.is_call:
            return self._value(row)
        if row.state == taskdb.FAILED:
            raise self._failure(row, TaskFailed(f"task {row.name} failed: {row.reason}", hint=self._see_logs))
        return row.exit_code

    def _value(self, row: taskdb.TaskRow) -> Any:
        from flowfn_runtime import callfile, exceptions, pickling

        found = self._place.outcome()
        if found is None:
            if row.exit_code is None:
                raise TaskFailed(f"task {row.name} failed: {row.reason}")
            died = f"the call's process died: {row.reason}{self._last_words()}"
            raise self._failure(row, WorkerLost(died, hint=self._see_logs))
        kind, data, buffers = found
        if kind == callfile.ERROR:
            raise exceptions.loads(data, buffers)
        return pickling.loads(data, buffers)[0]

    def _last_words(self) -> str:
        try:
            said = self._place.tail(0, True, 5).strip()
        except (FlowError, OSError):  # they are lost, or elsewhere
            said = ""
        return f"\n{said[-1000:]}" if said else ""

    def _failure(self, row: taskdb.TaskRow, error: TaskFailed | WorkerLost) -> FlowError:
        if isinstance(error, TaskFailed):
            error.exit_code = row.exit_code
        else:
            error.exitcode = row.exit_code
        return error

    @property
    def _see_logs(self) -> str:
        return f"See what it wrote: flow logs {self.name}"

    # -- logs

    @overload
    def logs(
        self, follow: Literal[False] = False, tail: int | None = 100, stderr: bool = False, *, node: int = 0
    ) -> str: ...
    @overload
    def logs(
        self, follow: Literal[True], tail: int | None = 100, stderr: bool = False, *, node: int = 0
    ) -> Iterator[str]: ...
    def logs(
        self, follow: bool = False, tail: int | None = 100, stderr: bool = False, *, node: int = 0
    ) -> str | Iterator[str]:
        """What the task wrote to stdout, or to stderr: its last `tail` lines (None: all), as one string.

        With `follow`, an iterator of lines, each as it comes, which ends with the task. `node` is the rank of the node.
        """
        self._check_node(node)
        if follow:
            return (line for _node, _stderr, line in self._place.follow([(node, stderr)], tail))
        return self._place.tail(node, stderr, tail)

    def follow(self, *, tail: int | None = None, nodes: list[int] | None = None) -> Iterator[tuple[int, bool, str]]:
        """Yield (rank of the node, whether it is stderr, line) as lines come, until the task has ended."""
        wanted = list(range(self._row.nodes)) if nodes is None else nodes
        for node in wanted:
            self._check_node(node)
        return self._place.follow([(n, err) for n in wanted for err in (False, True)], tail)

    def _check_node(self, node: int) -> None:
        if not 0 <= node < self._row.nodes:
            raise TaskError(f"task {self.name} has no node {node}", hint=f"Its nodes are 0 to {self._row.nodes - 1}.")

    # -- doing something about it

    def cancel(self, reason: str = "cancelled by the user") -> Task:
        """End it, with every process that it started: SIGTERM first, SIGKILL ten seconds later. Returns itself.

        Returns when the request is made; `wait` says when it is done. A task that has ended stays as it is.
        """
        if not self.refresh()._row.active:
            return self
        try:
            self._place.cancel(reason)
        except OSError as error:
            raise (error if isinstance(error, FlowError) else tasksql.explain(error)) from None
        return self

    def stop(self) -> Task:
        """The same as `cancel`."""
        return self.cancel()

    def endpoint(self, port: int) -> str:
        """Where a port of `ports=` answers, as a URL. Raises `TaskError` if the task has no such port."""
        if port not in self._row.ports:
            ports = ", ".join(map(str, self._row.ports)) or "none"
            raise TaskError(f"task {self.name} has no port {port}", hint=f"Its ports are: {ports}. Name it in ports=.")
        return f"http://{self._place.address()}:{port}"

    def shell(self, command: str | None = None, node: int = 0) -> int:
        """Run a shell, or one command, among the running task's processes and files; returns its exit code."""
        self._check_node(node)
        from .shell import enter

        return enter(self, command, node)

    def get_instances(self) -> list[Instance]:
        """Its nodes; on this host all have the host's name and the loopback address."""
        address = self._place.address()
        host = os.uname().nodename if self.backend == taskdb.LOCAL else address
        return [Instance(rank, host, address) for rank in range(self._row.nodes)]

    def get_user(self) -> str:
        """Whose task it is."""
        import pwd

        return pwd.getpwuid(os.stat(self._place.directory).st_uid).pw_name


def submit_call(spec: FunctionSpec, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Task:
    """Make a call durable: run it as a task, which survives this process. What `Function.submit` does.

    The project's files go along, and the modules of the project are found there.
    """
    from .durable import submit_function

    return submit_function(spec, fn, args, kwargs)
