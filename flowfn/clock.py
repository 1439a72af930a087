"""Things to do later: one thread for all timeouts, retries and idle workers of this process."""

from __future__ import annotations

import heapq
import sys
import threading
import time
from collections.abc import Callable

from flowfn import threads


class Timer:
    """Something to be done at a time; `cancel` takes it back."""

    __slots__ = ("action", "when")

    def __init__(self, when: float, action: Callable[[], object] | None) -> None:
        self.when = when
        self.action = action

    def __lt__(self, other: Timer) -> bool:
        return self.when < other.when

    def cancel(self) -> None:
        self.action = None


class Clock:
    """Runs short actions at their time. The thread starts with the first."""

    def __init__(self) -> None:
        self._heap: list[Timer] = []
        self._lock = threading.Lock()  # `with` on it can't be left half-way by Ctrl-C; on a Condition it can
        self._condition = threading.Condition(self._lock)
        self._started = False

    def later(self, delay: float, action: Callable[[], object]) -> Timer:
        """Do `action` in `delay` seconds, in the clock's thread. It must not block."""
        timer = Timer(time.monotonic() + delay, action)
        with self._lock:
            heapq.heappush(self._heap, timer)
            if not self._started:
                threads.start(self._run)
                self._started = True
            elif self._heap[0] is timer:
                self._condition.notify()
        return timer

    def _run(self) -> None:
        while True:
            with self._lock:
                while True:
                    while self._heap and self._heap[0].action is None:
                        heapq.heappop(self._heap)
                    wait = self._heap[0].when - time.monotonic() if self._heap else None
                    if wait is not None and wait <= 0:
                        break
                    self._condition.wait(wait)
                action = heapq.heappop(self._heap).action
            if action is not None:
                try:
                    action()
                except Exception:  # all time limits hang on this thread
                    sys.excepthook(*sys.exc_info())
            del action  # it holds what it acts on


clock = Clock()


def forget() -> None:
    """In a forked child: the thread is the parent's."""
    clock.__init__()  # type: ignore[misc]
