"""`flow shell`."""

from __future__ import annotations

from typing import Any

SUMMARY = "open a shell inside of a running task"
EXAMPLES = """\
  flow shell train                     among its processes, with its files and mounts
  flow shell train -c 'nvidia-smi'     one command; its exit code is ours
  flow shell train --node 3            in one of several nodes
"""


def add_arguments(parser: Any) -> None:
    parser.add_argument("task", help="id, beginning of an id, or name")
    parser.add_argument("-c", "--command", metavar="COMMAND", help="run this instead of an interactive shell")
    parser.add_argument("--node", type=int, default=0, metavar="RANK", help="the node to enter (default 0)")


def run(args: Any) -> int:
    from flowfn.task import Task

    return Task.get(args.task).shell(args.command, args.node)
