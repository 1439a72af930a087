"""The client's side of a host process on this machine: starting it, asking it for workers, hearing how they ended."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import weakref
from collections.abc import Mapping
from typing import Any

import flowfn_runtime
from flowfn.backends.base import Connection, Exit
from flowfn_runtime import wire
from flowfn_runtime.errors import BackendUnavailable

# The environment that only counts when a program starts; workers that differ in it can't share a host.
EARLY = ("LD_", "PYTHON", "MALLOC_", "GLIBC_")
_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(flowfn_runtime.__file__)))
# Nothing from the working directory may stand in for a module of the standard library.
BOOT = (
    f"import sys; sys.path[:] = [p for p in sys.path if p]; sys.path.append({_ROOT!r}); "
    "from flowfn_runtime.host import main; main()"
)
_PACKET_BYTES = 1 << 20
MARK = "FLOWFN_HOST"  # the variable by which a process tells of which host it descends


class LocalConnection(Connection):
    def __init__(self, host: Host, number: int, stream: wire.Stream, side: socket.socket | None, env: Any) -> None:
        self.stream = stream
        self.label = "local"
        self.number = number
        self._host = host
        self.side = side
        self._env = env
        self._ended = threading.Event()
        self._exit = Exit()

    def hello(self) -> Mapping[str, Any]:
        started_with = self._host.environ
        now = {**os.environ, **self._env}
        return {
            "env": {name: value for name, value in now.items() if started_with.get(name) != value},
            "unset": [name for name in started_with if name not in now],
            "sys_path": _absolute(sys.path),
            "cwd": cwd(),
            "argv0": sys.argv[0] if sys.argv else "",
            "shm": self.side is not None,
        }

    def kill(self) -> None:
        self._host.send({"op": "kill", "id": self.number})

    def ended(self, how: Exit) -> None:
        self._exit = how
        self._ended.set()

    def exit(self, timeout: float) -> Exit:
        self._ended.wait(timeout)
        return self._exit

    def close(self) -> None:
        super().close()
        if self.side is not None:
            self.side.close()


class Host:
    """One host process, and the thread that hears from it."""

    def __init__(self, env: Mapping[str, str], launch: dict[str, Any] | None) -> None:
        _fill_standard_descriptors()
        self.environ = {**os.environ, **{k: v for k, v in env.items() if k.startswith(EARLY)}}
        # By this whatever the workers start can be found if the host is killed and can't end it. They all inherit it.
        self._mark = f"{MARK}={os.getpid()}-{os.urandom(8).hex()}"
        self._lock = threading.Lock()
        self._connections: dict[int, LocalConnection] = {}
        self._count = 0
        self._closing = False
        self.error: BaseException | None = None
        self.staged = threading.Event()
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self.pid = _spawn(theirs, {**self.environ, MARK: self._mark.partition("=")[2]})
        except BaseException:
            self.control.close()
            raise
        finally:
            theirs.close()
        hosts.add(self)
        self._reader = threading.Thread(target=self._listen, name="flowfn-host", daemon=True)
        self._reader.start()
        if launch is not None:
            self.send({"op": "launch", **launch})
        else:
            self.staged.set()

    def connect(self, request: dict[str, Any], env: Any, accelerated: bool) -> LocalConnection:
        self.staged.wait()
        ours, theirs = socket.socketpair()
        try:
            sides = socket.socketpair() if accelerated else ()
        except OSError:
            ours.close()
            theirs.close()
            raise
        with self._lock:
            self._count += 1
            number = self._count
            fd = ours.detach()
            connection = LocalConnection(self, number, wire.Stream(fd, fd), sides[0] if sides else None, env)
            self._connections[number] = connection
        fds = [theirs.fileno(), *([sides[1].fileno()] if sides else [])]
        try:
            sent = self.send({"op": "fork", "id": number, **request}, fds)
        finally:
            theirs.close()
            if sides:
                sides[1].close()
        if not sent:
            connection.close()
            raise self.error or BackendUnavailable("the host process of the local backend is gone")
        return connection

    def send(self, message: dict[str, Any], fds: list[int] | None = None) -> bool:
        try:
            socket.send_fds(self.control, [json.dumps(message).encode()], fds or [])
        except OSError:
            return False
        return True

    @property
    def alive(self) -> bool:
        return self._reader.is_alive() and not self._closing

    def _listen(self) -> None:
        while True:
            try:
                data = self.control.recv(_PACKET_BYTES)
            except OSError:
                data = b""
            if not data:
                break
            self._hear(json.loads(data))
        how = _reap(self.pid)
        if not self._closing:
            from flowfn_runtime import limits

            limits.kill_marked(self._mark)
        with self._lock:
            left, self._connections = list(self._connections.values()), {}
        for connection in left:
            connection.ended(Exit(detail=f"the host process of the local backend {how}"))
        if not self.staged.is_set():
            self.error = self.error or BackendUnavailable(f"the host process of the local backend {how} while starting")
            self._staging_over()

    def _staging_over(self) -> None:
        from flowfn import terminal

        terminal.staging_over()
        self.staged.set()

    def _hear(self, message: dict[str, Any]) -> None:
        if "exitcode" in message:
            with self._lock:
                connection = self._connections.pop(message["id"], None)
            if connection is not None:
                memory = message.get("out_of_memory") or {}
                output = tuple(message.get("output", ("", "")))
                connection.ended(Exit(message["exitcode"], memory.get("limit"), memory.get("peak"), output))
        elif "started" in message:
            if connection := self._connections.get(message["id"]):
                connection.label = f"local pid {message['pid']}"
        elif "progress" in message:
            from flowfn import terminal

            terminal.staging(message["progress"])
        elif "launched" in message:
            self._staging_over()
        elif "error" in message:
            import base64

            from flowfn_runtime import exceptions

            self.error = exceptions.loads(base64.b64decode(message["error"]))
            self._staging_over()

    def close(self) -> None:
        """End the host and its workers; returns when it is gone."""
        self._closing = True
        try:
            self.control.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self._reader.join(5)
        self.control.close()

    def was_ended(self) -> bool:
        """Whether it was ended, by somebody else; another one may then take its place."""
        self._reader.join(5)
        return not self.alive and self.error is None

    def forget(self) -> None:
        """In a forked child: let go of what belongs to the parent."""
        self.control.close()
        for connection in self._connections.values():
            connection.close()


hosts: weakref.WeakSet[Host] = weakref.WeakSet()  # of this process


def _fill_standard_descriptors() -> None:
    """Where the user closed descriptors 0 to 2, have /dev/null there, and none of ours, which C code would print to."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != fd:
                os.dup2(null, fd)
                os.close(null)


