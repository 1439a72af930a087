"""One call: sent to a worker, its output forwarded, its outcome taken, tried again where that is due."""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from flowfn import terminal, threads
from flowfn.clock import Timer, clock
from flowfn.pool import Ticket
from flowfn_runtime import exceptions, pickling, wire
from flowfn_runtime.errors import (
    BackendError,
    CallCancelled,
    FlowError,
    FunctionTimeout,
    OutOfMemory,
    ProtocolError,
    SerializationError,
    WorkerLost,
)
from flowfn_runtime.pickling import Payload

if TYPE_CHECKING:
    from flowfn.body import Version
    from flowfn.pool import Pool
    from flowfn.retries import Retries
    from flowfn.shared import Shared
    from flowfn.spec import FunctionSpec
    from flowfn.worker import Worker

MAX_LOSSES = 3  # a call that lost so many workers to kills from outside is given up
MAX_MISSES = 10  # and so is one that found so many workers dead before they had it
LOG_KEEP_BYTES = 1 << 19  # kept of each call's output: this much of the beginning and of the end
TYPE_ERRORS = (EOFError, ProtocolError)

_numbers = itertools.count(1)
# Held by who kills a call's worker, and by who gives it back: what is killed must not be another call's by then.
_ending = threading.Lock()
_run = os.urandom(4).hex()


class Outcome:
    """A value or an error, as it came: unpickled by whoever asks for it, not by the thread that received it."""

    __slots__ = ("_data", "_error", "_value", "seconds", "types")

    def __init__(
        self,
        *,
        data: Payload | None = None,
        error: BaseException | None = None,
        seconds: float = 0.0,
        own: bool = False,
    ) -> None:
        self._data = data
        self._error = error
        self._value: Any = None
        self.seconds = seconds  # that the function ran
        # What a retry policy looks at: empty unless the function itself failed.
        self.types: list[str] = exceptions.type_names(error) if own and error is not None else []

    @classmethod
    def of_error_frame(cls, head: bytes, payload: Payload) -> Outcome:
        """What an ERROR frame says."""
        outcome = cls(error=exceptions.loads(payload.data, payload.buffers))
        said = json.loads(head)
        outcome.types = said["types"] if said["origin"] == "function" else []
        return outcome

    def failed(self) -> BaseException | None:
        """The error, if the call ended with one; the value is not looked at."""
        return self._error

    def error(self) -> BaseException | None:
        """The error, if there is one. A value that can't be rebuilt is one."""
        data = self._data
        if data is not None:
            self._data = None
            try:
                self._value = pickling.loads(data.data, data.buffers, keep_classes=True)[0]
            except Exception as error:
                self._error = SerializationError(
                    f"the result can't be rebuilt here: {type(error).__name__}: {error}",
                    hint="are the modules of its types installed on this side?",
                )
                self._error.__cause__ = error
        return self._error

    def value(self) -> Any:
        """The value; raises the error."""
        error = self.error()
        if error is not None:
            raise error
        return self._value


class Call:
    """One invocation: what is sent, and what is known of it here."""

    __slots__ = ("attempt", "cancelled", "id", "logs", "losses", "misses", "name", "number", "payload", "retries",
                 "shared", "status", "ticket", "timed_out", "timeout", "version", "worker")  # fmt: skip

    def __init__(self, spec: FunctionSpec, name: str, version: Version, payload: Payload) -> None:
        self.number = next(_numbers) & 0xFFFFFFFF
        self.id = f"call-{_run}-{self.number}"
        self.name = name
        self.version = version
        self.payload = payload
        self.timeout = spec.timeout
        self.retries = spec.retries
        self.shared: Shared[Any] | None = None
        self.attempt = 0
        self.losses = 0
        self.misses = 0
        self.cancelled = False
        self.timed_out = False
        self.worker: Worker | None = None
        self.ticket: Ticket | None = None
        self.logs: Log | None = None
        self.status = "pending"

    def cancel(self) -> None:
        """Wherever it is: no longer wanted. A running one loses its worker."""
        self.cancelled = True
        with _ending:
            worker, ticket = self.worker, self.ticket
            if worker is not None:
                worker.kill()
        if worker is None and ticket is not None:
            ticket.open()


