"""Which files are the user's own project, as opposed to installed packages: they go along to other machines.

The project is the directory of the program, or the working directory, up to the nearest directory that looks like a
project's top; further entries of `sys.path` that are no installation's go along if modules were imported from them.
"""

from __future__ import annotations

import functools
import os
import sys
import sysconfig
import threading
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from flowfn_runtime import paths
from flowfn_runtime.errors import FlowError

if TYPE_CHECKING:
    from flowfn_runtime.project import Snapshot

LOOK_SHARE = 0.05  # of the time that may go into looking whether files have changed
MARKS = ("pyproject.toml", "setup.py", "setup.cfg", ".git", ".hg", ".flowignore", "uv.lock", "requirements.txt")
FRESH_S = 1.0  # how long a snapshot counts as the present state

Place = tuple[int, str]  # number of a root, path below it


class Code(NamedTuple):
    """The project's files, and where in them modules are looked for."""

    roots: tuple[Snapshot, ...]
    sys_path: tuple[Place, ...]
    cwd: Place | None  # the client's working directory, if it is part of a root


Signature = tuple[Any, ...]  # equal for equal files, as far as their times and sizes tell

_lock = threading.RLock()
_taken: dict[str, tuple[Signature, Snapshot]] = {}
_seen: dict[str, float] = {}  # when that was last found to be so
_generation = 0
_looked: tuple[float, Any, Signature | None] = (0.0, None, None)  # until when that counts, of which modules, what


def generation() -> int:
    """A number that changes when the project does: files that are edited, or modules imported from elsewhere.

    Looks at most once a second, and whenever there are further modules. Cheap enough for every call.
    """
    global _generation, _looked
    until, modules, last = _looked
    if time.monotonic() < until and modules == _imported():
        return _generation
    with _lock:
        started = time.monotonic()
        try:
            now: Signature | None = tuple(map(_signature, _roots()[0]))
        except (FlowError, OSError):
            now = last  # it will be reported by whoever needs the files
        if last is not None and now != last:
            _generation += 1
        seconds = time.monotonic() - started
        _looked = started + max(FRESH_S, seconds / LOOK_SHARE), _imported(), now
        return _generation


def look_again() -> None:
    """What was seen is out of date: the next call looks anew."""
    global _looked
    with _lock:
        _looked = (0.0, None, _looked[2])
        _seen.clear()


def _imported() -> tuple[int, str]:
    """Tells whether modules were imported: how many there are, and the last."""
    return len(sys.modules), next(reversed(sys.modules))


def look_ahead() -> None:
    """Look at the project while there is time, for the `code` that follows."""
    try:
        code()
    except (FlowError, OSError):
        pass  # it will be reported by whoever needs the files


def code(*, ahead: bool = False) -> Code:
    """The project as it is now. Raises ValidationError if it is too large, or a file can't be read.

    `ahead`: what was seen within the last second will do.
    """
    roots, entries, cwd = _roots()
    wanted = [place for entry in entries if os.path.isdir(entry) and (place := _place(entry, roots))]
    since = time.monotonic() - FRESH_S if ahead else None
    return Code(tuple(_snapshot(root, since) for root in roots), tuple(dict.fromkeys(wanted)), _place(cwd, roots))


def _roots() -> tuple[list[str], list[str], str]:
    """The directories that go along whole, the real entries of `sys.path`, and the working directory."""
    try:
        cwd = os.path.realpath(os.getcwd())
    except FileNotFoundError:  # it was removed
        cwd = "/"
    entries = [_real(entry) if entry else cwd for entry in sys.path]
    return find_roots(entries, cwd), entries, cwd


@functools.lru_cache(maxsize=1 << 14)
def _real(path: str) -> str:
    return os.path.realpath(path)


def find_roots(entries: Iterable[str], cwd: str) -> list[str]:
    """The directories that go along whole."""
    main = getattr(sys.modules.get("__main__"), "__file__", None)
    start = os.path.dirname(os.path.realpath(main)) if main else cwd
    roots: list[str] = []
    for directory in (start if _is_users(start) else cwd, cwd):
        if _is_users(directory):
            _add(top(directory), roots)
    imported = {
        _real(os.path.dirname(file))
        for module in list(sys.modules.values())
        if (file := getattr(module, "__file__", None)) and isinstance(file, str)
    }
    for entry in entries:
        if _is_users(entry) and not _is_ours(entry) and any(_within(place, entry) for place in imported):
            _add(entry, roots)
    return roots


def top(directory: str) -> str:
    """The nearest directory, from `directory` upwards, that looks like the top of a project; else `directory`."""
    candidate = directory
    while _is_users(candidate):
        if any(os.path.exists(os.path.join(candidate, mark)) for mark in MARKS):
            return candidate
        candidate = os.path.dirname(candidate)
    return directory


def _add(directory: str, roots: list[str]) -> None:
    if not any(_within(directory, root) for root in roots):
        roots[:] = [root for root in roots if not _within(root, directory)] + [directory]


def _is_users(directory: str) -> bool:
    """Whether it may be a project: neither an installation's nor everybody's, nor one that holds all else."""
    if not os.path.isdir(directory) or directory in _nobodys():
        return False
    if any(_within(directory, path) for path in _installed()):
        return False
    return not directory.endswith(("site-packages", "dist-packages"))


def _nobodys() -> set[str]:
    temporary = [os.environ.get(name) for name in ("TMPDIR", "TEMP", "TMP")]  # as `tempfile`, which would import more
    places = ("/", os.path.expanduser("~"), "/tmp", "/var/tmp", "/home", "/root", *temporary)
    return {_real(path) for path in places if path}


@functools.lru_cache(maxsize=1)
def _installed() -> frozenset[str]:
    places = {sys.prefix, sys.base_prefix, sys.exec_prefix, *sysconfig.get_paths().values()}
    places -= {"/usr", "/"}  # a system's Python: what lies elsewhere below is the user's
    return frozenset(os.path.realpath(path) for path in places if path)


def _is_ours(entry: str) -> bool:
    """Whether it holds flowfn itself, which travels as the runtime."""
    return os.path.isdir(os.path.join(entry, "flowfn_runtime")) or os.path.isfile(
        os.path.join(entry, "flowfn", "bundle.py")
    )


def _within(path: str, directory: str) -> bool:
    return path == directory or path.startswith(directory.rstrip("/") + "/")


def _place(path: str, roots: list[str]) -> Place | None:
    for number, root in enumerate(roots):
        if _within(path, root):
            return number, os.path.relpath(path, root)
    return None


def _snapshot(root: str, since: float | None = None) -> Snapshot:
    from flowfn_runtime import project

    with _lock:  # many workers that start at once share one look
        if since is not None and root in _taken and _seen.get(root, 0.0) > since:
            return _taken[root][1]
        now = time.monotonic()
        signature = _signature(root)
        taken = _taken.get(root)
        if taken is None or taken[0] != signature:
            taken = _taken[root] = signature, project.snapshot(root, exclude=_excluded())
        _seen[root] = now
        return taken[1]


def _signature(root: str) -> Signature:
    from flowfn_runtime import projectwalk

    walked = projectwalk.walk(root, set(_excluded()))
    return tuple(sorted((path, s.st_mtime_ns, s.st_size, s.st_ino, s.st_mode) for path, s, _ in walked))


def _excluded() -> tuple[str, str]:
    return os.path.abspath(paths.home()), os.path.abspath(paths.cache())
