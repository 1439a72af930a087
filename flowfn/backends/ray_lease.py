"""What runs on a node of a Ray cluster: a task, or an actor, that holds a worker's resources and starts its program.

It goes there by value and needs nothing of flowfn's but what it brings along, so that nodes need none. The worker
itself is a program of its own (`flowfn_runtime.bootstrap`), as on every other machine: what user code does to its
process, it does not do to Ray's.

- `lodge` is for nodes from which this client's door can be reached (see `ray_door`): on the client's own machine it
  hands the ends of the worker's stream through it, from others the connection to it becomes the program's stream. From
  then on it has no part in what is said. Ray keeps the processes of tasks for the next ones, so that this costs
  milliseconds.
- `Relay` is for all other nodes: an actor that passes frames on. Big buffers come and go through Ray's object store.
"""

from __future__ import annotations

import hmac
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import ray

CONCURRENCY = {"inward": 1, "outward": 1, "control": 2}  # of the actor's methods: how many run at a time
END_S = 10.0  # how long a program may take to end when it is told to
OUT_OF_BAND_BYTES = 1 << 16
TAIL_BYTES = 1 << 18  # of what a program says on standard error
ANSWER_S = 10.0  # for the client to answer, once it is connected to
# It is no child of Ray's process, which kills its children when it ends: what they have started would stay.
_BOOT = (
    "import os, sys; os.fork() and os._exit(0); sys.path[:] = [p for p in sys.path if p]; sys.path.insert(0, {!r}); "
    "from flowfn_runtime import bootstrap; bootstrap.main()"
)


class Program(NamedTuple):
    """A worker's program, and our ends of what leads to it."""

    group: int  # of processes
    stream: socket.socket | None  # none if the program has the connection to the client itself
    side: socket.socket | None  # for the descriptors of shared memory
    stderr: Any  # a file
    alive: int  # as long as this is open anywhere the program goes on
    done: int  # can be read when it has ended
    said: dict[str, Any]  # for the client: "host" and "node" name where it is, "alive" and "request" are of the set-up


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


def begin(order: Mapping[str, Any], place: str, link: socket.socket | None = None) -> Program:
    """Start a worker's program. `order`: see `flowfn.backends.ray`. `link`: what is to be its stream."""
    stream = side = None
    theirs: list[socket.socket] = []
    request = {}
    if link is None:
        (stream, link), (side, side_theirs) = socket.socketpair(), socket.socketpair()
        theirs = [link, side_theirs]
        request["side_fd"] = side_theirs.fileno()
    alive_theirs, alive = os.pipe()
    done, done_theirs = os.pipe()
    stderr, stderr_theirs = os.pipe()
    environ = {name: value for name, value in os.environ.items() if name not in order["drop"]}
    environ.update(order["environ"])
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", _BOOT.format(place)],
            stdin=link.fileno(),
            stdout=link.fileno(),
            stderr=stderr_theirs,
            env=environ,
            pass_fds=(*request.values(), alive_theirs, done_theirs),
            start_new_session=True,
        )
    finally:
        said = {
            "host": os.uname().nodename,
            "node": ray.get_runtime_context().get_node_id(),
            "alive": f"/dev/fd/{alive_theirs}",
            "request": request,
        }
        for one in theirs:
            one.close()
        for fd in (alive_theirs, done_theirs, stderr_theirs):
            os.close(fd)
    process.wait()
    return Program(process.pid, stream, side, open(stderr, "rb", buffering=0), alive, done, said)


def end(program: Program) -> None:
    """Have it end, with all that it started, and wait for that."""
    os.close(program.alive)
    if not select.select([program.done], [], [], END_S)[0]:
        os.killpg(program.group, signal.SIGKILL)
    os.close(program.done)


def set_up(link: socket.socket) -> None:
    """Of a connection between two machines: nothing waits for more to be sent, and an end that is gone is noticed.

    Its buffers are the kernel's to size, which it does up to more than one may ask for. There is no limit to how long
    what was sent may lie there unread: the worker may compute, or the client's program do something else.
    """
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def reach(order: Mapping[str, Any]) -> socket.socket | None:
    """A connection to the client's door, where both have shown that they know the lease; None if there is no way."""
    for family, address in order["doors"]:
        link = socket.socket(family)
        try:
            link.settimeout(order["connect_s"])
            link.connect(address)
            link.settimeout(ANSWER_S)
            link.sendall(" ".join(order["secret"]).encode() + b"\n")
            said = b""
            while len(said) < len(order["answering"]) and (data := link.recv(64)):
                said += data
            if hmac.compare_digest(said, order["answering"].encode()):
                link.settimeout(None)
                if family != socket.AF_UNIX:
                    set_up(link)
                return link
        except OSError:
            pass
        link.close()
    return None


def lodge(order: Mapping[str, Any], packed: Sequence[Any]) -> dict[str, Any]:
    """Start a worker's program, hand it in at the client's door, and stay until it ends: what it "said" on stderr.

    Where nothing was started the answer is why: the door can't be reached from this node ("node"), or the node has no
    runtime ("lacks") and none came along.
    """
    node = ray.get_runtime_context().get_node_id()
    if node in order["far"]:
        return {"node": node}
    place = runtime(order, packed)
    if not place:
        return {"lacks": order["digest"]}
    door = reach(order)
    if door is None:
        return {"node": node}
    near = door.family == socket.AF_UNIX
    with door:
        program = begin(order, place, None if near else door)
        words = json.dumps(program.said).encode() + b"\n"
        try:
            if program.stream and program.side:
                ends = [one.fileno() for one in (program.stream, program.side, program.stderr)]
                socket.send_fds(door, [words], ends)
            else:
                door.sendall(words)
        except OSError:  # the client is gone
            pass
        finally:
            for own in (program.stream, program.side):
                if own is not None:
                    own.close()
    said = b""
    try:
        if near:
            program.stderr.close()
        else:
            while data := program.stderr.read(1 << 16):
                said = (said + data)[-TAIL_BYTES:]
        os.read(program.done, 1)
    finally:
        program.stderr.close()
        end(program)
    return {"said": said}


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
        assert self._program.stream and self._program.side
        fd = self._program.stream.detach()
        self._stream = wire.Stream(fd, fd)
        self._side = self._program.side
        self._greeted = False
        self._tail = b""
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        """What the program says on standard error: the end of it is kept."""
        while data := self._program.stderr.read(1 << 16):
            self._tail = (self._tail + data)[-TAIL_BYTES:]

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
                self._stream.arena, self._stream.mapped = shm.Arena(self._side), shm.Mapped(self._side)

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
