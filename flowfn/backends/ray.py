"""The Ray backend: workers are Ray actors, so Ray schedules them and its object store carries what is big.

An actor does not run the user's code itself. It relays frames to a worker of the local backend on its node, which is
where limits, mounts, logs and the end of process trees are seen to, as everywhere. What Ray is asked for is what it
schedules by: `num_cpus`, `num_gpus`, `memory`, `accelerator_type`.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import ray
import ray.exceptions

from flowfn import userproject
from flowfn.backends.base import Backend, Connection, Exit
from flowfn.bundle import Bundle, bundle
from flowfn_runtime import pickling, project, wire
from flowfn_runtime.errors import BackendUnavailable, ResourceUnavailable

if TYPE_CHECKING:
    from flowfn.spec import FunctionSpec

START_S = 300.0  # how long an actor may take to be scheduled and to start
GROUPS = {"inward": 1, "outward": 1, "control": 2}  # of the actor's methods: how many run at a time
LOST = (ray.exceptions.RayError, ray.exceptions.RayActorError)


class Shell:
    """The actor. It goes by value and imports nothing of flowfn's before it has unpacked that, so that nodes need none.

    What it says and does is Relay's.
    """

    def __init__(self, digest: str, packed: list[Any], arguments: bytes) -> None:
        import io
        import os
        import pickle
        import sys
        import tempfile
        import zipfile

        import ray

        place = os.path.join(tempfile.gettempdir(), f"flowfn-{os.getuid()}", digest)
        if not os.path.isdir(place):
            os.makedirs(os.path.dirname(place), mode=0o700, exist_ok=True)
            partial = tempfile.mkdtemp(dir=os.path.dirname(place))
            zipfile.ZipFile(io.BytesIO(ray.get(packed[0]))).extractall(partial)
            try:
                os.rename(partial, place)
            except OSError:  # another actor was faster
                import shutil

                shutil.rmtree(partial)
        sys.path.insert(0, place)
        from flowfn.backends.ray import Relay

        self._relay = Relay(packed[1:], *pickle.loads(arguments))

    @ray.method(concurrency_group="control")
    def start(self) -> str:
        return self._relay.start()

    @ray.method(concurrency_group="inward")
    def feed(self, head: Any, body: Any, *buffers: Any) -> None:
        self._relay.feed(head, body, *buffers)

    @ray.method(concurrency_group="outward")
    def take(self) -> Any:
        return self._relay.take()

    @ray.method(concurrency_group="control")
    def exit(self) -> Any:
        return self._relay.exit()


class Relay:
    """In the actor: a worker of the local backend on this node, and the frames from and to it."""

    def __init__(
        self,
        packed: Sequence[Any],
        spec: FunctionSpec,
        digests: Sequence[str],
        places: Sequence[tuple[int, str]],
        cwd: tuple[int, str] | None,
    ) -> None:
        from flowfn.backends.local import LocalBackend
        from flowfn_runtime import checkout

        roots = []
        self._leases = []  # what keeps the project's files from being cleared away
        for digest, reference in zip(digests, packed, strict=True):
            place, lease = checkout.get(digest, partial(_unpack, reference))
            roots.append(place)
            self._leases.append(lease)
        sys.path[:0] = [os.path.normpath(f"{roots[number]}/{below}") for number, below in places]
        if roots:
            number, below = cwd or (0, ".")
            os.chdir(os.path.normpath(f"{roots[number]}/{below}"))
        self._connection: Any = LocalBackend().connect(spec)
        self._greeted = False

    def start(self) -> str:
        """Where this is, for people. Returning says that the worker was started."""
        return f"ray node {os.uname().nodename}"

    def feed(self, head: tuple[int, int, int, int, bytes], body: Any, *buffers: Any) -> None:
        """A frame for the worker."""
        kind, flags, call, arg, meta = head
        stream = self._connection.stream
        if kind == wire.HELLO and not self._greeted:
            meta = self._hello(meta)
        try:
            stream.send(
                kind, call=call, arg=arg, flags=flags, meta=meta, body=body, buffers=[memoryview(b) for b in buffers]
            )
        except EOFError:
            pass  # `take` says so

    def _hello(self, meta: bytes) -> bytes:
        """The client's HELLO, with the paths and environment of this node under its own, and shared memory agreed."""
        import json

        from flowfn_runtime import shm

        self._greeted = True
        theirs = json.loads(meta)
        here = dict(self._connection.hello())
        side = self._connection.side
        if side is not None:
            self._arena, self._mapped = shm.Arena(side), shm.Mapped(side)
            stream = self._connection.stream
            stream.arena, stream.mapped = self._arena, self._mapped
        env = {**here["env"], **theirs.get("env", {})}
        return json.dumps({**here, **theirs, "env": env, "shm": side is not None}).encode()

    def take(self) -> list[tuple[tuple[int, int, int, int, bytes], Any, list[Any]]]:
        """The next frames of the worker: one, and what else has come; none when it has ended."""
        import numpy

        frames: list[Any] = []
        stream = self._connection.stream
        try:
            while not frames or stream.pending:
                frame = stream.receive()
                head = (frame.kind, frame.flags & ~wire.BODY_SHARED, frame.call, frame.arg, frame.meta)
                buffers = [numpy.frombuffer(buffer, dtype=numpy.uint8) for buffer in frame.buffers]
                frames.append((head, bytes(frame.body), buffers))
        except EOFError:
            pass
        return frames

    def exit(self) -> Exit:
        """How the worker ended."""
        how: Exit = self._connection.exit(5.0)
        return how


