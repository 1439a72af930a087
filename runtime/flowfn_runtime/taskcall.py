"""Runs a call made durable, inside of the task's sandbox: `python -m flowfn_runtime.taskcall`.

The call's pickle is read from one inherited descriptor, its outcome written to another. What the function prints goes
to the task's log like the output of any command; so does the traceback of what it raises, and the exit code is 1 then,
or what `sys.exit` was told.
"""

from __future__ import annotations

import json
import os
import sys
import types
from typing import TYPE_CHECKING, Any

from . import callfile, exceptions, pickling
from .errors import SerializationError
from .tasknode import CALL_FD, RESULT_FD

if TYPE_CHECKING:
    from collections.abc import Callable


class FileFunction:
    """A function of a file, which travels as the file's source: what `invoke` runs."""

    def __init__(self, source: str, path: str, name: str, module: str, importable: bool) -> None:
        self.source = source
        self.path = path  # relative to the project if it is part of it, else absolute
        self.name = name
        self.module = module
        self.importable = importable  # whether the client can import the module by this name

    def load(self) -> Callable[..., Any]:
        """Run the file as a module, and return the function."""
        path = os.path.join(os.getcwd(), self.path)
        module = types.ModuleType(self.module)
        module.__file__ = path
        sys.modules[self.module] = module
        sys.path.insert(0, os.path.dirname(path))
        exec(compile(self.source, path, "exec"), module.__dict__)
        if not self.importable:
            import cloudpickle

            # What it defines is known to the client by value only.
            cloudpickle.register_pickle_by_value(module)
        function: Callable[..., Any] = getattr(module, self.name)
        return function


class StagedArgument:
    """Stands for an argument that is a URL: in the sandbox its data lies at `path`."""

    def __init__(self, url: str, path: str) -> None:
        self.url = url
        self.path = path

    def load(self) -> str:
        """The path, as a string that knows its URL."""
        from .data.references import File, StagedPath

        staged = StagedPath(self.path)
        staged.url = self.url
        staged._reference = File(self.url)
        return staged


def run(call_fd: int) -> tuple[bytes, pickling.Payload, int]:
    """Run the call in this file; its outcome, whatever happens, and an exit status."""
    references: list[Any] = []
    ok = False
    try:
        read = callfile.read(call_fd)
        if read is None:
            raise SerializationError("the call's file is damaged")
        try:
            (function, args, kwargs), references = pickling.loads(read[1], read[2])
        except Exception as error:
            raise SerializationError(
                f"the call can't be rebuilt in the task: {type(error).__name__}: {error}",
                hint="Are the modules that it needs installed, or part of the project?",
            ) from error
        for reference in references:
            reference.prepare()
        if isinstance(function, FileFunction):
            function = function.load()
        value = _settle(function(*map(_load, args), **{name: _load(value) for name, value in kwargs.items()}))
        outcome = callfile.VALUE, pickling.dumps(value), 0
        ok = True
    except BaseException as error:
        status = _status(error)
        if status is None:
            import traceback

            traceback.print_exc()
            status = 1
        # The frames of this module say nothing to the user.
        return callfile.ERROR, exceptions.dumps(error, skip_frames=1), status
    finally:
        for reference in references:
            reference.finish(ok)
    return outcome


def _status(error: BaseException) -> int | None:
    """The exit status that `sys.exit` was told, which prints no traceback; None for any other exception."""
    if not isinstance(error, SystemExit):
        return None
    if error.code is None or isinstance(error.code, int):
        return (error.code or 0) & 0xFF
    print(error.code, file=sys.stderr)
    return 1


def _load(value: Any) -> Any:
    return value.load() if isinstance(value, StagedArgument) else value


def _settle(value: Any) -> Any:
    """The value of a coroutine; of a generator all that it yields, as a list."""
    if isinstance(value, types.CoroutineType):
        import asyncio

        return asyncio.run(value)
    if isinstance(value, types.GeneratorType):
        return list(value)
    return value


def _descriptor(text: str, mode: int) -> int:
    """A descriptor that was inherited, or that of a file."""
    return int(text) if text.isdigit() else os.open(text, mode)


def main() -> None:
    """Entry point: take the descriptors from the environment, where the function must not find them."""
    call_fd = _descriptor(os.environ.pop(CALL_FD), os.O_RDONLY)
    result_fd = _descriptor(os.environ.pop(RESULT_FD), os.O_WRONLY)
    for fd in (call_fd, result_fd):
        os.set_inheritable(fd, False)
    known = json.loads(os.environ.pop("FLOW_CALL_PATH"))
    sys.path[:] = known + [entry for entry in sys.path if entry not in known]
    kind, payload, status = run(call_fd)
    try:
        callfile.write(result_fd, kind, payload)
    except OSError as error:
        print(f"flow: the result can't be written: {error}", file=sys.stderr)
        sys.exit(1)
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    sys.exit(status)


if __name__ == "__main__":
    main()
