"""The process beside the GPU that starts workers, watches them, and leaves nothing behind.

It is started afresh (never forked from the client), imports the runtime and nothing of the user's, runs no thread, and
forks workers on request. That is why forking is safe here whatever the client does: no lock can be held by a thread
that the child lacks, no CUDA context exists, and a second worker costs milliseconds.

Two ways to be started:

- `serve_control`: over a control socket of packets, for a client on the same machine. Each request to fork carries the
  descriptors of the new worker's stream; the host says how each worker ended.
- `serve_stdio`: one worker on standard input and output, for whatever can start a program elsewhere. How the worker
  ended is written to standard error as the last line.

If the client dies the host sees it (end of the control socket or stream, and a process descriptor of the client where
the kernel has them), kills all workers with everything they started, and ends. If the host dies the kernel kills its
workers. Whatever a worker started becomes the host's child when the worker dies, and is killed then.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from typing import TYPE_CHECKING, Any

from . import limits, outcomes, wire, worker

if TYPE_CHECKING:
    import socket  # whose import takes long; a worker elsewhere needs none

CONTROL_FD = 3
CLIENT_FD = 4  # a process descriptor of the client, if it could make one
LAST_WORDS_BYTES = 1 << 13  # kept of what a worker printed just before it died
GRACE_S = 0.5  # how long idle workers may take to end by themselves
WARM_AFTER_S = 0.1  # not at once: a simple function needs none of it, and a short program may be over by then


class Child:
    """A worker as the host knows it."""

    def __init__(self, number: int, pid: int, memory_limit: int | None, outputs: list[int]) -> None:
        self.number = number
        self.pid = pid
        self.outputs = outputs  # reading ends of its standard output and error; the worker reads them, while it lives
        self.memory_limit = memory_limit
        self.peak = 0
        self.out_of_memory = False
        self.kernel_kills: int | None = None  # in a container with a limit of its own: how many it had seen before
        self.next_sample = 0.0

    def kernel_was_faster(self) -> bool:
        """Whether the kernel has killed something for want of memory before the next sample would have shown it."""
        if self.kernel_kills is None or self.memory_limit is None or limits.kernel_kills() <= self.kernel_kills:
            return False
        self.peak = max(self.peak, self.memory_limit)
        return True


class Host:
    """Forks workers and watches them. `report` is told how each ended."""

    def __init__(self) -> None:
        self.children: dict[int, Child] = {}
        self.poll = select.poll()
        self._wake_read, self._wake_write = os.pipe()
        for fd in (self._wake_read, self._wake_write):
            os.set_blocking(fd, False)
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        self.poll.register(self._wake_read, select.POLLIN)
        limits.set_subreaper()
        self.ends: list[dict[str, Any]] = []

    def fork(self, request: dict[str, Any], stream: wire.Stream, side: socket.socket | None, private: list[int]) -> int:
        """Start a worker on this stream; its number. `private` are descriptors of the host's that it must not have."""
        host = os.getpid()
        pipes = _pipes()
        pid = os.fork()
        if pid == 0:
            code = 70
            try:
                signal.set_wakeup_fd(-1)
                for default in (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP):
                    signal.signal(default, signal.SIG_DFL)
                signal.signal(signal.SIGINT, signal.default_int_handler)
                others = [fd for child in self.children.values() for fd in child.outputs]
                for fd in (self._wake_read, self._wake_write, *private, *others):
                    os.close(fd)
                code = run_worker(request, stream, side, host, pipes)
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                os._exit(code)
        for _, write_end in pipes:
            os.close(write_end)
        child = Child(request.get("id", 0), pid, request.get("memory"), [read_end for read_end, _ in pipes])
        if request.get("cgroup"):
            child.kernel_kills = limits.kernel_kills()
        self.children[pid] = child
        return pid

    def wait(self, deadline: float | None = None) -> list[int]:
        """Descriptors that have something to say, after looking after the workers. Empty when time is up."""
        timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
        if (next_sample := self._next_sample()) is not None:
            timeout = next_sample if timeout is None else min(timeout, next_sample)
        ready = [fd for fd, _ in self.poll.poll(None if timeout is None else timeout * 1000)]
        if self._wake_read in ready:
            ready.remove(self._wake_read)
            try:
                os.read(self._wake_read, 4096)
            except BlockingIOError:
                pass
        self._reap()
        self._check_memory()
        return ready

    def _next_sample(self) -> float | None:
        """Seconds until the memory of a limited worker is to be looked at; None: there is no such worker."""
        times = [child.next_sample for child in self.children.values() if child.memory_limit]
        return max(0.0, min(times) - time.monotonic()) if times else None

    def _check_memory(self) -> None:
        for child in self.children.values():
            started = time.monotonic()
            if child.memory_limit and child.next_sample <= started:
                used = limits.tree_memory(child.pid, limit=child.memory_limit)
                child.peak = max(child.peak, used)
                if used > child.memory_limit or child.kernel_was_faster():
                    child.out_of_memory = True
                    limits.kill_tree(child.pid)
                now = time.monotonic()
                child.next_sample = now + limits.sample_interval(used, child.memory_limit, now - started)

    def _reap(self) -> None:
        ended: list[tuple[Child, dict[str, Any]]] = []
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if not pid:
                break
            child = self.children.pop(pid, None)
            if child is not None:
                child.out_of_memory |= child.kernel_was_faster()
                end: dict[str, Any] = {"id": child.number, "pid": pid, "exitcode": os.waitstatus_to_exitcode(status)}
                if child.out_of_memory:
                    end["out_of_memory"] = {"limit": child.memory_limit, "peak": child.peak}
                ended.append((child, end))
        if ended:
            limits.kill_orphans(keep=self.children)
        for child, end in ended:
            said = [_last_words(fd) for fd in child.outputs]
            if any(said) and end["exitcode"]:
                end["output"] = said
            self.ends.append(end)

    def kill(self, number: int) -> None:
        """End a worker and everything it started."""
        for child in self.children.values():
            if child.number == number:
                limits.kill_tree(child.pid)

    def end(self) -> None:
        """Give the workers a moment to end by themselves, then kill what is left."""
        deadline = time.monotonic() + GRACE_S
        while self.children and time.monotonic() < deadline:
            self.wait(deadline)
        for child in list(self.children.values()):
            limits.kill_tree(child.pid)
        deadline = time.monotonic() + GRACE_S
        while self.children and time.monotonic() < deadline:
            self.wait(deadline)
        limits.kill_orphans(keep=())


