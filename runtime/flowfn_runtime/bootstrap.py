"""What runs on another machine before a worker does: it gets the project, the environment and the data into place.

The loader (`flowfn.loader`, sent by the client) starts it with the stream on standard input and output. The client says
in a SETUP frame what is wanted:

- `request`: what `host.serve_stdio` is told: memory, cpus, gpus
- `env`: variables, secrets among them; `environ`: variables for what starts the worker, too
- `roots`, `sys_path`, `cwd`: digests of the project's snapshots, and places in them as [number of the root, path]
- `image`: a virtual environment to build, or to find built already
- `mounts`, `project_name`: data to stage; then the worker gets a filesystem of its own
- `alive`: the FIFO of the host's keeper, whose end ends the worker
- `keep`: no worker, but a keeper (see `keeper`), with this many seconds of patience

It is answered by NEWS frames: `ask` (see `flowfn.shipping`), `progress`, `log`, and at last `ready`; or by an ERROR.
Then this process becomes the host of the worker. Until then the end of the stream ends it, whatever it is doing.
"""

from __future__ import annotations

import errno
import functools
import io
import json
import os
import select
import sys
import threading
from collections.abc import Mapping
from typing import Any

from . import limits, logs, paths, settings, wire
from .errors import BackendError, FlowError

# Variables that count only when a program starts.
EARLY = ("LD_", "PYTHON", "MALLOC_", "GLIBC_")


def main(first: bytes = b"", heard: bytes = b"") -> None:
    """Entry: serve the client on standard input and output; does not return.

    `first` goes before all that is said. `heard` is what was read of the stream already.
    """
    limits.set_subreaper()
    read_fd, write_fd = logs.out_of_the_way(os.dup(0)), logs.out_of_the_way(os.dup(1))
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    stream = wire.Stream(read_fd, write_fd)
    stream.held, stream._rest = first, heard
    watch = HangUp(read_fd)
    if not heard:
        _import_ahead()
    try:
        setup = json.loads(stream.receive().meta)
        client = Client(stream)
        if "keep" in setup:
            from . import keeper

            watch.stop()
            keeper.keep(stream, setup["keep"], client)
            sys.exit(0)
        if "tasks" in setup:
            from . import taskserver

            if setup["home"]:
                os.environ["FLOW_HOME"] = os.path.expanduser(setup["home"])
            client.ready()
            taskserver.serve(stream, client)
            sys.exit(0)
        start = Start(setup, client)
        start.prepare()
        watch.stop()
        client.ready(later=not start.elsewhere)
    except EOFError:
        os._exit(70)
    except Exception as error:
        watch.stop()
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            error = BackendError(
                f"a worker could not be prepared: the disk of {error.filename or paths.cache()} is full",
                hint="free some space there, or say where there is more with cache=, or FLOW_CACHE there",
            )
        elif not isinstance(error, FlowError):
            error = BackendError(f"a worker could not be prepared: {type(error).__name__}: {error}")
        from . import exceptions

        print(error, file=sys.stderr, flush=True)  # for whoever does not get the rest
        payload = exceptions.dumps(error)
        stream.send(wire.ERROR, body=payload.data, buffers=payload.buffers)
        sys.exit(1)
    start.run(stream)


def _import_ahead() -> None:
    """Get what workers need while the client has not said yet what is wanted."""
    from . import checkout, host

    assert checkout and host


class HangUp:
    """Ends this process, and all that it started, when the stream's other end is gone. A thread, until `stop`."""

    def __init__(self, fd: int) -> None:
        self._read, self._write = os.pipe()
        self._poll = select.poll()
        self._poll.register(fd, wire.HANG_UP)
        self._poll.register(self._read, select.POLLIN)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        ready = [fd for fd, _ in self._poll.poll()]
        if self._read not in ready:
            limits.kill_orphans()
            os._exit(70)

    def stop(self) -> None:
        """From here on it is somebody else's to see. Safe to repeat."""
        if not self._thread.is_alive():
            return
        os.write(self._write, b"x")
        self._thread.join()
        os.close(self._read)
        os.close(self._write)


class Client:
    """Who is at the other end: told of progress, asked for what is lacking."""

    def __init__(self, stream: wire.Stream) -> None:
        self._stream = stream

    def tell(self, *, later: bool = False, **news: Any) -> None:
        """Something for the user to see."""
        self._stream.send(wire.NEWS, meta=json.dumps(news).encode(), later=later)

    def ready(self, *, later: bool = False, **facts: Any) -> None:
        """All is in place. `later`: it is said along with what comes next."""
        self.tell(later=later, ready=True, pid=os.getpid(), **facts)

    def ask(self, **question: Any) -> wire.Frame:
        """Ask for something; the first frame of the answer."""
        self.tell(ask=question)
        return self._stream.receive()

    def more(self) -> wire.Frame:
        """The next frame of an answer."""
        return self._stream.receive()


