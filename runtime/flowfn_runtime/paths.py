"""Where flowfn keeps things on a host: everything is under these two directories and nowhere else."""

from __future__ import annotations

import os


def home() -> str:
    """The flowfn home: volumes, tasks, the registry and locks. `FLOW_HOME`, else `~/.flowfn`."""
    return os.path.abspath(os.environ.get("FLOW_HOME") or os.path.expanduser("~/.flowfn"))


def cache() -> str:
    """The host's cache of staged data. `FLOW_CACHE`, else `$XDG_CACHE_HOME/flowfn`, else `~/.cache/flowfn`."""
    if explicit := os.environ.get("FLOW_CACHE"):
        return os.path.abspath(explicit)
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
