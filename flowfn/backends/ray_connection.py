"""The client's ends of workers on Ray: streams that lead straight to them, and ones that Ray relays."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import ray
import ray.exceptions

from flowfn.backends import ray_lease, stream
from flowfn.backends.base import Connection, Exit
from flowfn.backends.ray_door import GONE, Lease
from flowfn.backends.ray_gate import gate
from flowfn_runtime import wire

EXIT_S = 5.0  # how long a relayed worker's actor may take to say how it ended
LOOK_S = 5.0  # how often it is looked whether Ray is there at all
BIG_BYTES = 1 << 22


class _Words:
    """What a program on another machine says on standard error, with the face of a file: all comes at its end."""

    def __init__(self, lease: Lease) -> None:
        self._lease = lease
        self._read = False

    def read(self, size: int) -> bytes:
        if self._read:
            return b""
        self._read = True
        while not self._lease.over.wait(LOOK_S) and ray.is_initialized():
            pass
        said: bytes = self._lease.answer.get("said", b"")
        return said

    def close(self) -> None:
        pass


class _Program:
    """The program on the node, with the face of a process: its end is that of the Ray task that waits for it."""

    pid = 0

    def __init__(self, lease: Lease, stderr: Any) -> None:
        self.stderr = stderr
        self.returncode: int | None = None
        self._lease = lease

    def poll(self) -> int | None:
        return self.returncode

    def wait(self) -> None:
        # Ray takes its time to find a node dead, and the worker's stream has ended.
        self._lease.over.wait(1.0)
        self.returncode = 0

    def why(self) -> str:
        """What Ray says of it, if it did not end by itself."""
        error = self._lease.error
        return f"its Ray task failed: {summary(error)}" if error is not None else ""


class RayConnection(stream.StreamConnection):
    """A worker whose stream leads straight to it; on this machine, a socket for shared memory and its words as well."""

    process: Any

    def __init__(self, lease: Lease, said: dict[str, Any], fds: Sequence[int]) -> None:
        fd, *near = fds
        self.said_first = said
        self.label = f"ray node {said['host']}"
        self.facts = {}
        self.python = ""
        self.side: socket.socket | None = None
        if near:
            self.side = socket.socket(fileno=near[0])
            self.process = _Program(lease, open(near[1], "rb", buffering=0))
        else:
            self.process = _Program(lease, _Words(lease))
        os.set_inheritable(fd, False)
        self.begin(wire.Stream(fd, fd))

    def hello(self) -> Mapping[str, Any]:
        return {**super().hello(), "shm": self.side is not None}

    def kill(self) -> None:
        # The program sees it, and ends the worker with all that it started.
        try:
            fd = os.dup(self.stream.read_fd)
        except OSError:
            return  # closed already
        with socket.socket(fileno=fd) as end:
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def judge(self, status: int) -> Exit:
        return Exit(detail="\n".join(filter(None, (self.process.why(), super().said()))))

    def close(self) -> None:
        super().close()
        if self.side is not None:
            self.side.close()


class RayStream:
    """Frames over an actor's methods, with the face of a `wire.Stream`. Ray keeps the order of one caller's calls."""

    arena = None
    mapped = None
    read_fd = write_fd = -1

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self._frames: deque[Any] = deque()
        self._kept: list[Any] = []  # frames that go with the next one
        self._taking: Any = None
        self._lock = threading.Lock()
        self._closed = False

    @property
    def pending(self) -> int:
        return len(self._frames)

    def send(
        self,
        kind: int,
        *,
        call: int = 0,
        arg: int = 0,
        flags: int = 0,
        meta: bytes = b"",
        body: Any = b"",
        buffers: Sequence[Any] = (),
        later: bool = False,
    ) -> None:
        if self._closed:
            raise EOFError("the connection was closed")
        with self._lock:
            self._kept.append(((kind, flags, call, arg, meta), bytes(body), len(buffers)))
            if later and not buffers:
                return
            kept, self._kept = self._kept, []
            try:
                with gate:
                    self._actor.feed.remote(kept, list(map(ray_lease.out_of_band, buffers)))
            except GONE as error:
                raise EOFError(summary(error)) from None

    def receive(self) -> wire.Frame:
        while not self._frames:
            if self._closed:
                raise EOFError("the connection was closed")
            try:
                with gate:
                    if self._taking is None:
                        self._taking = self._actor.take.remote()
                    frames, self._taking = ray.get(self._taking), self._actor.take.remote()
            except GONE as error:
                raise EOFError(summary(error)) from None
            if not frames:
                raise EOFError("the worker has ended")
            self._frames.extend(frames)
        (kind, flags, call, arg, meta), body, buffers = self._frames.popleft()
        return wire.Frame(kind, flags, call, arg, meta, body, list(map(_own, buffers)))

    def close(self) -> None:
        self._closed = True

    def forget(self) -> None:
        self._closed = True


def _own(buffer: Any) -> Any:
    """A copy of what lies in Ray's object store, since what a call returns is its caller's to change."""
    if len(buffer) >= BIG_BYTES and hasattr(buffer, "copy"):  # numpy's copies are in huge pages: a quarter of the time
        return memoryview(buffer.copy())
    return bytearray(buffer)


class RelayedConnection(Connection):
    """A worker on a node that has no way to this process but Ray's own."""

    stream: Any

    def __init__(self, actor: Any, said: dict[str, Any]) -> None:
        self._actor = actor
        self._how: Exit | None = None
        self.said_first = said
        self.label = f"ray node {said['host']}"
        self.facts: dict[str, Any] = {}
        self.stream = RayStream(actor)

    def hello(self) -> Mapping[str, Any]:
        return {"argv0": os.path.basename(sys.argv[0]) if sys.argv else ""}

    def kill(self) -> None:
        self._how = self._how or Exit(detail="it was ended here")
        end(self._actor)

    def exit(self, timeout: float) -> Exit:
        if self._how is None:
            self._how = self._ask(max(timeout, EXIT_S))
        return self._how

    def _ask(self, timeout: float) -> Exit:
        try:
            with gate:
                said = ray.get(self._actor.exit.remote(), timeout=timeout).decode(errors="replace")
        except ray.exceptions.GetTimeoutError:
            return Exit(detail="its Ray actor does not answer")
        except GONE as error:
            return Exit(detail=f"its Ray actor is gone: {summary(error)}")
        _, found, mark = said.rpartition(wire.EXIT_MARK)
        if not found:
            return Exit(detail="\n".join(said.strip().splitlines()[-8:]))
        how = json.loads(mark.partition("\n")[0])
        memory = how.get("out_of_memory") or {}
        return Exit(how["exitcode"], memory.get("limit"), memory.get("peak"), tuple(how.get("output", ("", ""))))

    def close(self) -> None:
        self.stream.close()
        end(self._actor)


def end(actor: Any) -> None:
    """End an actor. Its worker's program sees it go, and ends the worker with all that it started."""
    try:
        with gate:
            if ray.is_initialized():
                ray.kill(actor, no_restart=True)
    except (*GONE, ValueError, RuntimeError):
        pass  # it is gone, or Ray is


def summary(error: BaseException | None) -> str:
    """What Ray says, in a line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
