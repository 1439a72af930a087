"""Where workers on Ray come in: the client's door, a Unix socket for nodes of its own machine, TCP for all others.

Who comes says which lease it has and its secret, and is answered with another one: neither side says or does more
before it has seen that the other one was told by Ray. Then it says where it is, and hands in the worker's stream: its
descriptors, or its own connection, which is the stream from there on.
"""

from __future__ import annotations

import concurrent.futures
import hmac
import json
import os
import secrets
import selectors
import socket
import threading
import time
from typing import Any

import ray
import ray.exceptions

from flowfn.backends import openssh, ray_lease
from flowfn.backends.ray_gate import gate

GONE = (ray.exceptions.RayError, ConnectionError)
SECRET_S = 5.0  # how long a visitor may take to say who it is
STRANGERS = 128  # how many may be about to; the one that came first goes when there are more
SECRET_BYTES = 64
WORDS_BYTES = 1 << 14
DESCRIPTORS = 3


class Lease:
    """A Ray task that holds the resources of a worker, from the moment it is asked for."""

    def __init__(self) -> None:
        self.number = secrets.token_hex(8)
        self.secret = secrets.token_hex(16)
        self.answering = secrets.token_hex(16)  # what the door answers
        self.reference: Any = None
        self.happened = threading.Event()  # one of the following
        self.handed_in: tuple[dict[str, Any], list[int]] | None = None  # what the node said, and the worker's ends
        self.answer: dict[str, Any] = {}  # of a node that can't reach the door, or that relays, or what a worker said
        self.error: BaseException | None = None
        self.over = threading.Event()
        self._lock = threading.Lock()
        self.given_up = False

    def begun(self, reference: Any) -> None:
        """Ray was asked for it."""
        self.reference = reference
        reference.future().add_done_callback(self._done)

    def hand_in(self, said: dict[str, Any], fds: list[int]) -> None:
        """A worker of it runs."""
        with self._lock:
            if not self.given_up:
                self.handed_in = said, fds
                self.happened.set()
                return
        _close(fds)

    def take(self) -> tuple[dict[str, Any], list[int]] | None:
        """What was handed in, which is the caller's from here on."""
        with self._lock:
            handed_in, self.handed_in = self.handed_in, None
            return handed_in

    def _done(self, future: concurrent.futures.Future[Any]) -> None:
        self.error = future.exception()
        if self.error is None:
            self.answer = future.result() or {}
        self.over.set()
        self.happened.set()

    def give_up(self) -> None:
        """Nobody wants it any more. What it started meanwhile ends, as its stream does."""
        with self._lock:
            self.given_up = True
            self.happened.set()
            handed_in, self.handed_in = self.handed_in, None
        if handed_in is not None:
            _close(handed_in[1])
        if self.reference is None or self.over.is_set():
            return
        try:
            with gate:
                if ray.is_initialized():
                    ray.cancel(self.reference)
        except (*GONE, ValueError, TypeError, RuntimeError):
            pass  # it was over, or Ray is


class _Visitor:
    """Who has come to the door, and has not handed in anything yet."""

    def __init__(self, link: socket.socket) -> None:
        self.link = link
        self.came = time.monotonic()
        self.lease: Lease | None = None  # the one that it was told of
        self.words = b""
        self.fds: list[int] = []

    def hear(self) -> bytes | None:
        """The next line, when it is whole. Raises OSError or ValueError: there will be none."""
        data, fds, _, _ = socket.recv_fds(self.link, WORDS_BYTES, DESCRIPTORS)
        self.fds += fds
        self.words += data
        line, ended, rest = self.words.partition(b"\n")
        limit = SECRET_BYTES if self.lease is None else WORDS_BYTES
        if not data or rest or len(self.words) > limit or len(self.fds) > DESCRIPTORS:
            raise ValueError("that is not how one speaks here")
        if not ended:
            return None
        self.words = b""
        return line

    def leave(self) -> None:
        self.link.close()
        _close(self.fds)


