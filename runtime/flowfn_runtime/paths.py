"""Where flowfn keeps things on a host: everything is under these two directories and nowhere else."""

from __future__ import annotations

import os

TYPE_CHECKING = False  # importing `typing` would take longer than all of this

if TYPE_CHECKING:
    from collections.abc import Callable


def home() -> str:
    """The flowfn home: volumes, tasks, the registry and locks. `FLOW_HOME`, else `~/.flowfn`."""
    return os.path.abspath(os.path.expanduser(os.environ.get("FLOW_HOME") or "~/.flowfn"))


def cache() -> str:
    """The host's cache of staged data. `FLOW_CACHE`, else `$XDG_CACHE_HOME/flowfn`, else `~/.cache/flowfn`."""
    if explicit := os.environ.get("FLOW_CACHE"):
        return os.path.abspath(os.path.expanduser(explicit))
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.abspath(os.path.join(base, "flowfn"))


def private_dir(path: str) -> str:
    """Make `path` (and its parents) as a directory that only this user can enter; return it."""
    # makedirs gives its mode to the last directory only.
    if not os.path.isdir(path):
        private_dir(os.path.dirname(path))
        try:
            os.mkdir(path, mode=0o700)
        except FileExistsError:  # somebody else was faster, unless it is a file
            if not os.path.isdir(path):
                raise
    return path


def which(program: str) -> str | None:
    """Where a program is on PATH. As `shutil.which`, whose import takes longer than the search."""
    for folder in os.get_exec_path():
        path = os.path.join(folder, program)
        if os.access(path, os.X_OK) and not os.path.isdir(path):
            return path
    return None


def placed(place: str, fill: Callable[[str], object]) -> str:
    """See that the directory `place` is there and complete: `fill` makes it if it is not. Many may do so at once."""
    if not os.path.isdir(place):
        import shutil
        import tempfile

        new = tempfile.mkdtemp(dir=private_dir(os.path.dirname(place)))
        try:
            fill(new)
            os.rename(new, place)
        except OSError:
            shutil.rmtree(new, ignore_errors=True)
            if not os.path.isdir(place):  # else somebody else was faster
                raise
    os.utime(place)  # it is in use
    return place
