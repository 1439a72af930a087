"""Directories that are made once, shared by whoever needs them, and dropped when nobody did for long.

Beside each directory lie two lock files. `.lock` is shared by its users and makers, and exclusive while it is dropped;
its time is that of the last use. `.making` is exclusive while it is made. The kernel frees the locks of those who die,
so nothing is ever left locked.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Callable

from . import paths

READY = ".flowfn-ready"  # in a directory that is whole


def get(place: str, make: Callable[[str], None]) -> int:
    """See that the directory `place` is there, by `make(place)` if it is not; a descriptor that keeps it while open.

    Of many who ask at a time one makes it. What was begun and not finished is removed first.
    """
    paths.private_dir(os.path.dirname(place))
    fd = os.open(f"{place}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH)
        if not os.path.exists(f"{place}/{READY}"):
            making = os.open(f"{place}.making", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(making, fcntl.LOCK_EX)
                if not os.path.exists(f"{place}/{READY}"):
                    shutil.rmtree(place, ignore_errors=True)
                    os.mkdir(place, 0o700)
                    make(place)
                    os.close(os.open(f"{place}/{READY}", os.O_CREAT | os.O_WRONLY, 0o600))
            finally:
                os.close(making)
        os.utime(fd)
    except BaseException:
        os.close(fd)
        raise
    return fd


def drop_old(directory: str, seconds: float) -> None:
    """Delete what nobody uses, and nobody used for so long."""
    for entry in list(os.scandir(directory)):
        place, suffix = os.path.splitext(entry.path)
        if suffix != ".lock" or time.time() - entry.stat().st_mtime < seconds:
            continue
        fd = os.open(entry.path, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(place, ignore_errors=True)
        except BlockingIOError:
            pass
        finally:
            os.close(fd)
