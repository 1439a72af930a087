"""Which files are the user's own project, as opposed to installed packages: they go along to other machines.

The project is the directory of the program, or the working directory, up to the nearest directory that looks like a
project's top; further entries of `sys.path` that are no installation's go along if modules were imported from them.
"""

from __future__ import annotations

import os
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from flowfn_runtime import paths

if TYPE_CHECKING:
    from flowfn_runtime.project import Snapshot

MARKS = ("pyproject.toml", "setup.py", "setup.cfg", ".git", ".hg", ".flowignore", "uv.lock", "requirements.txt")
FRESH_S = 1.0  # how long a snapshot counts as the present state

Place = tuple[int, str]  # number of a root, path below it


class Code(NamedTuple):
    """The project's files, and where in them modules are looked for."""

    roots: tuple[Snapshot, ...]
    sys_path: tuple[Place, ...]
    cwd: Place | None  # the client's working directory, if it is part of a root


_lock = threading.Lock()
_taken: dict[tuple[str, ...], tuple[float, tuple[Snapshot, ...]]] = {}


def code(*, fresh: bool = False) -> Code:
    """The project as it is now; `fresh`: and not as it was a second ago.

    Raises ValidationError if it is too large, or a file can't be read.
    """
    entries = [os.path.realpath(entry or os.getcwd()) for entry in sys.path]
    cwd = os.path.realpath(os.getcwd())
    roots = find_roots(entries, cwd)
    wanted = [place for entry in entries if os.path.isdir(entry) and (place := _place(entry, roots))]
    return Code(_snapshots(tuple(roots), 0.0 if fresh else FRESH_S), tuple(dict.fromkeys(wanted)), _place(cwd, roots))


def find_roots(entries: Iterable[str], cwd: str) -> list[str]:
    """The directories that go along whole."""
    main = getattr(sys.modules.get("__main__"), "__file__", None)
    start = os.path.dirname(os.path.realpath(main)) if main else cwd
    roots: list[str] = []
    for directory in (start if _is_users(start) else cwd, cwd):
        if _is_users(directory):
            _add(top(directory), roots)
    imported = {
        os.path.realpath(os.path.dirname(file))
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
    nobodys = ("/", os.path.expanduser("~"), tempfile.gettempdir(), "/tmp", "/home", "/root")
    if not os.path.isdir(directory) or directory in {os.path.realpath(path) for path in nobodys}:
        return False
    installed = {sys.prefix, sys.base_prefix, sys.exec_prefix, *sysconfig.get_paths().values()}
    installed -= {"/usr", "/"}  # a system's Python: what lies elsewhere below is the user's
    if any(_within(directory, os.path.realpath(path)) for path in installed if path):
        return False
    return not directory.endswith(("site-packages", "dist-packages"))


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


def _snapshots(roots: tuple[str, ...], fresh_s: float) -> tuple[Snapshot, ...]:
    from flowfn_runtime import project

    with _lock:  # many workers that start at once share one look
        taken = _taken.get(roots)
        if taken is None or time.monotonic() - taken[0] > fresh_s:
            exclude = (paths.home(), paths.cache())
            snapshots = tuple(project.snapshot(root, exclude=exclude) for root in roots)
            taken = _taken[roots] = (time.monotonic(), snapshots)
        return taken[1]
