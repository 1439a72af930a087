"""One connection to a host: the keeper's session, which opens it, and a first worker's, which starts along with it."""

from __future__ import annotations

import functools
import itertools
import json
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

from flowfn import shipping
from flowfn.backends import loading, openssh, stream
from flowfn.clock import clock
from flowfn_runtime import wire
from flowfn_runtime.errors import FlowError

BEAT_S = 5.0  # how often the keeper hears that the client is there
SPARE_S = 20.0  # how long a worker's program that nobody asked for stays
_numbers = itertools.count(1)


class Failure:
    """What ssh said when a session did not come about."""

    def __init__(self, client: openssh.Client) -> None:
        self._client = client
        self.said = ""

    def __call__(self, status: int, said: str) -> FlowError | None:
        self.said = said
        return openssh.explain(self._client, status, said)


class Lane:
    """One connection to a host. Returns from being made when the keeper has said what the host has."""

    def __init__(
        self,
        client: openssh.Client,
        program: Sequence[str],
        silence_s: float,
        *,
        started: Callable[[stream.StreamConnection], object],
    ) -> None:
        """`started` is called when ssh runs."""
        self.label = f"ssh {client.address}"
        self.sessions = 0
        self.dead = False
        self.socket = os.path.join(openssh.sockets_directory(), f"{os.getpid()}-{next(_numbers)}")
        self._spare: Spare | None = None
        self._spare_argv = client.further(self.socket, program)
        self._lock = threading.Lock()
        self._loaded = threading.Event()
        self._gpus: dict[str, Any] | None = None

        def launch() -> shipping.Launch:
            _get_ready()
            return shipping.Launch({"keep": silence_s})

        kind = functools.partial(_Keeper, opened=self._opened, started=started)
        failure = Failure(client)
        argv = client.first(self.socket, program)
        try:
            self.keeper = stream.start(argv, launch, label=self.label, explain=failure, kind=kind, on_end=self._ended)
        except BaseException:
            self.dead = True
            self._loaded.set()
            self._drop_spare()
            raise
        self._loaded.set()
        clock.later(SPARE_S, self._drop_spare)
        self._beat()

    def _opened(self) -> None:
        """The connection is there for others to use: a worker's program may start beside the keeper."""
        with self._lock:
            if not self.dead:
                self._spare = Spare(self._spare_argv, self.label, self._has_runtime)

    def _has_runtime(self) -> bool:
        self._loaded.wait()
        return not self.dead

    def spare(self) -> Spare | None:
        """The worker's program that runs already, if nobody had it yet."""
        with self._lock:
            spare, self._spare = self._spare, None
            return spare

    def _drop_spare(self) -> None:
        if (spare := self.spare()) is not None:
            spare.connection.kill()
            spare.connection.close()

    def _beat(self) -> None:
        if self.dead:
            return
        try:
            self.keeper.stream.send(wire.SETUP)
        except EOFError:
            return
        clock.later(BEAT_S, self._beat)

    def _ended(self) -> None:
        self.dead = True

    @property
    def facts(self) -> dict[str, Any]:
        """What the keeper said at once: `alive`, `cores`, `memory_bytes`."""
        return self.keeper.facts

    def gpus(self) -> dict[str, Any]:
        """What it says of GPUs, which it looks for when it is asked. Raises what stood in the way there."""
        with self._lock:
            if self._gpus is None:
                try:
                    self.keeper.stream.send(wire.SETUP, meta=b"gpus")
                    frame = self.keeper.stream.receive()
                except EOFError:
                    raise stream.ended(self.keeper, None) from None
                if frame.kind == wire.ERROR:
                    from flowfn_runtime import exceptions

                    raise exceptions.loads(frame.body, frame.buffers)
                self._gpus = json.loads(frame.meta)
            return self._gpus

    def close(self) -> None:
        self.dead = True
        self._drop_spare()
        self.keeper.close()
        self.keeper.kill()
        self.keeper.exit(stream.END_S)


class Spare:
    """A worker's program that was started before anybody asked for one. It loads the runtime, and waits."""

    def __init__(self, argv: Sequence[str], label: str, elsewhere: Callable[[], bool]) -> None:
        self.connection = stream.StreamConnection(argv, label=label)
        self._elsewhere = elsewhere
        self._error: BaseException | None = None
        self._done = threading.Event()
        threading.Thread(target=self._load, name="flowfn-spare", daemon=True).start()

    def _load(self) -> None:
        try:
            loading.load(self.connection, elsewhere=self._elsewhere)
        except BaseException as error:
            self._error = error
        self._done.set()

    def ready(self) -> stream.StreamConnection:
        self._done.wait()
        if self._error is not None:
            raise self._error
        return self.connection


class _Keeper(stream.StreamConnection):
    def __init__(
        self,
        argv: Sequence[str],
        *,
        opened: Callable[[], None],
        started: Callable[[stream.StreamConnection], object],
        **options: Any,
    ) -> None:
        self._opened = opened
        super().__init__(argv, **options)
        started(self)

    def heard(self, line: bytes) -> bool:
        if line == openssh.OPENED:
            self._opened()
            return True
        return False


def _get_ready() -> None:
    """Do what is to be done anyway while ssh logs in, which takes a while."""
    from flowfn import call, config, terminal, userproject
    from flowfn_runtime import exceptions

    assert call and exceptions and terminal
    userproject.look_ahead()
    try:
        config.load()
    except FlowError:
        pass  # it will be reported by whoever needs it
