"""Waiting for what happens in a directory, as the kernel reports it (inotify): no polling."""

from __future__ import annotations

import os
import select
import time
from functools import lru_cache
from typing import Any

from .errors import TaskError

_MODIFY, _CLOSE_WRITE, _MOVED_TO, _CREATE, _DELETE_SELF = 0x2, 0x8, 0x80, 0x100, 0x400


@lru_cache(maxsize=1)
def _libc() -> Any:
    import ctypes

    return ctypes.CDLL(None, use_errno=True)


class Watch:
    """Wakes when a file of a directory is written to, made, or closed by a writer."""

    def __init__(self, directory: str) -> None:
        import ctypes

        self._fd = _libc().inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
        if self._fd < 0:
            raise _explain(ctypes.get_errno())
        mask = _MODIFY | _CLOSE_WRITE | _MOVED_TO | _CREATE | _DELETE_SELF
        if _libc().inotify_add_watch(self._fd, os.fsencode(directory), mask) < 0:
            number = ctypes.get_errno()
            self.close()
            raise _explain(number)
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLIN)

    def wait(self, deadline: float | None = None) -> bool:
        """Sleep until something happened since the last time; False if the monotonic clock says `deadline` first."""
        left = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
        if not self._poll.poll(left):
            return False
        try:
            while len(os.read(self._fd, 65536)) > 32768:
                pass
        except BlockingIOError:
            pass
        return True

    def close(self) -> None:
        """Stop watching."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _explain(number: int) -> TaskError:
    return TaskError(
        f"the task's directory can't be watched: {os.strerror(number)}",
        hint="Raise fs.inotify.max_user_instances (sysctl), or wait without a timeout.",
    )
