"""Directories that are made once, shared by whoever needs them, and dropped when nobody did for long.

Beside each directory lie two lock files. `.lock` is shared by its users and makers, and exclusive while it is dropped;
its time is that of the last use. `.making` is exclusive while it is made. The kernel frees the locks of those who die,
so nothing is ever left locked.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable

from . import paths

READY = ".flowfn-ready"  # in a directory that is whole
_making: list[int] = []  # the locks of what this process makes


def get(place: str, make: Callable[[str], None], waits: Callable[[], None] | None = None) -> int:
    """See that the directory `place` is there, by `make(place)` if it is not; a descriptor that keeps it while open.

    Of many who ask at a time one makes it; the others call `waits`, and wait. What was begun and not finished is
    removed first.
    """
    paths.private_dir(os.path.dirname(place))
    fd = _open(place, ".lock")
    try:
        fcntl.flock(fd, fcntl.LOCK_SH)
        if not os.path.exists(f"{place}/{READY}"):
            making = _open(place, ".making")
            _making.append(making)
            try:
                _lock(making, waits)
                if not os.path.exists(f"{place}/{READY}"):
                    remove(place)
                    os.mkdir(place, 0o700)
                    try:
                        make(place)
                        os.close(os.open(f"{place}/{READY}", os.O_CREAT | os.O_WRONLY, 0o600))
                    except BaseException:
                        remove(place)  # at once: it may be what filled the disk
                        raise
            finally:
                _making.remove(making)
                os.close(making)
        os.utime(fd)
    except BaseException:
        os.close(fd)
        raise
    return fd


def making() -> list[int]:
    """Descriptors for programs that help to make a directory: as long as one has them, nobody begins anew."""
    return list(_making)


def drop_old(directory: str, seconds: float, most: int | None = None) -> None:
    """Delete what nobody uses and nobody used for so long; and of the rest the least recently used, down to `most`."""
    found = []
    for entry in list(os.scandir(directory)):
        place, suffix = os.path.splitext(entry.path)
        if suffix == ".lock" and os.path.isdir(place):
            found.append((time.time() - entry.stat().st_mtime, place))
    for rank, (age, place) in enumerate(sorted(found)):
        if age >= seconds or (most is not None and rank >= most):
            drop(place)


def drop(place: str) -> bool:
    """Delete a directory unless somebody uses it. Its lock stays: another may be waiting for it."""
    fd = _open(place, ".lock")
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        remove(place)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(fd)


def _open(place: str, suffix: str) -> int:
    return os.open(f"{place}{suffix}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _lock(fd: int, waits: Callable[[], None] | None) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if waits is not None:
            waits()
        fcntl.flock(fd, fcntl.LOCK_EX)


def remove(place: str) -> None:
    """Delete a directory with all that is in it, as far as it goes."""
    import shutil

    shutil.rmtree(place, ignore_errors=True)
