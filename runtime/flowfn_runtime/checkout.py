"""The projects that were sent to this host: kept by content, laid out once, shared by all workers that run them.

And the runtimes, one for each version of flowfn that a client had. What nobody uses and nobody used lately goes.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable

from . import kept, paths, project

KEEP_S = 7 * 86400.0  # a project that nobody used for so long may go
KEEP_PROJECTS = 32  # so many states of projects stay, those in use not counted
KEEP_RUNTIMES = 4  # so many runtimes stay, beside those in use and those that were used within ...
KEEP_RUNTIME_S = 86400.0


def store() -> str:
    """The directory of all of them."""
    return paths.private_dir(os.path.join(paths.cache(), "projects"))


def get(digest: str, fetch: Callable[[], None]) -> tuple[str, int]:
    """The directory where the snapshot of that digest is laid out, and a descriptor that keeps it there while open.

    `fetch` gets it into the store if it is not there.
    """
    root = store()
    laid_out = os.path.join(root, "checkouts")
    place = os.path.join(laid_out, digest)

    def make(place: str) -> None:
        with project.guarded(root):
            if not os.path.exists(os.path.join(root, "trees", digest)):
                fetch()
            project.lay_out(digest, root, place)

    before = os.path.exists(place)
    fd = kept.get(place, make)
    if not before:
        clean()
    return place, fd


def clean() -> None:
    """Drop projects that nobody uses, the least recently used first, and the contents that no other has.

    Not while others get theirs; whoever gets the next one does it.
    """
    root = store()
    laid_out = os.path.join(root, "checkouts")
    guard = os.open(os.path.join(root, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
        kept.drop_old(laid_out, KEEP_S, KEEP_PROJECTS)
        project.clean(root, {entry.name for entry in os.scandir(laid_out) if entry.is_dir()})
    except BlockingIOError:
        pass
    finally:
        os.close(guard)


def hold_runtime(directory: str) -> int:
    """A descriptor that keeps the runtime in `directory` where it is while open; runtimes that nobody uses are dropped.

    A runtime's time is that of its last use, which the loader sets.
    """
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    fcntl.flock(fd, fcntl.LOCK_SH)
    others = os.path.dirname(directory)
    if os.path.basename(others) == "runtime":  # put there by the loader
        _drop_runtimes(others)
    return fd


def _drop_runtimes(directory: str) -> None:
    there = sorted(os.scandir(directory), key=lambda entry: entry.stat().st_mtime, reverse=True)
    for entry in there[KEEP_RUNTIMES:]:
        if time.time() - entry.stat().st_mtime < KEEP_RUNTIME_S:
            continue
        try:
            fd = os.open(entry.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            kept.remove(entry.path)
        except BlockingIOError:
            pass
        finally:
            os.close(fd)