class Door:
    """Sockets at which workers are handed in. `host`: the address of this machine for TCP, if there is one."""

    def __init__(self, host: str | None) -> None:
        self.path = os.path.join(openssh.sockets_directory(), f"ray-{os.getpid()}-{secrets.token_hex(3)}")
        self._expected: dict[str, Lease] = {}
        self._listeners = [socket.socket(socket.AF_UNIX)]
        self._listeners[0].bind(self.path)
        self.addresses: list[tuple[int, Any]] = [(int(socket.AF_UNIX), self.path)]
        if host is not None:
            self._listen(host)
        for listener in self._listeners:
            listener.listen(256)
            listener.setblocking(False)
        self._closed = False
        self._woken, self._wake = socket.socketpair()
        self._visitors: dict[int, _Visitor] = {}  # by their descriptors, in the order in which they came
        threading.Thread(target=self._serve, name="flowfn-ray-door", daemon=True).start()

    def _listen(self, host: str) -> None:
        """Listen on this address as well, if it is one of this machine."""
        try:
            [(family, kind, _, _, where), *_] = socket.getaddrinfo(
                host, 0, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
            )
            listener = socket.socket(family, kind)
        except OSError:
            return
        try:
            listener.bind(where)
        except OSError:
            listener.close()
            return
        self._listeners.append(listener)
        self.addresses.append((int(family), listener.getsockname()[:2]))

    def lease(self) -> Lease:
        """One that will be handed in here."""
        lease = Lease()
        self._expected[lease.number] = lease
        return lease

    def order(self, lease: Lease) -> dict[str, Any]:
        """What a node has to know to hand it in."""
        return {"doors": self.addresses, "secret": [lease.number, lease.secret], "answering": lease.answering}

    def forget(self, lease: Lease) -> None:
        self._expected.pop(lease.number, None)

    # in the thread

    def _serve(self) -> None:
        with selectors.DefaultSelector() as self._selector:
            for source in (self._woken, *self._listeners):
                self._selector.register(source, selectors.EVENT_READ)
            while not self._closed:
                for key, _ in self._selector.select(SECRET_S if self._strangers() else None):
                    if key.data is not None:
                        self._listen_to(key.data)
                    elif key.fileobj is not self._woken:
                        self._admit(key.fileobj)
                self._tidy()
            for visitor in list(self._visitors.values()):
                self._dismiss(visitor)
        for own in (*self._listeners, self._woken, self._wake):
            own.close()

    def _admit(self, listener: Any) -> None:
        try:
            link, _ = listener.accept()
        except OSError:  # it has gone again; or there are no descriptors, until somebody leaves
            time.sleep(0.01)
            return
        link.setblocking(False)
        if link.family != socket.AF_UNIX:
            ray_lease.set_up(link)
        visitor = _Visitor(link)
        self._visitors[link.fileno()] = visitor
        self._selector.register(link, selectors.EVENT_READ, visitor)

    def _dismiss(self, visitor: _Visitor) -> None:
        self._visitors.pop(visitor.link.fileno())
        self._selector.unregister(visitor.link)
        visitor.leave()

    def _strangers(self) -> list[_Visitor]:
        return [visitor for visitor in self._visitors.values() if visitor.lease is None]

    def _tidy(self) -> None:
        """Send those away that have not said who they are for long, or that are too many."""
        strangers = self._strangers()
        late = time.monotonic() - SECRET_S
        for number, visitor in enumerate(strangers):
            if visitor.came <= late or len(strangers) - number > STRANGERS:
                self._dismiss(visitor)

    def _listen_to(self, visitor: _Visitor) -> None:
        try:
            line = visitor.hear()
            if line is None:
                return
            if visitor.lease is None:
                visitor.lease = self._who_is(line)
                visitor.link.sendall(visitor.lease.answering.encode())
                return
            said = json.loads(line)
        except BlockingIOError:
            return
        except (OSError, ValueError, RecursionError):
            self._dismiss(visitor)
            return
        # If it was given up meanwhile the worker ends, as its stream does.
        if self._expected.pop(visitor.lease.number, None) is not None:
            if visitor.link.family != socket.AF_UNIX:
                stream = visitor.link.dup()
                stream.setblocking(True)
                visitor.fds.append(stream.detach())
            visitor.lease.hand_in(said, visitor.fds)
            visitor.fds = []
        self._dismiss(visitor)

    def _who_is(self, line: bytes) -> Lease:
        number, _, secret = line.decode("ascii").partition(" ")
        lease = self._expected.get(number)
        if lease is None or not hmac.compare_digest(lease.secret, secret):
            raise ValueError("a stranger")
        return lease

    # its end

    def close(self) -> None:
        """Safe to repeat."""
        if self._closed:
            return
        try:
            os.unlink(self.path)
        except OSError:
            pass
        self._closed = True
        self._wake.send(b"x")

    def left(self) -> None:
        """In a forked child: it is the parent's."""
        for own in (*self._listeners, self._woken, self._wake, *(one.link for one in self._visitors.values())):
            own.close()


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
