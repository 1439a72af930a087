"""Threads that flowfn starts: they never keep the program from ending, and starting one can't leave half of one."""

from __future__ import annotations

import _thread
import sys
import threading
from collections.abc import Callable

from flowfn_runtime.errors import BackendError


def start(target: Callable[[], object]) -> None:
    """Run `target` in a thread of its own. Raises BackendError if there can be no more threads.

    Not `threading.Thread(...).start()`: that waits for the thread, so Ctrl-C finds it there with nobody knowing
    whether there is a thread, and a call of it by the garbage collector while the interpreter ends waits for ever.
    """
    try:
        _thread.start_new_thread(_run, (target,))
    except RuntimeError as error:  # too many, or the interpreter is ending
        raise BackendError(f"no thread could be started: {error}", hint="is there a limit (ulimit -u)?") from error


def _run(target: Callable[[], object]) -> None:
    trace = threading.gettrace()  # debuggers, and the measurement of coverage
    if trace is not None:
        sys.settrace(trace)
    target()
