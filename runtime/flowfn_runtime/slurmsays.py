"""Slurm's commands: running them, and what their words mean. On whichever machine has them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from . import paths
from .errors import BackendUnavailable, FlowError, ResourceUnavailable

COMMAND_S = 60.0  # a controller that takes longer than this to answer is not there
# What a user may have set for runs of their own, and would come between a worker and its stream.
_NOT_OURS = ("LABELIO", "STDINMODE", "STDOUTMODE", "STDERRMODE", "MULTI_PROG", "THREADS", "WAIT", "NTASKS", "NPROCS")
SQUEUE = "%j|%A|%T|%N|%m|%r"  # name, number, state, nodes, memory, reason; the last may hold anything


class Job(NamedTuple):
    """One job as squeue or sacct says."""

    name: str
    number: str
    state: str  # PENDING, RUNNING, COMPLETED, CANCELLED, PREEMPTED, NODE_FAIL, TIMEOUT, OUT_OF_MEMORY, ...
    nodes: str
    memory: str  # asked for, "300M"
    reason: str  # why it waits or failed
    exit_code: int | None = None  # of its script, if accounting said it
    ended_at: float | None = None

    @property
    def over(self) -> bool:
        return self.state not in ("PENDING", "RUNNING", "CONFIGURING", "SUSPENDED", "STOPPED", "RESIZING", "REQUEUED")


def jobs_of(listing: str) -> dict[str, Job]:
    """The jobs in what `squeue -h -o SQUEUE` printed, by name; of several of a name the last."""
    jobs = {}
    for line in listing.splitlines():
        fields = line.strip().split("|", 5)
        if len(fields) == 6:
            name, number, state, nodes, memory, reason = fields
            jobs[name] = Job(name, number, state, nodes, memory, reason)
    return jobs


def environment(*, python_first: bool = False) -> dict[str, str]:
    """This process's environment for Slurm's commands.

    Within a job Slurm's commands would take what they find there of that job for options, so that is left out.
    `python_first`: a shell of the job that looks for Python finds this one first.
    """
    ours = {f"SLURM_{name}" for name in _NOT_OURS}
    environ = {name: value for name, value in os.environ.items() if name not in ours}
    if "SLURM_JOB_ID" in environ:
        told = ("SLURM_", "SLURMD_", "PMI_", "PMIX_")
        environ = {k: v for k, v in environ.items() if not k.startswith(told) or k == "SLURM_CONF"}
    if python_first and sys.executable:
        environ["PATH"] = f"{os.path.dirname(sys.executable)}:{environ.get('PATH', os.defpath)}"
    return environ


def start(*argv: str, environ: Mapping[str, str] | None = None, reads: bool = False) -> subprocess.Popen[str]:
    """Have one of Slurm's commands begin; `finish` says what it printed. `reads`: its standard input is given then."""
    try:
        return subprocess.Popen(
            argv,
            env=dict(environ) if environ is not None else environment(),
            stdin=subprocess.PIPE if reads else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C is for this process
        )
    except OSError as error:
        raise missing(argv[0], error) from None


def finish(
    process: subprocess.Popen[str],
    name: str,
    *,
    timeout: float = COMMAND_S,
    given: str | None = None,
    explain: Callable[[int, str], FlowError | None] | None = None,
    asked: str = "",
    there: Callable[[], str] | None = None,
) -> str:
    """What one of Slurm's commands prints; `given` is its standard input.

    `explain` is of a command that runs through another program: what that one's failures mean. `asked` and `there` are
    for messages, see `meaning`. Raises BackendUnavailable, `uncertain` if it may have done its work all the same, or
    ResourceUnavailable for what Slurm refuses.
    """
    with process:
        try:
            said, errors = process.communicate(given, timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            late = BackendUnavailable(
                f"Slurm does not answer: {name} took longer than {timeout:g} s",
                hint="is slurmctld running? scontrol ping",
            )
            late.uncertain = True
            raise late from None
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        if explain and (failure := explain(process.returncode, errors)):
            raise failure
        raise meaning(errors, asked, there() if there else "") or BackendUnavailable(
            f"{name} failed:\n{errors.strip()}"
        )
    return said


def run(*argv: str, environ: Mapping[str, str] | None = None, given: str | None = None, **more: Any) -> str:
    """Both: what one of Slurm's commands prints. `more` as of `finish`."""
    return finish(start(*argv, environ=environ, reads=given is not None), argv[0], given=given, **more)


def missing(command: str, error: OSError) -> BackendUnavailable:
    """What to raise where Slurm's commands are not."""
    if paths.which(command) is not None:
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

# Where to look for what may be said, if not in a list of nodes.
_LISTED_BY = {
    "account": "sacctmgr show associations user=$USER format=account,partition,qos",
    "qos": "sacctmgr show associations user=$USER format=account,partition,qos",
    "constraint": "sinfo -o '%N %f'",
    "reservation": "scontrol show reservations",
}


def meaning(said: str, asked: str = "", there: str = "") -> FlowError | None:
    """What to raise for what Slurm's commands said, if it is known. `asked`: the options; `there`: what there is."""
    for pattern, message, hint in _UNREACHABLE:
        if re.search(pattern, said):
            return BackendUnavailable(f"{message}:\n{_errors(said)}", hint=hint)
    for pattern, message, option in _REFUSED:
        if re.search(pattern, said):
            text = f"Slurm refused: {message}" + (f" (asked for {asked})" if asked else "") + f":\n{_errors(said)}"
            if option in _LISTED_BY:
                return ResourceUnavailable(text, hint=f"set {option}= to what this lists: {_LISTED_BY[option]}")
            hint = f"set {option}= to what the cluster has" if option else "ask for less, or name another partition="
            return ResourceUnavailable(text, hint=f"{hint}: {there}" if there else hint)
    return None


def _errors(said: str) -> str:
    """The lines that matter."""
    lines = [line for line in said.splitlines() if "error" in line or "fatal" in line] or said.splitlines()
    return "\n".join(lines[-4:])


# Reasons that don't pass by waiting: they ask for what will never be.
_HOPELESS = (
    r"BadConstraints|InvalidAccount|InvalidQOS|AccountNotAllowed|QOSNotAllowed|PartitionNodeLimit|PartitionTimeLimit|"
    r"[Aa]ccount not|QOS not|PartitionConfig|JobArrayTaskLimit|MaxMemPerLimit|MaxCpuPerJob|MaxNodePerJob|MaxGRESPerJob|"
    r"MaxTRESPerJob|MaxWallDuration|Dependency never|DependencyNeverSatisfied|more than the partition|not permitted"
)


def hopeless(reason: str) -> bool:
    """Whether a job that waits for this reason would wait for ever."""
    return re.search(_HOPELESS, reason) is not None


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
    (r"Timed out waiting for job step", "did not answer any more"),  # it has lost its slurmstepd
)


def end_of(text: str) -> str | None:
    """What happened to a job, in words, from its state or from what was said; None if nothing special did."""
    for pattern, words in _ENDS:
        if re.search(pattern, text):
            return words
    return None
