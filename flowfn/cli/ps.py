"""`flow ps`."""

from __future__ import annotations

import time
from typing import Any

SUMMARY = "list tasks"
EXAMPLES = """\
  flow ps                          what is active, and the 20 newest
  flow ps --state failed           the newest that failed
  flow ps --all --json             every task of the project, for a program
"""


def add_arguments(parser: Any) -> None:
    parser.add_argument("--state", metavar="STATE", action="append", help="only tasks in this state; may be repeated")
    parser.add_argument("-n", "--limit", type=int, default=20, metavar="N", help="how many of the newest (default 20)")
    parser.add_argument("-a", "--all", action="store_true", help="without a limit")
    parser.add_argument("--json", action="store_true", help="as JSON")


def run(args: Any) -> int:
    from flowfn import config
    from flowfn_runtime import taskdb
    from flowfn_runtime.errors import ValidationError

    from . import output

    for state in args.state or ():
        if state not in taskdb.STATES:
            raise ValidationError(f"{state!r} is no state of a task", hint=f"The states: {', '.join(taskdb.STATES)}.")
    project = config.load().project
    if taskdb.elsewhere(project):
        from flowfn import places

        places.look(project)  # one question to each place that runs tasks of ours
    limit = None if args.all else args.limit
    rows = taskdb.list_tasks(project, states=args.state or (), limit=limit)
    if not args.state and not args.all:
        # However many came after it, what is active is shown.
        known = {row.id for row in rows}
        rows += [r for r in taskdb.list_tasks(project, states=taskdb.ACTIVE, limit=None) if r.id not in known]
    if args.json:
        output.print_json([row.to_dict() for row in rows])
        return 0
    output.table(
        ("TASK", "NAME", "STATE", "BACKEND", "GPU", "SUBMITTED", "RAN", "EXIT", "COMMAND"),
        [
            (
                *(row.id, row.name, row.state, row.backend, _gpu(row)),
                *(output.ago(row.created_at), _ran(row), row.exit_code, row.command),
            )
            for row in rows
        ],
        empty=f"project {project!r} has no tasks yet; start one: flow run 'echo hello'",
    )
    return 0


def _gpu(row: Any) -> str:
    return f"{row.nodes}x {row.gpu or 'cpu'}" if row.nodes > 1 else row.gpu


def _ran(row: Any) -> str:
    from .output import duration

    return "" if row.started_at is None else duration((row.ended_at or time.time()) - row.started_at)
