"""Future: the handle of a call that runs elsewhere."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Generator
from typing import TYPE_CHECKING, Any, TypeVar

from flowfn import threads
from flowfn_runtime.errors import CallCancelled

if TYPE_CHECKING:
    from flowfn.call import Call, Outcome
    from flowfn.remote_stream import RemoteStream

R = TypeVar("R")
_base = concurrent.futures._base


class Future(concurrent.futures.Future[R]):
    """A `concurrent.futures.Future` of a call, which can be awaited as well.

    `wait`, `as_completed` and `asyncio.wrap_future` take it. `result(timeout)` returns the value or raises what the
    function raised; `cancel()` also ends a call that runs already, by ending its worker.
    """

    def __init__(self, call: Call) -> None:
        super().__init__()
        self._condition = threads.Condition()
        self._call = call

    @property
    def call_id(self) -> str:
        """The call's id, as in logs."""
        return self._call.id

    @property
    def status(self) -> str:
        """`pending`, `running`, `completed`, `failed` or `cancelled`."""
        if self.cancelled():
            return "cancelled"
        if self.done():
            return "failed" if self.exception() is not None else "completed"
        return self._call.status

    def logs(self) -> str:
        """What the call printed so far, both streams as they came; the middle is left out if it is very much."""
        return self._call.logs.text() if self._call.logs is not None else ""

    def cancel(self) -> bool:
        """Give the call up. A running one is ended with its worker. False if it was done already."""
        with self._condition:
            if self._state == _base.FINISHED:
                return False
            if self._state in (_base.CANCELLED, _base.CANCELLED_AND_NOTIFIED):
                return True
            for waiter in self._waiters:  # now, and not when a thread gets to it, as they wait for that
                waiter.add_cancelled(self)
            self._state = _base.CANCELLED_AND_NOTIFIED
            self._condition.notify_all()
        self._call.cancel()
        self._invoke_callbacks()  # type: ignore[attr-defined]
        return True

    # The outcome is unpickled when it is first asked for, by whoever asks.

    def result(self, timeout: float | None = None) -> R:
        """The value; raises the function's exception, `TimeoutError` after `timeout` seconds, or `CancelledError`."""
        outcome: Any = super().result(timeout)
        try:
            value: R = outcome.value()
            return value
        finally:
            del self, outcome  # no reference cycle through the traceback

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """The function's exception, None if it returned; raises as `result` does if there is none yet."""
        error = super().exception(timeout)
        if error is not None:
            return error
        outcome: Any = super().result(0)
        unreadable: BaseException | None = outcome.error()
        return unreadable

    def __await__(self) -> Generator[Any, None, R]:
        import asyncio

        return asyncio.wrap_future(self).__await__()

    # What the pool's threads say.

    def _start(self) -> bool:
        """The call is about to run, for the first time or once more. False if it was cancelled before."""
        with self._condition:
            if self._state in (_base.CANCELLED, _base.CANCELLED_AND_NOTIFIED):
                return False
            self._state = _base.RUNNING
            return True

    def _finish(self, outcome: Outcome | RemoteStream) -> None:
        """The call is done."""
        failed = outcome.failed()
        if isinstance(failed, CallCancelled):
            self.cancel()
            return
        try:
            if failed is None:
                self.set_result(outcome)  # type: ignore[arg-type]
            else:
                self.set_exception(failed)
        except concurrent.futures.InvalidStateError:
            pass  # cancelled meanwhile