def _unpack(reference: Any) -> None:
    """A snapshot of the project from Ray's object store into this host's."""
    import io

    from flowfn_runtime import checkout

    project.unpack(io.BytesIO(ray.get(reference)), checkout.store())


class RayStream:
    """Frames over an actor's methods, with the face of a `wire.Stream`. Ray keeps the order of one caller's calls."""

    arena = None
    mapped = None
    read_fd = write_fd = -1

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self._frames: deque[Any] = deque()
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
    ) -> None:
        import numpy

        if self._closed:
            raise EOFError("the connection was closed")
        arrays = [numpy.frombuffer(buffer, dtype=numpy.uint8) for buffer in buffers]
        with self._lock:
            try:
                self._actor.feed.remote((kind, flags, call, arg, meta), bytes(body), *arrays)
            except LOST as error:
                raise EOFError(str(error)) from None

    def receive(self) -> wire.Frame:
        while not self._frames:
            if self._closed:
                raise EOFError("the connection was closed")
            try:
                if self._taking is None:
                    self._taking = self._actor.take.remote()
                frames, self._taking = ray.get(self._taking), self._actor.take.remote()
            except LOST as error:
                raise EOFError(str(error).splitlines()[0]) from None
            if not frames:
                raise EOFError("the worker has ended")
            self._frames.extend(frames)
        (kind, flags, call, arg, meta), body, buffers = self._frames.popleft()
        return wire.Frame(kind, flags, call, arg, meta, body, buffers)

    def close(self) -> None:
        self._closed = True


class RayConnection(Connection):
    def __init__(self, actor: Any, env: Mapping[str, str], node: str) -> None:
        self._actor = actor
        self._env = env
        self.label = node
        self.stream = RayStream(actor)  # type: ignore[assignment]

    def hello(self) -> Mapping[str, Any]:
        return {"env": dict(self._env)}

    def kill(self) -> None:
        # The relay's host process sees its client go, and ends the worker with all it started.
        ray.kill(self._actor, no_restart=True)

    def exit(self, timeout: float) -> Exit:
        try:
            how: Exit = ray.get(self._actor.exit.remote(), timeout=max(timeout, 5.0))
        except ray.exceptions.GetTimeoutError:
            return Exit(detail="its Ray actor does not answer")
        except LOST as error:
            return Exit(detail=f"its Ray actor is gone: {str(error).splitlines()[0]}")
        return how

    def close(self) -> None:
        self.stream.close()
        try:
            ray.kill(self._actor, no_restart=True)
        except LOST:
            pass


