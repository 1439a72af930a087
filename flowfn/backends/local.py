"""The embedded backend: workers on this machine, nothing to install or start.

A host process (`flowfn_runtime.host`) forks the workers; there is one for all workers that can share it, and one for
each combination of mounts, in a filesystem of its own. A worker's stream is a socket pair, and a second one passes the
descriptors of shared memory.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flowfn import config
from flowfn.backends import local_host
from flowfn.backends.base import Backend, Connection
from flowfn.backends.local_host import Host
from flowfn_runtime import paths
from flowfn_runtime.errors import BackendUnavailable, FlowError

if TYPE_CHECKING:
    from flowfn.spec import FunctionSpec

_ATTEMPTS = 3  # when somebody kills the host at the very moment it is asked for a worker

_backends: weakref.WeakSet[LocalBackend] = weakref.WeakSet()


def _after_fork() -> None:
    for host in list(local_host.hosts):
        host.forget()
    local_host.hosts.clear()
    for backend in list(_backends):
        backend.forget()


os.register_at_fork(after_in_child=_after_fork)


class LocalBackend(Backend):
    """Workers on this machine.

    `accelerated=False` does without shared memory: everything goes through the byte stream, as it does to other
    machines.
    """

    name = "local"

    def __init__(self, *, accelerated: bool = True) -> None:
        self.accelerated = accelerated and hasattr(os, "memfd_create")
        self.forget()
        _backends.add(self)

    def forget(self) -> None:
        """In a forked child: the hosts are the parent's."""
        self._hosts: dict[Any, Host] = {}
        self._lock = threading.Lock()

    def jobs(self) -> None:
        """This host runs its tasks itself."""

    def connect(self, spec: FunctionSpec) -> Connection:
        if spec.image is not None:
            raise BackendUnavailable(
                f"image={spec.image!r}: the local backend runs functions in this Python's own environment",
                hint='leave image= out, or choose a backend that has images, such as backend="container"',
            )
        env = spec.environment(os.environ)
        request: dict[str, Any] = {"home": paths.home()}
        if spec.memory:
            request["memory"] = spec.memory
        if spec.cpu:
            request["cpus"] = spec.cpu
        if spec.gpu:
            request["gpus"] = list(map(str, spec.gpu))
            request["declared_gpus"] = config.load().gpus
        for attempt in range(_ATTEMPTS):
            host = self._host(spec, env)
            try:
                return host.connect(request, env, self.accelerated)
            except BackendUnavailable:
                if attempt == _ATTEMPTS - 1 or not host.was_ended():
                    raise
        raise AssertionError

    def _host(self, spec: FunctionSpec, env: Mapping[str, str]) -> Host:
        early = tuple(sorted((k, v) for k, v in env.items() if k.startswith(local_host.EARLY)))
        mounted = spec.shape if spec.mounts else None
        with self._lock:
            host = self._hosts.get((mounted, early))
            if host is None or not host.alive:
                if host is not None:
                    host.close()
                launch = None
                if spec.mounts:
                    settings = config.load()
                    launch = {
                        "mounts": [settings.with_options(mount).to_dict() for mount in spec.mounts],
                        "env": dict(env),
                        "environ": settings.data_environment(env),
                        "project": settings.project,
                        "boot": local_host.BOOT,
                        "cwd": local_host.cwd(),
                    }
                host = self._hosts[(mounted, early)] = Host(env, launch)
        host.staged.wait()
        if host.error is not None:
            with self._lock:
                if self._hosts.get((mounted, early)) is host:
                    del self._hosts[(mounted, early)]
            host.close()
            raise host.error
        return host

    def describe(self) -> str:
        from flowfn_runtime import gpus, limits, sandbox

        try:
            sandbox.check()
            mounts = ""
        except FlowError as error:
            mounts = f"; no mounts: {error.message}"
        return f"{limits.cores()} cores, {gpus.inventory(config.load().gpus)}{mounts}"

    def slots(self, spec: FunctionSpec) -> int:
        if spec.gpu:
            from flowfn_runtime import gpus

            there = gpus.inventory(config.load().gpus)
            gpus.check(spec.gpu, there)
            fit = [sum(g.fits(gpu.model, gpu.memory_bytes) for gpu in there.gpus) // g.count for g in spec.gpu]
            return max(fit)
        from flowfn_runtime import limits

        return max(1, int(limits.cores() // spec.cpu)) if spec.cpu else limits.cores()

    def has_room(self, spec: FunctionSpec) -> bool:
        if not spec.gpu:
            return True
        from flowfn_runtime import gpus

        free = gpus.free(gpus.inventory(config.load().gpus))
        return any(sum(g.fits(gpu.model, gpu.memory_bytes) for gpu in free) >= g.count for g in spec.gpu)

    def close(self) -> None:
        with self._lock:
            for key, host in list(self._hosts.items()):
                host.close()  # if this is interrupted, it can be closed again
                self._hosts.pop(key, None)
