"""What travels between a client and a worker: frames over one duplex byte stream. The one definition of it.

A frame is a fixed header, an optional table of buffers, and three parts:

```
header (36 bytes) │ table (16 bytes a buffer) │ meta │ body │ buffers that travel in the stream
```

- `meta` is JSON or packed integers, and can be read without trusting anybody; `body` is a pickle.
- A buffer's table entry is its length and where it is: 0 means it follows in the stream, all ones that it does so and
  is to arrive as bytes, any other n that it lies at offset n - 1 of the shared-memory segment that the header names
  (see `shm`). Shared memory is an acceleration that both ends agree on when they connect; without it everything follows
  in the stream.
- The header carries a checksum of itself, so that stray bytes on the descriptor are noticed, not obeyed.

A conversation: both ends send HELLO (versions, see `hello`), and check the other's before they unpickle anything. The
client then sends FUNCTION once a function body and CALL or BATCH for what is to be run; the worker answers with LOG,
BEGIN, YIELD, PART as they come, and with RESULT or ERROR at the end. A worker handles one CALL or BATCH after another.
After a frame with the flag AHEAD the client may send further frames before the answer; the worker then reads ahead, in
a thread, until a frame without the flag. This keeps the common case, one call and one answer, free of threads.
"""

from __future__ import annotations

import errno
import io
import os
import select
import struct
import sys
import threading
import zlib
from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import ProtocolError, VersionMismatch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .shm import Arena, Mapped, Segment

PROTOCOL = 1
MAGIC = b"fN"
HEAD = struct.Struct("<2sBBIIIIIQI")  # magic kind flags call arg segment buffers meta body crc
ENTRY = struct.Struct("<QQ")
READ_BYTES = 1 << 16
IOV_MAX = 512
FROZEN = (1 << 64) - 1  # where a buffer is that follows and is to arrive as bytes
FRESH_BYTES = 1 << 25  # so much memory is new each time: malloc gives what is this large back at once
INLINE_BYTES = 1 << 16  # parts smaller than this are joined into one write

# What poll says of a stream whose other end is gone; a socket's may close one half.
HANG_UP = select.POLLHUP | select.POLLERR | getattr(select, "POLLRDHUP", 0)

EXIT_MARK = "flowfn-exit: "  # begins the line on standard error that says how a worker ended

# kinds, client to worker
HELLO, FUNCTION, CALL, BATCH, CREDIT, CLOSE, RECALL, END, OBJECT, DROP, STAGE, SETUP, PATHS = range(1, 14)
# kinds, worker to client (HELLO both ways)
LOG, BEGIN, YIELD, PART, RESULT, ERROR, STREAM, NEWS = range(32, 40)
# either way
RELEASE = 64

# flags
AHEAD = 1  # the client may send more before the answer
BODY_SHARED = 2  # the body is the first buffer of the table
PLAIN = 4  # of a BATCH or PART: the body is one pickle of a list of plain values
LAST = 8  # of a PART: the batch is over
WANT_BEGIN = 16  # of a CALL: say BEGIN when the function starts
STDERR = 32  # of a LOG
STOP = 64  # of a BATCH: leave the rest when an item fails, and the batches after it
HEARD = 32  # of a BATCH: the client knows what failed before, and wants this one nevertheless
GIVEN_BACK = 128  # the segment is one of the receiver's own, which the sender has done with


class Frame(NamedTuple):
    kind: int
    flags: int
    call: int  # which call it is about, 0 for none
    arg: int  # depends on the kind: number of a function, index of an item, microseconds
    meta: bytes
    body: Any  # bytes-like
    buffers: list[Any]  # bytes-like, for pickle.loads(buffers=)