class Start:
    """One worker to be started."""

    def __init__(self, setup: Mapping[str, Any], client: Client) -> None:
        self.setup = setup
        self.client = client
        self.request: dict[str, Any] = dict(setup["request"])
        self.python = sys.executable
        self.env: dict[str, str] = setup["env"]
        self.staged: Any = None
        self._leases: list[int] = []

    def prepare(self) -> None:
        """Get everything into place. Raises what stands in the way."""
        from . import checkout

        self._leases.append(checkout.hold_runtime(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
        if alive := self.setup.get("alive"):
            try:
                self.request["alive_fd"] = os.open(alive, os.O_RDONLY | os.O_NONBLOCK)
            except FileNotFoundError:
                raise BackendError("the connection to this host was lost") from None
            self._leases.append(self.request["alive_fd"])
        if roots := self.setup.get("roots"):
            self._lay_out(roots)
        if image := self.setup.get("image"):
            from . import environments

            place, lease = environments.ready(image, self.client.tell, self.env)
            self._leases.append(lease)
            self.python = f"{place}/bin/python"
            path = f"{place}/bin:{os.environ.get('PATH', os.defpath)}"
            self.env = {"VIRTUAL_ENV": place, "PATH": path, **image["env"], **self.env}
        os.environ.update(self.setup["environ"])
        if "FLOW_STORE" in self.setup["environ"]:  # it is the client's, too, which does not see this host's files
            os.environ[settings.UPLOAD_LOCAL] = "1"
        if mounts := self.setup.get("mounts"):
            self._stage(mounts)

    def _lay_out(self, digests: list[str]) -> None:
        from . import checkout

        places = []
        for digest in digests:
            place, lease = checkout.get(digest, functools.partial(fetch, self.client, digest, checkout.store()))
            places.append(place)
            self._leases.append(lease)
        self.request["sys_path"] = [os.path.normpath(f"{places[n]}/{path}") for n, path in self.setup["sys_path"]]
        cwd = self.setup.get("cwd") or (0, ".")
        place = os.path.normpath(f"{places[cwd[0]]}/{cwd[1]}")
        os.makedirs(place, exist_ok=True)  # one without files, or with ignored ones only, did not travel
        os.chdir(place)

    def _stage(self, mounts: list[dict[str, Any]]) -> None:
        from . import sandbox
        from .data import mounts as data
        from .data.spec import Mount

        def progress(state: Any) -> None:
            news = {"url": state.url, "done_bytes": state.done_bytes, "total_bytes": state.total_bytes}
            self.client.tell(progress=news)

        sandbox.check()
        wanted = [Mount.from_dict(mount) for mount in mounts]
        self.staged = data.stage(wanted, env=self.env, project=self.setup["project_name"], progress=progress)
        os.environ["FLOW_MOUNTS"] = json.dumps({mount.source: mount.target for mount in wanted})
        os.environ.update(self.staged.environ())

    @property
    def elsewhere(self) -> bool:
        """Whether the worker takes another program than this one, or another filesystem."""
        another = self.staged is not None or self.python != sys.executable
        return another or any(name.startswith(EARLY) for name in self.env)

    def run(self, stream: wire.Stream) -> None:
        """Become the worker's host: in this process, if it can be."""
        os.environ.update(self.env)
        self.request["keep"] = list(self.env)
        if not self.elsewhere:
            from . import host

            code = host.serve_stdio(self.request, stream.read_fd, stream.write_fd, stream.held)
            os._exit(code)  # there is nothing to take down, and the engine and the client wait for the end
        runtime = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        boot = (
            "import sys; sys.path[:] = [p for p in sys.path if p]; "
            f"sys.path.insert(0, {runtime!r}); from flowfn_runtime.host import main; main()"
        )
        argv = [self.python, "-c", boot, json.dumps(self.request)]
        if self.staged is not None:
            argv = self._boxed(argv, runtime)
        for fd in self._leases:
            os.set_inheritable(fd, True)
        os.dup2(stream.read_fd, 0)
        os.dup2(stream.write_fd, 1)
        os.execvp(argv[0], argv)

    def _boxed(self, argv: list[str], runtime: str) -> list[str]:
        from . import sandbox

        os.environ.update(sandbox.environment(os.environ))
        places = [runtime, *self.request.get("sys_path", ()), os.path.dirname(os.path.dirname(self.python))]
        sys.path[:0] = [place for place in places if place not in sys.path]  # the sandbox keeps these readable
        for fd in self.staged.lease_fds:
            os.set_inheritable(fd, True)
        return sandbox.command(argv, self.staged.binds, cwd=os.getcwd(), die_with_parent=False)


def fetch(client: Client, digest: str, store: str) -> None:
    """Get a snapshot of the project into a store: its manifest, then of its contents what is lacking."""
    import zlib

    from . import project

    manifest = zlib.decompress(client.ask(project=digest).body)
    first = client.ask(project=digest, missing=project.missing(manifest, store))
    stream = io.BufferedReader(_Chunks(first, client))
    got = project.unpack(stream, store, manifest)
    while stream.read(1 << 20):  # the archive's padding, and the end
        pass
    if got != digest:
        raise BackendError(f"the project arrived damaged: {got} instead of {digest}")


class _Chunks(io.RawIOBase):
    """The body of SETUP frames as a file; an empty frame is its end."""

    def __init__(self, first: wire.Frame, client: Client) -> None:
        self._rest = memoryview(first.body)
        self._client = client
        self._ended = not len(self._rest)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not len(self._rest) and not self._ended:
            self._rest = memoryview(self._client.more().body)
            self._ended = not len(self._rest)
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count
