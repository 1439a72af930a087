"""Writing what arrives, in pieces of a size that the kernel's memory is good for.

The kernel takes memory for a file in pieces as large as the write. Large ones cost a fifth less of the processor, where
they are to be had: where memory is in small pieces, or comes from a virtual machine's host page by page, they take up
to three times as long as small ones (measured on ext4 of Linux 6.18).
"""

from __future__ import annotations

import os
import time

LARGE_BYTES = 512 << 10  # writes of a mebibyte each take twice the processor time of these
SMALL_BYTES = 32 << 10
# A byte's time of the processor. Writes that take longer than this have to look for memory, and do not only copy.
_DEAR_S = 1e-3 / (1 << 20)
_TOLD_BYTES = 256 << 10  # shorter ones tell nothing
_WEIGHT = 0.1  # of the last write in the mean


class Writer:
    """Writes for all threads of a transfer; turns to small pieces if large ones turn out to be dear."""

    def __init__(self) -> None:
        self.at_once = LARGE_BYTES
        self._mean_s = 0.0  # for a byte

    def write(self, fd: int, piece: memoryview, position: int) -> None:
        """Write `piece` at `position`, all of it."""
        size, started = len(piece), time.thread_time()
        write_all(fd, piece, position, self.at_once)
        if size >= _TOLD_BYTES:
            self.learn(size, time.thread_time() - started)

    def learn(self, size: int, used_s: float) -> None:
        """So many bytes took so much of the processor."""
        self._mean_s += _WEIGHT * (used_s / size - self._mean_s)
        if self._mean_s > _DEAR_S:
            self.at_once = SMALL_BYTES


def write_all(fd: int, piece: memoryview, position: int, at_once: int = LARGE_BYTES) -> None:
    """Write `piece` at `position`, all of it, at most so many bytes at a time."""
    while piece:
        count = os.pwrite(fd, piece[:at_once], position)
        piece = piece[count:]
        position += count
