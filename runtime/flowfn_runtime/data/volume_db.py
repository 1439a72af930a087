"""The database of volumes on this host: `FLOW_HOME/volumes/registry.db`."""

from __future__ import annotations

import os

from .. import paths
from ..errors import VolumeError
from ..registry import Registry, release

__all__ = ["at", "explain", "made", "read", "release", "root", "write"]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS volumes (
    id TEXT PRIMARY KEY,
    project TEXT NOT NULL,
    name TEXT,                      -- NULL: an unnamed volume, found by its id only
    size_gb INTEGER NOT NULL,
    interface TEXT NOT NULL,
    region TEXT,
    created_at REAL NOT NULL,
    deleted_at REAL,                -- set: deleted, but its files may not be gone yet
    UNIQUE (project, name)
)
"""


def root() -> str:
    """The directory of all volumes."""
    return os.path.join(paths.home(), "volumes")


def made(path: str) -> str:
    """Make a directory that only this user can enter; return its path."""
    try:
        return paths.private_dir(path)
    except OSError as error:
        raise explain(error) from error


_registry = Registry(
    root, "volumes", VolumeError, [[_SCHEMA]], "restore it from a backup; the volumes' data is still beside it"
)


def at(home: str) -> Registry:
    """The same of another flowfn home."""
    return _registry._replace(root=lambda: os.path.join(home, "volumes"))


write, read, explain = _registry.write, _registry.read, _registry.explain
