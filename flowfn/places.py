"""Where a task is, and what can be done with it there: a directory of this host, or a job of some engine.

The register here has a row for each task. Of those elsewhere it says what was known last; who wants to know better asks
`refresh`, which puts one question to each place for all of its tasks, and none for those that have ended.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flowfn_runtime import callfile, taskdb, taskdir, tasklogs, tasksql, taskstart
from flowfn_runtime.errors import BackendError, FlowError, TaskNotFound, ValidationError
from flowfn_runtime.taskdb import TaskRow
from flowfn_runtime.watch import Watch

if TYPE_CHECKING:
    from flowfn.backends.jobs import Jobs, State
    from flowfn.plan import Draft

WAIT_S = 60.0  # how long one question may wait for news
AGAIN_S = (1.0, 30.0)  # when a place that did not answer is asked again: at first, and at last
FIELDS = ("state", "reason", "exit_code", "started_at", "ended_at", "attempts")

_jobs: dict[str, Jobs] = {}
_lock = threading.Lock()


class Place(ABC):
    """Where one task is."""

    def __init__(self, row: TaskRow) -> None:
        self.row = row

    def refresh(self) -> TaskRow:
        """The task's row as it is now."""
        if self.row.active:
            self.row = refresh([taskdb.get(self.row.id)])[0]
        return self.row

    @property
    def is_call(self) -> bool:
        """Whether it is a call made durable."""
        return bool((taskdir.read_json(self.directory, "spec.json") or {}).get("call"))

    @property
    def directory(self) -> str:
        """What this host keeps of it."""
        return taskdir.task_dir(self.row.id)

    @abstractmethod
    def wait(self, until: Sequence[str], timeout: float | None) -> bool:
        """Sleep until its state is none of `until`; False after `timeout` seconds."""

    @abstractmethod
    def outcome(self) -> tuple[bytes, Any, list[Any]] | None:
        """What came of a call: its kind (see `callfile`), the pickle and buffers. None if there is nothing."""

    @abstractmethod
    def tail(self, node: int, stderr: bool, lines: int | None) -> str:
        """The last lines that a node wrote."""

    @abstractmethod
    def follow(self, streams: list[tuple[int, bool]], lines: int | None) -> Iterator[tuple[int, bool, str]]:
        """Lines as they come, until it has ended."""

    @abstractmethod
    def cancel(self, reason: str) -> None:
        """Have it ended."""

    @abstractmethod
    def address(self) -> str:
        """The host where its ports answer."""


def place_of(row: TaskRow) -> Place:
    """Where the task of this row is."""
    return There(row) if row.place else Here(row)


