"""`flow rm`."""

from __future__ import annotations

import time
from typing import Any

SUMMARY = "forget tasks that have ended, with their logs and results"
EXAMPLES = """\
  flow rm train                    one; what is active has to be cancelled first
  flow rm --older-than 30          all of the project that ended more than 30 days ago
"""


def add_arguments(parser: Any) -> None:
    parser.add_argument("task", nargs="*", help="ids, beginnings of ids, or names")
    parser.add_argument("--older-than", type=float, metavar="DAYS", help="all that ended more than DAYS days ago")
    parser.add_argument("--json", action="store_true", help="print the tasks that were removed, as JSON")


def run(args: Any) -> int:
    from flowfn.client import Flow
    from flowfn_runtime.errors import ValidationError

    from . import output

    if bool(args.task) == (args.older_than is not None):
        raise ValidationError("name tasks to forget, or give --older-than DAYS", hint="flow ps --all lists them.")
    client = Flow()
    if args.task:
        tasks = [client.get_task(name) for name in args.task]
    else:
        before = time.time() - args.older_than * 86400
        ended = client.list_tasks(status=["completed", "failed", "cancelled"], limit=None)
        tasks = [task for task in ended if (task.ended_at or task.created_at) < before]
    gone = [task.to_dict() for task in tasks]
    client.delete_tasks(*tasks)
    if args.json:
        output.print_json(gone)
    else:
        output.note(f"{len(tasks)} task{'' if len(tasks) == 1 else 's'} removed")
    return 0