class RayBackend(Backend):
    """Workers on a Ray cluster: a running one (`address` or `url`, `RAY_ADDRESS`), else one started on this machine.

    `url` may be `ray://head:10001`. `runtime_env` is passed to Ray beside what flowfn puts there: its own packages and
    the project's working directory.
    """

    name = "ray"

    def __init__(
        self, *, url: str | None = None, address: str | None = None, runtime_env: Mapping[str, Any] | None = None
    ) -> None:
        self._address = url if url and url != "ray" else address
        self._runtime_env = dict(runtime_env or {})
        self._started = False
        self._stored: dict[str, Any] = {}  # digest: reference
        self._lock = threading.Lock()

    def _connect(self) -> None:
        with self._lock:
            if ray.is_initialized():
                return
            try:
                ray.init(address=self._address, log_to_driver=False, logging_level="ERROR", namespace="flowfn")
            except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
                where = self._address or os.environ.get("RAY_ADDRESS") or "this machine"
                raise BackendUnavailable(
                    f"no Ray cluster can be had at {where}: {error}",
                    hint="is it running, and the address right? `ray status` tells",
                ) from error
            self._started = True

    def connect(self, spec: FunctionSpec) -> Connection:
        if spec.image is not None:
            raise BackendUnavailable(
                f"image={spec.image!r}: the Ray backend runs functions in the environment of the cluster's nodes",
                hint='leave image= out, or configure the backend with runtime_env={"image_uri": ...}',
            )
        self._connect()
        self.slots(spec)
        env = spec.environment(os.environ)
        options = self._resources(spec)
        relayed = spec.replace(gpu=None, env=dict(env), secrets=None, backend=None)
        code = userproject.code()
        options["max_restarts"] = 0
        carried = bundle()
        packed = [self._put(part) for part in (carried, *code.roots)]
        digests = [root.digest for root in code.roots]
        arguments = bytes(pickling.dumps((relayed, digests, code.sys_path, code.cwd)).data)
        actor = (
            ray.remote(concurrency_groups=GROUPS)(Shell).options(**options).remote(carried.digest, packed, arguments)
        )
        try:
            node = ray.get(actor.start.remote(), timeout=START_S)
        except ray.exceptions.GetTimeoutError:
            ray.kill(actor)
            raise ResourceUnavailable(
                f"Ray did not start a worker with {options} within {START_S:g} s", hint="`ray status` says what is free"
            ) from None
        except ray.exceptions.RayActorError as error:
            raise BackendUnavailable(f"a worker could not be started on Ray: {error}") from error
        return RayConnection(actor, env, node)

    def _resources(self, spec: FunctionSpec) -> dict[str, Any]:
        """The actor's options that Ray schedules by."""
        options: dict[str, Any] = {"num_cpus": spec.cpu or 1}
        if spec.memory:
            options["memory"] = spec.memory
        if spec.gpu:
            request = self._fallback(spec)
            options["num_gpus"] = request.count
            if request.model:
                options["accelerator_type"] = self._accelerator(request.model)
        return options

    def _accelerator(self, model: str) -> str | None:
        """Ray's name of the model, as the cluster's nodes say it."""
        for name in ray.cluster_resources():
            kind, _, accelerator = name.partition("accelerator_type:")
            if not kind and accelerator.lower().replace("-", "").startswith(model.lower().replace("-", "")):
                return str(accelerator)
        return None

    def _fallback(self, spec: FunctionSpec) -> Any:
        """The first request that the cluster's nodes could meet."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        for request in spec.gpu:
            for resources in nodes:
                enough = resources.get("GPU", 0) >= request.count
                model = request.model is None or any(
                    name.startswith("accelerator_type:") and self._accelerator(request.model) == name.partition(":")[2]
                    for name in resources
                )
                if enough and model:
                    return request
        there = ", ".join(f"{resources.get('GPU', 0):g} GPUs" for resources in nodes) or "no node"
        asked = " or ".join(map(str, spec.gpu))
        raise ResourceUnavailable(f"gpu: {asked} asked for; the Ray cluster's nodes have {there}")

    def slots(self, spec: FunctionSpec) -> int:
        self._connect()
        total = ray.cluster_resources()
        if spec.gpu:
            return max(1, int(total.get("GPU", 0) // self._fallback(spec).count))
        cpus = spec.cpu or 1
        nodes = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
        if not any(available >= cpus for available in nodes):
            raise ResourceUnavailable(f"cpu={cpus:g} asked for; the Ray cluster's nodes have {nodes} CPUs")
        return max(1, int(total.get("CPU", 1) // cpus))

    def _put(self, thing: Any) -> Any:
        """The runtime or a snapshot of the project in Ray's object store, packed; put there once."""
        found = self._stored.get(thing.digest)
        if found is None:
            import io

            if isinstance(thing, Bundle):
                data = thing.pack()
            else:
                out = io.BytesIO()
                project.pack(thing, out)
                data = out.getvalue()
            if len(self._stored) > 32:
                self._stored.clear()
            found = self._stored[thing.digest] = ray.put(data)
        return found

    def close(self) -> None:
        if self._started:
            ray.shutdown()
            self._started = False


ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
