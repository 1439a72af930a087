"""What a call prints: file descriptors 1 and 2 of the worker, taken as they are written and sent as LOG frames.

Descriptors and not `sys.stdout`, so that C code and child processes are heard as well. A thread sends what comes in
while a call runs; the end of a call takes what is left first, so that a result never overtakes its own output.
"""

from __future__ import annotations

import fcntl
import os
import select
import sys
import termios
import threading
from typing import TYPE_CHECKING

from . import wire

if TYPE_CHECKING:
    from collections.abc import Sequence

CHUNK_BYTES = 1 << 16


def out_of_the_way(fd: int) -> int:
    """Move a descriptor of ours to a high number, where loops over the low ones don't hit it. Closed on exec."""
    import resource

    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    high = max(32, min(soft, 4096) - 64)
    try:
        moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, high)
    except OSError:
        moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
    os.close(fd)
    return moved


def _identity(fd: int) -> tuple[int, int]:
    """What a descriptor stands for."""
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def _available(fd: int) -> int:
    """How many bytes can be read from a pipe now."""
    return int.from_bytes(fcntl.ioctl(fd, termios.FIONREAD, b"\0\0\0\0"), sys.byteorder)


class Capture:
    """Owns descriptors 1 and 2 of this process. `call` is the call that output belongs to now.

    `pipes` are the two to use, reading and writing end, if somebody else reads what is left when this process dies.
    """

    def __init__(self, stream: wire.Stream, pipes: Sequence[tuple[int, int]] = ()) -> None:
        self.call = 0
        self._stream = stream
        self._lock = threading.Lock()
        self._sources: dict[int, int] = {}  # descriptor to read: flag of its frames
        self._writers: dict[int, tuple[int, tuple[int, int]]] = {}  # 1 and 2: another descriptor of its pipe, and which
        for (fd, flag), ends in zip(((1, 0), (2, wire.STDERR)), pipes or (None, None), strict=True):
            read_end, write_end = ends or os.pipe()
            os.dup2(write_end, fd, inheritable=True)
            self._writers[fd] = out_of_the_way(write_end), _identity(fd)
            read_end = out_of_the_way(read_end)
            os.set_blocking(read_end, False)
            self._sources[read_end] = flag
        self._open()
        self._poll = select.poll()
        for fd in self._sources:
            self._poll.register(fd, select.POLLIN)
        self._thread = threading.Thread(target=self._pump, name="flowfn-logs", daemon=True)
        self._thread.start()

    def _open(self) -> None:
        """New objects on the descriptors: what the old ones had buffered is not ours to print."""
        sys.stdout = open(1, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)
        sys.stderr = open(2, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)
        sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr  # type: ignore[misc]
        self._ours = sys.stdout, sys.stderr

    def begin(self, call: int) -> None:
        """Output belongs to this call from now on. What an earlier one did to the streams is undone."""
        self.call = call
        for fd, (writer, pipe) in self._writers.items():
            try:
                if _identity(fd) == pipe:
                    continue
            except OSError:
                pass
            try:
                os.dup2(writer, fd, inheritable=True)
            except OSError:
                pass  # it closed that one as well
        out, err = self._ours
        if out.closed or err.closed:
            self._open()
        elif sys.stdout is not out or sys.stderr is not err:
            sys.stdout, sys.stderr = out, err

    def _pump(self) -> None:
        poll = select.poll()
        for fd in self._sources:
            poll.register(fd, select.POLLIN)
        while self._sources:
            for fd, _ in poll.poll():
                with self._lock:
                    if not self._take(fd):
                        poll.unregister(fd)

    def _take(self, fd: int) -> bool:
        """Send what there is now. False when nobody holds the other end any more. The caller has the lock."""
        flag = self._sources.get(fd)
        if flag is None:
            return False
        try:
            left = _available(fd)
            if left:
                # No more than there is now: what goes on writing would have us here for ever.
                while left > 0:
                    # Not read first: a process that dies between reading and sending would lose its last words.
                    self._stream.send_piped(wire.LOG, fd, min(left, CHUNK_BYTES), call=self.call, flags=flag)
                    left -= CHUNK_BYTES
                return True
            data = os.read(fd, CHUNK_BYTES)  # nothing now, or nothing ever again
            if data:
                self._stream.send(wire.LOG, call=self.call, flags=flag, body=data)
                return True
        except BlockingIOError:
            return True
        except EOFError:
            return False
        except OSError:
            pass
        self._sources.pop(fd, None)
        return False

    def forget(self) -> None:
        """In a forked child: what is written is for the parent to read."""
        for fd in (*self._sources, *(writer for writer, _ in self._writers.values())):
            os.close(fd)
        self._sources, self._writers = {}, {}
        self._poll = select.poll()
        self._lock = threading.Lock()

    def flush(self) -> None:
        """Send all that was written until now."""
        for file in self._ours if sys.stdout is self._ours[0] else (sys.stdout, sys.stderr, *self._ours):
            try:
                file.flush()
            except Exception:
                pass  # the user closed or replaced it
        if self._poll.poll(0):
            with self._lock:
                for fd in list(self._sources):
                    self._take(fd)
                for fd, event in self._poll.poll(0):
                    if event & (select.POLLHUP | select.POLLNVAL) and fd not in self._sources:
                        self._poll.unregister(fd)
