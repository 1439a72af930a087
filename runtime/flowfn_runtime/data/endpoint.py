"""Where a connection goes, what may be sent over it, and the errors of both."""

from __future__ import annotations

import os
import socket
import struct
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import ssl

_PIECE_BYTES = 1 << 20
_CONNECT_TIMEOUT_S = 15
# How long a socket may be silent. A server that thinks longer than this is as good as gone.
SILENCE_TIMEOUT_S = 60


class FileSlice:
    """A part of an open file as the body of a request; on a plain connection it never passes through this process."""

    def __init__(self, fd: int, start: int, length: int) -> None:
        self.fd = fd
        self.start = start
        self.length = length

    def __len__(self) -> int:
        return self.length

    def send(self, sock: socket.socket, *, plain: bool) -> None:
        """Write all of it to `sock`. Raises `WireError` if the file has become shorter."""
        position, end = self.start, self.start + self.length
        while position < end:
            if plain and hasattr(os, "sendfile"):
                count = os.sendfile(sock.fileno(), self.fd, position, end - position)
            else:
                piece = os.pread(self.fd, min(_PIECE_BYTES, end - position), position)
                sock.sendall(piece)
                count = len(piece)
            if not count:
                raise WireError("the file has become shorter while it was sent")
            position += count


Body = memoryview | bytes | FileSlice | None


class WireError(Exception):
    """The connection failed, or what came over it is not the answer: worth another try on a new connection."""


class Unreachable(WireError):
    """No connection came about: refused, no route, no such name."""


class Endpoint:
    """Where to connect: `scheme` (http or https), `host`, `port`; `ca_file` replaces the system's authorities."""

    def __init__(self, scheme: str, host: str, port: int | None = None, *, ca_file: str | None = None) -> None:
        self.scheme = scheme
        self.host = host
        self.port = port or (443 if scheme == "https" else 80)
        self.ca_file = ca_file
        self._context: ssl.SSLContext | None = None

    @property
    def authority(self) -> str:
        """The value of the Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.scheme == "https" else 80) else f"{host}:{self.port}"

    def connect(self) -> socket.socket:
        """A connected socket, with TLS for https. Raises `Unreachable`, or `WireError` when the handshake fails."""
        try:
            # As bytes a name is taken as it is: no tables of international names are loaded for plain ones.
            host: Any = self.host.encode() if self.host.isascii() else self.host
            sock = socket.create_connection((host, self.port), timeout=_CONNECT_TIMEOUT_S)
        except OSError as error:
            raise Unreachable(f"{self.authority}: {error.strerror or error}") from error
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self.scheme == "https":
                sock = self._tls().wrap_socket(sock, server_hostname=self.host)
            # The kernel's own timeouts on a blocking socket: no poll before each read, and MSG_WAITALL works.
            sock.settimeout(None)
            silence = struct.pack("@ll", SILENCE_TIMEOUT_S, 0)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, silence)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, silence)
        except OSError as error:
            sock.close()
            raise WireError(f"{self.authority}: {error.strerror or error}") from error
        return sock

    def _tls(self) -> ssl.SSLContext:
        if self._context is None:
            import ssl

            self._context = ssl.create_default_context(cafile=self.ca_file)
        return self._context