class Stream:
    """Frames over a pair of file descriptors (the same one twice for a socket).

    Any thread may send; one at a time may receive. `arena` and `mapped` are the two directions of shared memory, set
    once both ends have agreed on it. Ends with EOFError when the other side is gone.
    """

    def __init__(self, read_fd: int, write_fd: int) -> None:
        self.read_fd = read_fd
        self.write_fd = write_fd
        self.arena: Arena | None = None
        self.mapped: Mapped | None = None
        self.held = b""  # goes out with the next frame
        self._rest: Any = b""
        self._lock = threading.Lock()

    # sending

    def send(
        self,
        kind: int,
        *,
        call: int = 0,
        arg: int = 0,
        flags: int = 0,
        meta: bytes = b"",
        body: Any = b"",
        buffers: Sequence[Any] = (),
        later: bool = False,
    ) -> None:
        """Send one frame, whole. Raises EOFError when the other side is gone.

        `later`: a small one goes out with the next. Where the stream passes through somebody's sockets, as srun's, the
        second of two small ones that are sent one after the other takes 40 ms: it waits until the first is confirmed.
        """
        arena = self.arena
        if self.mapped is not None and self.mapped.released:
            self._send_released()
        if arena is not None and (buffers or len(body) >= arena.threshold):
            from .shm import padded_bytes

            if len(body) >= arena.threshold:
                buffers, body, flags = [body, *buffers], b"", flags | BODY_SHARED
            total = padded_bytes(buffers)
            segment = arena.allocate(total) if total >= arena.threshold else None
            if segment is not None:
                self._write(kind, flags, call, arg, segment.number, meta, body, segment.fill(buffers), ())
                return
        entries = [(len(b), FROZEN if _of_bytes(b) else 0) for b in buffers]
        self._write(kind, flags, call, arg, 0, meta, body, entries, buffers, later)

    def send_back(self, kind: int, *, call: int, arg: int, body: Any, buffers: list[Any]) -> None:
        """As `send`, of what nobody else needs: a segment in which all the buffers were received goes back with them.

        `buffers` is the caller's last reference to them, and is empty then.
        """
        claimed = self.mapped.claim(buffers) if self.mapped is not None and buffers else None
        if claimed is None:
            self.send(kind, call=call, arg=arg, body=body, buffers=buffers)
        else:
            number, entries = claimed
            self._write(kind, GIVEN_BACK, call, arg, number, b"", body, entries, ())

    def _write(
        self,
        kind: int,
        flags: int,
        call: int,
        arg: int,
        segment: int,
        meta: bytes,
        body: Any,
        entries: Sequence[tuple[int, int]],
        inline: Sequence[Any],
        later: bool = False,
    ) -> None:
        head = HEAD.pack(MAGIC, kind, flags, call, arg, segment, len(entries), len(meta), len(body), 0)[:-4]
        head += zlib.crc32(head).to_bytes(4, "little")
        if entries:
            head += b"".join([ENTRY.pack(*entry) for entry in entries])
        if meta:
            head += meta
        parts: list[Any]
        if len(body) < INLINE_BYTES and not inline:
            parts = [head + body if body else head]
        else:
            parts = [head, body, *inline] if len(body) else [head, *inline]
        with self._lock:
            if later and len(parts) == 1:
                self.held += parts[0]
                return
            if self.held:
                parts.insert(0, self.held)
                self.held = b""
            try:
                if len(parts) == 1:
                    data = parts[0]
                    sent = os.write(self.write_fd, data)
                    while sent < len(data):
                        sent += os.write(self.write_fd, memoryview(data)[sent:])
                else:
                    self._writev([memoryview(p).cast("B") for p in parts if len(p)])
            except OSError as error:
                raise EOFError(f"the other side is gone ({error.strerror})") from None

    def _writev(self, views: list[memoryview]) -> None:
        start = 0
        while start < len(views):
            sent = os.writev(self.write_fd, views[start : start + IOV_MAX])
            while start < len(views) and sent >= len(views[start]):
                sent -= len(views[start])
                start += 1
            if sent:
                views[start] = views[start][sent:]

    def send_piped(self, kind: int, pipe: int, size: int, *, call: int = 0, flags: int = 0) -> None:
        """Send a frame whose body is the next `size` bytes of a pipe, which has that many.

        They go from there without passing through this process: if it dies meanwhile, what was not sent is left.
        """
        head = HEAD.pack(MAGIC, kind, flags, call, 0, 0, 0, 0, size, 0)[:-4]
        with self._lock:
            held, self.held = self.held, b""
            try:
                self._writev([memoryview(held + head + zlib.crc32(head).to_bytes(4, "little"))])
                while size:
                    try:
                        size -= os.splice(pipe, self.write_fd, size)
                    except BlockingIOError:
                        # The pipe that is read doesn't block, and for splice that counts for the other one as well.
                        _wait_for_room(self.write_fd)
                    except (AttributeError, OSError) as error:
                        if getattr(error, "errno", errno.ENOSYS) not in (errno.ENOSYS, errno.EINVAL, errno.EPERM):
                            raise
                        data = os.read(pipe, size)
                        self._writev([memoryview(data)])
                        size -= len(data)
            except OSError as error:
                raise EOFError(f"the other side is gone ({error.strerror})") from None

    def send_shared(
        self, kind: int, flags: int, meta: bytes, segment: Segment, entries: Sequence[tuple[int, int]]
    ) -> None:
        """Send a frame whose body and buffers lie in a segment that other workers get as well."""
        assert self.arena is not None
        segment.send_to(self.arena.side)
        self._write(kind, flags | BODY_SHARED, 0, 0, segment.number, meta, b"", entries, ())

    def _send_released(self) -> None:
        """Tell the other side which of its segments are free again."""
        assert self.mapped is not None
        numbers = self.mapped.take_released()
        if numbers:
            self._write(RELEASE, 0, 0, 0, 0, struct.pack(f"<{len(numbers)}I", *numbers), b"", (), ())

    # receiving

    @property
    def pending(self) -> int:
        """How many bytes were read and not yet returned: a frame may be waiting though the descriptor is silent."""
        return len(self._rest)

    def receive(self) -> Frame:
        """The next frame. RELEASE frames are dealt with here and not returned."""
        while True:
            frame = self._receive()
            if frame.kind != RELEASE:
                return frame
            if self.arena is not None:
                self.arena.free(struct.unpack(f"<{len(frame.meta) // 4}I", frame.meta))

    def _receive(self) -> Frame:
        data = self._rest
        while len(data) < HEAD.size:
            more = self._read()
            data = data + more if data else more
        magic, kind, flags, call, arg, segment, count, meta_size, body_size, crc = HEAD.unpack_from(data)
        if magic != MAGIC or zlib.crc32(data[: HEAD.size - 4]) != crc:
            raise ProtocolError(f"the stream carried something that is no frame: {bytes(data[:48])!r}")
        end = HEAD.size + meta_size + body_size
        if not count and len(data) >= end:  # the common case: a small frame, read whole
            self._rest = data[end:] if len(data) > end else b""
            middle = HEAD.size + meta_size
            return Frame(kind, flags, call, arg, data[HEAD.size : middle], data[middle:end], [])
        self._rest = data[HEAD.size :]
        table = self._take(count * ENTRY.size)
        meta = bytes(self._take(meta_size))
        body: Any = self._take(body_size)
        buffers: list[Any] = []
        view = None
        if segment:
            owner = self.arena if flags & GIVEN_BACK else self.mapped
            if owner is None:
                raise ProtocolError("a frame names shared memory, and none was agreed on")
            view = owner.view(segment)
        for length, where in ENTRY.iter_unpack(table):
            if where == FROZEN:
                buffers.append(self._take_bytes(length))
            elif not where:
                taken = self._take(length)
                # Arrays made of it are their owner's to change, however small they are.
                buffers.append(bytearray(taken) if type(taken) is bytes else taken)
            elif view is None or where - 1 + length > len(view):
                raise ProtocolError("a frame names shared memory that is not there")
            else:
                buffers.append(view[where - 1 : where - 1 + length])
        if flags & BODY_SHARED:
            body = buffers.pop(0)
        return Frame(kind, flags & ~GIVEN_BACK, call, arg, meta, body, buffers)

    def _take(self, size: int) -> Any:
        """Exactly `size` bytes: what was read already, and the rest straight into its final place."""
        rest = self._rest
        if len(rest) >= size:
            self._rest = rest[size:]
            return rest[:size]
        out = _memory(size)
        with memoryview(out) as view:
            self._fill(view)
        return out

    def _take_bytes(self, size: int) -> bytes:
        """As `_take`, as bytes that are never copied: a copy of many goes to fresh pages, which takes as long again."""
        if len(self._rest) >= size:
            return bytes(self._take(size))
        out = io.BytesIO()
        out.seek(size - 1)
        out.write(b"\0")
        with out.getbuffer() as view:
            self._fill(view)
        return out.getvalue()

    def _fill(self, view: memoryview) -> None:
        """What was read already, and the rest."""
        done = len(self._rest)
        view[:done] = self._rest
        self._rest = b""
        while done < len(view):
            try:
                got = os.readv(self.read_fd, [view[done:]])
            except OSError as error:
                raise EOFError(f"the other side is gone ({error.strerror})") from None
            if not got:
                raise EOFError("the other side is gone in the middle of a frame")
            done += got

    def _read(self) -> bytes:
        try:
            data = os.read(self.read_fd, READ_BYTES)
        except OSError as error:
            raise EOFError(f"the other side is gone ({error.strerror})") from None
        if not data:
            raise EOFError("the other side is gone")
        return data

    def close(self) -> None:
        """Close the descriptors. Safe to repeat."""
        for fd in {self.read_fd, self.write_fd} - {-1}:
            try:
                os.close(fd)
            except OSError:
                pass
        self.read_fd = self.write_fd = -1

    def forget(self) -> None:
        """In a forked child: the conversation is the parent's, and so is whoever holds the lock."""
        self.close()
        self._lock = threading.Lock()
        self.arena = self.mapped = None