def _absolute(entries: list[str]) -> list[str]:
    """As the entries of `sys.path` are meant here; relative ones mean nothing where there is no directory."""
    here = cwd()
    found = []
    for entry in entries:
        if os.path.isabs(entry):
            found.append(entry)
        elif here is not None:
            found.append(os.path.join(here, entry) if entry else here)
    return found


def cwd() -> str | None:
    """The working directory, if it is still there."""
    try:
        return os.getcwd()
    except FileNotFoundError:
        return None


def _reap(pid: int) -> str:
    try:
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    except ChildProcessError:
        return "ended"
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"


def _spawn(control: socket.socket, environ: Mapping[str, str]) -> int:
    """Start a host process that has the control socket as descriptor 3 and a descriptor of this process as 4.

    posix_spawn and not fork: threads, locks and CUDA contexts of this process don't matter to it.
    """
    if not sys.executable:
        raise BackendUnavailable("this Python does not know its own executable", hint="run under a regular python")
    actions: list[tuple[Any, ...]] = []
    # Out of the way first: the targets 3 and 4 may be the numbers of the sources.
    import fcntl

    high = [fcntl.fcntl(control.fileno(), fcntl.F_DUPFD_CLOEXEC, 10)]
    try:
        pidfd = os.pidfd_open(os.getpid())
        try:
            high.append(fcntl.fcntl(pidfd, fcntl.F_DUPFD_CLOEXEC, 10))
        finally:
            os.close(pidfd)
    except (AttributeError, OSError):
        pass  # an old kernel
    try:
        actions = [(os.POSIX_SPAWN_DUP2, fd, 3 + i) for i, fd in enumerate(high)]
        if len(high) == 1:
            actions.append((os.POSIX_SPAWN_OPEN, 4, os.devnull, os.O_RDONLY, 0))
        actions.append((os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0))
        argv = [sys.executable, "-c", BOOT]
        defaults = [signal.SIGINT, signal.SIGTERM, signal.SIGPIPE, signal.SIGHUP]
        options: dict[str, Any] = {"file_actions": actions, "setsigdef": defaults, "setsigmask": []}
        try:
            # In a session of its own from the start: Ctrl-C is not for it.
            return os.posix_spawn(sys.executable, argv, environ, setsid=True, **options)
        except NotImplementedError:
            return os.posix_spawn(sys.executable, argv, environ, **options)
    except OSError as error:
        raise BackendUnavailable(f"no process can be started with {sys.executable}: {error}") from error
    finally:
        for fd in high:
            os.close(fd)