class Log:
    """What a call printed: the beginning and the end of it, if it is much."""

    __slots__ = ("_head", "_left_out", "_tail")

    def __init__(self) -> None:
        self._head = bytearray()
        self._tail = bytearray()
        self._left_out = 0

    def add(self, data: bytes) -> None:
        room = LOG_KEEP_BYTES - len(self._head)
        self._head += data[:room]
        self._tail += data[room:] if room > 0 else data
        if (excess := len(self._tail) - LOG_KEEP_BYTES) > 0:
            del self._tail[:excess]
            self._left_out += excess

    def text(self) -> str:
        middle = f"\n[... {self._left_out:,} bytes left out ...]\n".encode() if self._left_out else b""
        return (bytes(self._head) + middle + bytes(self._tail)).decode(errors="replace")


def retry_delay(types: list[str], attempt: int, retries: Retries | None, *, seed: object = "") -> float | None:
    """Seconds to wait before the next attempt after failure number `attempt`, or None: no further one."""
    if retries is None or attempt > retries.max_retries or not types:
        return None
    wanted = {f"{t.__module__}.{t.__qualname__}" for t in retries.on}
    return retries.delay(attempt, seed) if wanted.intersection(types) else None


class Pause(NamedTuple):
    """The call failed, and is to be executed again in so many seconds."""

    seconds: float


def execute(call: Call, pool: Pool, *, sleep: bool = True) -> Any:
    """Run the call to its end, in this thread: an Outcome, or a RemoteStream if the function generates values.

    Without `sleep` it may be a Pause: the caller has better things to do than to wait for the next attempt.
    """
    while True:
        try:
            outcome = _attempt(call, pool)
        except BaseException:  # Ctrl-C: nobody wants this call any more
            pool.reclaim(call)
            raise
        if outcome is None:  # its worker was lost before it started, or to a kill: once more
            continue
        if isinstance(outcome, RemoteStream) or not outcome.types:
            return outcome
        call.attempt += 1
        delay = retry_delay(outcome.types, call.attempt, call.retries, seed=call.id)
        if delay is None or call.cancelled:
            return outcome
        call.status = "pending"
        if not sleep and delay:
            return Pause(delay)
        time.sleep(delay)


def _attempt(call: Call, pool: Pool) -> Outcome | RemoteStream | None:
    """Have a worker run the call once. None: its worker was lost, and it is to be tried again."""
    call.ticket = None
    worker = pool.try_acquire(call)
    if worker is None:
        try:
            call.ticket = Ticket(call)
            worker = pool.acquire(call.ticket)
        except FlowError as error:
            return Outcome(error=error)
    call.worker = worker
    if call.cancelled:
        with _ending:
            call.worker = None
        pool.release(worker)
        return Outcome(error=CallCancelled(f"{call.name} was cancelled"))
    started = False
    outcome: Outcome | RemoteStream | None
    try:
        started = start(call, worker)
        outcome = converse(call, worker, pool)
    except TYPE_ERRORS as error:
        outcome = _lost(call, worker, error, started)
    if isinstance(outcome, RemoteStream):
        return outcome  # it gives the worker back
    with _ending:
        call.worker = None
    if call.logs is not None:
        terminal.end_output(call.number)
    if worker.broken:
        pool.discard(worker)
    else:
        pool.release(worker)
    return outcome


def start(call: Call, worker: Worker) -> bool:
    """Send the call. True: the worker has it."""
    worker.tidy()
    payload = call.payload
    flags = 0
    if payload.references:
        for reference in payload.references:
            if hasattr(reference, "on_drop"):
                worker.give(reference)
    if call.timeout is not None:
        flags = wire.WANT_BEGIN
    number = worker.function(call.version, call.shared)
    call.status = "running"
    worker.stream.send(wire.CALL, call=call.number, arg=number, flags=flags, body=payload.data, buffers=payload.buffers)
    return True


