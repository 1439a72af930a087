"""The register of tasks: one row each in `FLOW_HOME/tasks/registry.db`, and what readers make of it.

A row is what its supervisor wrote last. A supervisor that was killed wrote nothing, so nobody believes a row that says
pending or running before looking at the task's lock: if it is free, the reader settles the row from what the task's
directory holds. This is the one place that sees sqlite3's errors.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from . import paths, taskdir
from .errors import NameConflict, ResourceUnavailable, TaskError, TaskNotFound

if TYPE_CHECKING:
    import sqlite3

T = TypeVar("T")

PENDING, RUNNING, COMPLETED, FAILED, CANCELLED = "pending", "running", "completed", "failed", "cancelled"
ACTIVE = (PENDING, RUNNING)
STATES = (PENDING, RUNNING, COMPLETED, FAILED, CANCELLED)

_SCHEMA_VERSION = 1
_BUSY_TIMEOUT_S = 60.0
_SCHEMA = (
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
_COLUMNS = (
    "seq, id, project, name, state, reason, command, gpu, nodes, ports, created_at, started_at, ended_at, exit_code, "
    "attempts, boot_id"
)


class TaskRow(NamedTuple):
    """What is known of a task. Times are in seconds since the epoch."""

    seq: int  # order of submission among all tasks of this home
    id: str  # "task_" and 12 hex digits
    project: str
    name: str
    state: str  # one of STATES
    reason: str  # why it is in that state, where there is more to say
    command: str  # its beginning, for listings
    gpu: str  # as asked for; "" for none
    nodes: int
    ports: tuple[int, ...]
    created_at: float
    started_at: float | None
    ended_at: float | None
    exit_code: int | None  # None: not ended, or never started
    attempts: int  # how often it was started
    boot_id: str  # the run of the host's kernel in which it was submitted

    @property
    def active(self) -> bool:
        """Neither completed, failed nor cancelled."""
        return self.state in ACTIVE

    def to_dict(self) -> dict[str, Any]:
        """The fields, JSON-able."""
        fields = self._asdict()
        del fields["boot_id"], fields["seq"]
        return fields | {"ports": list(self.ports)}


# -- writing -----------------------------------------------------------------------------------------------------------


def add(row: TaskRow, block_volumes: Sequence[str] = (), depends_on: Sequence[str] = ()) -> tuple[int, list[str]]:
    """Register a task whose lock is already held. Returns its place and the tasks whose end it has to await.

    Those are the tasks before it that use one of the same block volumes, nearest first. Raises `NameConflict` if an
    active task of the project has the name, `ResourceUnavailable` if one has one of the ports.
    """

    def insert(db: sqlite3.Connection) -> tuple[int, list[str]]:
        _refuse_conflicts(db, row, depends_on)
        values = (*_values(row),)
        marks = ", ".join("?" * len(values))
        seq = db.execute(f"INSERT INTO tasks ({_COLUMNS}) VALUES (NULL, {marks})", values).lastrowid
        assert seq is not None
        db.executemany("INSERT INTO holds VALUES (?, ?)", [(volume, seq) for volume in set(block_volumes)])
        volumes = ", ".join("?" * len(block_volumes))
        before = db.execute(
            f"SELECT DISTINCT t.id, t.seq FROM tasks t JOIN holds h ON h.seq = t.seq WHERE h.volume_id IN ({volumes}) "
            "AND t.seq < ? AND t.state IN ('pending', 'running') ORDER BY t.seq DESC",
            (*block_volumes, seq),
        )
        after = [task_id for task_id, _seq in before]
        if after and not row.reason:
            reason = (
                f"it waits for a volume that {after[0]} has"
                if len(after) == 1
                else (f"it waits for a volume; {len(after)} tasks are before it")
            )
            db.execute("UPDATE tasks SET reason = ? WHERE seq = ?", (reason, seq))
        return seq, after

    return _write(insert)


def update(task_id: str, **fields: Any) -> bool:
    """Change a task that is active; False if it isn't any more: what ended stays as it ended."""
    changes = ", ".join(f"{name} = ?" for name in fields)

    def change(db: sqlite3.Connection) -> bool:
        done = db.execute(
            f"UPDATE tasks SET {changes} WHERE id = ? AND state IN ('pending', 'running')",
            (*fields.values(), task_id),
        )
        if fields.get("state", PENDING) not in ACTIVE:
            db.execute("DELETE FROM holds WHERE seq = (SELECT seq FROM tasks WHERE id = ?)", (task_id,))
        return done.rowcount > 0

    return _write(change)


