"""The client's side of one worker: the handshake, and a conversation for one call at a time."""

from __future__ import annotations

import json
import sys
import threading
from typing import TYPE_CHECKING, Any

from flowfn_runtime import exceptions, wire
from flowfn_runtime.errors import BackendUnavailable, OutOfMemory, ProtocolError, WorkerLost

if TYPE_CHECKING:
    from flowfn.backends.base import Connection, Exit
    from flowfn.body import Version
    from flowfn.shared import Shared

KEPT_FUNCTIONS = 256  # function bodies that a worker has at a time
EXIT_WAIT_S = 2.0  # how long the news of a worker's end may take once its stream has ended


class Worker:
    """A running worker as the client sees it. Lent to one thread at a time; `kill` may come from any."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.stream = connection.stream
        self.broken = False
        self.idle_since = 0.0
        self.owner: object = None  # the call that has it now; the pool's to set
        self.ahead = 0  # wire.AHEAD while the worker reads ahead: what is sent meanwhile must not end that
        self.host = ""
        self.pid = 0
        self._functions: dict[Any, int] = {}
        self._numbered = 0
        self._objects: set[str] = set()
        self._drops: list[str] = []
        self._killed = False
        self.last_words = ("", "")  # what it printed just before it died
        self._path: list[str] | None = None  # sys.path as the worker knows it
        self.leaving = False  # this process is ending it
        self._lock = threading.Lock()

    @property
    def label(self) -> str:
        """Where the worker is, for people."""
        return self.connection.label

    def greet(self) -> None:
        """Check that the two sides understand each other, before anything is unpickled."""
        try:
            frame = self.stream.receive()
            while frame.kind == wire.NEWS:
                frame = self.stream.receive()
            if frame.kind == wire.ERROR:
                raise exceptions.loads(frame.body, frame.buffers)
            if frame.kind != wire.HELLO:
                raise ProtocolError("the worker did not say hello")
            there = json.loads(frame.meta)
            here = wire.versions()
            self.host, self.pid = there["host"], there["pid"]
            hello = {**self.connection.hello()}
            shm = bool(hello.get("shm") and there.get("shm"))
            self._path = sys.path[:] if "sys_path" in hello else None
            self.stream.send(wire.HELLO, meta=json.dumps({**here, **hello, "shm": shm}).encode(), later=not shm)
            wire.check_versions(here, there, where=f"the worker ({self.label})")
        except EOFError:
            how = self.connection.exit(EXIT_WAIT_S)
            if how.limit_bytes is not None:
                raise self._over_limit(how, "a worker used", "while it started") from None
            raise BackendUnavailable(f"a worker ({self.label}) ended while it started: {describe(how)}") from None
        side = getattr(self.connection, "side", None)
        if shm and side is not None:
            from flowfn_runtime import shm as memory

            self.stream.arena = memory.Arena(side)
            self.stream.mapped = memory.Mapped(side)

    def function(self, version: Version, shared: Shared[Any] | None = None) -> int:
        """The number under which the worker knows this function body; the body is sent at the first use."""
        key = (version.digest, shared.key if shared else "")
        number = self._functions.get(key)
        if number is None:
            for needed in (*version.objects, *([shared] if shared else [])):
                self.give(needed)
            if len(self._functions) >= KEPT_FUNCTIONS:
                number = self._functions.pop(next(iter(self._functions)))  # the worker has the new one in its place
            else:
                self._numbered += 1
                number = self._numbered
            self._functions[key] = number
            meta = json.dumps({"kwargs": shared.key}).encode() if shared else b""
            payload = version.payload
            body, buffers = payload.data, payload.buffers
            self.stream.send(
                wire.FUNCTION, arg=number, flags=self.ahead, meta=meta, body=body, buffers=buffers, later=True
            )
        return number

    def give(self, shared: Shared[Any]) -> None:
        """See that the worker has a shared object. It travels once."""
        if shared.key not in self._objects:
            for inner in shared.references:
                self.give(inner)
            self._objects.add(shared.key)
            shared.send(self.stream, self.ahead)
            shared.on_drop(self)

    def drop(self, key: str) -> None:
        """A shared object is gone here: the worker is told with the next call. From any thread."""
        self._drops.append(key)

    def tidy(self) -> None:
        """Tell the worker what it need not keep any more, and where modules are found by now."""
        if self._path is not None and self._path != sys.path:
            self._path = sys.path[:]
            paths = self.connection.hello().get("sys_path", self._path)
            self.stream.send(wire.PATHS, flags=self.ahead, meta=json.dumps(paths).encode())
        while self._drops:
            key = self._drops.pop()
            self._objects.discard(key)
            for known in [known for known in self._functions if known[1] == key]:
                del self._functions[known]  # whose calls all had this object
            self.stream.send(wire.DROP, flags=self.ahead, meta=key.encode())

    def kill(self) -> None:
        """End the worker's process tree. Whoever talks to it sees its stream end."""
        self.broken = True
        with self._lock:
            if self._killed:
                return
            self._killed = True
        self.connection.kill()

    def lost(self, error: BaseException) -> tuple[WorkerLost, bool]:
        """After the stream ended or carried nonsense: what to raise, and whether the function did it by itself."""
        self.broken = True
        if isinstance(error, ProtocolError):
            self.kill()
            lost = WorkerLost(
                f"the stream of a worker ({self.label}) is corrupt: {error.message}",
                hint="does the function write to file descriptors that are not its own?",
            )
            lost.__cause__ = error
            return lost, False
        how = self.connection.exit(EXIT_WAIT_S)
        self.last_words = how.output
        if how.limit_bytes is not None:
            return self._over_limit(how, "the call used", "of memory"), True
        lost = WorkerLost(f"the worker ({self.label}) died during the call: {describe(how)}")
        lost.exitcode = how.exitcode
        return lost, how.by_itself

    def _over_limit(self, how: Exit, who: str, what: str) -> OutOfMemory:
        limit = how.limit_bytes or 0
        peak = how.peak_bytes or limit
        error = OutOfMemory(
            f"{who} {mib(peak)} MiB {what}, and its limit is {mib(limit)} MiB ({self.label})",
            hint="ask for more with memory=, or use less",
        )
        error.limit_bytes, error.peak_bytes, error.exitcode = limit, peak, how.exitcode
        return error

    def close(self) -> None:
        """Let go of it: it ends by itself."""
        self.connection.close()

    def shut_down(self) -> None:
        """End it from a thread that does not own it: the owner, if any, sees the stream end."""
        import os
        import socket

        self.leaving = True
        self.kill()
        try:
            fd = os.dup(self.stream.read_fd)
        except OSError:
            return  # closed already
        try:
            stream = socket.socket(fileno=fd)
        except OSError:
            os.close(fd)  # no socket but a pipe, whose end comes with the process's
            return
        with stream:
            try:
                stream.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def forget(self) -> None:
        """In a forked child: let go of what belongs to the parent, and never end it."""
        self.broken = self._killed = True
        self.connection.stream.close()


def mib(size: int) -> str:
    """Bytes as MiB, for messages."""
    return f"{size / 2**20:,.0f}"


def describe(how: Exit) -> str:
    """How a process ended, in words."""
    from flowfn_runtime import limits

    words = "its connection was lost" if how.exitcode is None else limits.describe_exit(how.exitcode)
    return f"{words}; {how.detail}" if how.detail else words