def converse(call: Call, worker: Worker, pool: Pool) -> Outcome | RemoteStream:
    """Hear what the worker says about the call until it has its outcome."""
    receive = worker.stream.receive
    timer: Timer | None = None
    try:
        while True:
            frame = receive()
            kind = frame.kind
            if kind == wire.RESULT:
                return Outcome(data=Payload(frame.body, frame.buffers, []), seconds=frame.arg / 1e6)
            if kind == wire.ERROR:
                return Outcome.of_error_frame(frame.meta, Payload(frame.body, frame.buffers, []))
            if kind == wire.LOG:
                hear(call, worker, frame)
            elif kind == wire.BEGIN and call.timeout is not None:
                timer = clock.later(call.timeout, lambda: _time_is_up(call, worker))
            elif kind == wire.STREAM:
                stream, timer = RemoteStream(call, worker, pool, timer), None
                return stream
    finally:
        if timer is not None:
            timer.cancel()


def hear(call: Call, worker: Worker, frame: wire.Frame) -> None:
    """A piece of output: kept, and shown."""
    if frame.call == call.number:
        if call.logs is None:
            call.logs = Log()
        call.logs.add(frame.body)
    terminal.show_output(call.name, frame.call, worker.label, frame.body, bool(frame.flags & wire.STDERR))


def _time_is_up(call: Call, worker: Worker) -> None:
    with _ending:
        if call.worker is worker:
            call.timed_out = True
            worker.kill()


def _lost(call: Call, worker: Worker, error: BaseException, started: bool) -> Outcome | None:
    """The outcome of a call whose worker is gone; None: it is to be tried again."""
    lost, by_itself = worker.lost(error)
    for flags, text in zip((0, wire.STDERR), worker.last_words, strict=True):
        if text:
            hear(call, worker, wire.Frame(wire.LOG, flags, call.number, 0, b"", text.encode(), []))
    if call.cancelled:
        return Outcome(error=CallCancelled(f"{call.name} was cancelled"))
    if call.timed_out:
        call.timed_out = False
        timeout = FunctionTimeout(
            f"{call.name} ran longer than its timeout of {call.timeout:g} s ({worker.label})",
            hint="give it more with timeout=, or less to do",
        )
        return Outcome(error=timeout, own=True)
    if worker.leaving:
        return Outcome(error=CallCancelled(f"flowfn was shut down while {call.name} ran"))
    if not started and not isinstance(lost, OutOfMemory):  # it was gone before it had the call
        call.misses += 1
        return None if call.misses < MAX_MISSES else Outcome(error=lost)
    call.losses += 1
    if by_itself or call.losses >= MAX_LOSSES:
        return Outcome(error=lost_for_good(lost, call.name, call.losses, by_itself), own=by_itself)
    return None


def lost_for_good(lost: WorkerLost, name: str, losses: int, by_itself: bool) -> WorkerLost:
    """The error of a call that is given up, which says how often it was tried."""
    if not by_itself and 1 < losses <= MAX_LOSSES:  # a stream's count is above: it is tried once
        lost.args = (f"{lost.message}; {name} was tried {losses} times and lost its worker each time",)
    return lost


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
        except TYPE_ERRORS as error:
            call.losses = MAX_LOSSES  # what was yielded can't be taken back, so it is not tried again
            outcome = _lost(call, worker, error, True)
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
        except TYPE_ERRORS:
            worker.broken = True
        finally:
            kill.cancel()
            self._give_back()

    def _give_back(self) -> None:
        worker = self._worker
        if self._timer is not None:
            self._timer.cancel()
        with _ending:
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


def forget() -> None:
    """In a forked child: nobody holds the lock."""
    global _ending
    _ending = threading.Lock()


STREAM_CREDIT = 8  # half of what the worker may be ahead
