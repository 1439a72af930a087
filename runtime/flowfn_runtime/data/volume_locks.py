"""Who uses a volume: kernel locks, which go when the last process that inherited them dies, however it dies."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..errors import VolumeInUse, VolumeNotFound
from . import volume_db

if TYPE_CHECKING:
    from .volumes import Volume


class Attachment:
    """A volume in use: the lock that keeps it from deletion (and, if exclusive, from every other user).

    `fd` is inheritable: a process that inherits it holds the volume too, and the kernel frees the volume when the last
    holder is gone. `close()` lets go in this process. `keeper`: where to ask that a volume of a bucket
    be written back.
    """

    def __init__(self, volume: Volume, fd: int, *, exclusive: bool, keeper: str | None = None) -> None:
        self.volume = volume
        self.path = volume.path
        self.fd = fd
        self.exclusive = exclusive
        self.keeper = keeper

    def commit(self) -> bool:
        """Write changes back to the bucket, if the volume lives in one; see `volumes.commit`."""
        from . import volumes

        return volumes.commit(self.volume.id, self.volume.project)

    def close(self) -> None:
        """Let go of the volume in this process. Safe to call twice."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Attachment {self.volume.label} at {self.path}{' exclusive' if self.exclusive else ''}>"


@contextmanager
def turn(volume: Volume) -> Iterator[None]:
    """One process of this host at a time begins to use a volume of a bucket, or sees that nobody does."""
    fd = _open(volume, "turn.lock")
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        fcntl.flock(fd, fcntl.LOCK_UN)  # children that were forked meanwhile have it, too
        os.close(fd)


def _open(volume: Volume, name: str) -> int:
    path = os.path.join(os.path.dirname(volume.path), name)
    try:
        try:
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
                raise
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # a read-only home: enough for flock
    except FileNotFoundError:
        raise VolumeNotFound(
            f"volume {volume.label} is gone: there is no {os.path.dirname(path)}", hint="was it deleted meanwhile?"
        ) from None
    except OSError as error:
        raise volume_db.explain(error) from error


def acquire(volume: Volume, *, exclusive: bool, wait: bool) -> int:
    """A descriptor that holds the volume's lock. Raises `VolumeInUse` rather than wait, unless told to `wait`."""
    fd = _open(volume, "lock")
    try:
        fcntl.flock(fd, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        pids = _holders(fd)
        os.close(fd)
        by = f" by process {', '.join(map(str, pids))}" if pids else ""
        raise VolumeInUse(
            f"volume {volume.label} is in use{by}",
            hint="wait until that has ended, or cancel it; `file` volumes can be shared by tasks",
        ) from None
    except BaseException:
        os.close(fd)
        raise
    return fd


def alone(fd: int) -> bool:
    """Whether nobody else has the lock, of which `fd` has a share: then it is this one's alone, else it may be lost."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False


def share(fd: int) -> None:
    """Let others share a lock that was held alone."""
    fcntl.flock(fd, fcntl.LOCK_SH)


def _holders(fd: int) -> list[int]:
    """The processes that took a lock on this file, as the kernel lists them; [] where it doesn't say."""
    stat = os.fstat(fd)
    key = f"{os.major(stat.st_dev):02x}:{os.minor(stat.st_dev):02x}:{stat.st_ino}"
    try:
        with open("/proc/locks") as lines:
            # 1: FLOCK  ADVISORY  WRITE 708 00:2d:5150 0 EOF     (waiting ones have "->" after the number)
            fields = [line.split() for line in lines]
    except OSError:
        return []
    return sorted({int(f[4]) for f in fields if len(f) > 5 and f[1] == "FLOCK" and f[5] == key and int(f[4]) > 0})
