"""The client's ends of workers on Ray: the door at which nodes of this machine hand in streams, and relayed ones."""

from __future__ import annotations

import concurrent.futures
import json
import os
import secrets
import socket
import sys
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import ray
import ray.exceptions

from flowfn.backends import openssh, ray_lease, stream
from flowfn.backends.base import Connection, Exit
from flowfn_runtime import wire

GONE = (ray.exceptions.RayError, ConnectionError)
EXIT_S = 5.0  # how long a relayed worker's actor may take to say how it ended
WORDS_BYTES = 1 << 14
BIG_BYTES = 1 << 22


class Lease:
    """A Ray task that holds the resources of a worker, from the moment it is asked for."""

    def __init__(self, token: str) -> None:
        self.token = token
        self.reference: Any = None
        self.happened = threading.Event()  # one of the following
        self.handed_in: tuple[dict[str, Any], list[int]] | None = None  # what the node said, and the worker's ends
        self.answer: dict[str, Any] = {}  # of a node that can't reach the door, or that relays
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
        for fd in fds:
            os.close(fd)

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
            for fd in handed_in[1]:
                os.close(fd)
        if self.reference is None or self.over.is_set() or not ray.is_initialized():
            return
        try:
            ray.cancel(self.reference)
        except (*GONE, ValueError, TypeError, RuntimeError):
            pass  # it was over, or Ray is


class Door:
    """A socket that only this user's processes on this machine can reach; they hand in workers here."""

    def __init__(self) -> None:
        self.path = os.path.join(openssh.sockets_directory(), f"ray-{os.getpid()}-{secrets.token_hex(3)}")
        self._expected: dict[str, Lease] = {}
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen(256)
        threading.Thread(target=self._serve, name="flowfn-ray-door", daemon=True).start()

    def lease(self) -> Lease:
        """One that will be handed in here."""
        lease = Lease(secrets.token_hex(16))
        self._expected[lease.token] = lease
        return lease

    def forget(self, lease: Lease) -> None:
        self._expected.pop(lease.token, None)

    def _serve(self) -> None:
        while True:
            try:
                visitor, _ = self._listener.accept()
            except OSError:
                return
            with visitor:
                visitor.settimeout(10)
                fds: list[int] = []
                try:
                    words, fds, _, _ = socket.recv_fds(visitor, WORDS_BYTES, 3)
                    said = json.loads(words)
                    lease = self._expected.pop(said["token"])
                except (OSError, ValueError, KeyError, TypeError):
                    for fd in fds:  # it was given up meanwhile; its worker ends as these are closed
                        os.close(fd)
                    continue
            lease.hand_in(said, fds)

    def close(self) -> None:
        try:
            os.unlink(self.path)
        except OSError:
            pass
        try:
            self._listener.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self._listener.close()

    def left(self) -> None:
        """In a forked child: it is the parent's."""
        self._listener.close()


class _Program:
    """The program on the node, with the face of a process: its end is that of the Ray task that waits for it."""

    pid = 0

    def __init__(self, lease: Lease, stderr: int) -> None:
        self.stderr = open(stderr, "rb", buffering=0)
        self.returncode: int | None = None
        self._lease = lease

    def poll(self) -> int | None:
        return self.returncode

    def wait(self) -> None:
        # Ray takes its time to find a node dead, and the worker's stream has ended.
        self._lease.over.wait(1.0)
        self.returncode = 0

    def why(self) -> str:
        """What Ray says of it, if it did not end by itself."""
        error = self._lease.error
        return f"its Ray task failed: {summary(error)}" if error is not None else ""


class RayConnection(stream.StreamConnection):
    """A worker on this machine's own node: its stream, and a socket for shared memory, lead straight to it."""

    process: Any

    def __init__(self, lease: Lease, said: dict[str, Any], fds: Sequence[int]) -> None:
        fd, side, stderr = fds
        self.said_first = said
        self.label = f"ray node {said['host']}"
        self.facts = {}
        self.python = ""
        self.process = _Program(lease, stderr)
        self.side = socket.socket(fileno=side)
        os.set_inheritable(fd, False)
        self.begin(wire.Stream(fd, fd))

    def hello(self) -> Mapping[str, Any]:
        return {**super().hello(), "shm": True}

    def kill(self) -> None:
        # The program sees it, and ends the worker with all that it started.
        try:
            fd = os.dup(self.stream.read_fd)
        except OSError:
            return  # closed already
        with socket.socket(fileno=fd) as end:
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def judge(self, status: int) -> Exit:
        return Exit(detail="\n".join(filter(None, (self.process.why(), super().said()))))

    def close(self) -> None:
        super().close()
        self.side.close()


