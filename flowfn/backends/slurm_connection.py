"""One worker of the Slurm backend: the srun that stands for its job, and what became of it."""

from __future__ import annotations

import functools
import re
import signal
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from flowfn import shipping, threads
from flowfn.backends import stream
from flowfn.backends.base import Exit
from flowfn.clock import clock
from flowfn_runtime import slurmsays
from flowfn_runtime.errors import BackendUnavailable, FlowError

if TYPE_CHECKING:
    from flowfn.backends.slurm import SlurmBackend
    from flowfn.spec import FunctionSpec

TERM_S = 5.0  # how long srun may take to end its job, before it is killed and the job cancelled
STEP_S = 0.5  # after so long a step of a job that is there must be waiting for others to end
SAYS = b"flowfn-job "  # begins the line by which a job says that it runs: its number, its node
# If slurmstepd dies the worker sees its stream end, but srun would wait for ever: nobody tells it but what is started
# here, which has another parent then.
SAY = """
echo "flowfn-job $SLURM_JOB_ID $SLURMD_NODENAME" >&2
trap : TERM
"$@"
status=$?
set -- $(sed 's/.*) //' /proc/$$/stat)
case $2 in "" | $PPID) ;; *) scancel -Q $SLURM_JOB_ID.$SLURM_STEP_ID ;; esac
exit $status
"""
_QUEUED = rb"srun: job (\d+) queued and waiting"


class SlurmConnection(stream.StreamConnection):
    """One srun, and the job that it stands for."""

    def __init__(self, argv: Sequence[str], *, label: str, environ: Any, backend: SlurmBackend, start: Start) -> None:
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

    @property
    def label(self) -> str:
        """Of what is known by now: the job is heard of in one thread, its worker in another."""
        where = f"slurm job {self.job}" if self.job else "slurm"
        where += f" on {self.node}" if self.node else ""
        return f"{where} pid {self.facts['pid']}" if self.facts else where

    @label.setter
    def label(self, _: str) -> None:
        pass

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
            self.backend.runs(self)
            return True
        if queued := re.match(_QUEUED, line):
            self.job = queued[1].decode()
            self.waits = True
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


class Unwanted(BackendUnavailable):
    """The job was given up in the queue, since no call waited for it."""


class Start:
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
            self.again = isinstance(connection.failure, Unwanted) and pools.wanted(self.backend, self.spec)
            return connection.failure
        login = self.backend.queue.login
        if login is not None and (failure := login.explain(status, said)):
            from flowfn.backends import openssh

            self.again = "no more sessions" in str(failure) or openssh.lost_connection(said)
            return failure
        words = slurmsays.end_of(said)
        if words is None:
            return slurmsays.meaning(said, self.asked, self.backend.there())
        self.again = words == slurmsays.NOT_LAUNCHED or (connection.node != "" and words != slurmsays.OOM)
        what = f"Slurm job {connection.job}" if connection.job else "its Slurm job"
        return BackendUnavailable(f"a worker did not start: {what} {words}\n{said.strip()}")