def forget(task_id: str) -> None:
    """Take a task out of the register: one that never came to be."""

    def delete(db: sqlite3.Connection) -> None:
        db.execute("DELETE FROM holds WHERE seq = (SELECT seq FROM tasks WHERE id = ?)", (task_id,))
        db.execute("DELETE FROM tasks WHERE id = ?", (task_id,))

    _write(delete)


def remove(task_ids: Sequence[str]) -> None:
    """Take tasks that have ended out of the register, and remove their directories. Their logs and results go."""

    def delete(db: sqlite3.Connection) -> None:
        for task_id in task_ids:
            db.execute("DELETE FROM tasks WHERE id = ? AND state NOT IN ('pending', 'running')", (task_id,))

    _write(delete)
    for task_id in task_ids:
        taskdir.remove_tree(taskdir.task_dir(task_id))


def _refuse_conflicts(db: sqlite3.Connection, row: TaskRow, depends_on: Sequence[str]) -> None:
    def alive(other: TaskRow) -> bool:
        return taskdir.is_held(taskdir.task_dir(other.id))

    active = "state IN ('pending', 'running')"
    for found in db.execute(
        f"SELECT {_COLUMNS} FROM tasks WHERE project = ? AND name = ? AND {active}", (row.project, row.name)
    ).fetchall():
        if alive(other := _row(found)):
            raise NameConflict(
                f"task {other.id} is {other.state} under the name {row.name!r}",
                hint="Choose another name, leave unique_name=True, or cancel that task first.",
            )
    if not row.ports:
        return
    for found in db.execute(f"SELECT {_COLUMNS} FROM tasks WHERE {active} AND ports != '[]'").fetchall():
        other = _row(found)
        taken = sorted(set(other.ports) & set(row.ports))
        if taken and other.id not in depends_on and alive(other):
            raise ResourceUnavailable(
                f"port {taken[0]} belongs to task {other.name} ({other.id}), which is {other.state}",
                hint=f"Choose another port, or cancel that task: flow cancel {other.id}",
            )


# -- reading -----------------------------------------------------------------------------------------------------------


def get(task_id: str) -> TaskRow:
    """The task of this id, as it really is now; `TaskNotFound` if there is none."""
    row = _read(lambda db: db.execute(f"SELECT {_COLUMNS} FROM tasks WHERE id = ?", (task_id,)).fetchone())
    if row is None:
        raise TaskNotFound(f"there is no task {task_id!r}", hint="See the tasks of the project with: flow ps --all")
    return settled(_row(row))


def find(wanted: str, project: str) -> TaskRow:
    """The project's task of this id, or beginning of an id, or the newest of this name; else `TaskNotFound`.

    A name also stands for the newest task to whose name six digits were appended.
    """

    def select(db: sqlite3.Connection) -> tuple[list[Any], list[Any]]:
        exact = db.execute(f"SELECT {_COLUMNS} FROM tasks WHERE id = ? AND project = ?", (wanted, project)).fetchone()
        if exact is None:
            exact = db.execute(
                f"SELECT {_COLUMNS} FROM tasks WHERE project = ? AND name = ? ORDER BY seq DESC LIMIT 1",
                (project, wanted),
            ).fetchone()
        if exact is None:
            exact = db.execute(
                f"SELECT {_COLUMNS} FROM tasks WHERE project = ? AND name >= ? AND name < ? AND length(name) = ? "
                "ORDER BY seq DESC LIMIT 1",
                (project, f"{wanted}-0", f"{wanted}-g", len(wanted) + 7),
            ).fetchone()
        if exact is not None:
            return [exact], []
        prefix = wanted if wanted.startswith("task_") else f"task_{wanted}"
        like = db.execute(
            f"SELECT {_COLUMNS} FROM tasks WHERE id >= ? AND id < ? AND project = ? LIMIT 2",
            (prefix, prefix + "\x7f", project),
        ).fetchall()
        names = db.execute("SELECT name FROM tasks WHERE project = ? ORDER BY seq DESC LIMIT 200", (project,))
        return like, [name for (name,) in names]

    rows, names = _read(select) or ([], [])
    if len(rows) == 1:
        return settled(_row(rows[0]))
    if len(rows) > 1:
        raise TaskNotFound(f"{wanted!r} is the beginning of several task ids", hint="Give more of the id.")
    from difflib import get_close_matches

    near = get_close_matches(wanted, names, 1)
    raise TaskNotFound(
        f"project {project!r} has no task {wanted!r}",
        hint=f"Did you mean {near[0]!r}?" if near else "See them with: flow ps --all",
    )


