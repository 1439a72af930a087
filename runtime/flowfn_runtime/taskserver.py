"""Tasks of this host for a client on another machine: started, asked for and ended over one stream.

The client sends a request in a SETUP frame, `{"do": name, ...}`, perhaps with a body. It is answered by a NEWS frame
with `answer` and perhaps a body, or by an ERROR; before that, to start a task, by questions for the project's files.
The tasks are this host's own, in its register and under supervisors of their own; they outlive this process. With `of`
in a request, "slurm", they are those of the cluster whose login node this is (`slurmserver`).
"""

from __future__ import annotations

import json
import os
import re
import select
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from . import exceptions, limits, project, taskdb, taskdir, tasklogs, taskstart, wire
from .errors import FlowError, ProtocolError, TaskNotFound

if TYPE_CHECKING:
    from .bootstrap import Client

PATIENCE_S = 600.0  # after so long without a request the client is taken for gone
CHUNK_BYTES = 1 << 22
_FIELDS = ("state", "reason", "exit_code", "started_at", "ended_at", "attempts")
_FILES = re.compile(r"\d+\.(out|err)|result|supervisor\.log")


def serve(stream: wire.Stream, client: Client) -> None:
    """Answer until the client has nothing more to ask."""
    limits.set_subreaper(False)  # supervisors are nobody's children, and don't end with this process
    while True:
        if not stream.pending:
            poll = select.poll()
            poll.register(stream.read_fd, select.POLLIN)
            if not poll.poll(PATIENCE_S * 1000):
                return
        try:
            frame = stream.receive()
        except EOFError:
            return
        request = json.loads(frame.meta)
        try:
            answer, body = _requests(request.pop("of", None))[request.pop("do")](client, frame.body, **request)
        except EOFError:
            return
        except Exception as error:
            if not isinstance(error, FlowError):
                error = ProtocolError(f"the host failed: {type(error).__name__}: {error}")
            payload = exceptions.dumps(error)
            stream.send(wire.ERROR, body=payload.data, buffers=payload.buffers)
        else:
            stream.send(wire.NEWS, meta=json.dumps({"answer": answer}).encode(), body=body)


def _requests(of: str | None) -> Mapping[str, Callable[..., tuple[Any, bytes]]]:
    if of is None:
        return _DO
    from . import slurmserver

    return slurmserver.DO


def _check(client: Client, body: Any, wanted: dict[str, Any]) -> tuple[Any, bytes]:
    taskstart.check(wanted)
    return None, b""


def _start(client: Client, body: Any, wanted: dict[str, Any]) -> tuple[Any, bytes]:
    from .bootstrap import fetch

    if os.path.isdir(taskdir.task_dir(wanted["id"])):
        return None, b""  # it was started before the connection was lost
    taskstart.check(wanted)  # before anything travels
    store = taskstart.code_store()
    os.environ.update(wanted["environ"])
    with project.guarded(store):
        for digest in filter(None, [wanted["code"], *wanted["roots"]]):
            if not os.path.exists(os.path.join(store, "trees", digest)):
                fetch(client, digest, store)
        taskstart.start(wanted, bytes(body) if wanted["call"] else None)
    return None, b""


def _states(client: Client, body: Any, ids: list[str]) -> tuple[Any, bytes]:
    found = {}
    for task_id in ids:
        try:
            row = taskdb.get(task_id)
        except TaskNotFound:
            continue
        found[task_id] = [getattr(row, field) for field in _FIELDS]
    return found, b""


def _wait(client: Client, body: Any, id: str, state: str, timeout: float) -> tuple[Any, bytes]:
    from .watch import Watch

    directory, deadline = taskdir.task_dir(id), time.monotonic() + timeout
    if os.path.isdir(directory):
        with Watch(directory) as watch:
            while taskdb.get(id).state == state:
                if taskdir.is_held(directory) and not watch.wait(deadline):
                    break
    return None, b""


def _more(client: Client, body: Any, id: str, offsets: dict[str, int], timeout: float) -> tuple[Any, bytes]:
    from .watch import Watch

    directory, deadline = taskdir.task_dir(id), time.monotonic() + timeout
    if not os.path.isdir(directory):
        return [{}, True], b""
    with Watch(directory) as watch:
        while True:
            # In this order: what is written before the end is read after it was seen.
            ended = not taskdir.is_held(directory) and not taskdir.is_held(directory, "tree")
            pieces = {name: read(directory, name, offset) for name, offset in offsets.items()}
            if ended or any(pieces.values()) or not watch.wait(deadline):
                return [{name: len(piece) for name, piece in pieces.items()}, ended], b"".join(pieces.values())


def _read(client: Client, body: Any, id: str, name: str, offset: int) -> tuple[Any, bytes]:
    return None, read(taskdir.task_dir(id), name, offset)


def _end_of(client: Client, body: Any, id: str, name: str, lines: int) -> tuple[Any, bytes]:
    return tasklogs.start_of(os.path.join(taskdir.task_dir(id), _file(name)), lines), b""


def _cancel(client: Client, body: Any, id: str, reason: str) -> tuple[Any, bytes]:
    if taskdb.get(id).active:
        taskdir.cancel(taskdir.task_dir(id), reason)
    return None, b""


def _forget(client: Client, body: Any, ids: list[str]) -> tuple[Any, bytes]:
    rows = []
    for task_id in ids:
        try:
            rows.append(taskdb.get(task_id))
        except TaskNotFound:
            continue
    return taskstart.remove([row for row in rows if not row.active]), b""


def read(directory: str, name: str, offset: int) -> bytes:
    """At most CHUNK_BYTES of a task's file; b"" if it isn't there."""
    try:
        fd = os.open(os.path.join(directory, _file(name)), os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return b""
    try:
        return os.pread(fd, CHUNK_BYTES, offset)
    finally:
        os.close(fd)


def _file(name: str) -> str:
    if not _FILES.fullmatch(name):
        raise ProtocolError(f"{name!r} is no file of a task that may be asked for")
    return name


_DO: dict[str, Callable[..., tuple[Any, bytes]]] = {
    "check": _check,
    "start": _start,
    "states": _states,
    "wait": _wait,
    "more": _more,
    "read": _read,
    "end_of": _end_of,
    "cancel": _cancel,
    "forget": _forget,
}
