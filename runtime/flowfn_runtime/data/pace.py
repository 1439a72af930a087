"""How many requests to have under way at once: as many as help. Decisions only; the clock's readings are handed in."""

from __future__ import annotations

MOST_THREADS = 64
MOST_SMALL_THREADS = 32  # each of which has several requests under way
_SMALL_BYTES = 1 << 20
_LOOK_EVERY_S = 0.02
# How much faster it has to get when the number of threads doubles, and how long to leave it alone if it does not.
_GAIN = 1.15
_HOLD_S = 1.0


class Pace:
    """Doubles the threads of a transfer as long as that makes it faster and the processor has time for them.

    A server next door is busy with a few, and more only get into each other's way; one that is far away takes dozens.
    `mean_bytes` is the size of the objects: small ones are the interpreter's work, of which there is one, and large
    ones the kernel's, which has all processors.
    """

    def __init__(self, mean_bytes: float, *, now: float, used: float) -> None:
        small = mean_bytes < _SMALL_BYTES
        self.first = 1 if small else 4
        self._most = MOST_SMALL_THREADS if small else MOST_THREADS
        # The part of a processor that may be busy while we still count as waiting for the network.
        self._idle_below = 0.6 if small else 1.0
        self._then, self._used, self._done = now, used, 0
        self._before: float | None = None  # how fast it was before the threads were doubled
        self._hold_until = now
        self._hold = _HOLD_S
        self._grown = False

    def due(self, now: float) -> bool:
        """Whether it is worth asking `more`."""
        return now - self._then >= _LOOK_EVERY_S

    def more(self, *, now: float, used: float, done: int, threads: int, queued: int) -> int:
        """How many threads to add. `used`: processor seconds so far; `done`: requests; `queued`: those not begun."""
        elapsed, count = now - self._then, done - self._done
        # New connections take a moment to be of use: judge them by two requests each.
        if elapsed < _LOOK_EVERY_S or count < (2 * threads if self._grown else threads):
            return 0
        rate = count / elapsed
        idle = (used - self._used) / elapsed < self._idle_below
        self._then, self._used, self._done = now, used, done
        before, self._before = self._before, None
        if before is not None and rate < _GAIN * before:
            self._hold_until = now + self._hold
            self._hold *= 2
        if not idle or now < self._hold_until:
            return 0
        self._before, self._grown = rate, True
        return max(0, min(threads, self._most - threads, queued))