def list_tasks(project: str | None, *, states: Sequence[str] = (), limit: int | None = 10) -> list[TaskRow]:
    """The newest `limit` tasks of the project (of all if None) in one of `states` (any if empty), newest first."""
    found: list[TaskRow] = []
    before = 1 << 62
    while limit is None or len(found) < limit:
        # What reads as running may turn out to have failed, so more rows than asked for may have to be looked at.
        page = _page(project, states, before, 1000 if limit is None else limit)
        if not page:
            break
        before = page[-1].seq
        found.extend(row for row in map(settled, page) if not states or row.state in states)
    return found if limit is None else found[:limit]


def _page(project: str | None, states: Sequence[str], before: int, size: int) -> list[TaskRow]:
    wanted = list(states)
    if FAILED in wanted or CANCELLED in wanted or COMPLETED in wanted:
        wanted += [state for state in ACTIVE if state not in wanted]  # they may have ended unseen
    where, values = ["seq < ?"], [before]
    conditions: list[Any] = values
    if project is not None:
        where.append("project = ?")
        conditions.append(project)
    if wanted:
        only_active = set(wanted) <= set(ACTIVE)
        where.append("state IN ('pending', 'running')" if only_active else f"state IN ({', '.join('?' * len(wanted))})")
        conditions += [] if only_active else wanted
    query = f"SELECT {_COLUMNS} FROM tasks WHERE {' AND '.join(where)} ORDER BY seq DESC LIMIT ?"
    rows = _read(lambda db: db.execute(query, (*conditions, size)).fetchall())
    return [_row(row) for row in rows or ()]


def settled(row: TaskRow) -> TaskRow:
    """`row`, unless it says active and its supervisor is gone: then what became of the task, which is written down."""
    directory = taskdir.task_dir(row.id)
    if not row.active or taskdir.is_held(directory):
        return row
    fresh = _read(lambda db: db.execute(f"SELECT {_COLUMNS} FROM tasks WHERE id = ?", (row.id,)).fetchone())
    if fresh is None or not (row := _row(fresh)).active:
        return row if fresh is not None else row._replace(state=FAILED, reason="it was removed")
    ended = _what_became(row, directory)
    if not taskdir.is_held(directory, "tree"):  # else its last processes are dying: the next reader writes it down
        try:
            taskdir.remove_tree(os.path.join(directory, "scratch"))
            update(row.id, **ended)
        except (TaskError, OSError):
            pass  # a read-only home or a full disk: what is returned is right all the same
    return row._replace(**ended)


def _what_became(row: TaskRow, directory: str) -> dict[str, Any]:
    if outcome := taskdir.read_json(directory, "outcome.json"):
        return outcome
    reason = taskdir.cancel_reason(directory)
    if reason is not None:
        state = CANCELLED
    elif row.boot_id != taskdir.boot_id():
        state, reason = FAILED, "the host was restarted"
    elif not os.path.isdir(directory):
        state, reason = FAILED, "its directory was removed"
    else:
        state, reason = FAILED, "its supervisor was killed"
    return {"state": state, "reason": reason, "ended_at": time.time()}


# -- the database ------------------------------------------------------------------------------------------------------


def _values(row: TaskRow) -> tuple[Any, ...]:
    return (
        *(row.id, row.project, row.name, row.state, row.reason, row.command, row.gpu, row.nodes),
        *(
            json.dumps(row.ports),
            row.created_at,
            row.started_at,
            row.ended_at,
            row.exit_code,
            row.attempts,
            row.boot_id,
        ),
    )


def _row(values: Sequence[Any]) -> TaskRow:
    fields = list(values)
    fields[9] = tuple(json.loads(fields[9]))
    return TaskRow(*fields)


def _database() -> str:
    return os.path.join(taskdir.tasks_root(), "registry.db")


def _write(work: Callable[[sqlite3.Connection], T]) -> T:
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
        with _connection("rwc") as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                if _schema_version(db) < _SCHEMA_VERSION:
                    for statement in _SCHEMA:
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


def _read(work: Callable[[sqlite3.Connection], T]) -> T | None:
    """Run `work` on the register as it is; None if there is none yet."""
    if not os.path.exists(_database()):
        return None
    with _connection("ro") as db:
        return work(db) if _schema_version(db) else None


@contextmanager
def _connection(mode: str) -> Iterator[sqlite3.Connection]:
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
