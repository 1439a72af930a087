"""What all backends share whose worker is a program with a stream on its standard input and output.

Such a backend decides two things: which program to start (`podman run -i ...`, `ssh host ...`, `srun ...`, each
followed by `loader.program()`), and how to end it. Everything else is here: the runtime and the project get there, the
worker is prepared, what goes wrong meanwhile becomes one clear error, and how it ended is found out.

```python
class MyBackend(Backend):
    def connect(self, spec):
        argv = ["podman", "run", "-i", "--rm", "image", *loader.program("python3")]
        return stream.start(argv, shipping.launch(spec, enforce=("cpu",)), label="container", explain=explain)
```
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from flowfn import loader
from flowfn.backends.base import Connection, Exit
from flowfn.bundle import bundle
from flowfn_runtime import exceptions, wire
from flowfn_runtime.errors import BackendUnavailable, FlowError, ProtocolError, VersionMismatch

if TYPE_CHECKING:
    from flowfn.shipping import Launch

NOISE_BYTES = 1 << 18  # what login shells and engines may print before the loader speaks
TAIL_BYTES = 1 << 14  # of standard error: what is kept for messages
LINE_BYTES = 1 << 18  # the line about how the worker ended may hold what it printed last
PIPE_BYTES = 1 << 20
ATTEMPTS = 3  # when the project changes while it is sent
END_S = 5.0  # how long a program that is to end may take before it is killed

# Of a program that ended before a worker spoke: its exit status and the end of its standard error -> what to raise.
Explain = Callable[[int, str], FlowError | None]


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

    def said(self, lines: int = 8) -> str:
        """The last lines of the program's standard error, for messages."""
        return "\n".join(bytes(self._tail).decode(errors="replace").strip().splitlines()[-lines:])

    # within

    def _listen(self) -> None:
        """Take in what the program says on standard error, then its exit status."""
        assert self.process.stderr
        from flowfn_runtime.host import EXIT_MARK  # here, while the program starts

        mark = EXIT_MARK.encode()
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


class Begun(Protocol):
    """A program that was begun before it was known what for."""

    def ready(self) -> StreamConnection:
        """Its connection, the runtime loaded."""

    connection: StreamConnection


def start(
    argv: Sequence[str],
    launch: Launch | Callable[[], Launch],
    *,
    label: str,
    environ: Mapping[str, str] | None = None,
    explain: Explain | None = None,
    kind: Callable[..., StreamConnection] = StreamConnection,
    on_end: Callable[[], object] | None = None,
    begun: Begun | None = None,
) -> StreamConnection:
    """Start a program whose last part is `loader.program()`, and get a worker ready there.

    `launch` may be a function, which is called while the program starts. `label` says where it is, for people.
    `environ` is the program's own environment here. `explain` knows the engine's messages. `kind` makes the connection.
    `on_end` is called once, when the program has ended, or could not be started. `begun` is such a program that runs
    already.
    Raises BackendUnavailable, VersionMismatch, or what the preparation on the other side raised.
    """
    for attempt in range(ATTEMPTS):
        early, begun = begun, None
        try:
            connection = early.connection if early else kind(argv, label=label, environ=environ)
        except BaseException:
            if on_end is not None:
                on_end()
            raise
        if on_end is not None:
            connection.on_end(on_end)
        try:
            if callable(launch):
                launch = launch()
            if early:
                early.ready()
                launch.send(connection.stream)
            else:
                load(connection, launch)
            _loaded(connection)
            prepare(connection, launch)
            return connection
        except EOFError:
            raise ended(connection, explain) from None
        except BaseException as error:
            again = isinstance(error, (OSError, FlowError)) and attempt < ATTEMPTS - 1
            newer = launch.newer() if again and not callable(launch) else None
            if newer is not None and on_end is not None and not connection.forget(on_end):
                newer = None
            connection.kill()
            connection.close()
            if newer is None:
                raise
            launch = newer  # files were edited while they were sent
    raise AssertionError("unreachable: the last attempt returns or raises")


def ended(connection: StreamConnection, explain: Explain | None) -> FlowError:
    """What to raise of a program that ended before a worker was ready."""
    how = connection.exit(END_S)
    status = connection.process.poll()
    connection.kill()
    connection.close()
    known = explain(status if status is not None else -9, connection.said(1000)) if explain else None
    if known is not None:
        return known
    words = f"status {status}" if status is not None else "no status"
    said = connection.said() or how.detail
    message = f"{connection.label}: the worker's program ended with {words}"
    return BackendUnavailable(f"{message}:\n{said}" if said else message)


