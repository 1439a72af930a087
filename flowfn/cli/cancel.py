"""`flow cancel`."""

from __future__ import annotations

from typing import Any

SUMMARY = "end tasks, with all that they started"
EXAMPLES = """\
  flow cancel train                SIGTERM to all its processes, SIGKILL ten seconds later
  flow cancel task_1f task_20      several
  flow cancel --all                every active task of the project
"""


def add_arguments(parser: Any) -> None:
    parser.add_argument("task", nargs="*", help="ids, beginnings of ids, or names")
    parser.add_argument("--all", action="store_true", help="every active task of the project")
    parser.add_argument("--no-wait", action="store_true", help="don't wait until they have ended")
    parser.add_argument("--json", action="store_true", help="print the tasks, as JSON")


def run(args: Any) -> int:
    from flowfn.client import Flow
    from flowfn.task import Task
    from flowfn_runtime.errors import ValidationError
    from flowfn_runtime.taskdb import ACTIVE

    from . import output

    if bool(args.task) == args.all:
        raise ValidationError("name tasks to cancel, or give --all", hint="flow ps lists them.")
    tasks = Flow().list_tasks(status=ACTIVE, limit=None) if args.all else [Task.get(name) for name in args.task]
    ended = [task for task in tasks if task.is_terminal]
    for task in tasks:
        task.cancel()
    if not args.no_wait:
        for task in tasks:
            task.wait()
    if args.json:
        output.print_json([task.to_dict() for task in tasks])
    else:
        for task in tasks:
            output.note(
                f"task {task.name} had ended before: {task.status}"
                if task in ended
                else f"task {task.name}: {task.status}"
            )
    return 0
