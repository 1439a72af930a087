"""Workers of one shape: started on demand, lent to one call or map at a time, ended when idle for long."""

from __future__ import annotations

import atexit
import itertools
import os
import sys
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

from flowfn.backends import registry
from flowfn.clock import Timer, clock
from flowfn.worker import Worker
from flowfn_runtime.errors import BackendError, CallCancelled, FlowError

if TYPE_CHECKING:
    from collections.abc import Callable

    from flowfn.backends.base import Backend
    from flowfn.spec import FunctionSpec

IDLE_TIMEOUT_S = 300.0
IDLE_TIMEOUT_GPU_S = 60.0  # others may wait for the GPU


class Load(NamedTuple):
    """What a pool looks at when it decides whether to start workers."""

    waiting: int  # calls that wait for a worker
    starting: int
    alive: int  # started workers, lent or idle
    most: int


def to_start(load: Load) -> int:
    """How many workers to start now: one for each call that waits and has none coming, up to the limit."""
    return max(0, min(load.waiting - load.starting, load.most - load.alive - load.starting))


class Ticket:
    """A call's place in the queue for a worker: a lock that is opened when there is a worker or an error."""

    __slots__ = ("cancelled", "error", "gate", "worker")

    def __init__(self) -> None:
        self.gate = threading.Lock()
        self.gate.acquire()
        self.worker: Worker | None = None
        self.error: BaseException | None = None
        self.cancelled = False


class Pool:
    """The workers of one shape on one backend. All methods may be called from any thread."""

    def __init__(self, backend: Backend, spec: FunctionSpec) -> None:
        self.backend = backend
        self.spec = spec
        self.max_workers = spec.max_workers or backend.slots(spec)
        usual = IDLE_TIMEOUT_GPU_S if spec.gpu else IDLE_TIMEOUT_S
        self.idle_timeout = usual if spec.idle_timeout is None else spec.idle_timeout
        self.closed = False
        self._lock = threading.Lock()
        self._idle: list[Worker] = []  # the last is the one used last
        self._alive: set[Worker] = set()
        self._starting = 0
        self._tickets: deque[Ticket] = deque()
        self._timer: Timer | None = None
        self._jobs: deque[Callable[[], object]] = deque()  # what the helper threads do, see `run_later`
        self._jobs_ready = threading.Condition(self._lock)
        self._helpers = 0
        self._helpers_idle = 0
        self._busy = 0

    # lending

    def acquire(self, ticket: Ticket | None = None) -> Worker:
        """A worker of one's own until `release` or `discard`. Waits for one; raises what starting one raised."""
        with self._lock:
            if self._idle and not self._tickets:
                return self._idle.pop()
            if self.closed:
                raise CallCancelled("the pool was shut down")
            ticket = ticket or Ticket()
            self._tickets.append(ticket)
            self._start_some()
        try:
            ticket.gate.acquire()
        except BaseException:  # Ctrl-C while waiting
            self.give_up(ticket)
            raise
        if ticket.worker is not None:
            return ticket.worker
        if ticket.error is not None:
            raise ticket.error
        raise CallCancelled("the call was cancelled while it waited for a worker")

    def expect(self) -> None:
        """A call will come in a moment: if there is no worker at all, the first is started now."""
        if not self._alive and not self._starting and not self.closed:
            with self._lock:
                if not self._alive and not self._starting:
                    self._start(1)

    def try_acquire(self) -> Worker | None:
        """An idle worker, if there is one and nobody waits for it."""
        with self._lock:
            return self._idle.pop() if self._idle and not self._tickets else None

    def give_up(self, ticket: Ticket) -> None:
        """The call no longer wants a worker."""
        with self._lock:
            ticket.cancelled = True
            worker, ticket.worker = ticket.worker, None
            if worker is None and ticket in self._tickets:
                self._tickets.remove(ticket)
        if worker is not None:
            self.release(worker)
        elif ticket.gate.locked():
            ticket.gate.release()

    def release(self, worker: Worker) -> None:
        """Give a worker back that is ready for the next call."""
        if worker.broken:
            self.discard(worker)
            return
        with self._lock:
            if self.closed:
                self._alive.discard(worker)
            elif self._tickets:
                self._hand_out(worker)
                return
            else:
                worker.idle_since = time.monotonic()
                self._idle.append(worker)
                if self._timer is None:
                    self._timer = clock.later(self.idle_timeout, self._expire)
                return
        worker.close()

    def discard(self, worker: Worker) -> None:
        """Give a worker back that is dead or was killed."""
        worker.close()
        with self._lock:
            self._alive.discard(worker)
            self._start_some()

    @property
    def waited_for(self) -> bool:
        """Whether calls wait for a worker of this pool."""
        return bool(self._tickets)

    def _hand_out(self, worker: Worker) -> None:
        ticket = self._tickets.popleft()
        ticket.worker = worker
        ticket.gate.release()

    # starting and ending workers

    def _start_some(self) -> None:
        """Start what the load asks for. The caller has the lock."""
        if self.closed:
            return
        load = Load(len(self._tickets), self._starting, len(self._alive), self.max_workers)
        self._start(to_start(load))

    def _start(self, count: int) -> None:
        for _ in range(count):
            self._starting += 1
            threading.Thread(target=self._start_one, name="flowfn-start", daemon=True).start()

    def _start_one(self) -> None:
        worker = error = None
        try:
            worker = Worker(self.backend.connect(self.spec))
            worker.greet()
        except BaseException as problem:
            error = problem
            if worker is not None:
                worker.kill()
                worker.close()
        with self._lock:
            self._starting -= 1
            if error is None and worker is not None:
                if not self.closed:
                    self._alive.add(worker)
                    if self._tickets:
                        self._hand_out(worker)
                    else:
                        self._make_idle(worker)
                    return
            elif not self._alive and not self._starting:
                # Nobody else can serve those who wait.
                if not isinstance(error, FlowError):
                    error = BackendError(f"a worker could not be started: {type(error).__name__}: {error}")
                tickets, self._tickets = self._tickets, deque()
                for ticket in tickets:
                    ticket.error = error
                    ticket.gate.release()
                return
            else:
                return
        worker.close()

    def _make_idle(self, worker: Worker) -> None:
        worker.idle_since = time.monotonic()
        self._idle.append(worker)
        if self._timer is None:
            self._timer = clock.later(self.idle_timeout, self._expire)

    def _expire(self) -> None:
        """End the workers that were idle for too long. In the clock's thread."""
        with self._lock:
            limit = time.monotonic() - self.idle_timeout
            old = [worker for worker in self._idle if worker.idle_since <= limit + 0.001]
            self._idle = [worker for worker in self._idle if worker not in old]
            self._alive.difference_update(old)
            self._timer = None
            if self._idle:
                oldest = min(worker.idle_since for worker in self._idle)
                self._timer = clock.later(max(0.01, oldest - limit), self._expire)
        for worker in old:
            worker.close()

    def close(self) -> None:
        """End all workers; calls that wait are cancelled, running ones lose their worker."""
        with self._lock:
            self.closed = True
            idle, self._idle = self._idle, []
            busy = self._alive.difference(idle)
            self._alive = set()
            tickets, self._tickets = self._tickets, deque()
            self._jobs_ready.notify_all()
            if self._timer is not None:
                self._timer.cancel()
        for ticket in tickets:
            ticket.gate.release()
        for worker in idle:
            worker.close()
        for worker in busy:
            worker.shut_down()

    # threads that wait for workers in place of the caller

    def run_later(self, job: Callable[[], object]) -> None:
        """Run `job` in a helper thread. There are never more of these than workers; the rest waits in order."""
        with self._lock:
            if self.closed:
                raise CallCancelled("the pool was shut down")
            self._jobs.append(job)
            if self._helpers_idle >= len(self._jobs):
                self._jobs_ready.notify()
            elif self._helpers < self.max_workers:
                self._helpers += 1
                threading.Thread(target=self._help, name="flowfn-calls", daemon=True).start()

    @property
    def unfinished(self) -> int:
        """How many calls of futures are not done."""
        return len(self._jobs) + self._busy

    def _help(self) -> None:
        while True:
            with self._lock:
                while not self._jobs:
                    self._helpers_idle += 1
                    signalled = self._jobs_ready.wait(30)
                    self._helpers_idle -= 1
                    if not self._jobs and (self.closed or not signalled):
                        self._helpers -= 1
                        return
                job = self._jobs.popleft()
                self._busy += 1
            job()
            del job  # it holds a call's arguments
            with self._lock:
                self._busy -= 1


