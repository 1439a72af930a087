"""One worker of the container backend: the engine's program that stands for its container, and how both end."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flowfn.backends import stream
from flowfn.backends.base import Exit
from flowfn.backends.container_engine import Engine, noise
from flowfn_runtime import paths
from flowfn_runtime.errors import FlowError

if TYPE_CHECKING:
    import socket  # whose import takes a while, and there is time when the engine runs

END_S = 5.0  # how long a container may take to be gone once it was killed


class Door:
    """Where a worker comes in for shared memory: a socket in a directory that its container sees, until it came.

    It does not come where the container has another kernel than this process, or another user.
    """

    def __init__(self) -> None:
        self.path = os.path.join(_directory(), os.urandom(6).hex())
        self._socket: socket.socket | None = None

    def open(self) -> None:
        import socket

        try:
            folder = os.open(os.path.dirname(self.path), os.O_RDONLY | os.O_CLOEXEC)
            try:
                self._socket = socket.socket(socket.AF_UNIX)
                self._socket.bind(f"/proc/self/fd/{folder}/{os.path.basename(self.path)}")  # however long the path is
                self._socket.listen(1)
                self._socket.setblocking(False)
            finally:
                os.close(folder)
        except OSError:  # this filesystem has none, or there are no more descriptors
            self.close()

    def came(self) -> socket.socket | None:
        """The worker's socket, if it came: it does so before it says hello."""
        try:
            return self._socket.accept()[0] if self._socket is not None else None
        except OSError:
            return None
        finally:
            self.close()

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
            with contextlib.suppress(OSError):
                os.unlink(self.path)


def _directory() -> str:
    return paths.private_dir(os.path.join(paths.cache(), "containers"))


class ContainerConnection(stream.StreamConnection):
    """One `podman run` or `docker run`, and the container that it stands for.

    `door`: for shared memory, which there is if the worker can come that way.
    """

    def __init__(
        self, argv: Sequence[str], *, engine: Engine, pass_fds: Sequence[int], door: Door | None, **options: Any
    ) -> None:
        self.engine = engine
        self.name = f"flowfn-{os.urandom(6).hex()}"
        self._kill_lock = threading.Lock()
        self._killed = False
        self._killer: threading.Thread | None = None
        self._asides: deque[str] = deque(maxlen=8)
        self._door = door
        run = [*engine.command, "run", f"--name={self.name}", f"--hostname={self.name}", *argv]
        options["label"] = f"container {self.name}"
        # Podman's monitor leaves a file where it was started if a container runs out of memory.
        super().__init__(run, pass_fds=pass_fds, cwd=_directory(), **options)
        if door is not None:
            door.open()  # long before the worker comes

    def heard(self, line: bytes) -> bool:
        text = line.decode(errors="replace")
        if noise(text):
            self._asides.append(text)
            return True
        return False

    def said(self, lines: int = 8) -> str:
        return super().said(lines) or "\n".join(self._asides)  # where there is nothing else they may be the reason

    def hello(self) -> Mapping[str, Any]:
        return {**super().hello(), "shm": self.side is not None}

    @functools.cached_property
    def side(self) -> socket.socket | None:
        """For the descriptors of shared memory; asked for when the worker has said hello."""
        return self._door.came() if self._door is not None else None

    def close(self) -> None:
        super().close()
        if (side := self.side) is not None:  # who did not come in by now is not let in any more
            side.close()

    def judge(self, status: int) -> Exit:
        # The engine's own failure is 125; of a container that was killed by signal n it says 128 + n.
        return Exit(128 - status if status > 128 else None, detail=self.said())

    def kill(self) -> None:
        with self._kill_lock:
            if self._killed or self._ended.is_set():
                return
            self._killed = True
            killer = threading.Thread(target=self._end, name="flowfn-kill")
            try:
                killer.start()
                self._killer = killer
                return
            except RuntimeError:
                pass  # the interpreter is ending, and has no more threads (Python 3.12), or there are too many
        self._end()

    def exit(self, timeout: float) -> Exit:
        how = super().exit(timeout)
        if self._killer is not None and self._killer is not threading.current_thread():
            self._killer.join(timeout)
        return how

    def _end(self) -> None:
        try:
            status, _, _ = self.engine.ask("kill", self.name)
            if status == 0 and self._ended.wait(END_S):
                return
            if self.process.poll() is None:  # it is just starting, or hangs
                self.process.kill()
                self._ended.wait(END_S)
            self.engine.ask("rm", "--force", self.name)
        except FlowError:
            self.process.kill()
