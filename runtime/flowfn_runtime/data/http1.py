"""HTTP/1.1 for moving bytes: connections that are kept, and requests whose answers are taken later."""

from __future__ import annotations

from collections import deque
from weakref import WeakSet

from flowfn_runtime.data.connection import Connection, Response
from flowfn_runtime.data.endpoint import Body, Endpoint


class Pool:
    """Connections to one endpoint, each used by one request at a time. Safe to share among threads."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self._idle: deque[Connection] = deque()
        self._all: WeakSet[Connection] = WeakSet()

    def request(self, method: str, head: bytes, body: Body = None) -> Response:
        """Send a request, and wait for the answer."""
        return self.ask(method, head, body).answer()

    def ask(self, method: str, head: bytes, body: Body = None) -> Asked:
        """Send a request on an idle connection, or a new one. It is idle again when the answer's body is taken."""
        try:
            connection = self._idle.pop()
        except IndexError:
            connection = Connection(self.endpoint, self._idle.append)
            self._all.add(connection)
        connection.ask(method, head, body)
        return Asked(connection)

    def interrupt(self) -> None:
        """Break the connections, those in use too: who waits for an answer gets a `WireError` at once."""
        for connection in list(self._all):
            connection.interrupt()

    def close(self) -> None:
        """Close the idle connections."""
        while True:
            try:
                self._idle.pop().close()
            except IndexError:
                return


class Asked:
    """A request that has been sent. Somebody has to take its answer, or `drop` it."""

    __slots__ = ("_connection",)

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def answer(self) -> Response:
        """Wait for the answer's head. Raises `WireError`."""
        return self._connection.answer()

    def drop(self) -> None:
        """Nobody wants the answer."""
        self._connection.close()
        self._connection.released()
