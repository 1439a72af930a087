"""The projects that were sent to this host: kept by content, laid out once, shared by all workers that run them."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable

from . import paths, project

KEEP_S = 7 * 86400.0  # a project that nobody used for so long may go


def store() -> str:
    """The directory of all of them."""
    return paths.private_dir(os.path.join(paths.cache(), "projects"))


def get(digest: str, fetch: Callable[[str], None]) -> tuple[str, int]:
    """The directory where the snapshot of that digest is laid out, and a descriptor that keeps it there while open.

    `fetch` gets it into the store if it is not there; of many who ask at a time one does it.
    """
    root = store()
    place = os.path.join(root, "trees-out", digest)
    paths.private_dir(os.path.dirname(place))
    fd = os.open(f"{place}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(fd, fcntl.LOCK_SH)
    if not os.path.isdir(place):
        fcntl.flock(fd, fcntl.LOCK_EX)
        if not os.path.isdir(place):
            if not os.path.exists(os.path.join(root, "trees", digest)):
                fetch(digest)
            _lay_out(digest, root, place)
            _drop_old(root, keep=digest)
        fcntl.flock(fd, fcntl.LOCK_SH)
    os.utime(fd)
    return place, fd


def _lay_out(digest: str, root: str, place: str) -> None:
    new = tempfile.mkdtemp(dir=os.path.dirname(place))
    try:
        project.lay_out(digest, root, new)
        os.rename(new, place)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def _drop_old(root: str, *, keep: str) -> None:
    """Delete what was not used for long and is not used now."""
    directory = os.path.join(root, "trees-out")
    for entry in list(os.scandir(directory)):
        digest, suffix = os.path.splitext(entry.name)
        if suffix != ".lock" or digest == keep or time.time() - entry.stat().st_mtime < KEEP_S:
            continue
        fd = os.open(entry.path, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(os.path.join(directory, digest), ignore_errors=True)
        except BlockingIOError:
            pass  # in use
        finally:
            os.close(fd)