class Here(Place):
    """A task of this host."""

    def wait(self, until: Sequence[str], timeout: float | None) -> bool:
        if timeout is None and set(until) == set(taskdb.ACTIVE):
            while self.refresh().active:
                taskdir.wait_released(self.directory)
            return True
        if self.refresh().state not in until:
            return True
        deadline = None if timeout is None else time.monotonic() + timeout
        with Watch(self.directory) as watch:
            while self.refresh().state in until:
                if taskdir.is_held(self.directory) and not watch.wait(deadline):
                    return False
        return True

    def outcome(self) -> tuple[bytes, Any, list[Any]] | None:
        try:
            fd = os.open(os.path.join(self.directory, "result"), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            return callfile.read(fd)
        finally:
            os.close(fd)

    def tail(self, node: int, stderr: bool, lines: int | None) -> str:
        self._check()
        return tasklogs.tail(os.path.join(self.directory, tasklogs.name_of(node, stderr)), lines)

    def follow(self, streams: list[tuple[int, bool]], lines: int | None) -> Iterator[tuple[int, bool, str]]:
        self._check()
        return tasklogs.follow(self.directory, streams, lines=lines)

    def _check(self) -> None:
        if not os.path.isdir(self.directory):
            raise TaskNotFound(f"the directory of task {self.row.name} is gone: {self.directory}")

    def cancel(self, reason: str) -> None:
        taskdir.cancel(self.directory, reason)

    def address(self) -> str:
        return "127.0.0.1"


class There(Place):
    """A task of some engine."""

    @property
    def jobs(self) -> Jobs:
        """Who is asked for it."""
        return jobs_at(self.row.place)

    def wait(self, until: Sequence[str], timeout: float | None) -> bool:
        deadline = float("inf") if timeout is None else time.monotonic() + timeout
        pause = AGAIN_S[0]
        while self.refresh().state in until:
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            if _being_submitted(self.row):
                taskdir.wait_released(self.directory)
                continue
            try:
                self.jobs.wait(self.row.id, self.row.state, min(left, WAIT_S))
                pause = AGAIN_S[0]
            except BackendError:  # the task runs on; what became of it will be known
                time.sleep(min(pause, left))
                pause = min(2 * pause, AGAIN_S[1])
        return True

    def outcome(self) -> tuple[bytes, Any, list[Any]] | None:
        from flowfn.backends.jobs import contents

        with tempfile.TemporaryFile(dir=self.directory if os.access(self.directory, os.W_OK) else None) as file:
            for piece in contents(self.jobs, self.row.id, "result"):
                file.write(piece)
            file.flush()
            return callfile.read(file.fileno())

    def tail(self, node: int, stderr: bool, lines: int | None) -> str:
        name = tasklogs.name_of(node, stderr)
        offset = 0 if lines is None else self.jobs.end_of(self.row.id, name, lines)
        raw = b""
        while piece := self.jobs.read(self.row.id, name, offset + len(raw)):
            raw += piece
        return raw.decode("utf-8", "replace")

    def follow(self, streams: list[tuple[int, bool]], lines: int | None) -> Iterator[tuple[int, bool, str]]:
        names = {tasklogs.name_of(node, stderr): (node, stderr) for node, stderr in streams}
        offsets: dict[str, int] = {}
        rest = dict.fromkeys(names, b"")
        pause = AGAIN_S[0]
        while True:
            try:
                if not offsets:
                    offsets = {n: self.jobs.end_of(self.row.id, n, lines) if lines is not None else 0 for n in names}
                more = self.jobs.more(self.row.id, offsets, WAIT_S)
                pause = AGAIN_S[0]
            except BackendError:
                time.sleep(pause)
                pause = min(2 * pause, AGAIN_S[1])
                continue
            for name, added in more.added.items():
                offsets[name] += len(added)
                *whole, rest[name] = (rest[name] + added).split(b"\n")
                for line in whole:
                    yield (*names[name], line.decode("utf-8", "replace") + "\n")
            if more.ended and not any(more.added.values()):
                break
        for name, line in rest.items():
            if line:
                yield (*names[name], line.decode("utf-8", "replace"))

    def cancel(self, reason: str) -> None:
        if _being_submitted(self.row):
            taskdir.wait_released(self.directory)
        self.jobs.cancel(self.row.id, reason)

    def address(self) -> str:
        return self.jobs.address(self.row.id)


# -- starting and forgetting -------------------------------------------------------------------------------------------


def start(jobs: Jobs, draft: Draft) -> str:
    """Start a task elsewhere; returns its id."""
    spec = draft.wanted
    task_id: str = spec["id"]
    place = json.dumps(dict(jobs.place), sort_keys=True)
    with _lock:
        _jobs.setdefault(place, jobs)  # for asking; how it is started is this one's matter
    _dependencies(spec, jobs, place)
    try:
        # The lock is held while it is submitted: whoever lists it meanwhile does not take it for lost.
        directory, lock = taskdir.create(task_id)
    except OSError as error:
        raise tasksql.explain(error) from error
    known = False
    try:
        taskdir.write_json(directory, "spec.json", taskstart.public(spec))
        row = taskstart.row(spec, backend=jobs.label, place=place)
        _seq, spec["after"] = taskdb.add(row, _held(spec, jobs, place), spec["depends_on"])
        known = True
        jobs.start(draft)
    except BaseException as error:
        # A client that is interrupted does not know what became of it; who asks next finds out.
        if isinstance(error, Exception) and not getattr(error, "uncertain", False):
            if known:
                taskdb.forget(task_id)
            taskdir.remove_tree(directory)
        if isinstance(error, OSError) and not isinstance(error, FlowError):
            raise tasksql.explain(error) from error
        raise
    finally:
        os.close(lock)
    return task_id


def _held(spec: dict[str, Any], jobs: Jobs, place: str) -> list[str]:
    """Names for the volumes that one task has at a time: that place's own, which this register does not know."""
    return [f"{place} {spec['project']}/{called}" for called in jobs.held(spec)]


def _dependencies(spec: dict[str, Any], jobs: Jobs, place: str) -> None:
    """The tasks that it depends on, by their ids. They have to be of the same place, which sees to the order."""
    rows = [taskdb.find(other, spec["project"]) for other in spec["depends_on"]]
    for row in rows:
        if row.place != place:
            raise ValidationError(
                f"depends_on: task {row.name} is on {row.backend}, and this one is to run on {jobs.label}",
                hint="a task can depend on tasks of its own place; wait for others first: task.wait()",
            )
    spec["depends_on"] = [row.id for row in rows]


def remove(rows: Sequence[TaskRow]) -> int:
    """Forget tasks that have ended, with all that is left of them; the bytes that are free on this host now."""
    for place, group in _by_place(rows).items():
        jobs_at(place).forget([row.id for row in group])
    return taskstart.remove(rows)


# -- asking ------------------------------------------------------------------------------------------------------------


def look(project: str | None) -> None:
    """Bring the register up to date with what other places say of the project's active tasks (of all if None)."""
    refresh(taskdb.elsewhere(project))


def refresh(rows: Iterable[TaskRow]) -> list[TaskRow]:
    """These rows as they are now: one question to each place. Where that does not answer, the reason says so."""
    rows = list(rows)
    asked = [row for row in rows if row.active and row.place and not _being_submitted(row)]
    fresh: dict[str, TaskRow] = {}
    groups = _by_place(asked)

    def ask(place: str, group: list[TaskRow]) -> None:
        fresh.update({row.id: row for row in _ask(place, group)})

    threads = [threading.Thread(target=ask, args=item) for item in list(groups.items())[1:]]
    for thread in threads:
        thread.start()
    for item in list(groups.items())[:1]:
        ask(*item)
    for thread in threads:
        thread.join()
    return [fresh.get(row.id, row) for row in rows]


def _ask(place: str, rows: list[TaskRow]) -> list[TaskRow]:
    known: Mapping[str, State | FlowError]
    try:
        known = jobs_at(place).states([row.id for row in rows])
    except FlowError as error:
        known = dict.fromkeys((row.id for row in rows), error)
    return [_written(row, _judged(row, known.get(row.id))) for row in rows]


def _judged(row: TaskRow, state: State | FlowError | None) -> TaskRow:
    if isinstance(state, FlowError):
        said = state.message.splitlines()[0]
        return row._replace(reason=f"this is what was known when {row.backend} answered last; now: {said}")
    if state is None:
        reason = f"{row.backend} does not know it: its submission was interrupted, or its files were removed there"
        return row._replace(state=taskdb.FAILED, reason=reason, ended_at=time.time())
    return row._replace(**state._asdict())


def _written(before: TaskRow, now: TaskRow) -> TaskRow:
    changed = {name: getattr(now, name) for name in FIELDS if getattr(now, name) != getattr(before, name)}
    if changed:
        try:
            taskdb.update(now.id, **changed)
        except FlowError:
            pass  # a read-only home or a full disk: what is returned is right all the same
    return now


def _being_submitted(row: TaskRow) -> bool:
    return taskdir.is_held(taskdir.task_dir(row.id))


def _by_place(rows: Iterable[TaskRow]) -> dict[str, list[TaskRow]]:
    groups: dict[str, list[TaskRow]] = {}
    for row in rows:
        if row.place:
            groups.setdefault(row.place, []).append(row)
    return groups


def jobs_at(place: str) -> Jobs:
    """Who is asked for the tasks of a place."""
    from flowfn.backends import registry

    with _lock:
        if place not in _jobs:
            where: Mapping[str, Any] = json.loads(place)
            _jobs[place] = registry.kind(where["backend"]).jobs_at(where)
        return _jobs[place]


def close_all() -> None:
    """Close what was opened to ask. It is opened again if need be."""
    with _lock:
        opened = list(_jobs.values())
    for jobs in opened:
        jobs.close()


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()
    _jobs.clear()  # they are the parent's


os.register_at_fork(after_in_child=_after_fork)
