"""`flow wait`."""

from __future__ import annotations

import time
from typing import Any

SUMMARY = "wait until tasks have ended"
EXAMPLES = """\
  flow wait train && flow run evaluate.py       go on if it completed
  flow wait stage-1 stage-2                     several; the exit code is the first one that is not 0
  flow wait train --timeout 600                 for ten minutes at most; then exit code 124
"""


def add_arguments(parser: Any) -> None:
    parser.add_argument("task", nargs="+", help="ids, beginnings of ids, or names")
    parser.add_argument("--timeout", type=float, metavar="S", help="seconds to wait at most (default: no limit)")
    parser.add_argument("--json", action="store_true", help="print the tasks as they ended, as JSON")


def run(args: Any) -> int:
    from flowfn.task import Task

    from . import output
    from .logs import goes_on

    tasks = [Task.get(name) for name in args.task]
    deadline = None if args.timeout is None else time.monotonic() + args.timeout
    for task in tasks:
        try:
            task.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
        except KeyboardInterrupt:
            goes_on(task)
            return 130
    if args.json:
        output.print_json([task.to_dict() for task in tasks])
    else:
        for task in tasks:
            output.note(ending(task))
    return next((code for code in map(exit_code, tasks) if code), 0)


def ending(task: Any) -> str:
    """How a task ended, in a line."""
    reason = f": {task.reason}" if task.reason else ""
    ran = "" if task.started_at is None else f" after {_duration(task)}"
    return f"task {task.name} {task.status}{ran}{reason}"


def _duration(task: Any) -> str:
    from .output import duration

    return duration(task.ended_at - task.started_at)


def exit_code(task: Any) -> int:
    """The task's exit code as ours: 1 where it ended badly without one."""
    if task.status == "completed":
        return 0
    return task.exit_code or 1
