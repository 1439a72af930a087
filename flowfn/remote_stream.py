"""The values of a generator function, taken from its worker one by one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flowfn import call as calls
from flowfn import terminal, threads
from flowfn.call import Call, Outcome, hear, lost
from flowfn.clock import Timer, clock
from flowfn_runtime import wire
from flowfn_runtime.errors import BackendError
from flowfn_runtime.pickling import Payload

if TYPE_CHECKING:
    from flowfn.pool import Pool
    from flowfn.worker import Worker

STREAM_CREDIT = 8  # half of what the worker may be ahead


class RemoteStream:
    """What a generator function's `.remote()` returns: an iterator over the values as they are made.

    The function is never more than a few values ahead of who takes them. `close()`, or leaving the loop and dropping
    the iterator, ends the function. It can be used in `async for` as well.
    """

    def __init__(self, call: Call, worker: Worker, pool: Pool, timer: Timer | None) -> None:
        self._call = call
        self._worker: Worker | None = worker
        self._pool = pool
        self._timer = timer
        self._taken = 0

    def failed(self) -> None:
        """As of an Outcome: it did not fail, so far."""

    def error(self) -> None:
        """As of an Outcome."""

    def value(self) -> RemoteStream:
        """As of an Outcome."""
        return self

    def __iter__(self) -> RemoteStream:
        return self

    def __next__(self) -> Any:
        worker, call = self._worker, self._call
        if worker is None or worker.owner is not call:
            raise StopIteration
        try:
            outcome = self._receive(worker)
        except calls.TYPE_ERRORS as error:
            call.losses = calls.MAX_LOSSES  # what was yielded can't be taken back, so it is not tried again
            outcome = lost(call, worker, error, True)
            self._give_back()
        except BaseException:  # Ctrl-C: nobody knows how much was read
            worker.kill()
            self._give_back()
            raise
        if outcome is None:
            raise StopIteration
        return outcome.value()

    def _receive(self, worker: Worker) -> Outcome | None:
        """The next value, or the error with which the function ended; None: it has returned."""
        call = self._call
        while True:
            frame = worker.stream.receive()
            if frame.kind == wire.YIELD:
                self._taken += 1
                if self._taken >= STREAM_CREDIT:
                    worker.stream.send(wire.CREDIT, call=call.number, arg=self._taken)
                    self._taken = 0
                return Outcome(data=Payload(frame.body, frame.buffers, []))
            if frame.kind == wire.LOG:
                hear(call, worker, frame)
            elif frame.kind == wire.RESULT:
                self._give_back()
                return None
            elif frame.kind == wire.ERROR:
                self._give_back()
                return Outcome.of_error_frame(frame.meta, Payload(frame.body, frame.buffers, []))

    def close(self) -> None:
        """End the function, if it has not ended; the values that are left are dropped."""
        worker = self._worker
        if worker is None or worker.owner is not self._call:
            return
        # It may be busy with its next value for long: it gets a moment to end by itself.
        kill = clock.later(1.0, worker.kill)
        try:
            worker.stream.send(wire.CLOSE, call=self._call.number)
            while worker.stream.receive().kind not in (wire.RESULT, wire.ERROR):
                pass
        except calls.TYPE_ERRORS:
            worker.broken = True
        finally:
            kill.cancel()
            self._give_back()

    def _give_back(self) -> None:
        worker = self._worker
        if self._timer is not None:
            self._timer.cancel()
        with calls.ending:
            self._call.worker = None
        if self._call.logs is not None:
            terminal.end_output(self._call.number)
        if worker is not None and worker.owner is self._call:  # if not, it was given back, and Ctrl-C came then
            self._pool.release(worker)
        self._worker = None

    def __del__(self) -> None:
        worker = getattr(self, "_worker", None)
        if worker is not None and worker.leaving:  # it was ended already
            worker.close()
        elif worker is not None:
            try:
                threads.start(self.close)  # not here: this may be the garbage collector, in any thread
            except BackendError:
                pass  # the interpreter ends, and the worker with it

    def __aiter__(self) -> RemoteStream:
        return self

    async def __anext__(self) -> Any:
        import asyncio

        end = object()
        value = await asyncio.get_running_loop().run_in_executor(None, next, self, end)
        if value is end:
            raise StopAsyncIteration
        return value
