"""Shared memory for big buffers between two processes of one host, reused from call to call.

Touching a fresh page costs many times what copying into a warm one does, so segments are kept and used again. A segment
is an anonymous file in memory (memfd): it has no name, nobody else can open it, and the kernel frees it with its last
descriptor, however the two processes end. Its descriptor travels once, over a side socket.

The sending side owns its segments (`Arena`); the receiving side maps them (`Mapped`), hands out views, and says which
segments are free again once the last object made of such a view is gone. So a received array *is* the shared memory,
with no copy, for as long as it lives. One that is sent back while nothing else refers to it, perhaps changed in place,
goes back in its segment.
"""

from __future__ import annotations

import errno
import mmap
import os
import socket
import struct
import sys
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

from .errors import ProtocolError

THRESHOLD_BYTES = 1 << 17  # below this, the stream is as fast
KEEP_SHARE = 16  # free segments may keep this part of the host's memory; beyond it their pages are given back
ALIGN = 64
PART_BYTES = 1 << 24  # what is larger is copied by several threads, in parts of this size at least
COPIERS = 4  # at most: a few saturate the memory
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
                _copy(self.map, offset, buffer)
            entries.append((size, offset + 1))
            offset = -(-(offset + size) // ALIGN) * ALIGN
        self.fresh = False
        return entries

    def send_to(self, side: socket.socket) -> None:
        """Give the other end of the side socket this segment's descriptor."""
        socket.send_fds(side, [struct.pack("<IQ", self.number, self.size)], [self.fd])


def _copy(target: mmap.mmap, offset: int, source: Any) -> None:
    """Copy `source` there: if it is large, and NumPy loaded, in several threads, since NumPy copies without the GIL."""
    size = len(source)
    threads = min(COPIERS, os.cpu_count() or 1, size // PART_BYTES)
    numpy: Any = sys.modules.get("numpy") if threads > 1 else None
    if numpy is None or not hasattr(numpy, "copyto"):  # it may be half imported
        target[offset : offset + size] = source
        return
    there = numpy.frombuffer(target, dtype=numpy.uint8, count=size, offset=offset)
    here = numpy.frombuffer(source, dtype=numpy.uint8)
    step = -(-size // threads)
    others = [
        threading.Thread(target=numpy.copyto, args=(there[at : at + step], here[at : at + step]), daemon=True)
        for at in range(step, size, step)
    ]
    for other in others:
        other.start()
    numpy.copyto(there[:step], here[:step])
    for other in others:
        other.join()


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
        self._returned: deque[int] = deque()  # segments that came back and are free; filled by the garbage collector
        self._watched: dict[int, weakref.ref[Any]] = {}
        self._next = 1
        self._keep_bytes = max(1 << 28, os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE // KEEP_SHARE)

    def allocate(self, size: int) -> Segment | None:
        """A segment that holds `size` bytes: the smallest free one that fits well, else a new one. None: no memory."""
        while self._returned:
            self.free([self._returned.popleft()])
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

    def view(self, number: int) -> memoryview:
        """The bytes of a segment that the other side has given back; it is free when nothing made of them is left."""
        segment = self._segments.get(number)
        if segment is None:
            raise ProtocolError("a frame gives back shared memory that was never sent")
        owner = _owner(segment.map)
        self._watched[number] = _watch(owner, number, self._returned)
        return memoryview(owner).cast("B")

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


def _owner(memory: mmap.mmap) -> Any:
    """An object on the memory that can be watched by a weak reference, which a memoryview can't."""
    import ctypes

    return (ctypes.c_ubyte * len(memory)).from_buffer(memory)


def _watch(owner: Any, number: int, gone: deque[int]) -> weakref.ref[Any]:
    """When the owner's last reference is gone, the number is put into `gone`."""
    return weakref.ref(owner, lambda _: gone.append(number))


class Mapped:
    """The receiving side's view of the other's segments."""

    def __init__(self, side: socket.socket) -> None:
        self.side = side
        self.released: deque[int] = deque()  # filled by the garbage collector, in any thread
        self._maps: dict[int, mmap.mmap] = {}
        self._alive: dict[int, weakref.ref[Any]] = {}

    def view(self, number: int) -> memoryview:
        """The bytes of a segment; it counts as released when nothing made of this view is left."""
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
        if number & EVERYBODY:
            return memoryview(memory).toreadonly()  # kept until the worker is told to drop the object
        owner = _owner(memory)
        self._alive[number] = _watch(owner, number, self.released)
        return memoryview(owner).cast("B")

    def claim(self, buffers: list[Any]) -> tuple[int, list[tuple[int, int]]] | None:
        """The one segment in which all these buffers lie, and their table entries, if nothing else refers to it.

        It is then not this side's any more, and the list is empty. None, and the list holds what it held, if they lie
        elsewhere or something else is left that refers to the segment: an array kept in a global, for example.
        """
        number, entries = self._find(buffers)
        if not number:
            return None
        # From here on its end is not to be told to the other side, which any thread does that sends something.
        self._alive[number] = weakref.ref(self._alive[number]())
        buffers.clear()
        owner = self._alive[number]()
        if owner is None:
            return number, entries
        self._alive[number] = _watch(owner, number, self.released)
        whole = memoryview(owner).cast("B")
        buffers.extend(whole[where - 1 : where - 1 + size] for size, where in entries)
        return None

    def _find(self, buffers: list[Any]) -> tuple[int, list[tuple[int, int]]]:
        """The segment in which all the buffers lie, 0 if they don't, and their table entries."""
        import ctypes

        place = (0, 0, 0)
        entries: list[tuple[int, int]] = []
        for buffer in buffers:
            try:
                address = ctypes.addressof(ctypes.c_ubyte.from_buffer(buffer))
            except (TypeError, ValueError):  # read-only, or empty: no view of a segment
                return 0, []
            if not entries:
                place = self._place(address)
            number, start, end = place
            if not number or not start <= address <= address + len(buffer) <= end:
                return 0, []
            entries.append((len(buffer), address - start + 1))
        return place[0], entries

    def _place(self, address: int) -> tuple[int, int, int]:
        """Number, start and end of the segment in use that holds the address."""
        import ctypes

        for number, watched in list(self._alive.items()):
            if (owner := watched()) is not None:
                start = ctypes.addressof(owner)
                if start <= address < start + len(owner):
                    return number, start, start + len(owner)
        return 0, 0, 0

    def forget(self, number: int) -> None:
        """The segment will not be used again: its memory goes when nothing is made of it any more."""
        self._maps.pop(number, None)

    def take_released(self) -> list[int]:
        numbers = []
        while self.released:
            numbers.append(self.released.popleft())
        return numbers
