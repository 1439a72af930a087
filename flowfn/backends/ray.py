"""The Ray backend: each worker is a Ray task, so Ray schedules it, by `num_cpus`, `num_gpus`, `memory` and the like.

The task starts the worker's program on its node and stays until that ends (see `ray_lease`). Workers live long: a map
starts some and sends them all of its items, so that small calls cost far less than a Ray task each. On nodes of this
machine the worker's stream leads straight there, with shared memory for big buffers; from others it is relayed by an
actor, and Ray's object store carries what is big. Where Ray has no room, idle workers of other shapes end to make some.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import ray
import ray.exceptions

from flowfn import shipping, terminal
from flowfn.backends import ray_connection, ray_lease, ray_resources, ray_session, stream
from flowfn.backends.base import Backend, Connection
from flowfn.bundle import bundle
from flowfn_runtime.errors import BackendUnavailable, ConfigError, FlowError, ResourceUnavailable

if TYPE_CHECKING:
    from flowfn.backends.jobs import Jobs
    from flowfn.image import Image
    from flowfn.spec import FunctionSpec

LOOK_S = 0.25  # how often it is looked at why a worker does not start
ROOM_S = 3.0  # after so long idle workers make room, whatever Ray says of what is free
UNWANTED_S = 10.0  # after so long a worker that no call waits for any more is given up
ATTEMPTS = 3  # to start a worker: the project changes while it is sent, or the node is lost
WAIT_S = 600.0  # for Ray to have room for a worker; an autoscaler takes minutes


# What a worker that starts meets where its node is lost, and the cluster is not.
NODE_LOST = (ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError)


class _Wanted(NamedTuple):
    """A worker that is asked for."""

    spec: FunctionSpec
    need: ray_resources.Need
    options: dict[str, Any]  # for Ray
    meanwhile: Callable[[], object]  # what there is to do once Ray was asked


class RayBackend(Backend):
    """Workers on a Ray cluster: a running one (`address` or `url`, `RAY_ADDRESS`), else one started on this machine.

    `url` may be `ray://head:10001`. `resources`: custom resources that each worker takes. `spread`: workers go to as
    many nodes as there are. `runtime_env` is passed to Ray. `cache`, `home`: directories on the nodes in place of
    ~/.cache/flowfn and ~/.flowfn. `wait`: seconds for Ray to have room for a worker. `direct=False` has all frames
    relayed by Ray, as they are from other machines.
    """

    name = "ray"
    ships_project = True

    def __init__(
        self,
        *,
        url: str | None = None,
        address: str | None = None,
        resources: Mapping[str, float] | None = None,
        spread: bool = False,
        runtime_env: Mapping[str, Any] | None = None,
        cache: str | None = None,
        home: str | None = None,
        wait: float = WAIT_S,
        direct: bool = True,
    ) -> None:
        self._session = ray_session.Session((url if url not in ("ray", "ray://") else None) or address)
        self._resources = dict(resources or {})
        self._spread = spread
        self._runtime_env = dict(runtime_env or {})
        self._cache = cache
        self._environ = {"FLOW_HOME": home} if home else {}
        self._wait_s = wait
        self._direct = direct
        self._door: ray_connection.Door | None = None
        self._far: set[str] = set()  # nodes that don't reach the door
        self._near: set[str] = set()
        self._packed: tuple[str, Any] = ("", None)  # the runtime in the object store of which session
        self._leases: set[ray_connection.Lease] = set()  # that were asked for and are not there
        self._waiting: set[ray_connection.Lease] = set()  # of these, those that Ray has no room for
        self._closed = 0  # how often
        self._lock = threading.Lock()
        _backends.add(self)

    # the contract

    def connect(self, spec: FunctionSpec) -> Connection:
        environment, more = self._image(spec)

        @functools.cache
        def to_ship() -> shipping.Launch:
            return shipping.launch(spec, enforce={"cpu", "memory"}, environ=self._environ, image=environment)

        generation = self._closed
        newer: shipping.Launch | None = None
        for attempt in range(1, ATTEMPTS + 1):
            need = self._choose(spec)
            options = {**need.options, **more, "max_retries": 0}
            if self._spread:
                options["scheduling_strategy"] = "SPREAD"
            try:
                connection: Any = self._start(_Wanted(spec, need, options, to_ship), generation)
            except BackendUnavailable as error:
                if attempt < ATTEMPTS and isinstance(error.__cause__, NODE_LOST):
                    continue
                raise
            try:
                self._check_open(generation)
                launch = newer or to_ship()
                said = connection.said_first
                told = {**launch.setup, "alive": said["alive"]}
                told["request"] = {**told["request"], "side_fd": said["side_fd"]}
                shipping.Launch(told, launch.roots).send(connection.stream)
                stream.prepare(connection, shipping.Launch(told, launch.roots))
                started: Connection = connection
                return started
            except BaseException as error:
                how = connection.exit(stream.END_S).detail if isinstance(error, EOFError) else ""
                connection.kill()
                connection.close()
                if isinstance(error, EOFError) and attempt == ATTEMPTS:
                    raise BackendUnavailable(f"{connection.label}: a worker's program ended early: {how}") from None
                if isinstance(error, (OSError, FlowError)) and attempt < ATTEMPTS:
                    edited = (newer or to_ship()).newer()
                    if edited is not None:  # files, while they were sent
                        newer = edited
                        continue
                if not isinstance(error, EOFError):
                    raise
        raise AssertionError("unreachable: the last attempt returns or raises")

    def describe(self) -> str:
        if not (address := self._session.address or os.environ.get("RAY_ADDRESS")):
            return f"a cluster is started on this machine when it is needed, with {os.cpu_count()} cores"
        nodes = self._session.nodes()
        cores, gpus = (sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU"))
        return f"{address}: {len(nodes)} nodes with {cores:g} cores, {gpus:g} GPUs"

    def slots(self, spec: FunctionSpec) -> int:
        return self._choose(spec).slots

    def has_room(self, spec: FunctionSpec) -> bool:
        return not self._waiting

    def jobs(self) -> Jobs:
        from flowfn.backends import ray_tasks

        home = self._environ.get("FLOW_HOME")
        starting = ray_tasks.Starting(self._resources, self._cache, home, self._image)
        return ray_tasks.jobs(self._session.address, starting, connected=self._session.connected)

    @classmethod
    def jobs_at(cls, place: Mapping[str, Any]) -> Jobs:
        from flowfn.backends import ray_tasks

        return ray_tasks.RayJobs(place)

    def close(self) -> None:
        self._closed += 1
        leases, connections = list(self._leases), self._session.workers()
        for lease in leases:
            lease.give_up()
        for connection in connections:
            connection.kill()
        for lease in leases:
            lease.over.wait(stream.END_S)
        for connection in connections:
            connection.exit(stream.END_S)
        with self._lock:
            door, self._door = self._door, None
            if door is not None:
                door.close()
            self._near.clear()
            self._far.clear()
        self._session.close()

    def forget(self) -> None:
        """In a forked child: Ray is the parent's, and can't be used here."""
        if self._door is not None:
            self._door.left()
        self._door = None
        self._session.forget()
        self._lock = threading.Lock()

    # what is asked for

    def _choose(self, spec: FunctionSpec) -> ray_resources.Need:
        return ray_resources.choose(spec, self._session.nodes(), self._resources)

    def _image(self, spec: FunctionSpec) -> tuple[Image | None, dict[str, Any]]:
        """What to build on the node, and options for Ray."""
        image: Any = spec.image
        runtime_env = dict(self._runtime_env)
        if isinstance(image, str) or (image is not None and image.kind == "registry"):
            reference = image if isinstance(image, str) else image.source
            if not isinstance(image, str) and image.steps:
                raise ConfigError(
                    f"image={image!r}: Ray runs containers as they are, and can't add steps to them",
                    hint="build and push it, and name what you pushed; or use flow.Image.python(...)",
                )
            return None, {"runtime_env": {**runtime_env, "image_uri": reference}}
        if image is not None and image.kind != "venv":
            raise ConfigError(
                f"image={image!r}: Ray can't build a container",
                hint="build and push it, and name it with flow.Image.from_registry; or use flow.Image.python(...)",
            )
        return image, {"runtime_env": runtime_env} if runtime_env else {}

    # starting a worker

    def _check_open(self, generation: int) -> None:
        if self._closed != generation or not ray.is_initialized():  # else Ray would start a cluster
            raise BackendUnavailable("the ray backend was shut down while a worker started")

    def _start(self, wanted: _Wanted, generation: int) -> Any:
        """Start a worker's program where Ray has room for it."""
        self._check_open(generation)
        try:
            order = {
                "digest": bundle().digest,
                "cache": self._cache,
                "environ": {"FLOW_CACHE": self._cache} if self._cache else {},
                "drop": [] if wanted.spec.cpu else ["OMP_NUM_THREADS"],  # Ray sets it by what a task asks for
            }
            if self._direct and not (self._far and not self._near):
                lodged = self._lodge(wanted, order, [])
                if lodged == {"lacks": order["digest"]}:  # most nodes have it: it is packed when one does not
                    lodged = self._lodge(wanted, order, [self._runtime()])
                if not isinstance(lodged, dict):
                    return lodged
                wanted = wanted._replace(options={**wanted.options, "scheduling_strategy": _on(lodged["node"])})
            return self._relay(wanted, order, [self._runtime()])
        except ray.exceptions.RuntimeEnvSetupError as error:
            raise BackendUnavailable(
                f"Ray can't make the environment of a worker: {error}",
                hint="a container takes Podman on the nodes, and Ray in its image"
                if wanted.spec.image is not None
                else None,
            ) from error
        except ray.exceptions.RayTaskError as error:
            raise BackendUnavailable(
                f"the runtime can't be put in place on a Ray node: {error.cause}",
                hint="is its disk full? Another directory there may do: cache=",
            ) from error
        except ray_connection.GONE as error:
            raise self._session.lost(error) from error

    def _runtime(self) -> Any:
        """A reference to the runtime in Ray's object store; put there once."""
        session = ray.get_runtime_context().get_job_id()
        with self._lock:
            if self._packed[0] != session:
                self._packed = session, ray.put(bundle().pack())
            return self._packed[1]

    def _lodge(
        self, wanted: _Wanted, order: dict[str, Any], packed: list[Any]
    ) -> ray_connection.RayConnection | dict[str, Any]:
        """A worker that was handed in at the door, or why not: see `ray_lease.lodge`."""
        with self._lock:
            if self._door is None:
                self._door = ray_connection.Door()
            door = self._door
        lease = door.lease()
        self._leases.add(lease)
        try:
            order = {**order, "door": door.path, "token": lease.token}
            lease.begun(_lodge.options(**wanted.options).remote(order, packed))
            wanted.meanwhile()
            self._wait(lease, wanted)
        except BaseException:
            lease.give_up()
            raise
        finally:
            door.forget(lease)
            self._leases.discard(lease)
            self._waiting.discard(lease)
        handed_in = lease.take()
        if handed_in is not None:
            self._near.add(handed_in[0]["node"])
            connection = ray_connection.RayConnection(lease, *handed_in)
            self._session.keep(connection)
            return connection
        if lease.answer:
            if "node" in lease.answer:
                self._far.add(lease.answer["node"])
            return lease.answer
        if lease.error is not None and not lease.given_up:
            raise lease.error
        raise BackendUnavailable("the ray backend was shut down while a worker started")

    def _wait(self, lease: ray_connection.Lease, wanted: _Wanted) -> None:
        """Until the lease is handed in, or is not to be. Raises ResourceUnavailable, or that nobody wants it."""
        from flowfn import pools

        begun = time.monotonic()
        told = False
        while not lease.happened.wait(LOOK_S):
            waited = time.monotonic() - begun
            self._session.look_up()
            full = not any(map(wanted.need.fits, ray_session.free()))
            if full:
                self._waiting.add(lease)
            if full or waited > ROOM_S:
                pools.retire_idle(self, wanted.spec)
            if waited > UNWANTED_S and not pools.wanted(self, wanted.spec):
                raise BackendUnavailable("a worker waited for room on Ray, and no call for it any more")
            if waited > self._wait_s:
                raise ResourceUnavailable(
                    f"Ray had no room for a worker with {wanted.need} for {self._wait_s:g} s",
                    hint=f"there is: {ray_resources.summary(self._session.nodes())}; wait longer with wait=",
                )
            if full and not told and waited > ROOM_S and sys.stderr is not None and sys.stderr.isatty():
                told = True
                text = f"waits for room on Ray: {wanted.need}\n"
                terminal.show_output("ray", 0, "ray", text.encode(), True)

    def _relay(self, wanted: _Wanted, order: dict[str, Any], packed: list[Any]) -> ray_connection.RelayedConnection:
        options = {name: value for name, value in wanted.options.items() if name != "max_retries"}
        actor = _Relay.options(max_restarts=0, **options).remote(order, packed)
        lease = ray_connection.Lease("")
        self._leases.add(lease)
        try:
            lease.begun(actor.start.remote())
            wanted.meanwhile()
            self._wait(lease, wanted)
            if lease.given_up:
                raise BackendUnavailable("the ray backend was shut down while a worker started")
            if lease.error is not None:
                raise lease.error
        except BaseException:
            ray_connection.end(actor)
            raise
        finally:
            self._leases.discard(lease)
            self._waiting.discard(lease)
        connection = ray_connection.RelayedConnection(actor, lease.answer)
        self._session.keep(connection)
        return connection


def _on(node: str) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node, soft=True)


ray.cloudpickle.register_pickle_by_value(ray_lease)
_lodge = ray.remote(ray_lease.lodge)
_Relay = ray.remote(concurrency_groups=ray_lease.CONCURRENCY)(ray_lease.Relay)

_backends: weakref.WeakSet[RayBackend] = weakref.WeakSet()


def _after_fork() -> None:
    for backend in list(_backends):
        backend.forget()


os.register_at_fork(after_in_child=_after_fork)
