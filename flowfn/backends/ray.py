"""The Ray backend: each worker is a Ray task, so Ray schedules it, by `num_cpus`, `num_gpus`, `memory` and the like.

The task starts the worker's program on its node and stays until that ends (see `ray_lease`). Workers live long: a map
starts some and sends them all of its items, so that small calls cost far less than a Ray task each. The worker's stream
leads straight to it, on nodes of this machine with shared memory for big buffers (see `ray_door`); where there is no
way but Ray's own it is relayed by an actor. Where Ray has no room, idle workers of other shapes end to make some.
"""

from __future__ import annotations

import functools
import os
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import ray
import ray.exceptions

from flowfn import shipping
from flowfn.backends import ray_resources, ray_session, ray_start, stream
from flowfn.backends.base import Backend, Connection
from flowfn_runtime.errors import BackendUnavailable, ConfigError, FlowError

if TYPE_CHECKING:
    from flowfn.backends.jobs import Jobs
    from flowfn.image import Image
    from flowfn.spec import FunctionSpec

ATTEMPTS = 3  # to start a worker: the project changes while it is sent, or the node is lost
WAIT_S = 600.0  # for Ray to have room for a worker; an autoscaler takes minutes


# What a worker that starts meets where its node is lost, and the cluster is not.
NODE_LOST = (ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError)


class RayBackend(Backend):
    """Workers on a Ray cluster: a running one (`address` or `url`, `RAY_ADDRESS`), else one started on this machine.

    `url` may be `ray://head:10001`. `resources`: custom resources that each worker takes. `spread`: workers go to as
    many nodes as there are. `runtime_env` is passed to Ray. `cache`, `home`: directories on the nodes in place of
    ~/.cache/flowfn and ~/.flowfn. `wait`: seconds for Ray to have room for a worker. `direct=False` has all frames
    relayed by Ray, as they are where nodes can't reach this machine.
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
        self._starter = ray_start.Starter(self._session, cache=cache, wait_s=wait, direct=direct)
        self._closed = 0  # how often
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
                self._check_open(generation)
                connection: Any = self._starter.start(ray_start.Wanted(self, spec, need, options, to_ship))
            except BackendUnavailable as error:
                if attempt < ATTEMPTS and isinstance(error.__cause__, NODE_LOST):
                    continue
                raise
            try:
                self._check_open(generation)
                launch = newer or to_ship()
                said = connection.said_first
                told = {**launch.setup, "alive": said["alive"]}
                told["request"] = {**told["request"], **said["request"]}
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
        return not self._starter.waits_for_room

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
        connections = self._session.workers()
        self._starter.give_up()
        for connection in connections:
            connection.kill()
        for connection in connections:
            connection.exit(stream.END_S)
        self._starter.close()
        self._session.close()

    def forget(self) -> None:
        """In a forked child: Ray is the parent's, and can't be used here."""
        self._starter.forget()
        self._session.forget()

    def _check_open(self, generation: int) -> None:
        if self._closed != generation or not ray.is_initialized():  # else Ray would start a cluster
            raise BackendUnavailable("the ray backend was shut down while a worker started")

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


_backends: weakref.WeakSet[RayBackend] = weakref.WeakSet()


def _after_fork() -> None:
    for backend in list(_backends):
        backend.forget()


os.register_at_fork(after_in_child=_after_fork)
