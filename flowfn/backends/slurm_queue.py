"""Slurm's commands: what the cluster has, how this client's jobs are, and the end of all of them with the client.

One `squeue` answers for all jobs, whoever asks; who asks while one runs shares the next.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import signal
import subprocess
import threading
import time
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flowfn.slurm_options import SINFO, Node, allocated, nodes_of
from flowfn_runtime.errors import BackendUnavailable, FlowError, ResourceUnavailable

if TYPE_CHECKING:
    from flowfn.backends.slurm_login import Login

COMMAND_S = 60.0  # a controller that takes longer than this to answer is not there
SQUEUE_S = 10.0  # the same where the answer is not worth more of a wait
# What a user may have set for runs of their own, and would come between a worker and its stream.
_NOT_OURS = ("LABELIO", "STDINMODE", "STDOUTMODE", "STDERRMODE", "MULTI_PROG", "THREADS", "WAIT", "NTASKS", "NPROCS")
NODES_S = 30.0  # how long what sinfo said is good for
SQUEUE = "%j|%A|%T|%N|%m|%r"  # name, number, state, nodes, memory, reason; the last may hold anything

# A client that is killed can't cancel its jobs. This shell does: its standard input ends with the client.
_GUARD = """
while read -r _; do :; done
ids=$(squeue -h -u "$1" -o '%j %A' | sed -n "s/^$2-[0-9]* //p")
[ -z "$ids" ] || exec scancel -Q $ids
"""


@dataclass(frozen=True)
class Job:
    """One job as squeue says."""

    name: str
    number: str
    state: str  # PENDING, RUNNING, COMPLETED, CANCELLED, PREEMPTED, NODE_FAIL, TIMEOUT, OUT_OF_MEMORY, ...
    nodes: str
    memory: str  # asked for, "300M"
    reason: str  # why it waits or failed

    @property
    def over(self) -> bool:
        return self.state not in ("PENDING", "RUNNING", "CONFIGURING", "SUSPENDED", "STOPPED", "RESIZING", "REQUEUED")


def jobs_of(listing: str) -> dict[str, Job]:
    """The jobs in what `squeue -h -o SQUEUE` printed, by name; of several of a name the last."""
    jobs = {}
    for line in listing.splitlines():
        fields = line.strip().split("|", 5)
        if len(fields) == 6:
            jobs[fields[0]] = Job(*fields)
    return jobs


def environment() -> dict[str, str]:
    """This process's environment for Slurm's commands.

    Within a job Slurm's commands would take what they find there of that job for options, so that is left out.
    """
    ours = {f"SLURM_{name}" for name in _NOT_OURS}
    environ = {name: value for name, value in os.environ.items() if name not in ours}
    if "SLURM_JOB_ID" in environ:
        told = ("SLURM_", "SLURMD_", "PMI_", "PMIX_")
        environ = {k: v for k, v in environ.items() if not k.startswith(told) or k == "SLURM_CONF"}
    return environ


def run(*argv: str, timeout: float = COMMAND_S, login: Login | None = None) -> str:
    """What one of Slurm's commands prints, here or on a login node.

    Raises BackendUnavailable, or ResourceUnavailable for what it refuses.
    """
    try:
        done = subprocess.run(
            login.command(argv) if login else argv,
            env=environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            start_new_session=True,  # Ctrl-C is for this process
        )
    except OSError as error:
        raise missing(argv[0], error) from None
    except subprocess.TimeoutExpired:
        raise BackendUnavailable(
            f"Slurm does not answer: {argv[0]} took longer than {timeout:g} s",
            hint="is slurmctld running? scontrol ping",
        ) from None
    if done.returncode:
        if login and (failure := login.explain(done.returncode, done.stderr)):
            raise failure
        raise meaning(done.stderr) or BackendUnavailable(f"{argv[0]} failed:\n{done.stderr.strip()}")
    return done.stdout


def missing(command: str, error: OSError) -> BackendUnavailable:
    """What to raise where Slurm's commands are not."""
    if shutil.which(command) is not None:
        return BackendUnavailable(f"{command} can't be started: {error.strerror}")
    return BackendUnavailable(
        f"there is no {command} here: Slurm's commands are not installed, or not on PATH",
        hint="run this on a login node of the cluster (load its slurm module), or install Slurm's client: "
        "apt-get install slurm-client",
    )


_UNREACHABLE = (
    (
        r"Unable to contact slurm controller|slurm_load_\w+ error|Connection (?:refused|timed out)|Socket timed out",
        "Slurm's controller can't be reached",
        "is slurmctld running? scontrol ping",
    ),
    (
        r"Could not establish a configuration source|cannot stat file|[Uu]nable to process configuration",
        "Slurm's commands find no configuration",
        "is this a login node of the cluster? SLURM_CONF names its slurm.conf",
    ),
    (
        r"[Mm]unge|Protocol authentication error|Invalid authentication credential|[Aa]uthenticat",
        "Slurm does not know who this is: its authentication failed",
        "is munged running here, with the cluster's key and clock?",
    ),
    (
        r"Slurm temporarily unable to accept job|Unable to confirm allocation|Zero Bytes were transmitted",
        "Slurm takes no jobs at the moment",
        "try again later; scontrol ping says how the controller is",
    ),
)
_REFUSED = (
    (r"[Ii]nvalid partition(?: name)? specified", "there is no such partition", "partition"),
    (
        r"[Ii]nvalid account|account/partition combination|[Aa]ccount not permitted",
        "that account may not be used",
        "account",
    ),
    (r"[Ii]nvalid qos|QOS not permitted", "that quality of service may not be used", "qos"),
    (r"[Ii]nvalid feature specification", "no node has such features", "constraint"),
    (
        r"[Rr]eservation (?:is invalid|name)|[Rr]equested reservation",
        "there is no such reservation, or not for this user",
        "reservation",
    ),
    (
        r"[Tt]ime limit (?:is )?(?:invalid|exceed|specification)|Requested time limit",
        "the time limit is not accepted",
        "time",
    ),
    (r"[Ii]nvalid generic resource|[Ii]nvalid Trackable RESource", "no node has such GPUs", "gpu"),
    (
        r"Memory specification can ?not be satisfied|Requested node configuration is not available|CPU count per node",
        "no node has all of that",
        "",
    ),
    (r"[Ii]nvalid node name", "there is no such node", "extra"),
    (
        r"AssocMaxSubmitJobLimit|QOSMaxSubmitJob|violates accounting/QOS policy|job limit",
        "the account's limits don't allow it",
        "",
    ),
    (
        r"User.s group not permitted|Access/permission denied|user name not permitted",
        "this user may not use that partition",
        "partition",
    ),
    (
        r"(?:invalid|unrecognized|unknown|ambiguous) option|Invalid (?:--)?\S+ specification",
        "srun does not take these options",
        "extra",
    ),
)


