"""What runs on a node of a Ray cluster: a task, or an actor, that holds a worker's resources and starts its program.

It goes there by value and needs nothing of flowfn's but what it brings along, so that nodes need none. The worker
itself is a program of its own (`flowfn_runtime.bootstrap`), as on every other machine: what user code does to its
process, it does not do to Ray's.

- `lodge` is for nodes from which this client's door can be reached, a socket in a directory of its user: it hands the
  ends of the worker's stream through it, and from then on has no part in what is said. Ray keeps the processes of tasks
  for the next ones, so that this costs milliseconds.
- `Relay` is for all other nodes: an actor that passes frames on. Big buffers come and go through Ray's object store.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import ray

CONCURRENCY = {"inward": 1, "outward": 1, "control": 2}  # of the actor's methods: how many run at a time
END_S = 10.0  # how long a program may take to end when it is told to
OUT_OF_BAND_BYTES = 1 << 16
_BOOT = (
    "import sys; sys.path[:] = [p for p in sys.path if p]; sys.path.insert(0, {!r}); "
    "from flowfn_runtime import bootstrap; bootstrap.main()"
)


class Program(NamedTuple):
    """A worker's program, and our ends of what leads to it."""

    process: Any
    stream: socket.socket
    side: socket.socket  # for the descriptors of shared memory
    stderr: int
    alive: int  # as long as this is open anywhere the program goes on
    said: dict[
        str, Any
    ]  # for the client: "host" and "node" name where it is, "side_fd" and "alive" what it has of ours


def runtime(order: Mapping[str, Any], packed: Sequence[Any]) -> str:
    """The directory of flowfn's runtime on this node, unpacked there unless it was before. "": it takes `packed`."""
    import io
    import shutil
    import tempfile
    import zipfile

    cache = order["cache"] or os.environ.get("FLOW_CACHE")
    cache = cache or (os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) + "/flowfn"
    place = os.path.join(os.path.abspath(os.path.expanduser(cache)), "runtime", order["digest"])
    if not os.path.isdir(place):
        if not packed:
            return ""
        os.makedirs(os.path.dirname(place), mode=0o700, exist_ok=True)
        new = tempfile.mkdtemp(dir=os.path.dirname(place))
        try:
            zipfile.ZipFile(io.BytesIO(ray.get(packed[0]))).extractall(new)
            os.rename(new, place)
        except BaseException:
            shutil.rmtree(new, True)
            if not os.path.isdir(place):  # else another one was faster
                raise
    return place


def begin(order: Mapping[str, Any], place: str) -> Program:
    """Start a worker's program. `order`: see `flowfn.backends.ray`."""
    stream, theirs = socket.socketpair()
    side, side_theirs = socket.socketpair()
    alive_theirs, alive = os.pipe()
    stderr, stderr_theirs = os.pipe()
    environ = {name: value for name, value in os.environ.items() if name not in order["drop"]}
    environ.update(order["environ"])
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", _BOOT.format(place)],
            stdin=theirs.fileno(),
            stdout=theirs.fileno(),
            stderr=stderr_theirs,
            env=environ,
            pass_fds=(side_theirs.fileno(), alive_theirs),
            start_new_session=True,
        )
    finally:
        said = {
            "host": os.uname().nodename,
            "node": ray.get_runtime_context().get_node_id(),
            "side_fd": side_theirs.fileno(),
            "alive": f"/dev/fd/{alive_theirs}",
        }
        theirs.close()
        side_theirs.close()
        os.close(alive_theirs)
        os.close(stderr_theirs)
    return Program(process, stream, side, stderr, alive, said)


def end(program: Program) -> None:
    """Have it end, with all that it started, and wait for that."""
    os.close(program.alive)
    try:
        program.process.wait(END_S)
    except subprocess.TimeoutExpired:
        program.process.kill()
        program.process.wait()


