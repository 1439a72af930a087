"""Several items of a map that travel together, and how the worker runs them."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

from . import items, outcomes, pickling, wire

if TYPE_CHECKING:
    from collections.abc import Callable

    from .worker import Worker

FLUSH_S = 0.01  # how long a result may wait for company


class Batch:
    """Items of one map, run one after another; results leave when the batch is done or has taken FLUSH_S."""

    def __init__(self, worker: Worker, frame: wire.Frame) -> None:
        self.worker = worker
        self.call = frame.call
        self.number = frame.arg
        self.star = frame.meta[:1] != b"1"  # whether an item is a tuple of arguments or the one argument
        self.watched = frame.flags & wire.WANT_BEGIN
        self.stops = frame.flags & wire.STOP
        if frame.flags & wire.HEARD:
            worker.stopped = False
        self.inputs = items.unpack(frame.flags, frame.meta[1:], frame.body, frame.buffers)
        self.results: list[Any] = []
        self.sent = 0
        self.lock = threading.Lock()
        self.started = self.flushed = self.item_started = time.perf_counter()
        self._reported = -1

    def run(self) -> None:
        worker, results, inputs = self.worker, self.results, [] if self.worker.stopped else self.inputs
        capture, plain = worker.capture, pickling.PLAIN
        try:
            function, shared = worker.function(self.number)
        except BaseException as error:
            function, shared = _raiser(error), {}
        clock = time.perf_counter
        star = self.star
        capture.begin(self.call)
        for index in range(len(inputs)):
            item = inputs[index]
            inputs[index] = None
            if type(item) is items.Packed:
                value: Any = self._general(function, shared, item)
            else:
                try:
                    value = function(*item, **shared) if star else function(item, **shared)
                    if type(value) not in plain:
                        value = items.Packed(outcomes.payload(outcomes.no_stream(worker.settle(value))))
                except BaseException as error:
                    if worker.forked:
                        outcomes.end_fork(error)
                    value = outcomes.failed(error)
            if worker.forked:
                outcomes.end_fork(None)
            capture.flush()
            results.append(value)
            if self.stops and type(value) is items.Packed and value.head:
                worker.stopped = True
                break
            if worker.recalled == self.call:
                break
            now = self.item_started = clock()
            if now - self.flushed > FLUSH_S:
                self.flush()
        self.flush(last=True)

    def _general(self, function: Callable[..., Any], shared: dict[str, Any], item: items.Packed) -> items.Packed:
        references: list[Any] = []
        try:
            argument, references = self.worker.arguments(item.payload.data, item.payload.buffers)
            item.payload = None  # type: ignore[assignment]
            args = argument if self.star else (argument,)
            argument = None
            value = outcomes.no_stream(self.worker.settle(function(*args, **shared)))
            args = ()
            if self.worker.forked:
                outcomes.end_fork(None)
            outcomes.finish(references, True)
            return items.Packed(outcomes.payload(value))
        except BaseException as error:
            if self.worker.forked:
                outcomes.end_fork(error)
            outcomes.finish(references, False)
            return outcomes.failed(error)

    def flush(self, *, last: bool = False) -> bool:
        """Send the results that were not sent yet, and which item runs now. False if there was nothing to say."""
        with self.lock:
            now = time.perf_counter()
            done = len(self.results)
            if done == self.sent and not last and (not self.watched or self._reported == done):
                return False
            self.worker.own_up()
            first, values = self.sent, self.results[self.sent : done]
            self.results[first:done] = [None] * (done - first)
            flags, table, body, buffers = items.pack(values)
            progress = items.PROGRESS.pack(done, now - self.item_started, now - self.started)
            self.worker.stream.send(
                wire.PART,
                call=self.call,
                arg=first,
                flags=flags | (wire.LAST if last else 0),
                meta=progress + table,
                body=body,
                buffers=buffers,
            )
            self.sent = self._reported = done
            self.flushed = now
            return True


def _raiser(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail
