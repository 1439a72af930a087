"""`flow dev`."""

from __future__ import annotations

from typing import Any

SUMMARY = "open a shell in a task's environment"
EXAMPLES = """\
  flow dev                                  the project's files at /workspace, a filesystem of its own
  flow dev --gpu a100 --mount s3://b/data   with a GPU and data at /data
  flow dev -c 'python -m pytest'            one command instead of a shell; its exit code is ours

/var/lib/docker persists between shells of a project.
"""


def add_arguments(parser: Any) -> None:
    from .taskopts import add_task_options

    parser.add_argument("-c", "--command", metavar="COMMAND", help="run this instead of an interactive shell")
    add_task_options(parser)


def run(args: Any) -> int:
    from flowfn.client import Flow

    from . import taskopts

    return Flow().dev(args.command, **taskopts.fields(args))