def _pipes() -> list[tuple[int, int]]:
    """For the standard output and error of a worker. None if there are no more descriptors: it makes its own."""
    made: list[tuple[int, int]] = []
    try:
        for _ in range(2):
            made.append(os.pipe())
    except OSError:
        for ends in made:
            for fd in ends:
                os.close(fd)
        return []
    return made


def _last_words(fd: int) -> str:
    """What a worker printed last and did not come to send, since it died. Closes the descriptor."""
    said = b""
    try:
        os.set_blocking(fd, False)
        for _ in range(64):  # whoever still writes is not waited for
            data = os.read(fd, 1 << 16)
            if not data:
                break
            said = (said + data)[-LAST_WORDS_BYTES:]
    except OSError:
        pass
    os.close(fd)
    return said.decode(errors="backslashreplace")


def run_worker(
    request: dict[str, Any], stream: wire.Stream, side: socket.socket | None, host: int, pipes: list[tuple[int, int]]
) -> int:
    """Be a worker, in a process of its own, until the client is gone. Returns the exit status."""
    import atexit

    from . import logs

    sys.dont_write_bytecode = bool(sys.flags.dont_write_bytecode)  # the loader allowed it for the runtime's own
    os.setsid()
    limits.set_pdeathsig(signal.SIGKILL)
    if os.getppid() != host:  # it died before the kernel was told
        return 70
    limits.set_subreaper()
    read_fd = logs.out_of_the_way(stream.read_fd)
    stream.write_fd = read_fd if stream.write_fd == stream.read_fd else logs.out_of_the_way(stream.write_fd)
    stream.read_fd = read_fd
    if side is not None:
        import socket

        side = socket.socket(fileno=logs.out_of_the_way(side.detach()))
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    claim = cores = None
    if home := request.get("home"):
        os.environ["FLOW_HOME"] = home  # where the locks are that all clients share
    try:
        if cpus := request.get("cpus"):
            cores = limits.set_cpu(cpus, keep=request.get("keep", ()))
        if gpus := request.get("gpus"):
            from . import gpus as inventory
            from .gpu_request import parse_gpu

            there = inventory.inventory(request.get("declared_gpus"))
            claim = inventory.claim(parse_gpu(gpus), there=there, wait=True)
            assert claim is not None
            os.environ.update(claim.env)
    except Exception as error:
        meta, payload = outcomes.failure(error)
        stream.send(wire.ERROR, meta=meta, body=payload.data, buffers=payload.buffers)
        return 0
    # What the client says of the environment is of before the claim.
    kills = limits.kernel_kills() if request.get("cgroup") and request.get("memory") else None
    worker.Worker(stream, side, pipes=pipes, pinned=claim.env if claim else None, kernel_kills=kills).serve()
    atexit._run_exitfuncs()
    del claim, cores  # held until here
    return 0