def _of_bytes(buffer: Any) -> bool:
    """Whether a big bytes object travels, and no array's memory."""
    return len(buffer) >= INLINE_BYTES and type(buffer) is memoryview and type(buffer.obj) is bytes


def _memory(size: int) -> Any:
    """Memory to receive into. Much comes in huge pages: to get 256 MiB in small ones takes longer than to fill them."""
    if size >= FRESH_BYTES:
        try:
            import mmap

            out = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            out.madvise(mmap.MADV_HUGEPAGE)
            return memoryview(out)
        except (ImportError, AttributeError, OSError):
            pass  # there are none here, or user code has spoiled `sys.path`
    return bytearray(size)


def _wait_for_room(fd: int) -> None:
    """Return when something can be written to the descriptor."""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    poll.poll()


def versions() -> dict[str, Any]:
    """What this side says of itself in HELLO."""
    return {
        "protocol": PROTOCOL,
        "python": list(sys.version_info[:2]),
        "implementation": sys.implementation.name,
        "platform": sys.platform,
        "byteorder": sys.byteorder,
    }


def check_versions(here: dict[str, Any], there: dict[str, Any], *, where: str) -> None:
    """Raise VersionMismatch, naming both sides and the remedy, if the two can't work together.

    Pickles of functions hold bytecode, which is the same only within one minor version of one implementation.
    """
    if there.get("protocol") != here["protocol"]:
        raise VersionMismatch(
            f"{where} speaks protocol {there.get('protocol')}, this client speaks {here['protocol']}",
            hint="install the same version of flowfn on both sides",
        )
    for key in ("implementation", "python", "byteorder"):
        if there.get(key) != here[key]:
            mine, its = (
                ".".join(map(str, value)) if isinstance(value, list) else str(value)
                for value in (here[key], there.get(key))
            )
            name = "Python" if key == "python" else key
            raise VersionMismatch(
                f"{where} has {name} {its}, this client has {name} {mine}",
                hint=f"run both sides with {name} {mine}, or with {name} {its}",
            )