def meaning(said: str, asked: str = "", there: str = "") -> FlowError | None:
    """What to raise for what Slurm's commands said, if it is known. `asked`: the options; `there`: what there is."""
    for pattern, message, hint in _UNREACHABLE:
        if re.search(pattern, said):
            return BackendUnavailable(f"{message}:\n{_errors(said)}", hint=hint)
    for pattern, message, option in _REFUSED:
        if re.search(pattern, said):
            text = f"Slurm refused: {message}" + (f" (asked for {asked})" if asked else "") + f":\n{_errors(said)}"
            hint = f"set {option}= to what the cluster has" if option else "ask for less, or name another partition="
            return ResourceUnavailable(text, hint=f"{hint}: {there}" if there else hint)
    return None


def _errors(said: str) -> str:
    """The lines that matter."""
    lines = [line for line in said.splitlines() if "error" in line or "fatal" in line] or said.splitlines()
    return "\n".join(lines[-4:])


# Reasons that don't pass by waiting: they ask for what will never be.
_HOPELESS = re.compile(
    r"BadConstraints|InvalidAccount|InvalidQOS|AccountNotAllowed|QOSNotAllowed|PartitionNodeLimit|PartitionTimeLimit|"
    r"[Aa]ccount not|QOS not|PartitionConfig|JobArrayTaskLimit|MaxMemPerLimit|MaxCpuPerJob|MaxNodePerJob|MaxGRESPerJob|"
    r"MaxTRESPerJob|MaxWallDuration|Dependency never|DependencyNeverSatisfied|more than the partition|not permitted"
)


def hopeless(reason: str) -> bool:
    """Whether a job that waits for this reason would wait for ever."""
    return _HOPELESS.search(reason) is not None


OOM = "went over its memory limit"
CANCELLED = "was cancelled from outside"
NOT_LAUNCHED = "could not be launched"
# Of a job that ended: its state, or what srun and slurmstepd said -> what happened to it.
_ENDS = (
    (r"PREEMPT", "was preempted"),
    (r"TIME LIMIT|TIMEOUT|DEADLINE", "went over the time limit of its job"),
    (r"NODE FAILURE|NODE_FAIL|Node failure|node_fail", "lost its node"),
    (r"OUT_OF_MEMORY|oom[-_ ]kill|OOM[ -]Killed|[Ee]xceeded (?:job |step )?memory limit", OOM),
    # A controller that crashed may give the number of a job that ended once more, and nodes don't take it then.
    (r"BOOT_FAIL|LAUNCH_FAILED|credential revoked", NOT_LAUNCHED),
    (r"REQUEUE", "was requeued"),
    (r"CANCELLED|Force Terminated|has been revoked|was cancell?ed|been cancell?ed", CANCELLED),
)


def end_of(text: str) -> str | None:
    """What happened to a job, in words, from its state or from what was said; None if nothing special did."""
    for pattern, words in _ENDS:
        if re.search(pattern, text):
            return words
    return None


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
        self._allocations: dict[str, list[Node]] = {}
        self._guard: subprocess.Popen[bytes] | None = None
        self._count = 0
        _all.add(self)

    def run(self, *argv: str, timeout: float = COMMAND_S) -> str:
        """What one of Slurm's commands prints, there where the cluster is."""
        return run(*argv, timeout=timeout, login=self.login)

    def nodes(self) -> list[Node]:
        """What the cluster has. Raises BackendUnavailable."""
        with self._lock:
            if self._nodes is None or time.monotonic() - self._nodes[0] > NODES_S:
                self._nodes = time.monotonic(), nodes_of(self.run("sinfo", "-h", "-N", "-a", "-o", SINFO))
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
        if (shell := shutil.which("sh")) is None:
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
        if self.login is not None:
            self.login.close()
        if guard is not None:
            assert guard.stdin
            guard.send_signal(signal.SIGKILL)
            guard.wait()
            guard.stdin.close()


_all: weakref.WeakSet[Queue] = weakref.WeakSet()


def _after_fork() -> None:
    """A forked child must not keep the guard from seeing that the parent has ended."""
    for queue in list(_all):
        if queue.login is not None:
            queue.login.forget()
        if queue._guard is not None and queue._guard.stdin is not None:
            queue._guard.stdin.close()
            queue._guard.returncode = 0  # it is the parent's child
            queue._guard = None


os.register_at_fork(after_in_child=_after_fork)
