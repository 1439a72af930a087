"""One HTTP/1.1 connection, made for moving bytes: bodies go from the socket into a reused buffer and on to a file.

A general client copies each body two or three times and allocates as it goes; here a gigabyte costs a few system calls
a mebibyte. It speaks what object stores speak: requests with a body of known length, answers with a length or chunked,
connections that stay open. `http1` keeps them; signing, retries and meaning are for others (`s3`, `retry`).
"""

from __future__ import annotations

import errno
import os
import re
import socket
import sys
from collections.abc import Callable, Mapping

from flowfn_runtime.data.endpoint import SILENCE_TIMEOUT_S, Body, Endpoint, FileSlice, Unreachable, WireError

BUFFER_BYTES = 1 << 20
_SMALL_BUFFER_BYTES = 128 << 10
_MAX_HEAD_BYTES = 64 << 10
_HEADER = re.compile(r"\n([^:\r\n]+):[ \t]*([^\r\n]*)")
# Bodies up to this size travel in the packets of their head.
_JOINED_BYTES = 16 << 10


def _linux() -> tuple[int, ...]:
    """The version of the Linux kernel; () elsewhere."""
    return tuple(map(int, re.findall(r"\d+", os.uname().release)[:2])) if sys.platform == "linux" else ()


# A thread that waits for a long body is woken when so much has come. (Before Linux 5.12 that could wait for ever.)
_LOW_WATER = 256 << 10 if _linux() >= (5, 12) else 0

# Takes a piece of a body, which is valid during the call. Or keeps it, and returns `BUFFER_BYTES` of other memory for
# what comes next.
Sink = Callable[[memoryview], memoryview | None]


class Response:
    """An answer's head; its body is still on the wire until `read` or `pour` took it.

    `length` is the body's length in bytes, None when it is chunked or ends with the connection.
    """

    def __init__(self, status: int, headers: Mapping[str, str], connection: Connection, method: str) -> None:
        self.status = status
        self.headers = headers
        self._connection = connection
        self.chunked = headers.get("transfer-encoding", "").lower() == "chunked"
        self.length: int | None
        if method == "HEAD" or status in (204, 304) or status < 200:
            self.length = 0
        elif self.chunked or "content-length" not in headers:
            self.length = None
        else:
            self.length = int(headers["content-length"])

    @property
    def keep_alive(self) -> bool:
        return self.headers.get("connection", "").lower() != "close"

    def pour(self, sink: Sink) -> int:
        """Hand the body to `sink`, piece by piece (each valid only during the call); return its length in bytes.

        Raises `WireError` when the body ends early. What a sink may do: see `Sink`.
        """
        return self._connection.pour(self, sink)

    def discard(self) -> None:
        """Close the connection rather than take a body that nobody wants."""
        self._connection.close()
        self._connection.released()

    def read(self) -> bytes:
        """The whole body."""
        parts: list[bytes] = []
        self.pour(lambda piece: parts.append(bytes(piece)))
        return b"".join(parts)


