"""`flow status`."""

from __future__ import annotations

import time
from typing import Any

SUMMARY = "show a task"
EXAMPLES = """\
  flow status train                the newest task of that name
  flow status task_1f0c            by the beginning of its id
  flow status train --json         for a program
"""


def add_arguments(parser: Any) -> None:
    parser.add_argument("task", help="id, beginning of an id, or name")
    parser.add_argument("--json", action="store_true", help="as JSON")


def run(args: Any) -> int:
    from flowfn.task import Task
    from flowfn_runtime import taskdir

    from . import output

    task = Task.get(args.task)
    known = task.to_dict()
    if args.json:
        output.print_json(known)
        return 0
    spec = taskdir.read_json(taskdir.task_dir(task.task_id), "spec.json") or {}
    started, ended = known["started_at"], known["ended_at"]
    ran = None if started is None else output.duration((ended or time.time()) - started)
    output.fields(
        [
            ("task", known["id"]),
            ("name", known["name"]),
            ("project", known["project"]),
            ("state", known["state"] + (f" ({known['reason']})" if known["reason"] else "")),
            ("backend", known["backend"]),
            ("exit code", known["exit_code"]),
            ("command", known["command"]),
            ("gpu", known["gpu"]),
            ("nodes", known["nodes"] if known["nodes"] > 1 else None),
            ("submitted", output.date(known["created_at"])),
            ("started", output.date(started)),
            ("ended", output.date(ended)),
            ("ran", ran),
            ("attempts", known["attempts"] if known["attempts"] > 1 else None),
            ("mounts", ", ".join(f"{m['source']} at {m['target']}" for m in spec.get("mounts", []))),
            ("environment", ", ".join(spec.get("env", []))),
            ("endpoint", ", ".join(known["endpoints"].values())),
            ("directory", taskdir.task_dir(task.task_id)),
        ]
    )
    return 0
