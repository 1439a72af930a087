"""The Slurm backend: each worker is a job of one task, and `srun`'s own standard input and output are its stream.

`srun` asks for the job, waits in the queue, starts the worker and ends with it; ending `srun` ends the job. So there is
nothing on the cluster but the job, and no port is opened. Workers live long: a map starts some and sends them all of
its items. Where a job of ours has to wait in the queue, idle workers of other shapes end to make room.
"""

from __future__ import annotations

import functools
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flowfn import loader, shipping, slurm_options, terminal, threads
from flowfn.backends import openssh, slurm_queue, stream
from flowfn.backends.base import Backend, Connection, Exit
from flowfn.clock import clock
from flowfn.slurm_options import Slurm
from flowfn_runtime import paths, slurmsays
from flowfn_runtime.errors import BackendUnavailable, ConfigError, FlowError, ResourceUnavailable

if TYPE_CHECKING:
    from flowfn.backends.jobs import Jobs
    from flowfn.spec import FunctionSpec

ATTEMPTS = 3  # to start a worker whose job is preempted, loses its node or is refused by it while it starts
TERM_S = 5.0  # how long srun may take to end its job, before it is killed and the job cancelled
CLOSE_S = 1.0  # how long idle workers may take to end by themselves when the backend is closed
LET_GO_S = 0.5  # how long those who used workers may take to notice that these have ended
LOOK_S = (1.0, 10.0)  # how often the queue is looked at while jobs wait: at first, and at last
ROOM_S = 1.0  # how long a worker that made room for a job may take to be gone, before the next one does
STEP_S = 0.5  # after so long a step of a job that is there must be waiting for others to end
UNWANTED_S = 10.0  # after so long a job that no call waits for any more leaves the queue
SAYS = b"flowfn-job "  # begins the line by which a job says that it runs: its number, its node
_SAY = 'echo "flowfn-job $SLURM_JOB_ID $SLURMD_NODENAME" >&2; exec "$@"'
_QUEUED = re.compile(rb"srun: job (\d+) queued and waiting")


class SlurmConnection(stream.StreamConnection):
    """One srun, and the job that it stands for."""

    def __init__(self, argv: Sequence[str], *, label: str, environ: Any, backend: SlurmBackend, start: _Start) -> None:
        self.backend = backend
        self.start = start
        self.name = start.name
        self.memory = start.spec.memory
        self.job = ""
        self.node = ""
        self.waits = False  # in the queue
        self.reason = ""  # why, as squeue says
        self.begun = time.monotonic()
        self.failure: FlowError | None = None  # what to raise, where this client ended it for a reason
        self._killed = False
        self._let_go = threading.Event()
        start.connection = self
        super().__init__(argv, label=label, environ=environ)
        backend.track(self)
        if self.waits:  # srun was faster, and whoever watches has not seen this connection
            backend.somebody_waits()
        self.on_end(functools.partial(backend.untrack, self))
        if any(option.startswith("--jobid=") for option in start.options):
            clock.later(STEP_S, self._may_wait)

    def _runs(self) -> bool:
        return bool(self.node)

    def _may_wait(self) -> None:
        """In an allocation srun does not say that it waits for what other steps have."""
        if not self._runs() and not self._ended.is_set():
            self.waits = True
            if self._runs():  # since just now: another thread hears of it
                self.backend.runs(self)
            else:
                self.backend.somebody_waits()

    def heard(self, line: bytes) -> bool:
        if line.startswith(SAYS):
            self.job, _, self.node = line[len(SAYS) :].decode(errors="replace").partition(" ")
            self.label = f"slurm job {self.job} on {self.node}"
            self.backend.runs(self)
            return True
        if queued := _QUEUED.match(line):
            self.job = queued[1].decode()
            self.waits = True
            self.label = f"slurm job {self.job}"
            self.backend.somebody_waits()
        return False

    def kill(self) -> None:
        # srun answers SIGTERM by killing the job's processes, and ends: some 60 ms.
        if self._ended.is_set():
            return
        self._signal(signal.SIGTERM)
        if not self._killed:
            self._killed = True
            if self.backend.queue.login is not None:  # it was ssh that was told, and srun does not hear of it
                threads.start(lambda: self.backend.queue.cancel(self.name))
            clock.later(TERM_S, self._insist)

    def _insist(self) -> None:
        if not self._ended.is_set():
            self._signal(signal.SIGKILL)
            threads.start(lambda: self.backend.queue.cancel(self.name))

    def _signal(self, number: int) -> None:
        if self.process.poll() is None:
            try:
                self.process.send_signal(number)
            except ProcessLookupError:
                pass

    def close(self) -> None:
        super().close()
        self._let_go.set()

    def over(self, deadline: float) -> None:
        """Return when srun has ended, or it is that time."""
        self._ended.wait(max(0.0, deadline - time.monotonic()))

    def let_go(self, deadline: float) -> None:
        """Return when whoever used the worker has closed its stream, or it is that time."""
        self._let_go.wait(max(0.0, deadline - time.monotonic()))

    def exit(self, timeout: float) -> Exit:
        how = super().exit(timeout)
        if how.by_itself or self._killed or not self._ended.is_set() or not self.facts:
            return how
        # Killed, or lost without a word: what Slurm did to the job.
        said = self.said(1000)
        words = slurmsays.end_of(said)
        if words is None and (job := self.backend.queue.job(self.name)) is not None:
            words = slurmsays.end_of(f"{job.state} {job.reason}")
        if words is None:
            return how
        limit = self.memory if words == slurmsays.OOM else None
        detail = f"Slurm job {self.job} {words}" if self.job else f"its Slurm job {words}"
        return Exit(how.exitcode, limit, how.peak_bytes, how.output, detail)

    def judge(self, status: int) -> Exit:
        said = self.said()
        if status == 255 and self.backend.queue.login is not None:
            return Exit(detail=f"the connection to {self.backend.queue.login} was lost\n{said}")
        if status < 0:
            return Exit(detail=f"its srun was killed by {signal.Signals(-status).name}" + (f"\n{said}" if said else ""))
        return Exit(128 - status if status > 128 else None, detail=said)


