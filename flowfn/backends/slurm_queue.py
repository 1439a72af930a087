"""What is known of a cluster and of this client's jobs there, and the end of all of them with the client.

One `squeue` answers for all jobs, whoever asks; who asks while one runs shares the next.
"""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import threading
import time
import weakref
from typing import TYPE_CHECKING

from flowfn.slurm_options import SINFO, Node, allocated, nodes_of
from flowfn_runtime import paths
from flowfn_runtime.errors import FlowError
from flowfn_runtime.slurmsays import COMMAND_S, SQUEUE, Job, environment, finish, jobs_of, run, start

if TYPE_CHECKING:
    from flowfn.backends.slurm_login import Login

SQUEUE_S = 10.0  # how long an answer about jobs is waited for, which is not worth more
NODES_S = 30.0  # how long what sinfo said is good for

_NODES = ("sinfo", "-h", "-N", "-a", "-o", SINFO)

# A client that is killed can't cancel its jobs. This shell does: its standard input ends with the client.
_GUARD = """
while read -r _; do :; done
ids=$(squeue -h -u "$1" -o '%j %A' | sed -n "s/^$2-[0-9]* //p")
[ -z "$ids" ] || exec scancel -Q $ids
"""


class Queue:
    """What is known of a cluster and of this client's jobs. From any thread."""

    def __init__(self, login: str | None = None, ssh_config: str | None = None) -> None:
        self.prefix = f"flowfn-{os.urandom(4).hex()}"  # of this client's job names
        self.login: Login | None = None
        if login is not None:
            from flowfn.backends.slurm_login import Login

            self.login = Login(login, ssh_config, self.prefix)
        self._lock = threading.Lock()
        self._looking = threading.Lock()
        self._looked = 0.0
        self._jobs: dict[str, Job] = {}
        self._nodes: tuple[float, list[Node]] | None = None
        self._ahead: subprocess.Popen[str] | None = None  # asks for the nodes
        self._allocations: dict[str, list[Node]] = {}
        self._guard: subprocess.Popen[bytes] | None = None
        self._count = 0
        _all.add(self)

    def run(self, *argv: str, timeout: float = COMMAND_S) -> str:
        """What one of Slurm's commands prints, there where the cluster is."""
        if self.login is None:
            return run(*argv, timeout=timeout)
        process = start(*self.login.command(argv))
        return finish(process, argv[0], timeout=timeout, explain=self.login.explain)

    def look_ahead(self) -> None:
        """Somebody will ask for the nodes in a moment: ask now, once. Raises nothing."""
        if self._nodes is None and self._ahead is None and self.login is None and self._lock.acquire(blocking=False):
            try:
                if self._nodes is None and self._ahead is None:
                    self._ahead = start(*_NODES)
            except FlowError:
                pass  # who asks will hear of it
            finally:
                self._lock.release()

    def nodes(self) -> list[Node]:
        """What the cluster has. Raises BackendUnavailable."""
        with self._lock:
            if self._nodes is None or time.monotonic() - self._nodes[0] > NODES_S:
                ahead, self._ahead = self._ahead, None
                said = finish(ahead, _NODES[0]) if ahead else self.run(*_NODES)
                self._nodes = time.monotonic(), nodes_of(said)
            return self._nodes[1]

    def allocation(self, job: str) -> list[Node]:
        """What a job that runs has of its nodes; nothing if it is none."""
        with self._lock:
            if job not in self._allocations:
                try:
                    listing = self.run("scontrol", "show", "job", "-d", job)
                    names = functools.cache(lambda names: self.run("scontrol", "show", "hostnames", names).split())
                    self._allocations[job] = allocated(listing, names)
                except FlowError:
                    return []
            return self._allocations[job]

    def job(self, name: str) -> Job | None:
        """How a job is now; None if Slurm does not know it, or does not say."""
        return self.jobs().get(name)

    def jobs(self) -> dict[str, Job]:
        """How this client's jobs are now, ended ones too for as long as Slurm remembers them, by name."""
        asked = time.monotonic()
        with self._looking:
            if self._looked < asked:
                started = time.monotonic()
                try:
                    user = self.login.uid if self.login else str(os.getuid())
                    listing = self.run("squeue", "-h", "-t", "all", "-u", user, "-o", SQUEUE, timeout=SQUEUE_S)
                except FlowError:
                    return {}
                found = jobs_of(listing)
                self._jobs = {name: job for name, job in found.items() if name.startswith(self.prefix)}
                self._looked = started
            return self._jobs

    def new_name(self) -> str:
        """A name for the next job. From the first on, the jobs end with this process, however it does."""
        with self._lock:
            self._count += 1
            if self.login is None and (self._guard is None or self._guard.poll() is not None):
                self._guard = self._start_guard()
            return f"{self.prefix}-{self._count}"

    def _start_guard(self) -> subprocess.Popen[bytes] | None:
        if (shell := paths.which("sh")) is None:
            return None
        return subprocess.Popen(
            [shell, "-c", _GUARD, "flowfn-guard", str(os.getuid()), self.prefix],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment(),
            cwd="/",
            start_new_session=True,
        )

    def cancel(self, *names: str) -> None:
        """End jobs, waiting or running. Whether they are there or not."""
        jobs = self.jobs()
        if numbers := [jobs[name].number for name in names if name in jobs and not jobs[name].over]:
            try:
                self.run("scancel", "-Q", *numbers)
            except FlowError:
                pass  # they have ended meanwhile

    def close(self) -> None:
        """All jobs are over: nobody need see to it."""
        with self._lock:
            guard, self._guard, self._nodes = self._guard, None, None
            ahead, self._ahead = self._ahead, None
        if ahead is not None:
            _drop(ahead)
        if self.login is not None:
            self.login.close()
        if guard is not None:
            assert guard.stdin
            guard.send_signal(signal.SIGKILL)
            guard.wait()
            guard.stdin.close()


def _drop(process: subprocess.Popen[str]) -> None:
    """Nobody wants its answer any more."""
    process.kill()
    with process:
        pass


_all: weakref.WeakSet[Queue] = weakref.WeakSet()


def _after_fork() -> None:
    """A forked child must not keep the guard from seeing that the parent has ended."""
    for queue in list(_all):
        if queue.login is not None:
            queue.login.forget()
        queue._lock = threading.Lock()
        if queue._ahead is not None:
            for pipe in (queue._ahead.stdout, queue._ahead.stderr):
                assert pipe
                pipe.close()
            queue._ahead.returncode = 0  # it is the parent's child
            queue._ahead = None
        if queue._guard is not None and queue._guard.stdin is not None:
            queue._guard.stdin.close()
            queue._guard.returncode = 0  # it is the parent's child
            queue._guard = None


os.register_at_fork(after_in_child=_after_fork)