_pools: dict[Any, Pool] = {}
_kept: list[Pool] = []  # of executors: theirs alone
_lock = threading.Lock()
_generations = itertools.count()
current = next(_generations)  # changes when handles must look up their pool anew


def pool_for(spec: FunctionSpec) -> Pool:
    """The pool of this spec's shape, made at the first use."""
    backend = registry.get(spec.backend)
    key = (id(backend), spec.shape)
    with _lock:
        pool = _pools.get(key)
        if pool is None or pool.closed:
            pool = _pools[key] = Pool(backend, spec)
        return pool


def keep(pool: Pool) -> None:
    """A pool that is found by nobody, but ends with the process all the same."""
    with _lock:
        _kept[:] = [other for other in _kept if not other.closed]
        _kept.append(pool)


def shutdown() -> None:
    """End all workers of this process; calls that run are cancelled. Later calls start new ones."""
    global current
    with _lock:
        pools = [*_pools.values(), *_kept]
        _pools.clear()
        _kept.clear()
        current = next(_generations)
    for pool in pools:
        pool.close()
    registry.close_all()


def _at_exit() -> None:
    waiting = sum(pool.unfinished for pool in [*_pools.values(), *_kept])
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
    if (calls := sys.modules.get("flowfn.call")) is not None:
        calls.forget()
    current = next(_generations)
    clock_module.forget()
    for pool in [*_pools.values(), *_kept]:
        for worker in pool._alive:
            worker.forget()
    _pools.clear()
    _kept.clear()
    registry.forget()


atexit.register(_at_exit)
os.register_at_fork(after_in_child=_after_fork)