class _Unwanted(BackendUnavailable):
    """The job was given up in the queue, since no call waited for it."""


class _Start:
    """One worker that is to start: the connection while there is one, and what to raise if nothing comes of it."""

    def __init__(self, backend: SlurmBackend, spec: FunctionSpec, options: list[str], program: list[str]) -> None:
        self.backend = backend
        self.spec = spec
        self.options = options
        self.name = backend.queue.new_name()
        # Without --unbuffered Slurm passes on whole lines only.
        always = [f"--job-name={self.name}", "--nodes=1", "--ntasks=1", "--mpi=none", "--unbuffered"]
        self.argv = ["srun", *always, *options, *program]
        self.connection: SlurmConnection | None = None
        self.again = False

    @property
    def asked(self) -> str:
        """The options of the job, for messages."""
        return " ".join(self.options)

    def __call__(self, launch: Callable[[], shipping.Launch]) -> SlurmConnection:
        kind = functools.partial(SlurmConnection, backend=self.backend, start=self)
        environ = self.backend.environment()
        login = self.backend.queue.login
        argv, left = (login.lasting(self.argv), login.left) if login else (self.argv, None)
        made = stream.start(argv, launch, label="slurm", environ=environ, explain=self.explain, kind=kind, on_end=left)
        assert isinstance(made, SlurmConnection)
        return made

    def explain(self, status: int, said: str) -> FlowError | None:
        connection = self.connection
        assert connection is not None
        if connection.failure is not None:
            from flowfn import pools

            # A call may have come meanwhile.
            self.again = isinstance(connection.failure, _Unwanted) and pools.wanted(self.backend, self.spec)
            return connection.failure
        login = self.backend.queue.login
        if login is not None and (failure := login.explain(status, said)):
            self.again = "no more sessions" in str(failure) or openssh.lost_connection(said)
            return failure
        words = slurmsays.end_of(said)
        if words is None:
            return slurmsays.meaning(said, self.asked, self.backend.there())
        self.again = words == slurmsays.NOT_LAUNCHED or (connection.node != "" and words != slurmsays.OOM)
        what = f"Slurm job {connection.job}" if connection.job else "its Slurm job"
        return BackendUnavailable(f"a worker did not start: {what} {words}\n{said.strip()}")


class SlurmBackend(Backend):
    """Workers as jobs of a Slurm cluster. What may be said of them: `flow.Slurm`, or the same names here."""

    name = "slurm"
    ships_project = True

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

    def connect(self, spec: FunctionSpec) -> Connection:
        image = _image(spec)
        generation = self._closed
        _, arguments = self._plan(spec)
        environ = {"FLOW_HOME": self.options.home} if self.options.home else {}
        enforce = ("cpu", "memory")
        launch = functools.partial(shipping.launch, spec, enforce=enforce, environ=environ, image=image)
        program = ["/bin/sh", "-c", _SAY, "sh", *loader.program(self.options.python, cache=self.options.cache)]
        for attempt in range(1, ATTEMPTS + 1):
            start = _Start(self, spec, arguments, program)
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
        job = slurm_options.within(os.environ)
        if job and (self.options.allocation or (self.options.allocation is None and self.options.anywhere)):
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
            connection.failure = _Unwanted(f"Slurm job {job.number} waited in the queue, and no call for it any more")
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
