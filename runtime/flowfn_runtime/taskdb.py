"""The register of tasks: one row each in `FLOW_HOME/tasks/registry.db`, and what readers make of it.

A row is what its supervisor wrote last. A supervisor that was killed wrote nothing, so nobody believes a row that says
pending or running before looking at the task's lock: if it is free, the reader settles the row from what the task's
directory holds.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from . import taskdir
from .errors import NameConflict, ResourceUnavailable, TaskError, TaskNotFound
from .tasksql import read, write

if TYPE_CHECKING:
    import sqlite3

PENDING, RUNNING, COMPLETED, FAILED, CANCELLED = "pending", "running", "completed", "failed", "cancelled"
ACTIVE = (PENDING, RUNNING)
STATES = (PENDING, RUNNING, COMPLETED, FAILED, CANCELLED)

_COLUMNS = (
    "seq, id, project, name, state, reason, command, gpu, nodes, ports, created_at, started_at, ended_at, exit_code, "
    "attempts, boot_id, backend, place"
)
LOCAL = "local"


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
    backend: str = LOCAL  # the engine that runs it, as listings name it
    place: str = ""  # where that is asked for it, as JSON; "": here

    @property
    def active(self) -> bool:
        """Neither completed, failed nor cancelled."""
        return self.state in ACTIVE

    def to_dict(self) -> dict[str, Any]:
        """The fields, JSON-able."""
        fields = self._asdict()
        del fields["boot_id"], fields["seq"], fields["place"]
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

    return write(insert)


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

    return write(change)


def forget(task_id: str) -> None:
    """Take a task out of the register: one that never came to be."""

    def delete(db: sqlite3.Connection) -> None:
        db.execute("DELETE FROM holds WHERE seq = (SELECT seq FROM tasks WHERE id = ?)", (task_id,))
        db.execute("DELETE FROM tasks WHERE id = ?", (task_id,))

    write(delete)


def remove(task_ids: Sequence[str]) -> None:
    """Take tasks that have ended out of the register, and remove their directories. Their logs and results go."""

    def delete(db: sqlite3.Connection) -> None:
        for task_id in task_ids:
            db.execute("DELETE FROM tasks WHERE id = ? AND state NOT IN ('pending', 'running')", (task_id,))

    write(delete)
    for task_id in task_ids:
        taskdir.remove_tree(taskdir.task_dir(task_id))


def _refuse_conflicts(db: sqlite3.Connection, row: TaskRow, depends_on: Sequence[str]) -> None:
    def alive(other: TaskRow) -> bool:
        return bool(other.place) or taskdir.is_held(taskdir.task_dir(other.id))

    active = "state IN ('pending', 'running')"
    for found in db.execute(
        f"SELECT {_COLUMNS} FROM tasks WHERE project = ? AND name = ? AND {active}", (row.project, row.name)
    ).fetchall():
        # A task that was sent here by a client with this very register has a row there as well.
        if alive(other := _row(found)) and row.id != f"{other.id}r":
            raise NameConflict(
                f"task {other.id} is {other.state} under the name {row.name!r}",
                hint="Choose another name, leave unique_name=True, or cancel that task first.",
            )
    if not row.ports:
        return
    for found in db.execute(f"SELECT {_COLUMNS} FROM tasks WHERE {active} AND ports != '[]'").fetchall():
        other = _row(found)
        taken = sorted(set(other.ports) & set(row.ports))
        if taken and other.id not in depends_on and other.place == row.place and alive(other):
            raise ResourceUnavailable(
                f"port {taken[0]} belongs to task {other.name} ({other.id}), which is {other.state}",
                hint=f"Choose another port, or cancel that task: flow cancel {other.id}",
            )


# -- reading -----------------------------------------------------------------------------------------------------------


def get(task_id: str) -> TaskRow:
    """The task of this id, as it really is now; `TaskNotFound` if there is none."""
    row = read(lambda db: db.execute(f"SELECT {_COLUMNS} FROM tasks WHERE id = ?", (task_id,)).fetchone())
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

    rows, names = read(select) or ([], [])
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


def elsewhere(project: str | None) -> list[TaskRow]:
    """The active tasks of the project (of all if None) that other places run."""
    query = f"SELECT {_COLUMNS} FROM tasks WHERE state IN ('pending', 'running') AND place != ''"
    values = () if project is None else (project,)
    rows = read(lambda db: db.execute(query + (" AND project = ?" if values else ""), values).fetchall())
    return [_row(row) for row in rows or ()]


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
    rows = read(lambda db: db.execute(query, (*conditions, size)).fetchall())
    return [_row(row) for row in rows or ()]


def settled(row: TaskRow) -> TaskRow:
    """`row`, unless it says active and its supervisor is gone: then what became of the task, which is written down."""
    directory = taskdir.task_dir(row.id)
    if not row.active or row.place or taskdir.is_held(directory):
        return row  # of tasks elsewhere the client finds out
    fresh = read(lambda db: db.execute(f"SELECT {_COLUMNS} FROM tasks WHERE id = ?", (row.id,)).fetchone())
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
        if row.state == PENDING:
            reason += " while it waited, and it has not begun"
    elif not os.path.isdir(directory):
        state, reason = FAILED, "its directory was removed"
    else:
        state, reason = FAILED, "its supervisor was killed"
    return {"state": state, "reason": reason, "ended_at": time.time()}


# -- rows --------------------------------------------------------------------------------------------------------------


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
            row.backend,
            row.place,
        ),
    )


def _row(values: Sequence[Any]) -> TaskRow:
    fields = list(values)
    fields[9] = tuple(json.loads(fields[9]))
    return TaskRow(*fields)
