"""Threads that wait for workers in place of the caller: one for each future of a pool, up to as many as workers."""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING

from flowfn import threads
from flowfn_runtime.errors import BackendError, CallCancelled

if TYPE_CHECKING:
    from collections.abc import Callable

    Job = Callable[[], Callable[[], object] | None]  # what it returns tells of its end

IDLE_S = 30.0


class Helpers:
    """The helper threads of one pool. All methods may be called from any thread."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._lock = threading.Lock()
        self._jobs: deque[Job] = deque()
        self._ready = threading.Condition(self._lock)
        self._count = 0
        self._idle = 0
        self._busy = 0
        self._telling: set[int] = set()  # threads that tell of a call's end, callbacks of its future included
        self._told = threading.Condition(self._lock)
        self._closed = False

    def run_later(self, job: Job) -> None:
        """Run `job` in a helper thread, and then what it returns. There are never more than `most`; the rest waits."""
        with self._lock:
            if self._closed:
                raise CallCancelled("the pool was shut down")
            if self._idle > len(self._jobs):
                self._jobs.append(job)
                self._ready.notify()
                return
            if self._count < self.most:
                try:
                    threads.start(self._run)  # which waits for the lock that is held here
                    self._count += 1
                except BackendError:
                    if not self._count:
                        raise
            self._jobs.append(job)

    @property
    def unfinished(self) -> int:
        """How many calls of futures are not done."""
        return len(self._jobs) + self._busy

    def wait_until_told(self) -> None:
        """Return when the callbacks of all futures that are done have run."""
        with self._lock:
            while self._telling:
                self._told.wait()

    def in_callback(self) -> bool:
        """Whether a future's callback asks, which holds up others if it waits."""
        return threading.get_ident() in self._telling

    def close(self) -> None:
        """No more jobs come: threads end when they have none."""
        with self._lock:
            self._closed = True
            self._ready.notify_all()

    def _run(self) -> None:
        me = threading.get_ident()
        while True:
            with self._lock:
                if me in self._telling:
                    self._telling.remove(me)
                    self._told.notify_all()
                while not self._jobs:
                    self._idle += 1
                    signalled = self._ready.wait(IDLE_S)
                    self._idle -= 1
                    if not self._jobs and (self._closed or not signalled):
                        self._count -= 1
                        return
                job = self._jobs.popleft()
                self._busy += 1
            tell = job()
            del job  # it holds a call's arguments
            with self._lock:
                self._busy -= 1  # before anybody can see that the call is done
                if tell is not None:
                    self._telling.add(me)
            if tell is not None:
                tell()
                del tell
