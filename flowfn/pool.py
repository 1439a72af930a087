"""Workers of one shape: started on demand, lent to one call or map at a time, ended when idle for long."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from flowfn import threads
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
        self.code = 0  # the state of the project that its workers have
        self._lock = threading.Lock()
        self._idle: list[Worker] = []  # the last is the one used last
        self._alive: set[Worker] = set()
        self._starting = 0
        self._tickets: deque[Ticket] = deque()
        self._timer: Timer | None = None
        self._jobs: deque[Callable[[], Callable[[], object] | None]] = (
            deque()
        )  # what the helper threads do, see `run_later`
        self._jobs_ready = threading.Condition(self._lock)
        self._helpers = 0
        self._helpers_idle = 0
        self._busy = 0
        self._telling: set[int] = set()  # helper threads that tell of a call's end, callbacks of its future included
        self._told = threading.Condition(self._lock)

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
            try:
                self._start_some()
            except BackendError as error:
                self._fail_those_who_wait(error)

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
                return
        worker.close()

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
            self._jobs_ready.notify_all()
            if self._timer is not None:
                self._timer.cancel()
        for ticket in tickets:
            ticket.open()
        for worker in idle:
            worker.close()
        for worker in busy:
            worker.shut_down()

    # threads that wait for workers in place of the caller

    def run_later(self, job: Callable[[], Callable[[], object] | None]) -> None:
        """Run `job` in a helper thread, and then what it returns, which tells of its end.

        There are never more helpers than workers; the rest waits in order.
        """
        with self._lock:
            if self.closed:
                raise CallCancelled("the pool was shut down")
            if self._helpers_idle > len(self._jobs):
                self._jobs.append(job)
                self._jobs_ready.notify()
                return
            if self._helpers < self.max_workers:
                try:
                    threads.start(self._help)  # which waits for the lock that is held here
                    self._helpers += 1
                except BackendError:
                    if not self._helpers:
                        raise
            self._jobs.append(job)

    @property
    def unfinished(self) -> int:
        """How many calls of futures are not done."""
        return len(self._jobs) + self._busy

    def wait_until_told(self) -> None:
        """Return when the callbacks of all futures that are done have run."""
        with self._lock:
            while self._telling:
                self._told.wait()

    def in_callback(self) -> bool:
        """Whether a future's callback asks, which holds up others if it waits."""
        return threading.get_ident() in self._telling

    def _help(self) -> None:
        me = threading.get_ident()
        while True:
            with self._lock:
                if me in self._telling:
                    self._telling.remove(me)
                    self._told.notify_all()
                while not self._jobs:
                    self._helpers_idle += 1
                    signalled = self._jobs_ready.wait(30)
                    self._helpers_idle -= 1
                    if not self._jobs and (self.closed or not signalled):
                        self._helpers -= 1
                        return
                job = self._jobs.popleft()
                self._busy += 1
            tell = job()
            del job  # it holds a call's arguments
            with self._lock:
                self._busy -= 1  # before anybody can see that the call is done
                if tell is not None:
                    self._telling.add(me)
            if tell is not None:
                tell()
                del tell
