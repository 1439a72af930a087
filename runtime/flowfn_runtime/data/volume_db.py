"""The database of volumes on this host: who reads, who writes, and what its failures mean to the user.

An embedded SQLite database, `FLOW_HOME/volumes/registry.db`. This is the one place that sees sqlite3's errors.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from .. import paths
from ..errors import VolumeError

if TYPE_CHECKING:
    import sqlite3

T = TypeVar("T")

_SCHEMA_VERSION = 1
_BUSY_TIMEOUT_S = 60.0
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


def release(fd: int) -> None:
    """Give a lock back. Unlocked by name, not just closed: a process forked meanwhile has the same open file."""
    fcntl.flock(fd, fcntl.LOCK_UN)
    os.close(fd)


def write(work: Callable[[sqlite3.Connection], T]) -> T:
    """Run `work` in a transaction of its own, one at a time among all processes of this home."""
    made(paths.home())
    made(root())
    try:
        # Writers queue at a kernel lock, which neither polls nor starves anyone as SQLite's busy handler may.
        gate = os.open(os.path.join(root(), "registry.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise explain(error) from error
    try:
        fcntl.flock(gate, fcntl.LOCK_EX)
        with _connection(write=True) as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                _migrate(db)
                result = work(db)
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise
            return result
    finally:
        release(gate)


def read(work: Callable[[sqlite3.Connection], T]) -> T | None:
    """Run `work` on the registry as it is; None if there is none yet. Also works in a read-only home."""
    if not os.path.exists(_database()):
        return None
    with _connection(write=False) as db:
        if _schema_version(db) == 0:
            return None  # another process has made the file, and is about to make the table
        return work(db)


def _database() -> str:
    return os.path.join(root(), "registry.db")


@contextmanager
def _connection(*, write: bool) -> Iterator[sqlite3.Connection]:
    # A connection an operation: they are few, and a connection must not cross a fork. A rollback journal, not WAL: it
    # can be read in a read-only home, and works on network filesystems, where homes often live.
    import sqlite3
    from urllib.parse import quote

    path = _database()
    # A reader that may write rolls back what a killed writer has left; one that may not still reads.
    mode = "rw" if write or os.access(path, os.W_OK) else "ro"
    try:
        if write:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        uri = f"file:{quote(path)}?mode={mode}"
        db = sqlite3.connect(uri, uri=True, timeout=_BUSY_TIMEOUT_S, isolation_level=None)
        try:
            yield db
        finally:
            db.close()
    except (sqlite3.Error, OSError) as error:
        raise explain(error) from error


def _schema_version(db: sqlite3.Connection) -> int:
    version: int = db.execute("PRAGMA user_version").fetchone()[0]
    if version > _SCHEMA_VERSION:
        raise VolumeError(
            f"{_database()} was written by a newer flowfn (schema {version}; this one knows {_SCHEMA_VERSION})",
            hint="upgrade flowfn here: pip install -U flowfn",
        )
    return version


def _migrate(db: sqlite3.Connection) -> None:
    if _schema_version(db) < _SCHEMA_VERSION:
        db.execute(_SCHEMA)
        db.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")


def explain(error: Exception) -> VolumeError:
    """What a failure of the database or the disk means to the user."""
    text, number = str(error), getattr(error, "errno", None)
    if number in (errno.EROFS, errno.EACCES, errno.EPERM) or "readonly" in text or "unable to open" in text:
        return VolumeError(
            f"volumes can't be changed: {root()} is not writable ({text})",
            hint="set FLOW_HOME to a directory that you may write to",
        )
    if number in (errno.ENOSPC, errno.EDQUOT) or "disk is full" in text:
        return VolumeError(
            f"volumes can't be changed: the disk of {root()} is full",
            hint="free some space there: flow volume ls, flow cache prune; or set FLOW_HOME to another disk",
        )
    if "malformed" in text or "not a database" in text:
        return VolumeError(
            f"the registry of volumes is damaged: {_database()} ({text})",
            hint=f"restore it from a backup; the volumes' data is still in {root()}",
        )
    if "locked" in text:
        return VolumeError(
            f"the registry of volumes stayed locked for {_BUSY_TIMEOUT_S:.0f} s: {_database()}",
            hint="another program has it open in a transaction; end it",
        )
    return VolumeError(f"the registry of volumes failed: {text} ({root()})")
