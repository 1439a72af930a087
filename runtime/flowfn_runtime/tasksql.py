"""The database of tasks: who reads, who writes, and what its failures mean to the user.

An embedded SQLite database, `FLOW_HOME/tasks/registry.db`. This is the one place that sees sqlite3's errors.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from . import paths, taskdir
from .errors import TaskError

if TYPE_CHECKING:
    import sqlite3

T = TypeVar("T")

_SCHEMA_VERSION = 2
_BUSY_TIMEOUT_S = 60.0
_FIRST = (
    """
    CREATE TABLE tasks (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,   -- the order of submission
        id TEXT NOT NULL UNIQUE,
        project TEXT NOT NULL,
        name TEXT NOT NULL,
        state TEXT NOT NULL,
        reason TEXT NOT NULL,
        command TEXT NOT NULL,
        gpu TEXT NOT NULL,
        nodes INTEGER NOT NULL,
        ports TEXT NOT NULL,                     -- JSON list
        created_at REAL NOT NULL,
        started_at REAL,
        ended_at REAL,
        exit_code INTEGER,
        attempts INTEGER NOT NULL,
        boot_id TEXT NOT NULL
    )
    """,
    "CREATE INDEX tasks_of_project ON tasks (project, seq)",
    "CREATE INDEX tasks_by_name ON tasks (project, name, seq)",
    "CREATE INDEX tasks_active ON tasks (seq) WHERE state IN ('pending', 'running')",
    # Which block volumes a task has to itself.
    "CREATE TABLE holds (volume_id TEXT NOT NULL, seq INTEGER NOT NULL, PRIMARY KEY (volume_id, seq)) WITHOUT ROWID",
)
_SECOND = (
    "ALTER TABLE tasks ADD COLUMN backend TEXT NOT NULL DEFAULT 'local'",
    "ALTER TABLE tasks ADD COLUMN place TEXT NOT NULL DEFAULT ''",  # JSON: where to ask for it; '': here
    "CREATE INDEX tasks_elsewhere ON tasks (seq) WHERE state IN ('pending', 'running') AND place != ''",
)
_SCHEMAS = (_FIRST, _SECOND)  # what each version adds


def _database() -> str:
    return os.path.join(taskdir.tasks_root(), "registry.db")


def write(work: Callable[[sqlite3.Connection], T]) -> T:
    """Run `work` in a transaction of its own, one at a time among all processes of this home."""
    try:
        paths.private_dir(paths.home())
        paths.private_dir(taskdir.tasks_root())
        # Writers queue at a kernel lock, which neither polls nor starves anyone as SQLite's busy handler may.
        gate = os.open(
            os.path.join(taskdir.tasks_root(), "registry.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
        )
    except OSError as error:
        raise explain(error) from error
    try:
        fcntl.flock(gate, fcntl.LOCK_EX)
        with connection("rwc") as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                if (version := _schema_version(db)) < _SCHEMA_VERSION:
                    for statement in (statement for added in _SCHEMAS[version:] for statement in added):
                        db.execute(statement)
                    db.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
                result = work(db)
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise
            return result
    finally:
        fcntl.flock(gate, fcntl.LOCK_UN)  # by name: a process forked meanwhile has the same open file
        os.close(gate)


def read(work: Callable[[sqlite3.Connection], T]) -> T | None:
    """Run `work` on the register as it is; None if there is none yet."""
    if not os.path.exists(_database()):
        return None
    with connection("ro") as db:
        version = _schema_version(db)
        if version == _SCHEMA_VERSION:
            return work(db)
    if not version:
        return None
    write(lambda db: None)  # an older flowfn's: it gets what was added since
    return read(work)


@contextmanager
def connection(mode: str) -> Iterator[sqlite3.Connection]:
    # A rollback journal, not WAL: it can be read in a read-only home, and works on network filesystems.
    import sqlite3

    path = _database()
    try:
        if mode == "rwc":
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        quoted = path.replace("%", "%25").replace("?", "%3f").replace("#", "%23")
        uri = f"file:{quoted}?mode={mode}"
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
        raise TaskError(
            f"{_database()} was written by a newer flowfn (schema {version}; this one knows {_SCHEMA_VERSION})",
            hint="Upgrade flowfn here: pip install -U flowfn",
        )
    return version


def explain(error: Exception) -> TaskError:
    """What a failure of the database or of the disk under the tasks means to the user."""
    text, number, root = str(error), getattr(error, "errno", None), taskdir.tasks_root()
    if number in (errno.EROFS, errno.EACCES, errno.EPERM) or "readonly" in text or "unable to open" in text:
        return TaskError(f"{root} is not writable ({text})", hint="Set FLOW_HOME to a directory that you may write to.")
    if number in (errno.ENOSPC, errno.EDQUOT) or "disk is full" in text:
        return TaskError(
            f"the disk of {root} is full", hint="Free some space there (flow cache prune), or set FLOW_HOME elsewhere."
        )
    if "malformed" in text or "not a database" in text:
        return TaskError(
            f"the register of tasks is damaged: {_database()} ({text})",
            hint="Move the file away: tasks run on, and their directories keep logs and outcomes.",
        )
    if "locked" in text:
        return TaskError(
            f"the register of tasks stayed locked for {_BUSY_TIMEOUT_S:.0f} s: {_database()}",
            hint="Another program has it open in a transaction; end it.",
        )
    return TaskError(f"the register of tasks failed: {text} ({root})")