class Connection:
    """A connection that is opened when needed and kept. For one thread at a time.

    `idle` is told when an answer's body has been taken, and the next request may come.
    """

    def __init__(self, endpoint: Endpoint, idle: Callable[[Connection], object]) -> None:
        self.endpoint = endpoint
        self._idle = idle
        self._socket: socket.socket | None = None
        # Enough for heads and small bodies: memory has to be cleared, and there may be many connections.
        self._buffer = memoryview(bytearray(_SMALL_BUFFER_BYTES))
        # What has been received and not yet consumed: self._buffer[self._start:self._end].
        self._start = self._end = 0
        self._wakes_at = 1
        self._asked: tuple[str, bytes, Body] = ("", b"", None)
        self._fresh = True  # whether nothing was received on this connection before

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        self._start = self._end = 0

    def interrupt(self) -> None:
        """Break the connection under the thread that uses it."""
        sock = self._socket
        if sock is not None:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # it is not connected any more

    def __del__(self) -> None:
        # The threads that connections belong to end without a word.
        self.close()

    def released(self) -> None:
        """The last answer is done with."""
        self._idle(self)

    def ask(self, method: str, head: bytes, body: Body = None) -> None:
        """Send a request (`head` ends with the empty line), whose `answer` is to be taken next. Raises `WireError`."""
        self._asked = method, head, body
        self._fresh = self._socket is None
        try:
            self._send(head, body)
        except (WireError, OSError, ValueError) as error:
            self._ask_again(error)

    def answer(self) -> Response:
        """Wait for the head of the answer to what was asked. Raises `WireError`."""
        while True:
            try:
                return self._read_head(self._asked[0])
            except (WireError, OSError, ValueError) as error:
                self._ask_again(error)

    def _ask_again(self, error: Exception) -> None:
        """Replace, once and unseen, a kept connection that turned out to be closed by the server. Else raise."""
        while True:
            nothing_came = self._start == self._end
            self.close()
            if self._fresh or not nothing_came or isinstance(error, Unreachable):
                raise _wire_error(error, self.endpoint) from error
            self._fresh = True
            try:
                self._send(*self._asked[1:])
                return
            except (WireError, OSError, ValueError) as next_error:
                error = next_error

    def _send(self, head: bytes, body: Body) -> None:
        if self._socket is None:
            self._socket = self.endpoint.connect()
            self._start = self._end = 0
            self._wakes_at = 1
        if isinstance(body, FileSlice):
            self._socket.sendall(head)
            body.send(self._socket, plain=self.endpoint.scheme == "http")
        elif body is not None and len(body) > _JOINED_BYTES:
            self._send_both(head, body)
        else:
            self._socket.sendall(head + bytes(body or b""))

    def _send_both(self, head: bytes, body: memoryview | bytes) -> None:
        """Send a head and what follows it: in one call, where the socket takes it."""
        assert self._socket is not None
        sent = 0
        if self.endpoint.scheme == "http" and hasattr(self._socket, "sendmsg"):
            sent = self._socket.sendmsg([head, body])
        if sent < len(head):
            self._socket.sendall(head[sent:])
            sent = len(head)
        if rest := memoryview(body)[sent - len(head) :]:
            self._socket.sendall(rest)

    def _read_head(self, method: str) -> Response:
        buffer, end = self._buffer.obj, self._end
        assert isinstance(buffer, bytearray)
        if self._start:
            self._buffer[: end - self._start] = self._buffer[self._start : end]
            self._start, self._end = 0, end - self._start
        while True:
            stop = buffer.find(b"\r\n\r\n", 0, self._end)
            if stop >= 0:
                break
            if self._end > _MAX_HEAD_BYTES:
                raise WireError("the answer's head has no end")
            self._receive_more()
        text = bytes(self._buffer[:stop]).decode("latin-1")
        self._start = stop + 4
        version, _, rest = text.partition(" ")
        if not version.startswith("HTTP/1."):
            raise WireError(f"not HTTP: {text[:40]!r}")
        headers = {name.lower(): value.rstrip() for name, value in _HEADER.findall(text)}
        status = int(rest[:3])
        if status == 100:
            return self._read_head(method)
        return Response(status, headers, self, method)

    def _receive_more(self) -> None:
        assert self._socket is not None
        count = self._socket.recv_into(self._buffer[self._end :])
        if not count:
            raise WireError("the server closed the connection")
        self._end += count

    def pour(self, response: Response, sink: Sink) -> int:
        """See `Response.pour`."""
        done = False

        def guarded(piece: memoryview) -> memoryview | None:
            # Errors of the sink (a full disk, a closed pipe) are not the network's, and no reason to try again.
            try:
                return sink(piece)
            except Exception as error:
                raise _SinkError(error) from error

        try:
            total = self._pour_chunks(guarded) if response.chunked else self._pour_plain(response.length, guarded)
            done = response.length is not None or response.chunked
            return total
        except _SinkError as error:
            raise error.error from None
        except (OSError, ValueError) as error:
            raise _wire_error(error, self.endpoint) from error
        finally:
            if not done or not response.keep_alive:
                self.close()
            self.released()

    def _pour_plain(self, length: int | None, sink: Sink) -> int:
        start, held = self._start, self._end - self._start
        if length is not None and held >= length:
            self._give(start + length, sink)
            return length
        # What came with the head and what follows in one piece: each is a write, and a turn at the interpreter.
        if length is not None and start + length <= len(self._buffer):
            if self._fill(self._end, start + length, 0) < start + length:
                raise WireError(f"the body ended before its {length:,} bytes were there")
            self._end = start + length
            self._give(self._end, sink)
            return length
        received = self._buffer[start : self._end]
        if len(self._buffer) < BUFFER_BYTES:
            self._buffer = memoryview(bytearray(BUFFER_BYTES))
        self._buffer[:held] = received
        self._start = self._end = 0
        done = 0
        while length is None or done < length:
            want = BUFFER_BYTES if length is None else min(BUFFER_BYTES, length - done)
            count = self._fill(held, want, 0 if length is None else length - done - want)
            if count:
                self._start, self._end = 0, count
                self._give(count, sink)
                self._start = self._end = 0
            elif length is None:
                break
            else:
                raise WireError(f"the body ended after {done:,} of {length:,} bytes")
            done, held = done + count, 0
        return done

    def _give(self, stop: int, sink: Sink) -> None:
        """Hand on what there is before `stop`."""
        other = sink(self._buffer[self._start : stop])
        self._start = stop
        if other is not None:
            rest = self._end - stop
            other[:rest] = self._buffer[stop : self._end]
            self._buffer, self._start, self._end = other, 0, rest

    def _fill(self, held: int, want: int, later: int) -> int:
        """Receive until the buffer has `want` bytes, `held` of which it has already; fewer when the connection ends.

        `later`: how many come after them.
        """
        sock = self._socket
        assert sock is not None
        plain = self.endpoint.scheme == "http"
        if plain and _LOW_WATER:
            # Wake up for a good many bytes at once, and for any at the end, when no more than those are to come.
            self._wake_at(sock, _LOW_WATER if later >= _LOW_WATER else 1)
        while held < want:
            try:
                count = sock.recv_into(self._buffer[held:want], 0, socket.MSG_WAITALL if plain else 0)
            except OSError:
                if not held:
                    raise
                break
            if not count:
                break
            held += count
        return held

    def _wake_at(self, sock: socket.socket, count: int) -> None:
        if self._wakes_at != count:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, count)
            self._wakes_at = count

    def _pour_chunks(self, sink: Sink) -> int:
        total = 0
        while True:
            size = int(self._line().partition(b";")[0], 16)
            total += self._pour_counted(size, sink)
            if not size:
                while self._line():  # trailers
                    pass
                return total
            if self._line():
                raise WireError("a chunk is longer than it said")

    def _pour_counted(self, size: int, sink: Sink) -> int:
        left = size
        while left:
            if self._start == self._end:
                self._start = self._end = 0
                self._receive_more()
            take = min(left, self._end - self._start)
            self._give(self._start + take, sink)
            left -= take
        return size

    def _line(self) -> bytes:
        buffer = self._buffer.obj
        assert isinstance(buffer, bytearray)
        while True:
            stop = buffer.find(b"\r\n", self._start, self._end)
            if stop >= 0:
                line = bytes(self._buffer[self._start : stop])
                self._start = stop + 2
                return line
            if self._start:
                rest = bytes(self._buffer[self._start : self._end])
                self._buffer[: len(rest)] = rest
                self._start, self._end = 0, len(rest)
            if self._end > _MAX_HEAD_BYTES:
                raise WireError("a line has no end")
            self._receive_more()


class _SinkError(Exception):
    """Carries an error of the sink past the handling of the network's."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error


def _wire_error(error: Exception, endpoint: Endpoint) -> WireError:
    if isinstance(error, WireError):
        return error
    if isinstance(error, OSError) and error.errno in (errno.EAGAIN, errno.EWOULDBLOCK):
        return WireError(f"{endpoint.authority}: nothing came for {SILENCE_TIMEOUT_S} s")
    text = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
    return WireError(f"{endpoint.authority}: {text}")
