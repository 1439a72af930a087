"""`flow logs`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowfn.task import Task

SUMMARY = "show or follow what a task writes"
EXAMPLES = """\
  flow logs train                  all it wrote: stdout to stdout, stderr to stderr
  flow logs -f train               as it writes, until it ends; Ctrl-C stops the watching, not the task
  flow logs -n 20 --stderr train   the last 20 lines of stderr
  flow logs --node 3 train         of one node; without it, of all, each line marked with its rank
"""


def add_arguments(parser: Any) -> None:
    parser.add_argument("task", help="id, beginning of an id, or name")
    parser.add_argument("-f", "--follow", action="store_true", help="until the task ends")
    parser.add_argument("-n", "--tail", type=int, metavar="N", help="the last N lines (default: all)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--stdout", action="store_true", help="stdout only")
    which.add_argument("--stderr", action="store_true", help="stderr only")
    parser.add_argument("--node", type=int, metavar="RANK", help="of this node only")


def run(args: Any) -> int:
    from flowfn.task import Task

    task = Task.get(args.task)
    kinds = [False] if args.stdout else [True] if args.stderr else [False, True]
    nodes = [args.node] if args.node is not None else list(range(task.num_instances))
    if not args.follow:
        for node in nodes:
            for stderr in kinds:
                text = task.logs(False, args.tail, stderr, node=node)
                for line in text.splitlines(keepends=True):
                    write(node if len(nodes) > 1 else None, stderr and len(kinds) > 1, line)
        return 0
    try:
        show(task, tail=args.tail, nodes=nodes, kinds=kinds)
    except KeyboardInterrupt:
        goes_on(task)
        return 130
    return 0


def show(
    task: Task, *, tail: int | None = None, nodes: list[int] | None = None, kinds: list[bool] | None = None
) -> None:
    """Print the task's lines as they come, until it has ended."""
    several = len(nodes) > 1 if nodes is not None else task.num_instances > 1
    for node, stderr, line in task.follow(tail=tail, nodes=nodes):
        if kinds is None or stderr in kinds:
            write(node if several else None, stderr and kinds != [True], line)


def write(node: int | None, to_stderr: bool, line: str) -> None:
    """One line to where it belongs, marked with the node's rank if there are several."""
    stream = sys.stderr if to_stderr else sys.stdout
    stream.write(line if node is None else f"[{node}] {line}")
    stream.flush()


def goes_on(task: Task) -> None:
    """After Ctrl-C: say what goes on running."""
    from .output import note

    print(file=sys.stderr)
    if task.is_terminal:
        return
    note(f"task {task.name} goes on ({task.status}).")
    note(f"follow it: flow logs -f {task.name}   wait: flow wait {task.name}   end it: flow cancel {task.name}")
