"""This process's connection to a Ray cluster: made when it is needed, and watched for as long as workers run there."""

from __future__ import annotations

import ipaddress
import logging
import os
import threading
import time
import weakref
from collections.abc import Mapping
from typing import Any

import ray
import ray.exceptions

from flowfn import threads
from flowfn.backends import ray_connection, ray_door
from flowfn.backends.base import Connection
from flowfn.backends.ray_gate import gate
from flowfn.backends.ray_talk import knock
from flowfn_runtime.errors import BackendUnavailable

WATCH_S = 5.0  # how often it is looked whether the cluster's head is there
HEAD_S = 5.0  # how long a head that was there may be gone
LOOK_S = 0.25
END_S = 5.0  # for those who use the connection to be done with it
CONNECTS = 3  # attempts to be connected through `ray://`


class Session:
    """A connection of the user's, who has said `ray.init`, or one of ours."""

    def __init__(self, address: str | None) -> None:
        self.address = address
        self._ours = False
        self._open: weakref.WeakSet[Any] = weakref.WeakSet()
        self._watched = False
        self._lock = threading.Lock()

    @property
    def connected(self) -> bool:
        return ray.is_initialized() and not _forked

    def open(self) -> None:
        """Be connected to the cluster, or start one here."""
        if _forked:
            raise BackendUnavailable(
                "this process was forked from one that uses Ray, and Ray can't be used in both",
                hint='start processes with the method "spawn"',
            )
        with self._lock:
            if ray.is_initialized():
                return
            knock(self.address or os.environ.get("RAY_ADDRESS") or "")
            # Which thread connects is no matter to us, and Ray warns that it takes no SIGTERM in this one.
            logger = logging.getLogger("ray._private.worker")
            level = logger.level
            logger.setLevel(logging.ERROR)
            try:
                self._connect()
            except (ConnectionError, ValueError, RuntimeError, OSError, ray.exceptions.RayError) as error:
                where = self.address or os.environ.get("RAY_ADDRESS") or "this machine"
                raise BackendUnavailable(
                    f"no Ray cluster can be had at {where}: {error}",
                    hint="is it running, and the address right? `ray status` tells",
                ) from error
            finally:
                logger.setLevel(level)
            self._ours = True

    def _connect(self) -> None:
        for attempt in range(CONNECTS):
            try:
                ray.init(address=self.address, log_to_driver=False, logging_level="ERROR", namespace="flowfn")
                return
            except ConnectionAbortedError as error:
                # `ray://` starts a process for each client, and gives a busy head half a minute for it.
                if "Initialization failure from server" not in str(error) or attempt == CONNECTS - 1:
                    raise

    def close(self) -> None:
        """End the connection, if it is ours."""
        with self._lock:
            ours, self._ours = self._ours, False
        if ours:
            gate.shut(END_S)
            try:
                with self._lock:
                    ray.shutdown()
            finally:
                gate.open()

    def forget(self) -> None:
        """In a forked child: Ray is the parent's, and can't be used here."""
        self._ours = self._watched = False
        self._lock = threading.Lock()

    def nodes(self) -> list[Mapping[str, float]]:
        """The resources of the nodes that are alive."""
        self.open()
        try:
            with gate:
                self.look_up()
                return [node["Resources"] for node in ray.nodes() if node["Alive"]]
        except ray_door.GONE as error:
            raise self.lost(error) from error

    @property
    def outside(self) -> bool:
        """Whether this process is on no machine of the cluster, but connected through `ray://`."""
        from ray.util.client import ray as client

        return bool(client.is_connected())

    def own_address(self) -> str | None:
        """By which the cluster's nodes may find this process by TCP, if it is as safe as what Ray says, and known."""
        if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
            return None
        if not self.outside:
            address: str = ray.util.get_node_ip_address()
            return address
        own = knock(self.address or os.environ.get("RAY_ADDRESS") or "")
        return None if own is None or ipaddress.ip_address(own).is_loopback else own  # a tunnel leads one way

    # whether the cluster is there

    def lost(self, error: BaseException) -> BackendUnavailable:
        """What an error of Ray's means."""
        return BackendUnavailable(
            f"the Ray cluster at {self.address or 'here'} does not answer: {ray_connection.summary(error)}",
            hint="is it running? `ray status` tells",
        )

    def look_up(self) -> None:
        """Raise BackendUnavailable if the head of the cluster is gone: Ray waits a minute, and then ends this process.

        It may come back at once, where somebody restarts it.
        """
        try:
            address = ray.get_runtime_context().gcs_address
        except Exception:  # Ray's client has none
            return
        deadline = time.monotonic() + HEAD_S
        while True:
            try:
                knock(address)
                return
            except BackendUnavailable:
                if time.monotonic() > deadline:
                    raise
                time.sleep(LOOK_S)

    def keep(self, connection: Connection) -> None:
        """Remember a worker, and watch that its node and the cluster's head are there as long as there are any."""
        with self._lock:
            self._open.add(connection)
            if self._watched:
                return
            self._watched = True
        threads.start(self._watch)

    def workers(self) -> list[Connection]:
        """Those that somebody still has."""
        return list(self._open)

    def _watch(self) -> None:
        while True:
            time.sleep(WATCH_S)
            with self._lock:
                open_now = list(self._open)
                if not open_now or not ray.is_initialized():
                    self._watched = False
                    return
            try:
                with gate:
                    if not ray.is_initialized():
                        continue
                    self.look_up()
                    dead = {node["NodeID"] for node in ray.nodes() if not node["Alive"]}
                lost = [connection for connection in open_now if connection.said_first["node"] in dead]
            except (BackendUnavailable, *ray_door.GONE):
                lost = open_now
            for connection in lost:  # it may not have noticed; who waits for it hears of it
                connection.kill()
            del open_now, lost


def free() -> list[Mapping[str, float]]:
    """What is free on each node, as far as Ray says; of all together where it does not say more."""
    try:
        from ray._private import state

        per_node: dict[str, Mapping[str, float]] = state.available_resources_per_node()
        return list(per_node.values())
    except Exception:  # not Ray's promise, and no part of its client
        return [ray.available_resources()]


_forked = False


def _after_fork() -> None:
    global _forked
    _forked = _forked or ray.is_initialized()


os.register_at_fork(after_in_child=_after_fork)
