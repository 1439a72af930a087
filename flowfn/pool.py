"""Workers of one shape: started on demand, lent to one call or map at a time, ended when idle for long."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from flowfn import threads
from flowfn.backends import registry
from flowfn.clock import Timer, clock
from flowfn.helpers import Helpers
from flowfn.worker import Worker
from flowfn_runtime.errors import BackendError, CallCancelled, FlowError

if TYPE_CHECKING:
    from flowfn.backends.base import Backend
    from flowfn.spec import FunctionSpec

IDLE_TIMEOUT_S = 300.0
IDLE_TIMEOUT_GPU_S = 60.0  # others may wait for the GPU
AGAIN_S = 1.0  # until a start that failed is tried again; doubled each time, up to 32 times as long
RETIRE_WAIT_S = 2.0  # how long an idle worker that makes room for another may take to end


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

    __slots__ = ("error", "gate", "owner", "worker")

    def __init__(self, owner: object = None) -> None:
        self.owner = owner
        self.gate = threading.Lock()
        self.gate.acquire()
        self.worker: Worker | None = None
        self.error: BaseException | None = None

    def wait(self) -> None:
        """Until it is opened."""
        self.gate.acquire()

    def open(self) -> None:
        """Let go who waits. Safe to repeat: a worker, an error and a cancellation may come at the same time."""
        try:
            self.gate.release()
        except RuntimeError:
            pass


class Pool:
    """The workers of one shape on one backend. All methods may be called from any thread."""

    def __init__(self, backend: Backend, spec: FunctionSpec) -> None:
        self.backend = backend
        self.spec = spec
        self.max_workers = spec.max_workers or backend.slots(spec)
        usual = IDLE_TIMEOUT_GPU_S if spec.gpu else IDLE_TIMEOUT_S
        self.idle_timeout = usual if spec.idle_timeout is None else spec.idle_timeout
        self.closed = False
        self.code = 0  # what its workers have started with: see `pools.code_of`
        self._lock = threading.Lock()
        self._idle: list[Worker] = []  # the last is the one used last
        self._alive: set[Worker] = set()
        self._starting = 0
        self._tickets: deque[Ticket] = deque()
        self._timer: Timer | None = None
        self._failed_starts = 0  # since one went well
        self.helpers = Helpers(self.max_workers)

    # lending

    def acquire(self, ticket: Ticket | None = None) -> Worker:
        """A worker of one's own until `release` or `discard`. Waits for one; raises what starting one raised."""
        ticket = ticket or Ticket()
        try:
            with self._lock:
                if self._idle and not self._tickets:
                    self._lend(ticket)
                elif self.closed:
                    raise CallCancelled("the pool was shut down")
                else:
                    self._tickets.append(ticket)
                    self._start_some()
            if ticket.worker is None:
                ticket.wait()
            if ticket.error is not None:
                raise ticket.error
            with self._lock:
                if ticket.worker is None:
                    raise CallCancelled("the call was cancelled while it waited for a worker")
                return ticket.worker
        except BaseException:  # cancelled, or Ctrl-C while waiting
            self.give_up(ticket)
            raise

    def expect(self) -> None:
        """A call will come in a moment: if there is no worker at all, the first is started now."""
        if not self._alive and not self._starting and not self.closed:
            with self._lock:
                if not self._alive and not self._starting:
                    self._start(1)

    def try_acquire(self, owner: object) -> Worker | None:
        """An idle worker, if there is one and nobody waits for it."""
        with self._lock:
            if not self._idle or self._tickets:
                return None
            # Not pop(): Ctrl-C comes between two bytecodes, and at none of them may a worker be nobody's.
            worker = self._idle[-1]
            worker.owner = owner
            del self._idle[-1]
            return worker

    def _lend(self, ticket: Ticket) -> None:
        worker = self._idle[-1]
        worker.owner = ticket.owner
        ticket.worker = worker
        del self._idle[-1]

    def give_up(self, ticket: Ticket) -> None:
        """The call no longer wants a worker."""
        with self._lock:
            worker, ticket.worker = ticket.worker, None
            if ticket in self._tickets:
                self._tickets.remove(ticket)
        if worker is not None:
            self.release(worker)

    def reclaim(self, owner: object) -> None:
        """A call was broken off, by Ctrl-C, at a moment that nobody knows: end the worker that it has, if any."""
        with self._lock:
            self._tickets = deque(ticket for ticket in self._tickets if ticket.owner is not owner)
            workers = [worker for worker in self._alive if worker.owner is owner and worker not in self._idle]
        for worker in workers:
            worker.kill()
            self.discard(worker)

    def release(self, worker: Worker) -> None:
        """Give a worker back that is ready for the next call."""
        if worker.broken:
            self.discard(worker)
            return
        needed = self.others_need_gpus
        with self._lock:
            if self.closed or (needed and not self._tickets):
                self._alive.discard(worker)
            elif self._tickets:
                self._hand_out(worker)
                return
            else:
                self._make_idle(worker)
                return
        worker.close()

    def discard(self, worker: Worker) -> None:
        """Give a worker back that is dead or was killed."""
        worker.close()
        with self._lock:
            self._alive.discard(worker)
        self._start_missing()

    @property
    def waited_for(self) -> bool:
        """Whether calls wait for a worker of this pool, or for its GPUs."""
        return bool(self._tickets) or self.others_need_gpus

    @property
    def others_need_gpus(self) -> bool:
        """Whether another pool waits for GPUs such as this one's workers hold."""
        if not self.spec.gpu:
            return False
        from flowfn import pools

        return pools.starved(self)

    def run_out(self) -> None:
        """No more calls will come: idle workers end now, the others when they become idle."""
        with self._lock:
            self.idle_timeout = 0.0
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            idle = list(self._idle)
        for worker in idle:
            with self._lock:
                if worker not in self._idle:
                    continue
                self._idle.remove(worker)
                self._alive.discard(worker)
            worker.close()

    def retire(self, worker: Worker) -> None:
        """End a worker if it is idle; returns when it is gone."""
        with self._lock:
            if worker not in self._idle:
                return
            self._idle.remove(worker)
            self._alive.discard(worker)
        worker.close()
        worker.connection.exit(RETIRE_WAIT_S)

    def _hand_out(self, worker: Worker) -> None:
        # Ctrl-C comes after calls: there is none here between taking the ticket and opening it.
        ticket = self._tickets[0]
        opening = ticket.gate.release
        worker.owner = ticket.owner
        ticket.worker = worker
        del self._tickets[0]
        try:
            opening()
        except RuntimeError:  # it was cancelled meanwhile; who waited gives the worker back
            pass

    def _fail_those_who_wait(self, error: BaseException) -> None:
        """No worker can be had, for any of them (with the lock held)."""
        tickets, self._tickets = self._tickets, deque()
        for ticket in tickets:
            ticket.error = error
            ticket.open()

    # starting and ending workers

    def _start_some(self) -> None:
        """Start what the load asks for. The caller has the lock."""
        if self.closed:
            return
        load = Load(len(self._tickets), self._starting, len(self._alive), self.max_workers)
        self._start(to_start(load))

    def _start(self, count: int) -> None:
        for _ in range(count):
            try:
                threads.start(self._start_one)  # which waits for the lock that is held here
            except BackendError:
                if not self._alive and not self._starting:
                    raise
                return
            self._starting += 1

    def _start_one(self) -> None:
        self._start_worker()
        if self.closed:
            registry.close_again(self.backend)

    def _start_worker(self) -> None:
        worker = error = None
        try:
            if self.spec.gpu:
                from flowfn import pools

                pools.make_room(self)
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
                self._failed_starts = 0
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
                self._fail_those_who_wait(error)
                return
            else:
                self._start_again_later(error)
                return
        worker.close()

    def _start_again_later(self, error: BaseException | None) -> None:
        """A start failed where other workers are: they go on, and it is tried again if calls wait for it then."""
        if not self._tickets:
            return
        clock.later(AGAIN_S * 2 ** min(self._failed_starts, 5), self._start_missing)
        self._failed_starts += 1
        if self._failed_starts == 1:
            import logging

            logging.getLogger("flowfn").warning("a worker could not be started; others go on meanwhile: %s", error)

    def _start_missing(self) -> None:
        with self._lock:
            try:
                self._start_some()
            except BackendError as error:
                self._fail_those_who_wait(error)

    def _make_idle(self, worker: Worker) -> None:
        worker.idle_since = time.monotonic()
        self._idle.append(worker)  # from here on the owner counts no more
        worker.owner = None
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
            if self._timer is not None:
                self._timer.cancel()
        self.helpers.close()
        for ticket in tickets:
            ticket.open()
        for worker in idle:
            worker.close()
        for worker in busy:
            worker.shut_down()