def serve_control(control_fd: int = CONTROL_FD, client_fd: int = CLIENT_FD) -> None:
    """Serve a client of this machine until it is gone."""
    import socket

    control = socket.socket(fileno=control_fd)
    os.set_inheritable(control_fd, False)
    private = [control_fd]
    host = Host()
    host.poll.register(control_fd, select.POLLIN)
    try:
        os.set_inheritable(client_fd, False)
        host.poll.register(client_fd, select.POLLIN)
        private.append(client_fd)
    except OSError:
        pass  # this kernel has no process descriptors: the end of the control socket has to do
    warm_at: float | None = time.monotonic() + WARM_AFTER_S
    while True:
        ready = host.wait(warm_at)
        if warm_at is not None and time.monotonic() >= warm_at:
            warm_up()
            warm_at = None
        for end in host.ends:
            tell(control, end)
        host.ends.clear()
        if client_fd in ready:
            break
        if control_fd in ready:
            data, fds = receive_packet(control)
            if not data:
                break
            request = json.loads(data)
            if request["op"] == "launch":
                from . import launching

                launching.launch(request, control, private)
            elif request["op"] == "fork":
                stream = wire.Stream(fds[0], fds[0])
                side = socket.socket(fileno=fds[1]) if len(fds) > 1 else None
                pid = host.fork(request, stream, side, private)
                stream.close()
                if side is not None:
                    side.close()
                tell(control, {"id": request["id"], "pid": pid, "started": True})
            elif request["op"] == "kill":
                host.kill(request["id"])
    host.end()


def tell(control: socket.socket, message: dict[str, Any]) -> None:
    """Send the client a message."""
    try:
        control.send(json.dumps(message).encode())
    except OSError:
        pass  # the client is gone; the loop will see it


def receive_packet(control: socket.socket, size: int = 1 << 20) -> tuple[bytes, list[int]]:
    """One packet and the descriptors that came with it; no bytes at the end."""
    import array
    import socket

    fds = array.array("i")
    try:
        data, ancillary, _, _ = control.recvmsg(size, socket.CMSG_SPACE(8 * fds.itemsize))
    except OSError:
        return b"", []
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    return data, list(fds)


def serve_stdio(request: dict[str, Any], read_fd: int = 0, write_fd: int = 1, held: bytes = b"") -> int:
    """Run one worker on standard input and output, or on the two descriptors.

    The exit status is the worker's (128 + n for signal n). `request` may hold `sys_path`, entries to put before this
    Python's own; `alive_fd`, the reading end of a FIFO: when nobody has its other end any more the worker ends; and
    `side_fd`, a socket for shared memory, where the client is on this machine, or `side_path`, where one may be had.
    `held` goes before all that the worker says.
    """
    sys.path[:0] = request.get("sys_path", ())
    if read_fd == 0:
        read_fd, write_fd = os.dup(0), os.dup(1)
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        os.dup2(2, 1)
    host = Host()
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: asked.append(number))
    alive = request.get("alive_fd")
    side = None
    if "side_fd" in request:
        import socket

        side = socket.socket(fileno=request["side_fd"])
    elif "side_path" in request:
        side = _come_in(request["side_path"])
    stream = wire.Stream(read_fd, write_fd)
    stream.held = held
    host.fork(request, stream, side, [] if alive is None else [alive])
    if side is not None:
        side.close()
    os.close(write_fd)
    watched = [fd for fd in (read_fd, alive) if fd is not None]
    for fd in watched:
        host.poll.register(fd, wire.HANG_UP)
    while not host.ends:
        if (host.wait() or asked) and not host.ends:
            for fd in watched:  # a hang-up would be told again and again, and this process never sleep
                host.poll.unregister(fd)
            host.end()
            break
    limits.kill_orphans()
    end = host.ends[0] if host.ends else {"exitcode": 0}
    print(wire.EXIT_MARK + json.dumps(end), file=sys.stderr, flush=True)
    code: int = end["exitcode"]
    return code if code >= 0 else 128 - code


def _come_in(path: str) -> socket.socket | None:
    """The client's socket for shared memory. None if that is another machine's, or another user's."""
    import socket

    side = socket.socket(socket.AF_UNIX)
    try:
        folder = os.open(os.path.dirname(path), os.O_RDONLY | os.O_CLOEXEC)
        try:
            side.connect(f"/proc/self/fd/{folder}/{os.path.basename(path)}")  # however long the path is
        finally:
            os.close(folder)
        os.unlink(path)
    except OSError:
        side.close()
        return None
    return side


def warm_up() -> None:
    """Import what most workers need at some time, before more of them are forked."""
    import ctypes
    import gc

    import cloudpickle

    assert ctypes and cloudpickle
    gc.collect()
    gc.freeze()


def main() -> None:
    """Entry of the program: with an argument, it is the JSON of a request to run one worker on standard input."""
    if hasattr(os, "setsid") and os.getpid() != os.getpgrp():  # who leads a group, as a job's task does, can't
        os.setsid()
    if len(sys.argv) > 1:
        sys.exit(serve_stdio(json.loads(sys.argv[1])))
    serve_control()
    os._exit(0)  # there is nothing to take down, and the client may be waiting


if __name__ == "__main__":
    main()
