"""One call: sent to a worker, its output forwarded, its outcome taken, tried again where that is due."""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from flowfn import terminal
from flowfn.clock import Timer, clock
from flowfn.pool import Ticket
from flowfn_runtime import exceptions, pickling, wire
from flowfn_runtime.errors import (
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
    from flowfn.remote_stream import RemoteStream
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
ending = threading.Lock()
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
        with ending:
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
        if not isinstance(outcome, Outcome) or not outcome.types:
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
        with ending:
            call.worker = None
        pool.release(worker)
        return Outcome(error=CallCancelled(f"{call.name} was cancelled"))
    started = False
    outcome: Outcome | RemoteStream | None
    try:
        started = start(call, worker)
        outcome = converse(call, worker, pool)
    except TYPE_ERRORS as error:
        outcome = lost(call, worker, error, started)
    if outcome is not None and not isinstance(outcome, Outcome):
        return outcome  # it gives the worker back
    with ending:
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
                from flowfn.remote_stream import RemoteStream

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
    with ending:
        if call.worker is worker:
            call.timed_out = True
            worker.kill()


def lost(call: Call, worker: Worker, error: BaseException, started: bool) -> Outcome | None:
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


def forget() -> None:
    """In a forked child: nobody holds the lock."""
    global ending
    ending = threading.Lock()
