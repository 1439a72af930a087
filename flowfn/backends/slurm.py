"""The Slurm backend: each worker is a job of one task, and `srun`'s own standard input and output are its stream.

`srun` asks for the job, waits in the queue, starts the worker and ends with it; ending `srun` ends the job. So there is
nothing on the cluster but the job, and no port is opened. Workers live long: a map starts some and sends them all of
its items. Where a job of ours has to wait in the queue, idle workers of other shapes end to make room.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flowfn import loader, shipping, slurm_options, terminal, threads
from flowfn.backends import slurm_queue, stream
from flowfn.backends.base import Backend, Connection
from flowfn.backends.slurm_connection import SAY, TERM_S, SlurmConnection, Start, Unwanted
from flowfn.slurm_options import Slurm
from flowfn_runtime import paths, slurmsays
from flowfn_runtime.errors import BackendUnavailable, ConfigError, FlowError, ResourceUnavailable

if TYPE_CHECKING:
    from flowfn.backends.jobs import Jobs
    from flowfn.spec import FunctionSpec

ATTEMPTS = 3  # to start a worker whose job is preempted, loses its node or is refused by it while it starts
CLOSE_S = 1.0  # how long idle workers may take to end by themselves when the backend is closed
LET_GO_S = 0.5  # how long those who used workers may take to notice that these have ended
LOOK_S = (1.0, 10.0)  # how often the queue is looked at while jobs wait: at first, and at last
ROOM_S = 1.0  # how long a worker that made room for a job may take to be gone, before the next one does
UNWANTED_S = 10.0  # after so long a job that no call waits for any more leaves the queue


class SlurmBackend(Backend):
    """Workers as jobs of a Slurm cluster. What may be said of them: `flow.Slurm`, or the same names here."""

    name = "slurm"
    ships_project = True
    more_options = Slurm._fields

    def __init__(self, options: Slurm | None = None, *, url: str | None = None, **more: Any) -> None:
        if url is not None:
            if options is not None or not url.removeprefix("slurm://").strip("/"):
                raise ConfigError(f"backend={url!r} names no login node", hint='write "slurm://user@host"')
            more["login"] = url.removeprefix("slurm://").rstrip("/")
        if options is not None and more:
            raise ConfigError("pass the options of Slurm jobs in flow.Slurm or one by one, not both")
        self.options = options or Slurm(**more)
        self.queue = slurm_queue.Queue(self.options.login, self.options.ssh_config)
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._live: set[SlurmConnection] = set()
        self._watching = False
        self._news = False  # another job waits since the queue was looked at
        self._closed = 0  # how often
        self._jobs: Jobs | None = None

    # the contract

    def begin(self) -> None:
        if self._within() is None:
            self.queue.look_ahead()

    def connect(self, spec: FunctionSpec) -> Connection:
        image = _image(spec)
        generation = self._closed
        _, arguments = self._plan(spec)
        environ = {"FLOW_HOME": self.options.home} if self.options.home else {}
        enforce = ("cpu", "memory")
        launch = functools.partial(shipping.launch, spec, enforce=enforce, environ=environ, image=image)
        program = ["/bin/sh", "-c", SAY, "sh", *loader.program(self.options.python, cache=self.options.cache)]
        for attempt in range(1, ATTEMPTS + 1):
            start = Start(self, spec, arguments, program)
            try:
                connection = start(launch)
            except BackendUnavailable:
                if not start.again or attempt == ATTEMPTS or self._closed != generation:
                    raise
            else:
                if self._closed != generation:
                    connection.kill()
                return connection
        raise AssertionError("unreachable: the last attempt returns or raises")

    def describe(self) -> str:
        return slurm_options.summary(slurm_options.partition_nodes(self.queue.nodes(), self.options.partition))

    def slots(self, spec: FunctionSpec) -> int:
        return min(self._plan(spec)[0], self.options.workers)

    def has_room(self, spec: FunctionSpec) -> bool:
        return not any(connection.waits for connection in list(self._live))

    def close(self) -> None:
        """End all jobs; returns when they are over."""
        self._closed += 1
        live = list(self._live)
        for connection in live:
            if not connection.facts:  # it waits, or starts
                connection.kill()
        for seconds in (CLOSE_S, TERM_S + stream.END_S):
            deadline = time.monotonic() + seconds
            for connection in live:
                connection.over(deadline)
            for connection in live:
                connection.kill()
        deadline = time.monotonic() + LET_GO_S
        for connection in live:
            connection.let_go(deadline)
        self.queue.close()
        if self._jobs is not None:
            self._jobs.close()

    def jobs(self) -> Jobs:
        from flowfn.backends.slurm_tasks import LoginJobs, SlurmJobs

        if self._jobs is None:
            options = self.options
            if options.login is not None:
                config = options.ssh_config and os.path.abspath(os.path.expanduser(options.ssh_config))
                place = {"backend": "slurm", "login": options.login, "ssh_config": config}
                there = {"home": options.home, "cache": options.cache, "python": options.python}
                self._jobs = LoginJobs({**place, **there}, options)
            else:
                home = os.path.abspath(os.path.expanduser(options.home)) if options.home else paths.home()
                self._jobs = SlurmJobs({"backend": "slurm", "home": home}, self)
        return self._jobs

    @classmethod
    def jobs_at(cls, place: Mapping[str, Any]) -> Jobs:
        from flowfn.backends.slurm_tasks import LoginJobs, SlurmJobs

        return LoginJobs(place) if "login" in place else SlurmJobs(place)

    # what there is

    def _plan(self, spec: FunctionSpec) -> tuple[int, list[str]]:
        """How many workers of the spec there can be at once, and what srun is to be told of each."""
        if (job := self._within()) is not None:
            try:
                need, count = slurm_options.choose(spec, self.queue.allocation(job))
                return count, [*need.step_arguments(job), *self.options.extra]
            except ResourceUnavailable:
                if self.options.allocation:
                    raise
        elif self.options.allocation:
            raise ConfigError(
                "allocation=True: this process is in no Slurm job whose allocation it could use",
                hint="start it in salloc or sbatch, or leave allocation= out",
            )
        need, count = self.choose(spec)
        return count, need.arguments() + self.options.arguments()

    def _within(self) -> str | None:
        """The job whose allocation workers are to use if there is room."""
        job = slurm_options.within(os.environ)
        wanted = self.options.allocation or (self.options.allocation is None and self.options.anywhere)
        return job if job and wanted else None

    def choose(self, spec: FunctionSpec) -> tuple[slurm_options.Need, int]:
        """What a worker of the spec asks for, and how many the cluster holds at once."""
        nodes = slurm_options.partition_nodes(self.queue.nodes(), self.options.partition)
        return slurm_options.choose(spec, nodes)

    def there(self) -> str:
        """What the cluster has, for messages."""
        try:
            return slurm_options.summary(self.queue.nodes())
        except FlowError:
            return ""

    def environment(self) -> dict[str, str]:
        """For srun, which hands it on to the worker. The shell that looks for Python there finds this one first."""
        # On a login node it is ssh's, which keeps it to itself.
        return slurmsays.environment(python_first=self.queue.login is None and self.options.python is None)

    # jobs that wait

    def track(self, connection: SlurmConnection) -> None:
        with self._lock:
            self._live.add(connection)

    def untrack(self, connection: SlurmConnection) -> None:
        with self._lock:
            self._live.discard(connection)
            if connection.waits:
                connection.waits = False
                self._changed.notify_all()

    def runs(self, connection: SlurmConnection) -> None:
        """A job has started."""
        with self._lock:
            if connection.waits:
                connection.waits = False
                self._changed.notify_all()

    def somebody_waits(self) -> None:
        """A job is in the queue: it is watched from here on, with all others."""
        with self._lock:
            self._news = True
            self._changed.notify_all()
            if self._watching:
                return
            self._watching = True
        threads.start(self._watch)

    def _watch(self) -> None:
        """While jobs wait: make room for them, say why they wait, and give up those that wait in vain."""
        from flowfn import pools

        pause = LOOK_S[0]
        while True:
            with self._lock:
                self._news = False
                waiting = [connection for connection in self._live if connection.waits]
                if not waiting:
                    self._watching = False
                    return
            waiting.sort(key=lambda one: one.begun)
            made_room = any(pools.retire_idle(self, connection.start.spec) for connection in waiting)
            jobs = self.queue.jobs()
            for connection in waiting:
                if connection.waits and (job := jobs.get(connection.name)):
                    self._judge(connection, job)
            with self._lock:
                if self._news:
                    pause = LOOK_S[0]
                elif all(connection.waits for connection in waiting):
                    self._changed.wait(ROOM_S if made_room else pause)
                    pause = min(pause * 1.5, LOOK_S[1])

    def _judge(self, connection: SlurmConnection, job: slurmsays.Job) -> None:
        from flowfn import pools

        if job.state != "PENDING":
            return
        waited = time.monotonic() - connection.begun
        if job.reason != connection.reason and job.reason not in ("None", ""):
            connection.reason = job.reason
            if sys.stderr is not None and sys.stderr.isatty():
                text = f"waits in Slurm's queue: {job.reason}\n"
                terminal.show_output("slurm", 0, connection.label, text.encode(), True)
        if slurmsays.hopeless(job.reason):
            connection.failure = ResourceUnavailable(
                f"Slurm job {job.number} (asked for {connection.start.asked}) would wait for ever: {job.reason}",
                hint=f"the cluster has: {self.there()}",
            )
        elif waited > UNWANTED_S and not pools.wanted(self, connection.start.spec):
            connection.failure = Unwanted(f"Slurm job {job.number} waited in the queue, and no call for it any more")
        elif self.options.wait_s is not None and waited > self.options.wait_s:
            connection.failure = ResourceUnavailable(
                f"Slurm job {job.number} waited longer than {self.options.wait_s:g} s in the queue: {job.reason}",
                hint=f"the cluster has: {self.there()}; wait longer with wait=",
            )
        if connection.failure is not None:
            connection.kill()


def _image(spec: FunctionSpec) -> Any:
    if isinstance(spec.image, str):
        raise ConfigError(
            f"image={spec.image!r}: the slurm backend has no containers",
            hint="say what to install: image=flow.Image.python('3.12').pip_install(...)",
        )
    return spec.image
