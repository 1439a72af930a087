"""The database of tasks: `FLOW_HOME/tasks/registry.db`."""

from __future__ import annotations

from . import taskdir
from .errors import TaskError
from .registry import Registry

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


_registry = Registry(
    taskdir.tasks_root,
    "tasks",
    TaskError,
    [_FIRST, _SECOND],
    "move the file away: tasks run on, and their directories keep logs and outcomes",
)
write, read, explain, connection = _registry.write, _registry.read, _registry.explain, _registry.connection
