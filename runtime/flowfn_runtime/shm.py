"""Shared memory for big buffers between two processes of one host, reused from call to call.

Touching a fresh page costs many times what copying into a warm one does, so segments are kept and used again. A segment
is an anonymous file in memory (memfd): it has no name, nobody else can open it, and the kernel frees it with its last
descriptor, however the two processes end. Its descriptor travels once, over a side socket.

The sending side owns its segments (`Arena`); the receiving side maps them (`Mapped`), hands out views, and says which
segments are free again once the last object made of such a view is gone. So a received array *is* the shared memory,
with no copy, for as long as it lives.
"""

from __future__ import annotations

import errno
import mmap
import os
import socket
import struct
import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

THRESHOLD_BYTES = 1 << 17  # below this, the stream is as fast
KEEP_SHARE = 16  # free segments may keep this part of the host's memory; beyond it their pages are given back
ALIGN = 64


EVERYBODY = 1 << 31  # set in the numbers of segments that many workers map, read-only


class Segment:
    """One piece of shared memory of the sending side."""

    __slots__ = ("fd", "fresh", "map", "number", "size")

    def __init__(self, number: int, size: int) -> None:
        self.number = number
        self.size = size
        self.fd = os.memfd_create("flowfn", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self.fd, size)
            self.map = mmap.mmap(self.fd, size)
        except OSError:
            os.close(self.fd)
            raise
        self.fresh = True

    def __del__(self) -> None:
        if hasattr(self, "map"):
            os.close(self.fd)

    def fill(self, buffers: Sequence[Any]) -> list[tuple[int, int]]:
        """Copy the buffers in; the table entries that say where they are."""
        entries = []
        offset = 0
        for buffer in buffers:
            size = len(buffer)
            if self.fresh:  # writing to the file costs half of what touching fresh pages does
                with memoryview(buffer) as view:
                    done = 0
                    while done < size:
                        done += os.pwrite(self.fd, view[done:], offset + done)
            else:
                self.map[offset : offset + size] = buffer
            entries.append((size, offset + 1))
            offset = -(-(offset + size) // ALIGN) * ALIGN
        self.fresh = False
        return entries

    def send_to(self, side: socket.socket) -> None:
        """Give the other end of the side socket this segment's descriptor."""
        socket.send_fds(side, [struct.pack("<IQ", self.number, self.size)], [self.fd])


def padded_bytes(buffers: Sequence[Any]) -> int:
    """The room that the buffers take in a segment."""
    return sum(-(-len(buffer) // ALIGN) * ALIGN for buffer in buffers)


class Arena:
    """The sending side's segments."""

    def __init__(self, side: socket.socket, threshold: int = THRESHOLD_BYTES) -> None:
        self.side = side
        self.threshold = threshold
        self._segments: dict[int, Segment] = {}
        self._free: list[Segment] = []
        self._next = 1
        self._keep_bytes = max(1 << 28, os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE // KEEP_SHARE)

    def allocate(self, size: int) -> Segment | None:
        """A segment that holds `size` bytes: the smallest free one that fits well, else a new one. None: no memory."""
        best = None
        for segment in self._free:
            if size <= segment.size <= 4 * size and (best is None or segment.size < best.size):
                best = segment
        if best is not None:
            self._free.remove(best)
            return best
        try:
            segment = Segment(self._next, _round_up(size))
            segment.send_to(self.side)
        except (OSError, AttributeError):  # out of descriptors or memory, or no such thing on this platform
            return None
        self._next += 1
        self._segments[segment.number] = segment
        return segment

    def free(self, numbers: Iterable[int]) -> None:
        """The other side no longer uses these segments."""
        for number in numbers:
            if segment := self._segments.get(number):
                self._free.append(segment)
        kept = 0
        for segment in reversed(self._free):  # the last one used stays warm
            kept += segment.size
            if kept > self._keep_bytes:
                segment.map.madvise(mmap.MADV_REMOVE)
                segment.fresh = True


def _round_up(size: int) -> int:
    """A size that later buffers, a little bigger, may fit in as well; what is not touched costs nothing."""
    step = 1 << max(16, size.bit_length() - 3)
    return -(-size // step) * step


class Mapped:
    """The receiving side's view of the other's segments."""

    def __init__(self, side: socket.socket) -> None:
        self.side = side
        self.released: deque[int] = deque()  # filled by the garbage collector, in any thread
        self._maps: dict[int, mmap.mmap] = {}
        self._alive: dict[int, weakref.ref[Any]] = {}

    def view(self, number: int) -> memoryview:
        """The bytes of a segment; it counts as released when nothing made of this view is left."""
        import ctypes

        while number not in self._maps:
            message, fds, _, _ = socket.recv_fds(self.side, 12, 1)
            if not message:
                raise EOFError("the other side is gone")
            if not fds:  # the kernel had no room for it in this process's table
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE) + ", and shared memory needs one")
            which, size = struct.unpack("<IQ", message)
            try:
                self._maps[which] = mmap.mmap(fds[0], size)
            finally:
                os.close(fds[0])
        memory = self._maps[number]
        # memoryview can't be watched by a weak reference; a ctypes array on the same memory can.
        if number & EVERYBODY:
            return memoryview(memory).toreadonly()  # kept until the worker is told to drop the object
        owner = (ctypes.c_ubyte * len(memory)).from_buffer(memory)
        released = self.released
        self._alive[number] = weakref.ref(owner, lambda _: released.append(number))
        return memoryview(owner).cast("B")

    def forget(self, number: int) -> None:
        """The segment will not be used again: its memory goes when nothing is made of it any more."""
        self._maps.pop(number, None)

    def take_released(self) -> list[int]:
        numbers = []
        while self.released:
            numbers.append(self.released.popleft())
        return numbers
