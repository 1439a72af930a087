"""What the cases of the contract share: how they make functions, meet workers, and treat what a backend can't do.

Cases run on backends whose workers have nothing but the runtime. So what they run remotely is defined inside of the
case, goes by value, and imports what it needs itself.
"""

from __future__ import annotations

import functools
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pytest

import flowfn as flow

Case = TypeVar("Case", bound=Callable[..., None])

WAIT_S = 60.0  # how long a case waits for news of a worker before it fails; nothing waits that long if all is well

# What a backend may say it can't do.
FEATURES: dict[str, str] = {
    "cancel": "end a call that runs",
    "commands": "run commands as tasks",
    "cpu": "`cpu=`: threads and affinity of a worker",
    "gpu": "`gpu=`: GPUs that are the worker's alone",
    "main-thread": "run functions in the main thread of the worker's process",
    "memory": "`memory=`: a limit that is enforced",
    "mounts": "`mounts=` of files and directories of this machine",
    "network": "connect from a worker to this process (cases that watch a worker that runs need it)",
    "nodes": "tasks of several nodes",
    "ports": "ports of tasks that answer here",
    "references": "data references in arguments and results",
    "shared-files": "see the `scratch` directory under the same path",
    "tasks": "run calls as tasks, `fn.submit`",
    "timeout": "`timeout=`",
    "versions": "say hello over flowfn's own wire",
    "volumes": "`mounts=` of `volume://`",
}


def needs(*features: str, **options: Any) -> Callable[[Case], Case]:
    """Mark a case of features that a backend may lack.

    With `options`, the backend has to refuse these options, naming one of them; without, the case is skipped.
    """
    assert FEATURES.keys() >= set(features)

    def decorate(case: Case) -> Case:
        @functools.wraps(case)
        def checked(self: Contract, *args: Any, **kwargs: Any) -> None:
            for feature in features:
                if feature in self.unsupported:
                    if feature not in options:
                        pytest.skip(f"the backend says that it can't: {FEATURES[feature]}")
                    self.assert_refused(feature, options[feature])
                    return
            case(self, *args, **kwargs)

        return checked  # type: ignore[return-value]

    return decorate


class Met:
    """A connection from code that runs in a worker. It lasts until that process ends."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(WAIT_S)
        self._socket = connection
        self.said = connection.makefile().readline().rstrip("\n")

    def let_go(self) -> None:
        """Let the worker go on that waits in `recv`."""
        self._socket.sendall(b"!")

    def wait_for_end(self) -> None:
        """Return when the process at the other end is gone, or has closed the connection."""
        try:
            assert self._socket.recv(1) == b"", "the process said something, and was to end"
        except ConnectionResetError:
            pass


class Meeting:
    """A place where a case meets its workers.

    `meet(text)`, called in a worker, connects to this process and returns the socket. Whoever waits for the next worker
    calls `next()`. That shows that a function has begun, holds it at a known place, and shows its end, all without
    looking at a clock.
    """

    def __init__(self, address: str) -> None:
        self._listener = socket.create_server((address, 0), backlog=256)
        self._listener.settimeout(WAIT_S)
        self._met: list[Met] = []
        where = self._listener.getsockname()[:2]

        def meet(text: str = "") -> Any:
            import socket

            connection = socket.create_connection(where)
            connection.sendall(f"{text}\n".encode())
            return connection

        self.meet = meet

    def next(self) -> Met:
        """The next worker that comes."""
        met = Met(self._listener.accept()[0])
        self._met.append(met)
        return met

    def close(self) -> None:
        self._listener.close()
        for met in self._met:
            met._socket.close()


class Contract:
    """Base of the groups of cases."""

    unsupported: ClassVar[set[str] | frozenset[str]] = frozenset()
    """What the backend can't do: keys of `flowfn.testing.FEATURES`."""

    gpus: ClassVar[str] = "a100:2,h100:1"
    """The GPUs that the backend offers while the suite runs, as `FLOW_GPUS` names them."""

    address: ClassVar[str] = "127.0.0.1"
    """An address of this machine that workers can connect to."""

    _backend: Any = None
    _record: Callable[[str, object], None]  # says something in the report of the run

    @pytest.fixture
    def backend(self) -> Any:
        """The backend under test: a `Backend`, or what `backend=` accepts. To be defined by the subclass."""
        raise NotImplementedError("define a fixture `backend` in your subclass of BackendContract")

    @pytest.fixture
    def scratch(self, tmp_path: Path) -> Path:
        """A directory that functions without mounts can write to under the same path."""
        return tmp_path

    @pytest.fixture(autouse=True)
    def _contract(self, backend: Any, record_property: Callable[[str, object], None]) -> Iterator[None]:
        assert FEATURES.keys() >= set(self.unsupported), "`unsupported` names something that the suite does not know"
        self._backend = backend
        self._record = record_property
        yield

    @pytest.fixture
    def meeting(self) -> Iterator[Meeting]:
        if "network" in self.unsupported:
            pytest.skip(f"the backend says that it can't: {FEATURES['network']}")
        place = Meeting(self.address)
        yield place
        place.close()

    def function(self, function: Callable[..., Any], **options: Any) -> Any:
        """The function's handle on the backend under test."""
        return flow.function(**{"backend": self._backend, **options})(function)

    def assert_refused(self, feature: str, options: dict[str, Any]) -> None:
        """Asking for what the backend can't do is a FlowError at once, which names the option.

        `options` with a "command" are those of a task, the others a function's.
        """

        def never() -> int:
            return 1

        with pytest.raises(flow.FlowError) as caught:
            if "command" in options:
                with flow.Flow() as client:
                    client.submit(**options, backend=self._backend)
            else:
                self.function(never, **options).remote()
        self._record("refused", feature)
        text = str(caught.value)
        assert any(option in text for option in options), f"the refusal of {feature} names none of {list(options)}"


def make_where_am_i() -> Callable[[], tuple[str, int, str]]:
    """A function that says where it runs: host, process, and the namespace in which that number means something."""

    def where_am_i() -> tuple[str, int, str]:
        import os

        try:
            namespace = os.readlink("/proc/self/ns/pid")
        except OSError:
            namespace = ""
        return os.uname().nodename, os.getpid(), namespace

    return where_am_i


def from_main(source: str) -> dict[str, Any]:
    """What a script defines: its functions and classes say that they are of `__main__`."""
    namespace: dict[str, Any] = {"__name__": "__main__", "__builtins__": __builtins__}
    exec(compile(source, "<script>", "exec"), namespace)
    return namespace


def open_descriptors() -> set[str]:
    """What this process has open, but for what the test runner opens by itself."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{name} {os.readlink(f'/proc/self/fd/{name}')}")
        except OSError:
            continue
    return found