def load(
    connection: StreamConnection, launch: Launch | None = None, *, elsewhere: Callable[[], bool] | None = None
) -> None:
    """The loader's part: which Python it found, and the runtime if it lacks it. Sends what is wanted of it at once.

    `elsewhere` waits until the runtime was brought to that host over another connection; False: it was not.
    """
    stream = connection.stream
    lines = _Lines(stream.read_fd)
    runtime = bundle()  # read while the program starts
    there = lines.next()
    if choice := _choose(there, connection.label):
        _write(stream.write_fd, json.dumps(choice).encode() + b"\n")
        there = _other(there, lines.next(), connection.label)
    connection.python = there["executable"]
    has = runtime.digest in there["runtimes"] or (elsewhere is not None and elsewhere())
    packed = b"" if has else runtime.pack()
    ask = {"digest": runtime.digest, "size": len(packed), "sha256": hashlib.sha256(packed).hexdigest()}
    said = json.dumps(ask).encode() + b"\n" + packed
    try:
        if launch is None:
            _write(stream.write_fd, said)
        else:
            stream.held = said
            launch.send(stream)
    except EOFError:
        pass  # it has ended, and may have said why


def _choose(there: dict[str, Any], label: str) -> dict[str, str] | None:
    """What to do about the Python that was found there: None if it is right, else how to start another by uv."""
    major, minor = sys.version_info[:2]
    wanted = f"{major}.{minor}"
    if there.get("missing"):
        raise BackendUnavailable(
            f"{label} has no Python", hint=f"install Python {wanted} or uv there, or say where it is with python="
        )
    name = sys.implementation.name
    if there["python"][:2] == [major, minor] and there["implementation"] == name:
        return None
    if there["uv"] is None:
        raise _mismatch(there, label)
    return {"uv": there["uv"], "python": wanted, "start": loader.START}


def _other(there: dict[str, Any], other: dict[str, Any], label: str) -> dict[str, Any]:
    """What the Python says that uv was to start in place of the one that is there. Raises VersionMismatch."""
    if "unobtainable" in other:
        raise _mismatch(there, label, f", and uv there can't get it: {other['unobtainable']}")
    _choose({**other, "uv": None}, label)
    return other


def _mismatch(there: dict[str, Any], label: str, more: str = "") -> VersionMismatch:
    wanted = f"{sys.version_info[0]}.{sys.version_info[1]}"
    found = ".".join(map(str, there["python"]))
    return VersionMismatch(
        f"{label} has {there['implementation']} {found} ({there['executable']}), this client has "
        f"{sys.implementation.name} {wanted}{more}",
        hint=f"install Python {wanted}{' there' if more else ' or uv there'}, or say where it is with python=",
    )


def _loaded(connection: StreamConnection) -> None:
    """Return when the runtime runs there, which it says along with the first thing that it has to say."""
    lines = _Lines(connection.stream.read_fd)
    lines.next()
    connection.stream._rest = lines.rest


class _Lines:
    """The loader's lines among whatever else is printed."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.rest = b""  # what was read beyond the last line

    def next(self) -> dict[str, Any]:
        """The next thing that the loader says. Raises what it reports, and EOFError when it is gone."""
        mark = loader.MARK.encode()
        noise = 0
        while True:
            line, end, rest = self.rest.partition(b"\n")
            if not end:
                more = os.read(self._fd, 1 << 16)
                if not more:
                    raise EOFError
                self.rest += more
            else:
                self.rest = rest
                _, found, words = line.partition(mark)
                if found:
                    said: dict[str, Any] = json.loads(words)
                    if "error" in said:
                        raise BackendUnavailable(
                            f"the runtime can't be put in place there: {said['error']}",
                            hint="say where there is room with cache=, or FLOW_CACHE there",
                        )
                    return said
                noise += len(line)
            if noise + len(self.rest) > NOISE_BYTES:
                raise ProtocolError(f"the program is not the worker's: it says {self.rest[:80]!r}")


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    try:
        while view:
            view = view[os.write(fd, view) :]
    except OSError:
        raise EOFError from None


def prepare(connection: StreamConnection, launch: Launch) -> None:
    """Answer what the other side asks until the worker's process is there."""
    stream = connection.stream
    while True:
        frame = stream.receive()
        if frame.kind == wire.ERROR:
            raise exceptions.loads(frame.body, frame.buffers)
        news = json.loads(frame.meta) if frame.kind == wire.NEWS else {}
        if "ask" in news:
            launch.answer(stream, news["ask"])
        elif "ready" in news:
            connection.facts = news
            connection.label += f" pid {news['pid']}"
            return
        else:
            show(connection.label, news)


def show(label: str, news: dict[str, Any]) -> None:
    """Let the user see what is going on there."""
    from flowfn import terminal

    if "progress" in news:
        terminal.staging(news["progress"])
    elif "log" in news:
        terminal.show_output(news.get("step", "build"), 0, label, news["log"].encode(), True)


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
