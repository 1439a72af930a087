"""`Task`: the handle of a command, or a call made durable, that runs under a supervisor of its own."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, overload

from flowfn_runtime import taskdb, taskdir, tasksql
from flowfn_runtime.errors import CallCancelled, FlowError, TaskError, TaskFailed, TaskNotFound, WorkerLost

from . import config as configuration

if TYPE_CHECKING:
    from .spec import FunctionSpec


@dataclass(frozen=True)
class Instance:
    """One node of a task."""

    rank: int
    host: str
    address: str


class Task:
    """A task of this host. It runs whether or not anybody holds its handle; any process can get one by `Task.get`."""

    def __init__(self, row: taskdb.TaskRow) -> None:
        self._row = row

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
    def command(self) -> str:
        """The beginning of its command, in one line."""
        return self._row.command

    @property
    def status(self) -> Literal["pending", "running", "completed", "failed", "cancelled"]:
        """What it is doing now: asked for anew each time, until it has ended."""
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
        if self._row.active:
            self._row = taskdb.get(self._row.id)
        return self

    def to_dict(self) -> dict[str, Any]:
        """What is known of it, JSON-able."""
        fields = self.refresh()._row.to_dict()
        return fields | {"endpoints": {str(port): self.endpoint(port) for port in self._row.ports}}

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
        directory = self._directory
        if timeout is None:
            while self.refresh()._row.active:
                taskdir.wait_released(directory)
            return self
        from .watch import Watch

        deadline = time.monotonic() + timeout
        if self.refresh()._row.active:
            with Watch(directory) as watch:
                while self.refresh()._row.active:
                    if taskdir.is_held(directory) and not watch.wait(deadline):
                        raise TimeoutError(f"task {self.name} is still {self._row.state} after {timeout:g} s")
        return self

    def wait_started(self, timeout: float | None = None) -> Task:
        """Sleep until its command runs, or it has ended; returns itself. Raises `TimeoutError`."""
        from .watch import Watch

        deadline = None if timeout is None else time.monotonic() + timeout
        with Watch(self._directory) as watch:
            while self.refresh()._row.state == taskdb.PENDING:
                if taskdir.is_held(self._directory) and not watch.wait(deadline):
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
        if os.path.exists(os.path.join(self._directory, "call")):
            return self._value(row)
        if row.state == taskdb.FAILED:
            raise self._failure(row, TaskFailed(f"task {row.name} failed: {row.reason}", hint=self._see_logs))
        return row.exit_code

    def _value(self, row: taskdb.TaskRow) -> Any:
        from flowfn_runtime import callfile, exceptions, pickling

        found = None
        try:
            fd = os.open(os.path.join(self._directory, "result"), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            pass
        else:
            try:
                found = callfile.read(fd)
            finally:
                os.close(fd)
        if found is None:
            if row.exit_code is None:
                raise TaskFailed(f"task {row.name} failed: {row.reason}")
            raise self._failure(row, WorkerLost(f"the call's process died: {row.reason}", hint=self._see_logs))
        kind, data, buffers = found
        if kind == callfile.ERROR:
            raise exceptions.loads(data, buffers)
        return pickling.loads(data, buffers)[0]

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
        from . import tasklogs

        if follow:
            lines = tasklogs.follow(self._directory, [(node, stderr)], lines=tail)
            return (line for _node, _stderr, line in lines)
        return tasklogs.tail(tasklogs.path_of(self._directory, node, stderr), tail)

    def follow(self, *, tail: int | None = None, nodes: list[int] | None = None) -> Iterator[tuple[int, bool, str]]:
        """Yield (rank of the node, whether it is stderr, line) as lines come, until the task has ended."""
        from . import tasklogs

        wanted = list(range(self._row.nodes)) if nodes is None else nodes
        for node in wanted:
            self._check_node(node)
        return tasklogs.follow(self._directory, [(n, err) for n in wanted for err in (False, True)], lines=tail)

    def _check_node(self, node: int) -> None:
        if not 0 <= node < self._row.nodes:
            raise TaskError(f"task {self.name} has no node {node}", hint=f"Its nodes are 0 to {self._row.nodes - 1}.")
        if not os.path.isdir(self._directory):
            raise TaskNotFound(f"the directory of task {self.name} is gone: {self._directory}")

    # -- doing something about it

    def cancel(self, reason: str = "cancelled by the user") -> Task:
        """End it, with every process that it started: SIGTERM first, SIGKILL ten seconds later. Returns itself.

        Returns when the request is made; `wait` says when it is done. A task that has ended stays as it is.
        """
        if not self.refresh()._row.active:
            return self
        try:
            taskdir.request_cancel(self._directory, reason)
        except OSError as error:
            raise tasksql.explain(error) from error
        _signal_supervisor(self._directory)
        return self

    def stop(self) -> Task:
        """The same as `cancel`."""
        return self.cancel()

    def endpoint(self, port: int) -> str:
        """Where a port of `ports=` answers, as a URL. Raises `TaskError` if the task has no such port."""
        if port not in self._row.ports:
            ports = ", ".join(map(str, self._row.ports)) or "none"
            raise TaskError(f"task {self.name} has no port {port}", hint=f"Its ports are: {ports}. Name it in ports=.")
        return f"http://127.0.0.1:{port}"

    def shell(self, command: str | None = None, node: int = 0) -> int:
        """Run a shell, or one command, among the running task's processes and files; returns its exit code."""
        self._check_node(node)
        from .shell import enter

        return enter(self, command, node)

    def get_instances(self) -> list[Instance]:
        """Its nodes; on this host all have the host's name and the loopback address."""
        return [Instance(rank, os.uname().nodename, "127.0.0.1") for rank in range(self._row.nodes)]

    def get_user(self) -> str:
        """Whose task it is."""
        import pwd

        return pwd.getpwuid(os.stat(self._directory).st_uid).pw_name

    @property
    def _directory(self) -> str:
        return taskdir.task_dir(self._row.id)


def submit_call(spec: FunctionSpec, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Task:
    """Make a call durable: run it as a task, which survives this process. What `Function.submit` does.

    The project's files go along, and the modules of the project are found there.
    """
    from .durable import submit_function

    return submit_function(spec, fn, args, kwargs)


def _signal_supervisor(directory: str) -> None:
    """Wake the task's supervisor with SIGTERM. It reads then what is asked of it."""
    try:
        with open(os.path.join(directory, "pid")) as file:
            pid = int(file.read())
        pidfd = os.pidfd_open(pid)
    except (FileNotFoundError, ProcessLookupError, ValueError):
        return  # it hasn't come that far, and will look by itself; or it has ended
    try:
        # The lock is held now, so what the descriptor stands for is the supervisor and no later process of that number.
        if taskdir.is_held(directory):
            signal.pidfd_send_signal(pidfd, signal.SIGTERM)
    except ProcessLookupError:
        pass
    finally:
        os.close(pidfd)
