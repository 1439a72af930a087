"""Couriers: each takes items of a map to a worker, brings results back, and decides what a failure means."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from flowfn import call as calls
from flowfn import terminal
from flowfn.clock import Timer, clock
from flowfn_runtime import items, wire
from flowfn_runtime.errors import CallCancelled, FunctionTimeout, OutOfMemory
from flowfn_runtime.pickling import PLAIN, dumps

if TYPE_CHECKING:
    from flowfn.map import Run
    from flowfn.worker import Worker

SLOW_S = 0.05  # of a batch that takes longer, a worker gets the next only when it is done with it


class Item:
    """An input that travels alone, because it was tried before."""

    __slots__ = ("attempt", "index", "losses", "value")

    def __init__(self, index: int, value: Any, attempt: int, losses: int) -> None:
        self.index = index
        self.value = value
        self.attempt = attempt
        self.losses = losses


class Chunk:
    """Consecutive inputs that travel together."""

    __slots__ = ("attempt", "done", "first", "losses", "number", "values")

    def __init__(self, first: int, values: list[Any], attempt: int = 0, losses: int = 0) -> None:
        self.first = first
        self.values = values
        self.attempt = attempt
        self.losses = losses
        self.done = 0
        self.number = next(calls._numbers) & 0xFFFFFFFF


class Courier:
    """Takes items of one run to one worker at a time, and brings results back."""

    def __init__(self, run: Run) -> None:
        self.of = run
        self.worker: Worker | None = None
        self.shared = run.shared
        self.chunks: deque[Chunk] = deque()
        self.timer: Timer | None = None
        self.timed_out = False
        self.watched = 0  # how often the timer was set
        self.item_s = 0.0
        self.plain = True
        self.heard = True  # what failed so far, which the worker has not been told yet

    def run(self) -> None:
        run = self.of
        try:
            while self.step():
                pass
        except BaseException as error:
            with run.lock:
                run.error = run.error or error
        finally:
            if self.worker is not None:
                self.leave()
            with run.lock:
                run.couriers -= 1
                run.wake_couriers.notify_all()
                run.wake_consumer.notify_all()

    def step(self) -> bool:
        """Give the worker something to do, or hear one thing from it. False: there is nothing left."""
        run = self.of
        if not self.chunks:
            if self.worker is not None and (run.pool.waited_for or not run.pending):
                self.leave()
            chunk = run.take(wait=True)
            if chunk is None:
                return False
            if self.worker is None:
                try:
                    self.worker = run.pool.acquire()
                except BaseException:
                    with run.lock:
                        run.requeue(chunk)
                    raise
                self.heard = True
                with run.lock:
                    run.active[self.worker] = self.chunks
            self.give(chunk)
        elif len(self.chunks) < 2 and self.item_s * run.size < SLOW_S and not run.pool.waited_for:
            more = run.take(wait=False)
            if more is not None:
                self.give(more)
        if self.chunks:
            assert self.worker is not None
            try:
                self.hear(self.worker.stream.receive())
            except calls.TYPE_ERRORS as error:
                self.lost(error)
        return True

    def leave(self) -> None:
        """Give the worker back."""
        run, worker = self.of, self.worker
        assert worker is not None
        self.worker = None
        with run.lock:
            run.active.pop(worker, None)
        worker.ahead = 0
        try:
            worker.stream.send(wire.END)
        except EOFError:
            worker.broken = True
        run.pool.release(worker)

    def give(self, chunk: Chunk) -> None:
        """Send a chunk."""
        run, worker = self.of, self.worker
        assert worker is not None
        self.chunks.append(chunk)
        packed = self.pack(chunk)
        if run.closed or not chunk.values:
            self.chunks.pop()
            return
        flags, table, body, buffers = items.pack(packed, plain=self.plain)
        flags |= wire.AHEAD
        if run.spec.timeout is not None:
            flags |= wire.WANT_BEGIN
        if not run.return_exceptions:
            flags |= wire.STOP
        if self.heard:
            flags |= wire.HEARD
            self.heard = False
        meta = (b"*" if run.star else b"1") + table
        try:
            worker.tidy()
            number = worker.function(run.version, self.shared)
            worker.stream.send(
                wire.BATCH, call=chunk.number, arg=number, flags=flags, meta=meta, body=body, buffers=buffers
            )
        except calls.TYPE_ERRORS as error:
            self.lost(error, begun=len(self.chunks) > 1)
            return
        worker.ahead = wire.AHEAD
        if len(self.chunks) == 1:
            self.watch(0.0, silent=True)
        with run.lock:
            run.bytes_seen += len(body) + sum(map(len, buffers))
        if not self.plain and any(value.payload.references for value in packed):
            self.stage_next()

    def pack(self, chunk: Chunk) -> list[Any]:
        """The chunk's values as they travel. One that can't be pickled fails here and leaves the chunk."""
        run = self.of
        star = run.star
        if star:
            plain = all(type(v) is tuple and PLAIN.issuperset(map(type, v)) for v in chunk.values)
        else:
            plain = PLAIN.issuperset(map(type, chunk.values))
        self.plain = plain
        if plain:
            return chunk.values
        packed: list[Any] = []
        for offset, value in enumerate(chunk.values):
            try:
                payload = dumps(tuple(value) if star else value)
                if payload.references:
                    self.give_objects(payload.references)
                packed.append(items.Packed(payload))
            except Exception as error:
                with run.lock:
                    # What comes after it goes by other chunks.
                    rest = Chunk(chunk.first + offset + 1, chunk.values[offset + 1 :], chunk.attempt, chunk.losses)
                    if run.return_exceptions:
                        run.requeue(rest)
                    run.fail(chunk.first + offset, calls.Outcome(error=error))
                del chunk.values[offset:]
                break
        return packed

    def give_objects(self, references: list[Any]) -> None:
        assert self.worker is not None
        for reference in references:
            if hasattr(reference, "on_drop"):
                self.worker.give(reference)

    def stage_next(self) -> None:
        """While the worker computes, let it stage what the next input refers to."""
        value = self.of.peek()
        if value is None or self.worker is None:
            return
        try:
            payload = dumps(value)
            if payload.references:
                self.worker.stream.send(wire.STAGE, flags=wire.AHEAD, body=payload.data, buffers=payload.buffers)
        except Exception:
            pass  # it will be seen when it is this input's turn

    def hear(self, frame: wire.Frame) -> None:
        run, worker = self.of, self.worker
        assert worker is not None
        if frame.kind == wire.LOG:
            terminal.show_output(run.name, frame.call, worker.label, frame.body, bool(frame.flags & wire.STDERR))
            return
        if frame.kind != wire.PART or frame.call != self.chunks[0].number:
            return
        chunk = self.chunks[0]
        _running, item_s, batch_s = items.PROGRESS.unpack_from(frame.meta)
        values = items.unpack(frame.flags, frame.meta[items.PROGRESS.size :], frame.body, frame.buffers)
        first = frame.arg
        chunk.done = first + len(values)
        last = frame.flags & wire.LAST
        with run.lock:
            self.deliver(chunk, first, values)
            if last:
                self.chunks.popleft()
                if chunk.done:
                    self.item_s = batch_s / chunk.done
                    size = len(frame.body) + sum(map(len, frame.buffers))
                    run.learn(self.item_s, size, chunk.done)
                if chunk.done < len(chunk.values) and not run.closed:
                    run.requeue(chunk)
                elif not run.active_elsewhere():
                    run.wake_couriers.notify_all()
        run.progress.update(len(values))
        if last and self.chunks:
            self.watch(0.0, silent=True)
        else:
            self.watch(item_s, silent=False, stop=bool(last))

    def deliver(self, chunk: Chunk, first: int, values: list[Any]) -> None:
        """Hand results over; what failed is tried again or ends the map (with the run's lock held)."""
        run = self.of
        start = 0
        for offset, value in enumerate(values):
            if type(value) is items.Packed and value.head:
                if offset > start:
                    run.put(chunk.first + first + start, values[start:offset])
                self.heard = True
                start = offset + 1
                at = first + offset
                item = Item(chunk.first + at, chunk.values[at], chunk.attempt, chunk.losses)
                run.finish_item(item, calls.Outcome.of_error_frame(value.head, value.payload))
        if start < len(values):
            run.put(chunk.first + first + start, values[start:] if start else values)

    # timeouts and losses

    def watch(self, item_s: float, *, silent: bool, stop: bool = False) -> None:
        """Set the time at which the item that runs now is too late. `silent`: the worker has not said when it began."""
        timeout = self.of.spec.timeout
        if timeout is None:
            return
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        with self.of.lock:
            self.watched += 1  # who is found late from now on is found so too late
        if not stop:
            worker, number = self.worker, self.watched
            seconds = max(0.0, timeout - item_s) + (1.0 if silent else 0.0)
            self.timer = clock.later(seconds, lambda: self.late(worker, number))

    def late(self, worker: Worker | None, number: int) -> None:
        with self.of.lock:
            if self.watched == number and worker is not None:
                self.timed_out = True
                worker.kill()

    def lost(self, error: BaseException, *, begun: bool = True) -> None:
        """The worker is gone: decide for each of its items. Unless `begun`, it was gone before it had any."""
        run, worker = self.of, self.worker
        assert worker is not None
        if self.timer is not None:
            self.timer.cancel()
        with run.lock:
            self.watched += 1
        lost, by_itself = worker.lost(error)
        begun = begun or isinstance(lost, OutOfMemory)
        for stderr, text in enumerate(worker.last_words):
            if text and self.chunks:
                terminal.show_output(run.name, self.chunks[0].number, worker.label, text.encode(), bool(stderr))
        self.worker = None
        timed_out, self.timed_out = self.timed_out, False
        with run.lock:
            run.active.pop(worker, None)
            chunks = list(self.chunks)
            self.chunks.clear()
            if run.closed or not chunks:
                chunks = []
            for chunk in chunks[1:]:  # not begun
                run.requeue(chunk)
            if chunks and (begun or worker.leaving):
                run.misses = 0
                self.blame(chunks[0], lost, by_itself, timed_out, worker)
            elif chunks:
                run.misses += 1
                if run.misses < calls.MAX_MISSES * run.workers:
                    run.requeue(chunks[0])
                else:
                    for index in range(chunks[0].first, chunks[0].first + len(chunks[0].values)):
                        run.fail(index, calls.Outcome(error=lost))
        run.pool.discard(worker)

    def blame(self, chunk: Chunk, lost: Any, by_itself: bool, timed_out: bool, worker: Worker) -> None:
        """The chunk that ran when its worker ended (with the run's lock held)."""
        run = self.of
        at = chunk.done
        if at >= len(chunk.values):
            return
        item = Item(chunk.first + at, chunk.values[at], chunk.attempt, chunk.losses + 1)
        if timed_out:
            late = FunctionTimeout(
                f"item {item.index} of {run.name} ran longer than its timeout of {run.spec.timeout:g} s",
                hint="give it more with timeout=, or less to do",
            )
            chunk.done += 1
            run.requeue(chunk)
            run.finish_item(item, calls.Outcome(error=late, own=True))
        elif worker.leaving:
            run.fail(item.index, calls.Outcome(error=CallCancelled("flowfn was shut down during the map")))
        elif len(chunk.values) - at > 1:
            run.requeue(chunk, losses=0 if by_itself else 1)  # one of these: each alone will show which
        elif by_itself:
            run.finish_item(item, calls.Outcome(error=lost, own=True))
        elif item.losses >= calls.MAX_LOSSES:
            error = calls.lost_for_good(lost, f"item {item.index} of {run.name}", item.losses, by_itself)
            run.fail(item.index, calls.Outcome(error=error))
        else:
            run.requeue(chunk, losses=1)
