"""Volumes of a bucket are written back when a call ends, before its outcome is told.

A worker with mounts sees neither the volume's folder nor, perhaps, the right credentials. So it asks the volume's
keeper, a process outside, by a socket that is bound into the worker's filesystem.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import types
from collections.abc import Callable, Iterator
from typing import Any

from .. import errors
from ..errors import FlowError, VolumeError

# The sockets of the keepers of the volumes that this process has mounted, separated by colons.
VARIABLE = "FLOW_VOLUME_KEEPERS"
SOCKET = "commit.sock"


def keepers() -> list[str]:
    """The sockets of the mounted volumes' keepers."""
    return [path for path in os.environ.get(VARIABLE, "").split(":") if path]


def keeper_of(volume_id: str) -> str | None:
    """The socket of a mounted volume's keeper; None if it isn't mounted here, or lives in no bucket."""
    return next((path for path in keepers() if os.path.basename(os.path.dirname(path)) == volume_id), None)


def commit_mounted() -> None:
    """Write back what changed in the mounted volumes. Raises `VolumeConflict` and other `FlowError`s."""
    for path in keepers():
        ask(path)


def after(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, and then what it changed in volumes written back; a conflict is an error of the function's."""
    if not keepers():
        return function

    def committed(*args: Any, **kwargs: Any) -> Any:
        with _committing():
            value = function(*args, **kwargs)
        if type(value) is types.CoroutineType:
            return _awaited(value)
        if type(value) is types.GeneratorType:
            return _generated(value)
        if type(value) is types.AsyncGeneratorType:
            return _generated_async(value)
        return value

    return committed


@contextlib.contextmanager
def _committing() -> Iterator[None]:
    try:
        yield
    except BaseException:
        with contextlib.suppress(FlowError):  # the call has its own error to tell; the keeper tries again at the end
            commit_mounted()
        raise
    commit_mounted()


async def _awaited(value: Any) -> Any:
    with _committing():
        return await value


def _generated(values: Any) -> Any:
    with _committing():
        return (yield from values)


async def _generated_async(values: Any) -> Any:
    with _committing():
        async for value in values:
            yield value


def ask(path: str) -> bool:
    """Have the keeper at `path` write back; False if there was nothing to write. Raises its error."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        try:
            with _near(path) as short:
                connection.connect(short)
            with connection.makefile("rb") as reader:
                line = reader.readline()
        except OSError as error:
            line = str(error).encode()
    try:
        answer = json.loads(line)
    except ValueError:
        raise VolumeError(
            f"the process that writes the volume {os.path.basename(os.path.dirname(path))} back is gone",
            hint="was it killed? What was written is on this host; who attaches the volume next here writes it back",
        ) from None
    if "error" in answer:
        kind = getattr(errors, str(answer["error"]), VolumeError)
        raise kind(answer["message"], hint=answer["hint"])
    return bool(answer["changed"])


def listen(folder: str) -> socket.socket:
    """The socket on which a volume's keeper is asked, in the volume's folder; takes the place of an older one."""
    path = os.path.join(folder, SOCKET)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        with _near(path) as short:
            listener.bind(short)
        os.chmod(path, 0o600)
        listener.listen(128)
    except BaseException:
        listener.close()
        raise
    return listener


def serve(listener: socket.socket, commit: Callable[[], bool]) -> None:
    """Answer whoever asks, for as long as the process lives."""
    while True:
        connection, _ = listener.accept()
        with connection:
            try:
                answer: dict[str, Any] = {"changed": commit()}
            except FlowError as error:
                answer = {"error": type(error).__name__, "message": error.message, "hint": error.hint}
            except Exception as error:
                answer = {"error": "VolumeError", "message": f"{type(error).__name__}: {error}", "hint": None}
            with contextlib.suppress(OSError):
                connection.sendall(json.dumps(answer).encode() + b"\n")


@contextlib.contextmanager
def _near(path: str) -> Iterator[str]:
    """`path`, short enough for the address of a socket, which has a hundred bytes."""
    if len(os.fsencode(path)) < 100:
        yield path
        return
    folder = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{os.path.basename(path)}"
    finally:
        os.close(folder)
