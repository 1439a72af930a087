"""The client's side of the loader (`flowfn.loader`): which Python is there, and the runtime if it is lacking."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from flowfn import loader
from flowfn_runtime.errors import BackendUnavailable, ProtocolError, VersionMismatch

if TYPE_CHECKING:
    from flowfn.backends.program import StreamConnection
    from flowfn.shipping import Launch

NOISE_BYTES = 1 << 18  # what login shells and engines may print before the loader speaks
EARLY_BYTES = 1 << 14  # sent before anybody reads: less than a pipe holds


def load(
    connection: StreamConnection, launch: Launch | None = None, *, elsewhere: Callable[[], bool] | None = None
) -> bool:
    """The loader's part: the runtime, if it is lacking there. Sends what is wanted of it at once.

    `elsewhere` waits until the runtime was brought to that host over another connection; False: it was not.
    Returns whether the runtime has spoken already; if not, see `loaded`.
    """
    from flowfn.bundle import bundle

    stream = connection.stream
    runtime = bundle()  # read while the program starts
    wanted = b"" if launch is None else launch.frame()
    early = wanted if len(wanted) <= EARLY_BYTES else b""
    python = [*sys.version_info[:2], sys.implementation.name]
    ask = {"digest": runtime.digest, "size": 0, "python": python, "then": 0}
    # Where nothing is lacking, that is all: a round trip costs.
    _say(stream.write_fd, {**ask, "then": len(early)}, early)
    lines = Lines(stream.read_fd, on_end=connection.overheard)
    there = lines.next()
    if executable := there.get("loaded"):
        connection.python = executable
        stream._rest = lines.rest
        return True
    if (choice := _choose(there, connection.label)) is not None:
        _say(stream.write_fd, choice)
        _say(stream.write_fd, ask)
        there = _other(there, lines.next(), connection.label)
    connection.python = there["executable"]
    if runtime.digest in there["runtimes"]:  # it waits for what is wanted, which is still to come
        _write(stream.write_fd, wanted)
        return False
    has = elsewhere is not None and elsewhere()
    packed = b"" if has else runtime.pack()
    _say(stream.write_fd, {"digest": runtime.digest, "size": len(packed), "sha256": _sha256(packed)}, packed + wanted)
    return False


def loaded(connection: StreamConnection) -> None:
    """Return when the runtime runs there, which it says along with the first thing that it has to say."""
    lines = Lines(connection.stream.read_fd, connection.stream._rest)
    lines.next()
    connection.stream._rest = lines.rest


def _sha256(data: bytes) -> str:
    import hashlib

    return hashlib.sha256(data).hexdigest()


def _choose(there: dict[str, Any], label: str) -> dict[str, str] | None:
    """What to do about the Python that was found there: None if it is right, else how to start another by uv."""
    major, minor = sys.version_info[:2]
    wanted = f"{major}.{minor}"
    if there.get("missing"):
        raise BackendUnavailable(
            f"{label} has no Python", hint=f"install Python {wanted} or uv there, or say where it is with python="
        )
    name = sys.implementation.name
    if there["python"][:2] == [major, minor] and there["implementation"] == name:
        return None
    if there["uv"] is None:
        raise _mismatch(there, label)
    return {"uv": there["uv"], "python": wanted, "start": loader.START}


def _other(there: dict[str, Any], other: dict[str, Any], label: str) -> dict[str, Any]:
    """What the Python says that uv was to start in place of the one that is there. Raises VersionMismatch."""
    if "unobtainable" in other:
        raise _mismatch(there, label, f", and uv there can't get it: {other['unobtainable']}")
    _choose({**other, "uv": None}, label)
    return other


def _mismatch(there: dict[str, Any], label: str, more: str = "") -> VersionMismatch:
    wanted = f"{sys.version_info[0]}.{sys.version_info[1]}"
    found = ".".join(map(str, there["python"]))
    return VersionMismatch(
        f"{label} has {there['implementation']} {found} ({there['executable']}), this client has "
        f"{sys.implementation.name} {wanted}{more}",
        hint=f"install Python {wanted}{' there' if more else ' or uv there'}, or say where it is with python=",
    )


class Lines:
    """The loader's lines among whatever else is printed."""

    def __init__(self, fd: int, rest: bytes = b"", *, on_end: Callable[[bytes], object] | None = None) -> None:
        """`on_end` is told what else was printed if the loader says nothing."""
        self._fd = fd
        self._on_end = on_end
        self.rest = rest  # what was read beyond the last line

    def next(self) -> dict[str, Any]:
        """The next thing that the loader says. Raises what it reports, and EOFError when it is gone."""
        mark = loader.MARK.encode()
        noise = b""
        while True:
            line, end, rest = self.rest.partition(b"\n")
            if not end:
                more = os.read(self._fd, 1 << 16)
                if not more:
                    if self._on_end is not None:
                        self._on_end(noise + self.rest)
                    raise EOFError
                self.rest += more
            else:
                self.rest = rest
                _, found, words = line.partition(mark)
                if found:
                    said: dict[str, Any] = json.loads(words)
                    if "error" in said:
                        raise BackendUnavailable(
                            f"the runtime can't be put in place there: {said['error']}",
                            hint="say where there is room with cache=, or FLOW_CACHE there",
                        )
                    return said
                noise += line + b"\n"
            if len(noise) + len(self.rest) > NOISE_BYTES:
                raise ProtocolError(f"the program is not the worker's: it says {self.rest[:80]!r}")


def _say(fd: int, words: dict[str, Any], more: bytes = b"") -> None:
    _write(fd, json.dumps(words).encode() + b"\n" + more)


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    try:
        while view:
            view = view[os.write(fd, view) :]
    except OSError:
        pass  # it has ended, and may have said why
