"""Parts of objects in the cache, for those that are read lazily: a sparse file for each, and a map of what is in it.

A block's byte in the map is set after its content is written, so a reader that sees it finds the content, whoever wrote
it and however that process ended. The map begins with the id of the machine's start: after a crash nobody knows what
reached the disk, and the file starts over. Who has an object open holds a shared lock on its file; eviction needs an
exclusive one.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Callable

from flowfn_runtime.data.cache import Cache
from flowfn_runtime.data.locks import NamedLocks
from flowfn_runtime.data.model import Object
from flowfn_runtime.data.retry import Patience
from flowfn_runtime.data.snapshot import boot_id, object_name
from flowfn_runtime.data.sources import Source
from flowfn_runtime.data.writing import write_all

BLOCK_BYTES = 1 << 20
_HEAD_BYTES = 64
# What a reader in sequence gets ahead of itself, at most; and how much of it comes in one request.
_AHEAD_BLOCKS = 32
_REQUEST_BLOCKS = 8
# Room is asked for in pieces of this size, or of the object's.
_GRANT_BYTES = 64 << 20


class Blocks:
    """The blocks of one object. Safe to share among threads."""

    def __init__(self, cache: Cache, source: Source, object: Object, locks: NamedLocks) -> None:
        self.source = source
        self.object = object
        self.size = object.size or 0
        self.count = -(-self.size // BLOCK_BYTES)
        self.name = object_name(source.identity, object)
        self._cache = cache
        self._locks = locks
        self._lock = threading.Condition()
        self._busy: set[int] = set()  # blocks that a thread of this process is fetching
        self._next = 0  # the block that a reader in sequence would ask for next
        self._ahead = 0
        self._until = 0  # how far it has been fetched ahead
        self._granted = 0  # bytes that may be written before room is asked for again
        self._kept = True  # False once the cache has no room: blocks are then handed through
        whole = f"{cache.root}/objects/{self.name[:2]}/{self.name}"
        try:
            self._fd = os.open(whole, os.O_RDONLY | os.O_CLOEXEC)  # staged as a whole some time
            self._map = -1
        except FileNotFoundError:
            self._fd, self._map = self._open()

    def _open(self) -> tuple[int, int]:
        folder = os.path.join(self._cache.root, "blocks", self.name[:2])
        os.makedirs(folder, mode=0o700, exist_ok=True)
        path = os.path.join(folder, self.name)
        while True:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(fd, fcntl.LOCK_SH)
            map_fd = os.open(path + ".map", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                if os.fstat(fd).st_ino == os.stat(path).st_ino and os.fstat(map_fd).st_nlink:
                    break
            except FileNotFoundError:
                pass
            os.close(fd)  # it was evicted between the two
            os.close(map_fd)
        self._locks.wait(self.name)
        try:
            head = boot_id().encode().ljust(_HEAD_BYTES, b"\0")
            if os.pread(map_fd, _HEAD_BYTES, 0) != head:
                os.ftruncate(map_fd, 0)
                os.ftruncate(fd, 0)
                os.ftruncate(fd, self.size)
                os.pwrite(map_fd, head, 0)
        finally:
            self._locks.release(self.name)
        return fd, map_fd

    def close(self) -> None:
        os.close(self._fd)
        if self._map >= 0:
            os.close(self._map)
        self._locks.close()

    def read(self, offset: int, size: int, start: Callable[[Callable[[], None]], object]) -> bytes:
        """The bytes at `offset`. What a reader in sequence will want next is fetched by way of `start`, which runs a
        function in the background."""
        if self._map < 0:
            return os.pread(self._fd, size, offset)
        first, last = offset // BLOCK_BYTES, (offset + size - 1) // BLOCK_BYTES
        self._read_ahead(first, last, start)
        passed = self._obtain(first, last)
        if passed is not None:
            at = offset - first * BLOCK_BYTES
            return passed[at : at + size]
        return os.pread(self._fd, size, offset)

    def _read_ahead(self, first: int, last: int, start: Callable[[Callable[[], None]], object]) -> None:
        with self._lock:
            if first in (self._next, self._next - 1) and self._kept:
                self._ahead = min(_AHEAD_BLOCKS, max(2 * self._ahead, 2) if first or self._ahead else 1)
            else:
                self._ahead = self._until = 0
            self._next = last + 1
            # Half of the way is left for the next request, so that requests are few and large.
            if self._ahead == 0 or self._until - self._next > self._ahead // 2:
                return
            begin, self._until = max(self._until, self._next), min(self._next + self._ahead, self.count)
            wanted = [block for block in range(begin, self._until) if block not in self._busy and not self._has(block)]
        for run in _runs(wanted):
            start(lambda run=run: self._try(run[0], run[-1]))  # type: ignore[misc]

    def _try(self, first: int, last: int) -> None:
        try:
            self._obtain(first, last)
        except Exception:
            pass  # whoever reads it will see the error

    def _has(self, block: int) -> bool:
        return os.pread(self._map, 1, _HEAD_BYTES + block) == b"\1"

    def _obtain(self, first: int, last: int) -> bytes | None:
        """Have the blocks in the file; or, where there is no room for them, return their bytes."""
        while True:
            missing = [block for block in range(first, last + 1) if not self._has(block)]
            if not missing:
                return None
            if not self._kept:
                return self._fetch(first, last)
            with self._lock:
                mine = [block for block in missing if block not in self._busy]
                if not mine:
                    self._lock.wait(10)
                    continue
                run = _runs(mine)[0]
                self._busy.update(run)
            try:
                self._store(run[0], run[-1])
            finally:
                with self._lock:
                    self._busy.difference_update(run)
                    self._lock.notify_all()

    def _store(self, first: int, last: int) -> None:
        name = f"{self.name} {first}"
        self._locks.wait(name)
        try:
            if all(self._has(block) for block in range(first, last + 1)):
                return  # another process was faster
            data = memoryview(self._fetch(first, last))
            try:
                self._require(len(data))
                write_all(self._fd, data, first * BLOCK_BYTES)
                os.pwrite(self._map, b"\1" * (last - first + 1), _HEAD_BYTES + first)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                self._kept = False
        finally:
            self._locks.release(name)

    def _require(self, size: int) -> None:
        """Make room now and then: looking for it costs more than writing a block."""
        with self._lock:
            self._granted -= size
            if self._granted >= 0:
                return
            grant = max(size, min(_GRANT_BYTES, self.size))
            self._granted = grant - size
        if not self._cache.room.make(grant):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _fetch(self, first: int, last: int) -> bytes:
        start, end = first * BLOCK_BYTES, min((last + 1) * BLOCK_BYTES, self.size)

        def attempt() -> bytes:
            pieces: list[bytes] = []
            self.source.fetch(self.object, start, end - 1, lambda piece: pieces.append(bytes(piece)))
            return b"".join(pieces)

        return Patience(self.source.url).attempt(attempt)


def _runs(blocks: list[int]) -> list[list[int]]:
    """Neighbours together, as far as one request goes."""
    runs: list[list[int]] = []
    for block in blocks:
        if runs and block == runs[-1][-1] + 1 and len(runs[-1]) < _REQUEST_BLOCKS:
            runs[-1].append(block)
        else:
            runs.append([block])
    return runs
