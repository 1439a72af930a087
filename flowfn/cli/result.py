"""`flow result`."""

from __future__ import annotations

import sys
from typing import Any

SUMMARY = "fetch what a task returned"
EXAMPLES = """\
  flow result analyze              wait until it has ended, and print the value
  flow result analyze --json       as JSON, where the value can be written so
  flow result analyze -o out.pkl   as a pickle, into a file
"""


def add_arguments(parser: Any) -> None:
    parser.add_argument("task", help="id, beginning of an id, or name")
    parser.add_argument("-o", "--output", metavar="FILE", help="write the value there, as a pickle")
    parser.add_argument("--timeout", type=float, metavar="S", help="seconds to wait at most (default: no limit)")
    parser.add_argument("--json", action="store_true", help="as JSON")


def run(args: Any) -> int:
    from flowfn.task import Task

    from .logs import goes_on

    task = Task.get(args.task)
    try:
        value = task.result(args.timeout)
    except KeyboardInterrupt:
        goes_on(task)
        return 130
    except Exception as error:
        return report(error)
    if args.output:
        import cloudpickle

        with open(args.output, "wb") as file:
            cloudpickle.dump(value, file)
    else:
        show(value, as_json=args.json)
    return 0


def show(value: Any, *, as_json: bool) -> None:
    """Print a value: its repr, or JSON."""
    if as_json:
        from . import output

        output.print_json(value)
    elif value is not None:
        print(value if isinstance(value, str) else repr(value))


def report(error: Exception) -> int:
    """What a call raised, with its remote traceback: it is the function's failure, so it is shown as Python would."""
    from flowfn_runtime.errors import FlowError

    if isinstance(error, (FlowError, TimeoutError)):
        raise error
    import traceback

    traceback.print_exception(type(error), error, error.__traceback__, file=sys.stderr)
    return 1
