"""All pools of this process: which one a handle uses, who makes room for whom, and the end of them all."""

from __future__ import annotations

import atexit
import itertools
import os
import sys
import threading
from typing import TYPE_CHECKING, Any

from flowfn.backends import registry
from flowfn.pool import Pool

if TYPE_CHECKING:
    from flowfn.backends.base import Backend
    from flowfn.spec import FunctionSpec

_pools: dict[Any, Pool] = {}
_kept: list[Pool] = []  # of executors: theirs alone
_leaving: list[Pool] = []  # to be closed; if Ctrl-C comes before they are, by the next who closes all
_lock = threading.Lock()
_generations = itertools.count()
current = next(_generations)  # changes when handles must look up their pool anew
# Variables by which stores of data are found, and who asks them.
_IDENTITY = (
    b"AWS_ACCESS_KEY_ID",
    b"AWS_SECRET_ACCESS_KEY",
    b"AWS_SESSION_TOKEN",
    b"AWS_PROFILE",
    b"AWS_REGION",
    b"AWS_DEFAULT_REGION",
    b"AWS_ENDPOINT_URL",
    b"AWS_ENDPOINT_URL_S3",
    b"GOOGLE_APPLICATION_CREDENTIALS",
    b"AZURE_STORAGE_CONNECTION_STRING",
    b"AZURE_STORAGE_ACCOUNT_NAME",
    b"AZURE_STORAGE_ACCOUNT_KEY",
    b"AZURE_STORAGE_SAS_TOKEN",
    b"HF_TOKEN",
    b"FLOW_STORAGE",
    b"FLOW_STORE",
    b"FLOW_VOLUMES",
)


def pool_for(spec: FunctionSpec) -> Pool:
    """The pool of this spec's shape, made at the first use.

    Raises ConfigError if `secrets=` names variables that are not set.
    """
    backend = registry.get(spec.backend)
    backend.begin()
    if spec.secrets and isinstance(spec.secrets, tuple):
        values = spec.environment(os.environ)  # as they are now: a worker that has others will not do
        spec = spec.replace(secrets={name: values[name] for name in spec.secrets})
    key = (id(backend), spec.shape)
    code = code_of(backend)
    with _lock:
        pool = _pools.get(key)
        if pool is None or pool.closed or pool.code != code:
            if pool is not None and not pool.closed:
                pool.run_out()
                _kept[:] = [*(other for other in _kept if not other.closed), pool]
            pool = _pools[key] = Pool(backend, spec)
            pool.code = code
        return pool


def code_of(backend: Backend) -> int:
    """Which state a new worker would get: of the project; where workers see the files themselves, of who asks stores.

    Whoever was refused some data, and sets AWS_ACCESS_KEY_ID then, is not to be refused by the workers that are there.
    """
    if not backend.ships_project:
        environ: Any = getattr(
            os.environ, "_data", os.environb
        )  # as bytes: a tenth of the time, on the way of every call
        return hash(tuple(map(environ.get, _IDENTITY)))
    from flowfn import userproject

    return userproject.generation()


def _rivals(pool: Pool) -> list[Pool]:
    """The other pools whose workers hold GPUs of the same backend."""
    everybody = [*_pools.values(), *_kept]
    return [other for other in everybody if other.spec.gpu and other is not pool and other.backend is pool.backend]


def starved(pool: Pool) -> bool:
    """Whether another pool waits for GPUs, such as this one's workers have."""
    return any(other._starting and not other.backend.has_room(other.spec) for other in _rivals(pool))


def make_room(pool: Pool) -> None:
    """Idle workers of other shapes give their GPUs up for one that is to start, until there is room for it."""
    while not pool.backend.has_room(pool.spec):
        idle = [(worker.idle_since, id(worker), worker, other) for other in _rivals(pool) for worker in other._idle]
        if not idle:
            return  # all are busy: it waits for one that ends
        _, _, worker, other = min(idle)
        other.retire(worker)


def retire_idle(backend: Backend, spec: FunctionSpec) -> bool:
    """Where calls wait for a worker of `spec` that can't start: end an idle worker of another pool.

    Of this backend, or of one of its kind: a cluster's queue is the same for all.
    For backends that learn of it while they wait. One that may hold the GPUs that are waited for goes first, then the
    one that was idle longest. Whether there was one.
    """
    if not wanted(backend, spec):
        return False
    everybody = [pool for pool in [*_pools.values(), *_kept] if type(pool.backend) is type(backend)]
    others = [pool for pool in everybody if not pool._tickets]
    idle = [
        (not _alike(spec, other.spec), worker.idle_since, id(worker), worker, other)
        for other in others
        for worker in list(other._idle)
    ]
    if idle:
        *_, worker, other = min(idle)
        other.retire(worker)
    return bool(idle)


def _alike(one: FunctionSpec, other: FunctionSpec) -> bool:
    """Whether workers of the one may hold what those of the other need: GPUs of the same model, or none."""
    if not one.gpu or not other.gpu:
        return not one.gpu and not other.gpu
    models = {gpu.model for gpu in one.gpu}, {gpu.model for gpu in other.gpu}
    return None in models[0] | models[1] or bool(models[0] & models[1])


def wanted(backend: Backend, spec: FunctionSpec) -> bool:
    """Whether calls wait for workers of this shape."""
    everybody = [pool for pool in [*_pools.values(), *_kept] if pool.backend is backend]
    return any(pool._tickets for pool in everybody if pool.spec.shape == spec.shape)


def keep(pool: Pool) -> None:
    """A pool that is found by nobody, but ends with the process all the same."""
    with _lock:
        _kept[:] = [other for other in _kept if not other.closed]
        _kept.append(pool)


def shutdown() -> None:
    """End all workers of this process; calls that run are cancelled. Later calls start new ones."""
    global current
    with _lock:
        _leaving.extend((*_pools.values(), *_kept))
        _pools.clear()
        _kept.clear()
        current = next(_generations)
    for pool in list(_leaving):
        pool.close()
    registry.close_all()
    _leaving.clear()


def _at_exit() -> None:
    waiting = sum(pool.helpers.unfinished for pool in [*_pools.values(), *_kept])
    if waiting:
        calls = "1 call was" if waiting == 1 else f"{waiting} calls were"
        print(
            f"flowfn: {calls} not finished when the program ended, and cancelled; "
            "wait with .result(), or use .submit() for calls that go on",
            file=sys.stderr,
        )
    shutdown()


def _after_fork() -> None:
    """A forked child has the parent's sockets but none of its threads: it forgets everything and starts anew."""
    global _lock, current
    from flowfn import clock as clock_module

    _lock = threading.Lock()
    current = next(_generations)
    clock_module.forget()
    for pool in [*_pools.values(), *_kept]:
        pool.closed = True
        for worker in pool._alive:
            worker.forget()
    for name in ("call", "executor", "terminal"):
        if (module := sys.modules.get(f"flowfn.{name}")) is not None:
            module.forget()
    _pools.clear()
    _kept.clear()
    registry.forget()


atexit.register(_at_exit)
os.register_at_fork(after_in_child=_after_fork)
