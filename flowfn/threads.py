"""Threads and conditions that Ctrl-C can't leave half-way.

An exception of a signal handler may come after any call in the main thread: one that has just taken a lock, and has
not yet come to the `try` that gives it back. Where flowfn's own threads would then wait for ever, these are used.
"""

from __future__ import annotations

import _thread
import operator
import sys
import threading
from collections.abc import Callable
from typing import Any

from flowfn_runtime.errors import BackendError

LOOK_S = 1.0


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


def _until_open(gate: threading.Lock) -> bool:
    """Take `gate`, whenever that is.

    A signal that the kernel hands to another thread, or that comes just before the main thread falls asleep, does not
    wake it: so the main thread looks up now and then, and Ctrl-C is late at worst.
    """
    if threading.get_ident() != threading.main_thread().ident:
        return gate.acquire()
    while not gate.acquire(True, LOOK_S):
        pass
    return True


class Condition(threading.Condition):
    """A condition on a reentrant lock, which is in order however `with` and `wait` are interrupted."""

    # `with` finds the lock's own methods here, in C: there is no moment between having the lock and knowing it.
    __enter__: Any = property(operator.attrgetter("_lock.__enter__"))
    __exit__: Any = property(operator.attrgetter("_lock.__exit__"))

    def __init__(self, lock: Any = None) -> None:
        super().__init__(lock or threading.RLock())

    def wait(self, timeout: float | None = None) -> bool:
        """As of `threading.Condition`; also after an exception the lock is held."""
        gate = threading.Lock()
        gate.acquire()
        self._waiters.append(gate)  # type: ignore[attr-defined]
        signalled = False
        late: BaseException | None = None
        try:
            self._lock.release()  # type: ignore[attr-defined]  # held once: nothing here enters it twice and waits
            signalled = _until_open(gate) if timeout is None else gate.acquire(True, max(0.0, timeout))
        finally:
            while not self._lock._is_owned():  # type: ignore[attr-defined]
                try:
                    self._lock.acquire()  # type: ignore[attr-defined]
                except BaseException as error:
                    late = error
            if not signalled and gate in self._waiters:  # type: ignore[attr-defined]
                self._waiters.remove(gate)  # type: ignore[attr-defined]
            if late is not None:
                raise late
        return signalled
