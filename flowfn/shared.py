"""`flow.put`: a large object that travels once to each worker process, or is shared memory of all on one host."""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from flowfn_runtime import pickling, wire
from flowfn_runtime.pickling import Payload

if TYPE_CHECKING:
    from flowfn.worker import Worker
    from flowfn_runtime.shm import Segment

T = TypeVar("T")
_numbers = itertools.count(1)


class Shared(Generic[T]):
    """A reference to an object that was put. Passed to a call, in any place of its arguments, it arrives as the object.

    The object was copied when it was put: later changes of it are not seen by calls. Arrays in it arrive read-only.
    `get()` returns the object here.
    """

    def __init__(self, value: T, payload: Payload) -> None:
        self.key = f"{os.getpid()}-{next(_numbers)}"
        self._value = value
        self._number = int(self.key.rpartition("-")[2])
        self._lock = threading.Lock()
        self._segment: Segment | None = None
        self._entries: list[tuple[int, int]] = []
        self._payload = payload
        self.size_bytes = payload.size_bytes
        self.references = [r for r in payload.references if isinstance(r, Shared)]  # of what was put before, in this
        self._snapshot()

    def get(self) -> T:
        """The object itself."""
        return self._value

    def _snapshot(self) -> None:
        """Copy what was put, so that nobody changes it: into shared memory if the platform has it."""
        payload = self._payload
        if self.size_bytes >= 1 << 17 and hasattr(os, "memfd_create"):
            from flowfn_runtime import shm

            parts = [payload.data, *payload.buffers]
            try:
                self._segment = shm.Segment(shm.EVERYBODY | self._number, max(1, shm.padded_bytes(parts)))
            except OSError:
                pass
            else:
                self._entries = self._segment.fill(parts)
                view = memoryview(self._segment.map).toreadonly()
                data, *buffers = [view[at - 1 : at - 1 + size] for size, at in self._entries]
                self._payload = Payload(data, buffers, payload.references)
                return
        self._payload = Payload(bytes(payload.data), [bytes(b) for b in payload.buffers], payload.references)

    def send(self, stream: wire.Stream, flags: int) -> None:
        """Send the object to a worker that does not have it."""
        meta = self.key.encode()
        if self._segment is not None and stream.arena is not None:
            stream.send_shared(wire.OBJECT, flags, meta, self._segment, self._entries)
        else:
            stream.send(wire.OBJECT, flags=flags, meta=meta, body=self._payload.data, buffers=self._payload.buffers)

    def on_drop(self, worker: Worker) -> None:
        """When this reference is gone, the worker need not keep the object."""
        weakref.finalize(self, _drop, weakref.ref(worker), self.key).atexit = False

    def __reduce__(self) -> Any:
        pickling.note_reference(self)
        return pickling.shared_object, (self.key,)

    def __repr__(self) -> str:
        return f"<Shared {type(self._value).__qualname__}, {self.size_bytes:,} bytes>"


def _drop(worker: weakref.ref[Worker], key: str) -> None:
    if (alive := worker()) is not None:
        alive.drop(key)


def put(value: T) -> Shared[T]:
    """Copy a large object once, to be used by many calls; pass the reference that is returned in its place.

    On this machine all workers share one copy of its arrays, read-only; elsewhere it travels once to each worker.
    Raises SerializationError if the object can't be pickled.
    """
    return Shared(value, pickling.dumps(value))