def lodge(order: Mapping[str, Any], packed: Sequence[Any]) -> dict[str, Any] | None:
    """Start a worker's program, hand its stream in at the client's door, and stay until it ends.

    Where nothing was started it says why: the door can't be reached from this node ("node"), or the node has no runtime
    ("lacks") and none came along.
    """
    door = socket.socket(socket.AF_UNIX)
    try:
        door.connect(order["door"])
    except OSError:
        door.close()
        return {"node": ray.get_runtime_context().get_node_id()}
    with door:
        place = runtime(order, packed)
        if not place:
            return {"lacks": order["digest"]}
        program = begin(order, place)
        try:
            words = json.dumps({**program.said, "token": order["token"]}).encode()
            ends = [program.stream.fileno(), program.side.fileno(), program.stderr]
            socket.send_fds(door, [words], ends)
        except OSError:  # the client is gone
            pass
        finally:
            program.stream.close()
            program.side.close()
            os.close(program.stderr)
    try:
        program.process.wait()
    finally:
        end(program)
    return None


def out_of_band(buffer: Any) -> Any:
    """What has Ray put a large buffer into its object store as it is. Small ones travel with what is around them."""
    if len(buffer) >= OUT_OF_BAND_BYTES:
        try:
            import numpy
        except ImportError:
            pass
        else:  # not a PickleBuffer: Ray's own buffers don't survive Python's garbage collection
            return numpy.frombuffer(buffer, dtype=numpy.uint8)
    return bytes(buffer)


class Relay:
    """The actor."""

    def __init__(self, order: Mapping[str, Any], packed: Sequence[Any]) -> None:
        import threading

        place = runtime(order, packed)
        sys.path.insert(0, place)
        from flowfn_runtime import wire

        self._program = begin(order, place)
        fd = self._program.stream.detach()
        self._stream = wire.Stream(fd, fd)
        self._greeted = False
        self._tail = b""
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        """What the program says on standard error: the end of it is kept."""
        while data := os.read(self._program.stderr, 1 << 16):
            self._tail = (self._tail + data)[-(1 << 18) :]

    @ray.method(concurrency_group="control")
    def start(self) -> dict[str, Any]:
        """Where this is. Returning says that the program was started."""
        return self._program.said

    @ray.method(concurrency_group="inward")
    def feed(self, frames: list[tuple[tuple[int, int, int, int, bytes], bytes, int]], buffers: list[Any]) -> None:
        """Frames for the worker: the head of each, its body, and how many of the buffers are its own."""
        from flowfn_runtime import shm, wire

        views = [memoryview(buffer) for buffer in buffers]
        for (kind, flags, call, arg, meta), body, count in frames:
            own, views = views[:count], views[count:]
            greets = kind == wire.HELLO and not self._greeted
            if greets:
                meta = json.dumps({**json.loads(meta), "shm": True}).encode()
            try:
                self._stream.send(kind, call=call, arg=arg, flags=flags, meta=meta, body=body, buffers=own)
            except EOFError:
                return  # `take` says so
            if greets:
                self._greeted = True
                side = self._program.side
                self._stream.arena, self._stream.mapped = shm.Arena(side), shm.Mapped(side)

    @ray.method(concurrency_group="outward")
    def take(self) -> list[tuple[tuple[int, int, int, int, bytes], Any, list[Any]]]:
        """The next frames of the worker: one, and what else has come; none when it has ended."""
        from flowfn_runtime import wire

        frames: list[Any] = []
        try:
            while not frames or self._stream.pending:
                frame = self._stream.receive()
                head = (frame.kind, frame.flags & ~wire.BODY_SHARED, frame.call, frame.arg, frame.meta)
                buffers = list(map(out_of_band, frame.buffers))
                frames.append((head, bytes(frame.body), buffers))
        except EOFError:
            pass
        return frames

    @ray.method(concurrency_group="control")
    def exit(self) -> bytes:
        """What the program said last, on standard error, which ends with how the worker ended."""
        self._listener.join(END_S)
        return self._tail