class RayStream:
    """Frames over an actor's methods, with the face of a `wire.Stream`. Ray keeps the order of one caller's calls."""

    arena = None
    mapped = None
    read_fd = write_fd = -1

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self._frames: deque[Any] = deque()
        self._kept: list[Any] = []  # frames that go with the next one
        self._taking: Any = None
        self._lock = threading.Lock()
        self._closed = False

    @property
    def pending(self) -> int:
        return len(self._frames)

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
        if self._closed:
            raise EOFError("the connection was closed")
        with self._lock:
            self._kept.append(((kind, flags, call, arg, meta), bytes(body), len(buffers)))
            if later and not buffers:
                return
            kept, self._kept = self._kept, []
            try:
                self._actor.feed.remote(kept, list(map(ray_lease.out_of_band, buffers)))
            except GONE as error:
                raise EOFError(summary(error)) from None

    def receive(self) -> wire.Frame:
        while not self._frames:
            if self._closed:
                raise EOFError("the connection was closed")
            try:
                if self._taking is None:
                    self._taking = self._actor.take.remote()
                frames, self._taking = ray.get(self._taking), self._actor.take.remote()
            except GONE as error:
                raise EOFError(summary(error)) from None
            if not frames:
                raise EOFError("the worker has ended")
            self._frames.extend(frames)
        (kind, flags, call, arg, meta), body, buffers = self._frames.popleft()
        return wire.Frame(kind, flags, call, arg, meta, body, list(map(_own, buffers)))

    def close(self) -> None:
        self._closed = True

    def forget(self) -> None:
        self._closed = True


def _own(buffer: Any) -> Any:
    """A copy of what lies in Ray's object store, since what a call returns is its caller's to change."""
    if len(buffer) >= BIG_BYTES and hasattr(buffer, "copy"):  # numpy's copies are in huge pages: a quarter of the time
        return memoryview(buffer.copy())
    return bytearray(buffer)


class RelayedConnection(Connection):
    """A worker on a node that has no way to this process but Ray's own."""

    stream: Any

    def __init__(self, actor: Any, said: dict[str, Any]) -> None:
        self._actor = actor
        self._how: Exit | None = None
        self.said_first = said
        self.label = f"ray node {said['host']}"
        self.facts: dict[str, Any] = {}
        self.stream = RayStream(actor)

    def hello(self) -> Mapping[str, Any]:
        return {"argv0": os.path.basename(sys.argv[0]) if sys.argv else ""}

    def kill(self) -> None:
        self._how = self._how or Exit(detail="it was ended here")
        end(self._actor)

    def exit(self, timeout: float) -> Exit:
        if self._how is None:
            self._how = self._ask(max(timeout, EXIT_S))
        return self._how

    def _ask(self, timeout: float) -> Exit:
        try:
            said = ray.get(self._actor.exit.remote(), timeout=timeout).decode(errors="replace")
        except ray.exceptions.GetTimeoutError:
            return Exit(detail="its Ray actor does not answer")
        except GONE as error:
            return Exit(detail=f"its Ray actor is gone: {summary(error)}")
        _, found, mark = said.rpartition(wire.EXIT_MARK)
        if not found:
            return Exit(detail="\n".join(said.strip().splitlines()[-8:]))
        how = json.loads(mark.partition("\n")[0])
        memory = how.get("out_of_memory") or {}
        return Exit(how["exitcode"], memory.get("limit"), memory.get("peak"), tuple(how.get("output", ("", ""))))

    def close(self) -> None:
        self.stream.close()
        end(self._actor)


def end(actor: Any) -> None:
    """End an actor. Its worker's program sees it go, and ends the worker with all that it started."""
    if not ray.is_initialized():
        return
    try:
        ray.kill(actor, no_restart=True)
    except (*GONE, ValueError, RuntimeError):
        pass  # it is gone, or Ray is


def summary(error: BaseException | None) -> str:
    """What Ray says, in a line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
