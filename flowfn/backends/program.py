"""A program whose standard input and output are a worker's stream: started, listened to, and ended.

`stream` gets a worker ready there.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flowfn.backends.base import Connection, Exit
from flowfn_runtime import wire
from flowfn_runtime.errors import BackendUnavailable

TAIL_BYTES = 1 << 14  # of standard error: what is kept for messages
LINE_BYTES = 1 << 18  # the line about how the worker ended may hold what it printed last
PIPE_BYTES = 1 << 20
END_S = 5.0  # how long a program that is to end may take before it is killed


class StreamConnection(Connection):
    """A program with the worker's stream on its standard input and output.

    It gets a session of its own, where Ctrl-C does not reach it. A backend that has to do more to end the worker than
    to kill this program overrides `end_remote`.
    """

    def __init__(
        self,
        argv: Sequence[str],
        *,
        label: str,
        environ: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
        cwd: str | None = None,
    ) -> None:
        self.label = label
        self.facts: dict[str, Any] = {}  # what the other side said when it was ready
        self.python = ""  # the interpreter there
        try:
            self.process = subprocess.Popen(
                list(argv),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=environ,
                cwd=cwd,
                pass_fds=pass_fds,
                start_new_session=True,
                bufsize=0,
            )
        except OSError as error:
            raise BackendUnavailable(f"{argv[0]} can't be started: {error.strerror}") from None
        assert self.process.stdin and self.process.stdout and self.process.stderr
        fds = []
        for pipe in (self.process.stdout, self.process.stdin):
            fd = fcntl.fcntl(pipe.fileno(), fcntl.F_DUPFD_CLOEXEC, 3)  # the stream's own, to close when it likes
            pipe.close()
            if hasattr(fcntl, "F_SETPIPE_SZ"):
                try:
                    fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
                except OSError:
                    pass  # the user's pipes are many already
            fds.append(fd)
        self.begin(wire.Stream(*fds))

    def begin(self, stream: wire.Stream) -> None:
        """From here on this is the worker's stream, and `process` is listened to."""
        self.stream = stream
        _all.add(self)
        self._tail = bytearray()
        self._mark: dict[str, Any] | None = None
        self._ended = threading.Event()
        self._over = False
        self._lock = threading.Lock()
        self._end_calls: list[Callable[[], object]] = []
        self._thread = threading.Thread(target=self._listen, name="flowfn-stderr", daemon=True)
        self._thread.start()

    # what a backend may want otherwise

    def end_remote(self) -> None:
        """Called by `kill`, once, after the program here was killed: for what lives on elsewhere."""

    def on_end(self, call: Callable[[], object]) -> None:
        """Have something called when the program here has ended, at once if it has. In any thread."""
        with self._lock:
            if not self._over:
                self._end_calls.append(call)
                return
        call()

    def forget(self, call: Callable[[], object]) -> bool:
        """Have it not called after all. False: it was."""
        with self._lock:
            if call in self._end_calls:
                self._end_calls.remove(call)
                return True
            return False

    def heard(self, line: bytes) -> bool:
        """A line of the program's standard error, as it comes. True: it is not for messages. Must not block."""
        return False

    def judge(self, status: int) -> Exit:
        """How a worker ended whose own word is lacking, from the exit status of the program here."""
        return Exit(detail=self.said())

    # the contract

    def kill(self) -> None:
        if self.process.poll() is None:
            from flowfn_runtime import limits

            # With what has gone off on its own: where the program is the worker's own host, that is below it.
            limits.kill_tree(self.process.pid)
        self.end_remote()

    def exit(self, timeout: float) -> Exit:
        self._ended.wait(timeout)
        if self._mark is not None:
            memory = self._mark.get("out_of_memory") or {}
            output = tuple(self._mark.get("output", ("", "")))
            return Exit(self._mark["exitcode"], memory.get("limit"), memory.get("peak"), output)
        if self._ended.is_set():
            return self.judge(self.process.returncode)
        return Exit(detail=self.said())

    def hello(self) -> Mapping[str, Any]:
        return {"argv0": os.path.basename(sys.argv[0]) if sys.argv else ""}

    def overheard(self, data: bytes) -> None:
        """What the program printed on standard output and was meant for people: it goes into messages, too."""
        self._tail[:0] = data[-TAIL_BYTES:]

    def said(self, lines: int = 8) -> str:
        """The last lines of the program's standard error, for messages."""
        return "\n".join(bytes(self._tail).decode(errors="replace").strip().splitlines()[-lines:])

    # within

    def _listen(self) -> None:
        """Take in what the program says on standard error, then its exit status."""
        assert self.process.stderr
        mark = wire.EXIT_MARK.encode()
        rest = b""
        while data := self.process.stderr.read(1 << 16):
            *lines, rest = (rest + data).split(b"\n")
            if len(rest) > LINE_BYTES:
                lines, rest = [*lines, rest], b""
            for line in lines:
                if line.startswith(mark):
                    try:
                        self._mark = json.loads(line[len(mark) :])
                    except ValueError:
                        pass
                elif not self.heard(line):
                    self._tail += line + b"\n"
            del self._tail[:-TAIL_BYTES]
        self._tail += rest
        self.process.stderr.close()
        self.process.wait()
        with self._lock:
            self._over = True
            calls, self._end_calls = self._end_calls, []
        for call in calls:
            call()
        self._ended.set()  # whoever waits for the end finds everything in order


class Connections:
    """The connections of a backend, for its `close`."""

    def __init__(self) -> None:
        self._open: weakref.WeakSet[StreamConnection] = weakref.WeakSet()

    def add(self, connection: StreamConnection) -> StreamConnection:
        """Keep track of it; returns it."""
        self._open.add(connection)
        return connection

    def close(self) -> None:
        """End all of them; returns when their programs here are gone."""
        connections = list(self._open)
        for connection in connections:
            connection.kill()
        for connection in connections:
            connection.exit(END_S)


_all: weakref.WeakSet[StreamConnection] = weakref.WeakSet()


def _after_fork() -> None:
    """A forked child must not hold the parent's workers."""
    for connection in list(_all):
        connection.stream.close()


os.register_at_fork(after_in_child=_after_fork)
