"""How workers on Ray are started: Ray is asked for room, the node for the worker, and both are waited for.

A node that can reach this client's door hands the worker in there. One that can't is remembered, and its workers are
relayed.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import ray
import ray.exceptions

from flowfn import terminal
from flowfn.backends import ray_connection, ray_door, ray_lease, ray_resources, ray_session, stream
from flowfn.backends.ray_gate import gate
from flowfn.bundle import bundle
from flowfn_runtime.errors import BackendUnavailable, ResourceUnavailable

if TYPE_CHECKING:
    from flowfn.backends.base import Backend
    from flowfn.spec import FunctionSpec

LOOK_S = 0.25  # how often it is looked at why a worker does not start
ROOM_S = 3.0  # after so long idle workers make room, whatever Ray says of what is free
UNWANTED_S = 10.0  # after so long a worker that no call waits for any more is given up
CONNECT_S = 2.0  # for a node to reach the door: what lets nothing pass may not even refuse
CONNECT_OUTSIDE_S = 1.0  # where the client is outside of the cluster, and that is likely


class Wanted(NamedTuple):
    """A worker that is asked for."""

    backend: Backend
    spec: FunctionSpec
    need: ray_resources.Need
    options: dict[str, Any]  # for Ray
    meanwhile: Callable[[], object]  # what there is to do once Ray was asked


class Starter:
    """Starts the workers of a backend, and gives up on them."""

    def __init__(self, session: ray_session.Session, *, cache: str | None, wait_s: float, direct: bool) -> None:
        self._session = session
        self._cache = cache
        self._wait_s = wait_s
        self._direct = direct
        self._door: ray_door.Door | None = None
        self._far: set[str] = set()  # nodes that don't reach the door
        self._packed: tuple[str, Any] = ("", None)  # the runtime in the object store of which session
        self._leases: set[ray_door.Lease] = set()  # that were asked for and are not there
        self._waiting: set[ray_door.Lease] = set()  # of these, those that Ray has no room for
        self._lock = threading.Lock()

    @property
    def waits_for_room(self) -> bool:
        return bool(self._waiting)

    def door(self) -> ray_door.Door:
        """Where workers are handed in, as long as this is connected."""
        with self._lock:
            if self._door is None:
                self._door = ray_door.Door(self._session.own_address())
            return self._door

    def give_up(self) -> None:
        """Nobody wants what is being started."""
        leases = list(self._leases)
        for lease in leases:
            lease.give_up()
        for lease in leases:
            lease.over.wait(stream.END_S)

    def close(self) -> None:
        with self._lock:
            door, self._door = self._door, None
            if door is not None:
                door.close()
            self._far.clear()

    def forget(self) -> None:
        """In a forked child: Ray is the parent's, and can't be used here."""
        if self._door is not None:
            self._door.left()
        self._door = None
        self._lock = threading.Lock()

    def start(self, wanted: Wanted) -> Any:
        """Start a worker's program where Ray has room for it: its connection."""
        try:
            order = {
                "digest": bundle().digest,
                "cache": self._cache,
                "environ": {"FLOW_CACHE": self._cache} if self._cache else {},
                "drop": [] if wanted.spec.cpu else ["OMP_NUM_THREADS"],  # Ray sets it by what a task asks for
            }
            with gate:
                return self._start(wanted, order)
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
        except ray_door.GONE as error:
            raise self._session.lost(error) from error

    def _start(self, wanted: Wanted, order: dict[str, Any]) -> Any:
        if self._direct:
            lodged = self._lodge(wanted, order, [])
            if lodged == {"lacks": order["digest"]}:  # most nodes have it: it is packed when one does not
                lodged = self._lodge(wanted, order, [self._runtime()])
            if not isinstance(lodged, dict):
                return lodged
            self._far.add(lodged["node"])
            wanted = wanted._replace(options={**wanted.options, "scheduling_strategy": _on(lodged["node"])})
        return self._relay(wanted, order, [self._runtime()])

    def _runtime(self) -> Any:
        """A reference to the runtime in Ray's object store; put there once."""
        session = ray.get_runtime_context().get_job_id()
        with self._lock:
            if self._packed[0] != session:
                self._packed = session, ray.put(bundle().pack())
            return self._packed[1]

    def _lodge(
        self, wanted: Wanted, order: dict[str, Any], packed: list[Any]
    ) -> ray_connection.RayConnection | dict[str, Any]:
        """A worker that was handed in at the door, or why not: see `ray_lease.lodge`."""
        door = self.door()
        lease = door.lease()
        self._leases.add(lease)
        try:
            connect_s = CONNECT_OUTSIDE_S if self._session.outside else CONNECT_S
            order = {**order, **door.order(lease), "far": list(self._far), "connect_s": connect_s}
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
            connection = ray_connection.RayConnection(lease, *handed_in)
            self._session.keep(connection)
            return connection
        if lease.answer and "said" not in lease.answer:
            return lease.answer
        if lease.error is not None and not lease.given_up:
            raise lease.error
        if lease.answer:
            raise BackendUnavailable(f"a worker's program ended early: {lease.answer['said'].decode(errors='replace')}")
        raise BackendUnavailable("the ray backend was shut down while a worker started")

    def _wait(self, lease: ray_door.Lease, wanted: Wanted) -> None:
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
                pools.retire_idle(wanted.backend, wanted.spec)
            if waited > UNWANTED_S and not pools.wanted(wanted.backend, wanted.spec):
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

    def _relay(self, wanted: Wanted, order: dict[str, Any], packed: list[Any]) -> ray_connection.RelayedConnection:
        options = {name: value for name, value in wanted.options.items() if name != "max_retries"}
        actor = _Relay.options(max_restarts=0, **options).remote(order, packed)
        lease = ray_door.Lease()
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
