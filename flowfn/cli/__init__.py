"""The `flow` command: one file a verb, and only the verb that was asked for is imported.

A verb's module has `SUMMARY`, `EXAMPLES`, `add_arguments(parser)` and `run(args) -> int`, which returns the exit code:

    0    done                         2    a mistake in what was asked for
    1    it failed                    3    there is no such task, volume, object or file
    124  the time given was up        4    the place or resource is not there
    130  Ctrl-C

`flow run` and `flow wait` exit with the task's own exit code once it has ended.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # importing `typing` would take longer than `flow --help` otherwise does

if TYPE_CHECKING:
    from typing import Any

# In the order of the help. The summaries are the verbs' own; a test compares.
VERBS = {
    "run": "run a command, a script, a function or a job file as a task",
    "ps": "list tasks",
    "status": "show a task",
    "logs": "show or follow what a task writes",
    "wait": "wait until tasks have ended",
    "result": "fetch what a task returned",
    "cancel": "end tasks, with all that they started",
    "rm": "forget tasks that have ended, with their logs and results",
    "dev": "open a shell in a task's environment",
    "shell": "open a shell inside of a running task",
    "volume": "create, list and delete volumes",
    "cache": "see and manage the host's cache of staged data",
    "data": "list, copy and read data at URLs",
    "gpus": "list this host's GPUs and who has them",
    "backends": "list where functions can run, what is there, and why not",
    "doctor": "say what this machine can do, what it lacks, and how to mend it",
    "init": "write a configuration file and a first job file",
    "completion": "print the completion script of a shell",
}
ALIASES = {"list": "ps", "ls": "ps", "ssh": "shell", "volumes": "volume", "log": "logs"}

FAILED, MISTAKE, NOT_FOUND, UNAVAILABLE, TIMED_OUT, INTERRUPTED = 1, 2, 3, 4, 124, 130

_HELP = """\
usage: flow <verb> [options]

Runs Python functions and commands on the machine that has the GPU and the data.

{verbs}

examples:
  flow run 'nvidia-smi' --gpu a100               one command, its output here
  flow run train.py --lr 0.1                     a script, with the project's files
  flow run process.py::analyze --path s3://b/x   a function, its value here
  flow run job.yaml                              what a job file says
  flow ps                                        what runs, and what ran
  flow logs -f train                             what it writes, as it writes it

`flow <verb> --help` shows a verb's options and examples. Exit codes: 0 done, 1 failed, 2 a mistake in the
command, 3 not found, 4 not available, 124 timed out, 130 Ctrl-C; `run` and `wait`: the task's own.
"""


def main(argv: list[str] | None = None) -> int:
    """Entry point of the `flow` command; returns the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        return _main(arguments)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has had enough. Python would complain once more when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except Exception as error:
        code = _explain(error)
        if code is None:
            raise
        return code


def _main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help(), end="")
        return 0 if arguments else MISTAKE
    first, *rest = arguments
    if first in ("-V", "--version"):
        from importlib.metadata import version

        print(f"flow {version('flowfn')}")
        return 0
    if first == "help":
        return _main([*rest[:1], "--help"])
    verb = ALIASES.get(first, first)
    if verb not in VERBS:
        from difflib import get_close_matches

        near = get_close_matches(first, [*VERBS, *ALIASES], 1)
        print(f"error: there is no verb {first!r}", file=sys.stderr)
        print(f"  hint: did you mean `flow {near[0]}`?" if near else "  hint: see flow --help", file=sys.stderr)
        return MISTAKE
    from importlib import import_module

    module = import_module(f"flowfn.cli.{verb}")
    code: int = module.run(parser_of(verb, module).parse_args(rest))
    return code


def _help() -> str:
    width = max(map(len, VERBS)) + 2
    return _HELP.format(verbs="\n".join(f"  {verb:{width}}{summary}" for verb, summary in VERBS.items()))


def parser_of(verb: str, module: Any) -> Any:
    """The argument parser of a verb."""
    import argparse

    parser = argparse.ArgumentParser(
        prog=f"flow {verb}",
        description=module.SUMMARY[0].upper() + module.SUMMARY[1:] + ".",
        epilog="examples:\n" + module.EXAMPLES.rstrip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    return parser


def _explain(error: Exception) -> int | None:
    """Say what a user can do something about, without a traceback; None for anything else."""
    from flowfn_runtime.errors import (
        BackendError,
        ConfigError,
        DataNotFound,
        FlowError,
        TaskNotFound,
        VolumeNotFound,
    )

    if os.environ.get("FLOW_DEBUG"):
        return None
    if isinstance(error, FlowError):
        print(f"error: {error}", file=sys.stderr)
        if isinstance(error, (TaskNotFound, VolumeNotFound, DataNotFound)):
            return NOT_FOUND
        if isinstance(error, ConfigError):
            return MISTAKE
        return UNAVAILABLE if isinstance(error, BackendError) else FAILED
    if isinstance(error, TimeoutError):
        print(f"error: {error}", file=sys.stderr)
        return TIMED_OUT
    return None
