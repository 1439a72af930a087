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
from flowfn import terminal, threads
from flowfn.clock import clock
from flowfn.courier import Chunk, Courier, Item
from flowfn_runtime import items, wire
from flowfn_runtime.errors import BackendError
from flowfn_runtime.pickling import PLAIN

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
        self.lock = threading.RLock()
        self.wake_puller = threads.Condition(self.lock)
        self.wake_couriers = threads.Condition(self.lock)
        self.wake_consumer = threads.Condition(self.lock)
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
        self.error: BaseException | None = None  # of the map itself: no worker could be had
        self.source_error: BaseException | None = None
        self.couriers = 0
        self.idle_couriers = 0
        self.puller_waits = False
        self.consumer_waits = False
        self.active: dict[Worker, deque[Chunk]] = {}
        self.bytes_seen = self.items_seen = 0
        self.misses = 0  # how often in a row a worker was gone before it had its items
        self.progress = terminal.Progress(name, total)
        threads.start(self.pull)

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
                self.source_error = error  # raised where the next result would be
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
                    try:
                        threads.start(Courier(self).run)  # which waits for the lock that is held here
                        self.couriers += 1
                    except BackendError as error:
                        if not self.couriers:  # nobody will ever take anything
                            self.error = error
                            return -1
            while not self.closed and self.stop_at is None and pulled - self.consumed >= self.window:
                self.puller_waits = True
                self.wake_puller.wait()
            self.puller_waits = False
            if self.closed or self.stop_at is not None:
                return -1
            return self.consumed + self.window

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
            for chunk in list(chunks):  # its courier adds to it without the lock
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
                    error, self.source_error = self.source_error, None
                    if error is not None and not self.closed:
                        raise error
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
                while values and not self.closed:
                    result = values.pop()
                    self.consumed += 1
                    if self.puller_waits and self.pulled - self.consumed <= self.window - max(1, self.window // 8):
                        with self.lock:
                            self.wake_puller.notify()
                    yield result if type(result) in PLAIN else self.value(result)
                    del result
        except GeneratorExit:
            self.close_soon()
            raise
        except BaseException:
            self.close()
            raise
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
            self.shared = None  # couriers that are under way have it themselves
            self.pending.clear()
            self.singles.clear()
            self.wake_puller.notify_all()
            self.wake_couriers.notify_all()
            self.wake_consumer.notify_all()
            if any(self.active.values()):
                self.recall()
                try:
                    clock.later(GRACE_S, self.kill_active)
                except BackendError:
                    pass  # the interpreter ends, and all workers with it
        self.progress.close()

    def close_soon(self) -> None:
        """Close in another thread: the garbage collector may be at work here, in a thread that holds our locks."""
        if not self.closed:
            try:
                threads.start(self.close)
            except BackendError:
                pass  # the interpreter ends, and all workers with it

    def kill_active(self) -> None:
        with self.lock:  # what it kills has not been given back, and is nobody else's
            for worker in self.active:
                worker.kill()


class Guard:
    """Closes a run when nobody holds an iterator over it any more."""

    __slots__ = ("run",)

    def __init__(self, run: Run) -> None:
        self.run = run

    def __del__(self) -> None:
        self.run.close_soon()


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
