"""The streaming map: inputs pulled lazily, run in batches on all workers of a pool, results as soon as they may.

Three kinds of threads work on one `Run`: a *puller* takes inputs while there is room in the window, *couriers*, one for
each worker in use, take items to it and results back, and the *consumer* is whoever iterates. Batches are sized by how
long an item takes, so that tiny items cost little and long ones are spread well.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from flowfn import call as calls
from flowfn import terminal
from flowfn.clock import Timer, clock
from flowfn_runtime import items, wire
from flowfn_runtime.errors import CallCancelled, FunctionTimeout
from flowfn_runtime.pickling import PLAIN, dumps

if TYPE_CHECKING:
    from flowfn.body import Body
    from flowfn.pool import Pool
    from flowfn.shared import Shared
    from flowfn.spec import FunctionSpec
    from flowfn.worker import Worker

R = TypeVar("R")

BATCH_S = 0.01  # about how long a batch takes
BATCH_ITEMS = 4096  # the most items of a batch
WINDOW_ITEMS = 32768  # the most items under way, where the user does not say
WINDOW_BYTES = 1 << 28  # about as many bytes of inputs and results under way, where the user does not say
GRACE_S = 0.5  # how long a batch that nobody wants may go on before its worker is ended
SLOW_S = 0.05  # from here on, a worker gets its next item only when it is done with the last


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


def batch_size(current: int, item_s: float, window: int, workers: int) -> int:
    """How many items the next batch takes: as fit into BATCH_S, growing fourfold at most, and a share of the window."""
    wanted = int(BATCH_S / max(item_s, 1e-9))
    return max(1, min(wanted, current * 4, BATCH_ITEMS, window // (2 * workers) or 1))


class Run:
    """A map that is under way: what the threads share, under one lock."""

    def __init__(
        self,
        pool: Pool,
        spec: FunctionSpec,
        name: str,
        body: Body,
        source: Iterable[Any],
        *,
        star: bool,
        shared: Shared[Any] | None,
        window: int | None,
        ordered: bool,
        return_exceptions: bool,
        total: int | None,
    ) -> None:
        self.pool, self.spec, self.name, self.star, self.shared = pool, spec, name, star, shared
        self.version = body.current()
        self.source: Iterator[Any] | None = iter(source)
        self.ordered, self.return_exceptions = ordered, return_exceptions
        self.workers = pool.max_workers
        self.fixed_window = window
        self.window = window if window is not None else max(16, 4 * self.workers)
        self.size = 1  # items a batch
        self.lock = threading.Lock()
        self.wake_puller = threading.Condition(self.lock)
        self.wake_couriers = threading.Condition(self.lock)
        self.wake_consumer = threading.Condition(self.lock)
        self.pending: deque[Any] = deque()
        self.singles: deque[Item] = deque()
        self.pulled = 0  # inputs taken from the source
        self.taken = 0  # of these, how many couriers took from `pending`
        self.consumed = 0
        self.delayed = 0  # items that wait for their next attempt
        self.ready: dict[int, list[Any]] = {}  # index of the first: results
        self.ready_unordered: deque[list[Any]] = deque()
        self.delivered = 0
        self.exhausted = False
        self.closed = False
        self.stop_at: int | None = None  # no result from this index on is wanted
        self.error: BaseException | None = None  # of the map itself: the source raised, no worker could be had
        self.couriers = 0
        self.idle_couriers = 0
        self.puller_waits = False
        self.consumer_waits = False
        self.active: dict[Worker, deque[Chunk]] = {}
        self.bytes_seen = self.items_seen = 0
        self.progress = terminal.Progress(name, total)
        threading.Thread(target=self.pull, name="flowfn-pull", daemon=True).start()

    # the puller

    def pull(self) -> None:
        """Take inputs while there is room."""
        pending = self.pending
        append = pending.append
        pulled = 0
        source, self.source = self.source, None
        try:
            limit = self.window
            for value in source:  # type: ignore[union-attr]
                append(value)
                pulled += 1
                self.pulled = pulled
                if self.idle_couriers or self.couriers < self.workers or pulled >= limit:
                    limit = self.make_room(pulled)
                    if limit < 0:
                        return
        except BaseException as error:
            with self.lock:
                self.error_at(pulled, error)
        finally:
            close = getattr(source, "close", None)
            with self.lock:
                self.exhausted = True
                self.wake_couriers.notify_all()
                self.wake_consumer.notify_all()
            if self.closed and close is not None:
                try:
                    close()
                except Exception:
                    pass

    def make_room(self, pulled: int) -> int:
        """See that what was pulled is taken; wait while the window is full. The index to come back at; -1: stop."""
        with self.lock:
            if self.pending:
                if self.idle_couriers:
                    self.wake_couriers.notify()
                elif self.couriers < self.workers:
                    self.couriers += 1
                    threading.Thread(target=Courier(self).run, name="flowfn-courier", daemon=True).start()
            while not self.closed and self.stop_at is None and pulled - self.consumed >= self.window:
                self.puller_waits = True
                self.wake_puller.wait()
            self.puller_waits = False
            if self.closed or self.stop_at is not None:
                return -1
            return self.consumed + self.window

    def error_at(self, index: int, error: BaseException) -> None:
        """The source raised: that is raised where the next result would be."""
        if self.return_exceptions or not self.ordered:
            self.error = error
        else:
            self.put(index, [calls.Outcome(error=error)])
            self.stop_at = index if self.stop_at is None else min(self.stop_at, index)

    # for couriers; those marked (locked) are called with the lock held

    def take(self, *, wait: bool) -> Chunk | None:
        """The next items to run; None: there are none (now, or with `wait`, ever)."""
        with self.lock:
            while True:
                if self.closed or self.error is not None:
                    return None
                if self.singles:
                    item = self.singles.popleft()
                    if self.stop_at is None or item.index < self.stop_at:
                        return Chunk(item.index, [item.value], item.attempt, item.losses)
                    continue
                if self.stop_at is not None and self.taken >= self.stop_at:
                    self.pending.clear()
                count = len(self.pending)
                if count and (wait or self.exhausted or count >= self.size // 2):
                    size = self.size
                    if self.exhausted or self.puller_waits:
                        size = min(size, -(-count // (2 * max(1, self.couriers))))
                    popleft = self.pending.popleft
                    values = [popleft() for _ in range(min(size, count))]
                    first, self.taken = self.taken, self.taken + len(values)
                    return Chunk(first, values)
                if not wait or (self.exhausted and not self.delayed and not self.active_elsewhere()):
                    return None
                self.idle_couriers += 1
                self.wake_couriers.wait()
                self.idle_couriers -= 1

    def active_elsewhere(self) -> bool:
        """Whether items that others run may come back to be run again (locked)."""
        return any(self.active.values())

    def peek(self) -> Any:
        """The input that comes next, if there is one."""
        with self.lock:
            return self.pending[0] if self.pending else None

    def requeue(self, chunk: Chunk, *, losses: int = 0) -> None:
        """Items that a worker did not finish are run again, each by itself (locked)."""
        for offset in range(chunk.done, len(chunk.values)):
            item = Item(chunk.first + offset, chunk.values[offset], chunk.attempt, chunk.losses + losses)
            self.singles.append(item)
        self.wake_couriers.notify_all()

    def put(self, first: int, values: list[Any]) -> None:
        """Results, from index `first` on (locked)."""
        self.delivered += len(values)
        if self.ordered:
            self.ready[first] = values
        else:
            self.ready_unordered.append(values)
        if self.consumer_waits:
            self.wake_consumer.notify()

    def fail(self, index: int, outcome: calls.Outcome) -> None:
        """An item failed for good (locked)."""
        self.put(index, [outcome])
        if not self.return_exceptions:
            self.stop_at = index if self.stop_at is None else min(self.stop_at, index)
            self.wake_couriers.notify_all()
            self.wake_puller.notify_all()
            self.recall()

    def finish_item(self, item: Item, outcome: calls.Outcome) -> None:
        """An item failed: it gets another attempt, or that is its result (locked)."""
        attempt = item.attempt + 1
        delay = calls.retry_delay(outcome.types, attempt, self.spec.retries, seed=f"{self.name}-{item.index}")
        if delay is None or self.closed:
            self.fail(item.index, outcome)
            return
        self.delayed += 1
        again = Item(item.index, item.value, attempt, item.losses)
        clock.later(delay, lambda: self.retry(again))

    def retry(self, item: Item) -> None:
        with self.lock:
            self.delayed -= 1
            self.singles.append(item)
            self.wake_couriers.notify_all()

    def learn(self, item_s: float, size_bytes: int, count: int) -> None:
        """Size batches and window by what was seen (locked)."""
        self.items_seen += count
        self.bytes_seen += size_bytes
        if self.fixed_window is None:
            each = self.bytes_seen / max(1, self.items_seen)
            room = int(WINDOW_BYTES / max(each, 1.0))
            wanted = max(4 * self.workers, 16, self.size * self.workers * 4)
            self.window = max(2 * self.workers, min(wanted, WINDOW_ITEMS, room))
        self.size = batch_size(self.size, item_s, self.window, self.workers)

    def recall(self) -> None:
        """Tell the workers to leave what they have not begun, if none of it is wanted (locked)."""
        for worker, chunks in self.active.items():
            for chunk in chunks:
                if self.closed or (self.stop_at is not None and chunk.first > self.stop_at):
                    try:
                        worker.stream.send(wire.RECALL, call=chunk.number, flags=wire.AHEAD)
                    except EOFError:
                        pass

    # for the consumer

    def results(self) -> list[Any] | None:
        """The next results; None at the end."""
        with self.lock:
            while True:
                if self.ordered:
                    values = self.ready.pop(self.consumed, None)
                else:
                    values = self.ready_unordered.popleft() if self.ready_unordered else None
                if values is not None:
                    return values
                if self.error is not None:
                    raise self.error
                if self.closed or (self.exhausted and self.consumed >= self.pulled):
                    return None
                self.consumer_waits = True
                try:
                    self.wake_consumer.wait()
                finally:
                    self.consumer_waits = False

    def value(self, result: Any) -> Any:
        """What the consumer gets for a result: the value, or what is raised."""
        kind = type(result)
        if kind is items.Packed:
            result = calls.Outcome(data=result.payload)
        elif kind is not calls.Outcome:
            return result
        error = result.error()
        if error is None:
            return result.value()
        if self.return_exceptions:
            return error
        raise error

    def iterate(self, guard: Guard) -> Iterator[Any]:
        """The results one by one; ends what is under way when the iteration ends, however it ends.

        `guard` lives as long as the iterator, started or not.
        """
        try:
            while (values := self.results()) is not None:
                values.reverse()
                while values:
                    result = values.pop()
                    self.consumed += 1
                    if self.puller_waits and self.pulled - self.consumed <= self.window - max(1, self.window // 8):
                        with self.lock:
                            self.wake_puller.notify()
                    yield result if type(result) in PLAIN else self.value(result)
                    del result
        finally:
            self.close()

    async def iterate_async(self, guard: Guard) -> AsyncIterator[Any]:
        import asyncio

        loop = asyncio.get_running_loop()
        source, end = self.iterate(guard), object()
        try:
            while (value := await loop.run_in_executor(None, next, source, end)) is not end:
                yield value
        finally:
            self.close()

    def close(self) -> None:
        """Nobody wants more: stop pulling, drop what is queued, end what runs if it does not end soon."""
        with self.lock:
            if self.closed:
                return
            self.closed = True
            self.pending.clear()
            self.singles.clear()
            self.wake_puller.notify_all()
            self.wake_couriers.notify_all()
            self.wake_consumer.notify_all()
            if any(self.active.values()):
                self.recall()
                clock.later(GRACE_S, self.kill_active)
        self.progress.close()

    def kill_active(self) -> None:
        for worker in list(self.active):
            worker.kill()


class Courier:
    """Takes items of one run to one worker at a time, and brings results back."""

    def __init__(self, run: Run) -> None:
        self.of = run
        self.worker: Worker | None = None
        self.chunks: deque[Chunk] = deque()
        self.timer: Timer | None = None
        self.timed_out = False
        self.item_s = 0.0
        self.plain = True

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
        meta = (b"*" if run.star else b"1") + table
        try:
            worker.tidy()
            number = worker.function(run.version, run.shared)
            worker.stream.send(
                wire.BATCH, call=chunk.number, arg=number, flags=flags, meta=meta, body=body, buffers=buffers
            )
        except calls.TYPE_ERRORS as error:
            self.lost(error)
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
        if not stop:
            worker = self.worker
            self.timer = clock.later(max(0.0, timeout - item_s) + (1.0 if silent else 0.0), lambda: self.late(worker))

    def late(self, worker: Worker | None) -> None:
        self.timed_out = True
        if worker is not None:
            worker.kill()

    def lost(self, error: BaseException) -> None:
        """The worker is gone: decide for each of its items."""
        run, worker = self.of, self.worker
        assert worker is not None
        if self.timer is not None:
            self.timer.cancel()
        lost, by_itself = worker.lost(error)
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
            if chunks:
                self.blame(chunks[0], lost, by_itself, timed_out, worker)
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


class Guard:
    """Closes a run when nobody holds an iterator over it any more."""

    __slots__ = ("run",)

    def __init__(self, run: Run) -> None:
        self.run = run

    def __del__(self) -> None:
        self.run.close()


class Map(Generic[R]):
    """The results of a map, as an iterator: use it in `for` or `async for`.

    `close()` cancels what is left, and so does dropping the last iterator.
    """

    def __init__(self, run: Run) -> None:
        self._guard = Guard(run)
        self._results = run.iterate(self._guard)

    def __iter__(self) -> Iterator[R]:
        return self._results

    def __next__(self) -> R:
        value: R = next(self._results)
        return value

    def __aiter__(self) -> AsyncIterator[R]:
        return self._guard.run.iterate_async(self._guard)

    def close(self) -> None:
        """Cancel what is queued and running."""
        self._guard.run.close()
