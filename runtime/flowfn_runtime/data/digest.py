"""The MD5 of a large file while its parts arrive, in whatever order: what the end of such a transfer waits for.

MD5 takes bytes one after the other, slower than most networks bring them. So it begins with the first bytes and has a
thread of its own that waits for nothing else. What arrived ahead of it is kept as it was received, as far as there is
memory for that, and read from the file (that is, the page cache) where there is not.
"""

from __future__ import annotations

import hashlib
import os
import threading

from flowfn_runtime.data.connection import BUFFER_BYTES

# As much as a processor's own cache holds while it is read and hashed.
_PIECE_BYTES = 256 << 10
_STEP_BYTES = 4 << 20
# How far ahead of the digest it is worth fetching.
_AHEAD_BYTES = 64 << 20


class Spares:
    """So many pieces of memory, as connections receive into, for all digests of a transfer. Made when needed."""

    def __init__(self, count: int) -> None:
        self._unmade = count
        self._free: list[memoryview] = []
        self._lock = threading.Lock()

    def exchange(self, piece: memoryview) -> memoryview | None:
        """Another one for `piece`, which may then be kept; None if there is none, or `piece` is of another kind."""
        if not isinstance(piece.obj, bytearray) or len(piece.obj) != BUFFER_BYTES:
            return None
        with self._lock:
            if self._free:
                return self._free.pop()
            if not self._unmade:
                return None
            self._unmade -= 1
        return memoryview(bytearray(BUFFER_BYTES))

    def give_back(self, piece: memoryview) -> None:
        """A piece that was kept is not needed any more."""
        with self._lock:
            self._free.append(memoryview(piece.obj))


class Digest:
    """The MD5 of the file `fd`, which comes in parts of `part_bytes` and will have `size` bytes.

    `close` it before the descriptor, unless it has given its `result`.
    """

    def __init__(self, fd: int, size: int, part_bytes: int, spares: Spares) -> None:
        self.size = size
        self.part_bytes = part_bytes
        self._spares = spares
        self._kept: dict[int, memoryview] = {}  # by their place in the file
        self._fd = fd
        self._md5 = hashlib.md5(usedforsecurity=False)
        self._changed = threading.Condition()
        self._ends: dict[int, int] = {}  # up to where a part is there
        self._first = 0  # the first part that is not whole
        self._there = 0  # up to where the file is
        self._hashed = 0
        self._closed = False
        self._failure: Exception | None = None
        self._thread: threading.Thread | None = threading.Thread(target=self._work, name="flowfn-md5", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # the account may have no more threads: `result` does it
            self._thread = None

    def arrived(self, part: int, end: int, piece: memoryview) -> memoryview | None:
        """The bytes of `part` are in the file, up to the position `end`, the last of them those in `piece`.

        Returns memory in exchange for `piece` if that is kept.
        """
        other = self._spares.exchange(piece)
        with self._changed:
            if other is not None:
                self._kept[end - len(piece)] = piece
            self._ends[part] = end
            while self._ends.get(self._first) == min((self._first + 1) * self.part_bytes, self.size):
                del self._ends[self._first]
                self._first += 1
            self._there = min(self._ends.get(self._first, self._first * self.part_bytes), self.size)
            self._changed.notify_all()
        return other

    def wait_for_turn(self, part: int) -> None:
        """Wait until it is time to fetch `part`: whoever runs ahead takes the processor from the digest."""
        with self._changed:
            while self._thread and part * self.part_bytes > self._hashed + _AHEAD_BYTES and not self._closed:
                self._changed.wait()

    def result(self) -> str:
        """The digest in hex, when all has arrived. Raises `OSError` if the file can't be read, and if it was closed."""
        if self._thread is None:
            self._work()
        else:
            self._thread.join()
        if self._failure is not None:
            raise self._failure
        if self._closed:
            raise OSError("the digest was given up")
        return self._md5.hexdigest()

    def close(self) -> None:
        """Give up. Nothing reads the file after this. Safe to call twice."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _work(self) -> None:
        buffer = memoryview(bytearray(_PIECE_BYTES))
        position = 0
        try:
            while position < self.size:
                with self._changed:
                    self._hashed = position
                    self._changed.notify_all()
                    while self._there <= position and not self._closed:
                        self._changed.wait()
                    if self._closed:
                        return
                    piece = self._kept.pop(position, None)
                    end = min([self._there, position + _STEP_BYTES, *(p for p in self._kept if p > position)])
                if piece is not None:
                    self._md5.update(piece)
                    position += len(piece)
                    self._spares.give_back(piece)
                    continue
                while position < end:
                    count = os.preadv(self._fd, [buffer[: end - position]], position)
                    if not count:
                        raise OSError("a file became shorter while it was hashed")
                    self._md5.update(buffer[:count])
                    position += count
        except Exception as error:
            with self._changed:
                self._failure, self._closed = error, True
                self._changed.notify_all()
