"""`flow run`."""

from __future__ import annotations

import argparse
import ast
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowfn.task import Task

SUMMARY = "run a command, a script, a function or a job file as a task"
EXAMPLES = """\
  flow run 'nvidia-smi' --gpu a100                  a command: its output here, and its exit code
  flow run --gpu a100:4 --mount /data=s3://b/set train.py --lr 0.1
                                                    a script; what follows it are its own arguments
  flow run process.py::analyze --path s3://b/x.csv  a function: its value here; buckets' URLs become paths
  flow run job.yaml --dry-run                       what a job file says, checked only
  flow run --detach -n train 'python train.py'      started, and left to itself: flow logs -f train

Ctrl-C ends the watching, not the task.
"""


def add_arguments(parser: Any) -> None:
    from .taskopts import add_task_options

    add_task_options(parser)
    parser.add_argument("--detach", action="store_true", help="print the task's id and return")
    parser.add_argument("-d", "--dry-run", action="store_true", help="check everything, start nothing")
    parser.add_argument("--json", action="store_true", help="print the task as JSON, and don't follow it")
    parser.add_argument("what", metavar="WHAT", help="a command, script.py, script.py::function or job.yaml")
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="the command's or script's arguments")
    parser.set_defaults(parser=parser)


def run(args: Any) -> int:
    from flowfn.client import Flow, config_of, is_job_file

    from . import output, taskopts

    what, rest = args.what, args.rest
    script, _, function = what.partition("::")
    whole = is_job_file(what) or any(c.isspace() for c in what)
    if whole and rest:
        # Nothing can follow a job file or a quoted command but options of ours.
        args = args.parser.parse_args([*rest, what], namespace=args)
        if args.what != what:
            args.parser.error(f"unexpected argument: {args.what}")
    client = Flow()
    fields = taskopts.fields(args)
    if function and script.endswith(".py"):
        return _function(client, script, function, rest, fields, args)
    if whole:
        config = config_of(what, **fields)
    elif what.endswith(".py"):
        config = config_of(["python", _inside(what, fields), *rest], **fields)
    else:
        config = config_of([what, *(rest[1:] if rest[:1] == ["--"] else rest)], **fields)
    if args.dry_run:
        checked = client.check(config)
        if args.json:
            output.print_json(checked.model_dump(mode="json", exclude={"env"}, exclude_defaults=True))
        else:
            output.note("it would be accepted")
        return 0
    task = client.run(config)
    return _watch(task, args)


def _inside(script: str, fields: dict[str, Any]) -> str:
    """The script's path in the project, which is where the task starts."""
    from flowfn_runtime.errors import ValidationError

    root = os.path.abspath(os.path.expanduser(fields.get("code_root") or os.getcwd()))
    path = os.path.abspath(script)
    if not os.path.isfile(path):
        raise ValidationError(
            f"there is no file {script}", hint="To run a command of that name, quote it with a space."
        )
    inside = os.path.relpath(path, root)
    return path if inside.startswith("..") else inside


def _watch(task: Task, args: Any) -> int:
    from . import output
    from .logs import goes_on, show
    from .wait import ending, exit_code

    if args.json:
        output.print_json(task.to_dict())
        return 0
    if args.detach:
        print(task.task_id)
        output.note(f"task {task.name} goes on by itself; follow it: flow logs -f {task.name}")
        return 0
    output.note(f"task {task.name} ({task.task_id})")
    for port in task.to_dict()["ports"]:
        output.note(f"port {port}: {task.endpoint(port)}")
    if task.status == "pending" and task.reason:
        output.note(task.reason)
    try:
        show(task)
        task.wait()
    except KeyboardInterrupt:
        goes_on(task)
        return 130
    if task.status != "completed":
        output.note(ending(task))
    return exit_code(task)


def _function(client: Any, script: str, function: str, rest: list[str], fields: dict[str, Any], args: Any) -> int:
    from . import output
    from .logs import goes_on
    from .result import report, show

    positional, named = call_arguments(rest)
    task = client.invoke_async(script, function, positional, named, **fields)
    if args.detach or args.json:
        return _watch(task, args)
    output.note(f"task {task.name} ({task.task_id})")
    try:
        from .logs import show as show_logs

        show_logs(task, kinds=[False, True])
        value = task.result()
    except KeyboardInterrupt:
        goes_on(task)
        return 130
    except Exception as error:
        from flowfn_runtime.errors import FlowError

        # The task's own log, which was just shown, ends with the traceback.
        return report(error) if isinstance(error, (FlowError, TimeoutError)) else 1
    show(value, as_json=False)
    return 0


def call_arguments(words: list[str]) -> tuple[list[Any], dict[str, Any]]:
    """`3 --lr 0.1 --name=x --fast` as positional and named arguments. What is a Python literal is taken as one."""
    positional: list[Any] = []
    named: dict[str, Any] = {}
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        if not word.startswith("--") or word == "--":
            if word != "--":
                positional.append(_literal(word))
            continue
        name, equals, text = word[2:].partition("=")
        name = name.replace("-", "_")
        if equals:
            named[name] = _literal(text)
        elif position < len(words) and not words[position].startswith("--"):
            named[name] = _literal(words[position])
            position += 1
        else:
            named[name] = True
    return positional, named


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
