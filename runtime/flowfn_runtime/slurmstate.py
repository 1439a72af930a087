"""How tasks are that are Slurm jobs: from what Slurm says of their jobs, and what these have left.

The queue is asked first, all tasks by one question, and of those that it has forgotten Slurm's accounting, if there is.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Mapping
from typing import Any

from . import slurmsays, taskdb
from .errors import FlowError
from .slurmsays import Job
from .taskstate import State

NAME = "flowfn-"  # before the task's id, in the job's name
WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "CONFIGURING")
SACCT = "JobName,JobID,State,NodeList,ExitCode,End,Reason"


def judge(job: Job | None, facts: Mapping[str, Any]) -> State:
    """How a task is that has not said how it ended: from what Slurm says of its job, and what the job left. Pure."""
    told: Mapping[str, Any] = facts.get("state") or {}
    attempts: int = told.get("attempts", 0)
    started: float | None = told.get("started_at")
    if job is None and facts.get("submitting"):
        return State(taskdb.PENDING, "it is being submitted", None, None, None, attempts)
    if job is not None and not job.over:
        if job.state.startswith(WAITING):
            ever = ", and would for ever" if slurmsays.hopeless(job.reason) else ""
            why = f"Slurm job {job.number} waits in the queue{ever}: {job.reason}"
            return State(taskdb.PENDING, why, None, started, None, attempts)
        if facts.get("begun"):
            return State(taskdb.RUNNING, told.get("reason", ""), None, started, None, attempts)
        return State(taskdb.PENDING, told.get("reason") or f"Slurm job {job.number} starts", None, None, None, attempts)
    if job is not None and job.state == "COMPLETING" and facts.get("begun"):
        return State(taskdb.RUNNING, told.get("reason", ""), None, started, None, attempts)
    said = f"{job.state} {job.reason}" if job is not None else facts.get("taken", "")
    which = f"Slurm job {job.number}" if job is not None else "its Slurm job"
    words = slurmsays.end_of(said)
    state, code = taskdb.FAILED, job.exit_code if job is not None else None
    ended = job.ended_at if job is not None and job.ended_at else time.time()
    reason: str
    if facts.get("cancel") is not None:
        state, reason, code = taskdb.CANCELLED, facts["cancel"], None
    elif words == slurmsays.CANCELLED and job is not None and job.reason.startswith("Dependency"):
        reason, code = "it depends on a task that did not complete", None
    elif words == slurmsays.CANCELLED or said.startswith("COMPLETING"):
        state, reason, code = taskdb.CANCELLED, f"{which} was cancelled from outside", None
    elif words is not None:
        reason, code = f"{which} {words}", None
    elif job is not None and job.state == "COMPLETED":  # the job ends so if the task did
        state, reason, code = taskdb.COMPLETED, "", 0
    elif job is not None:
        reason = f"{which} ended without a word ({job.state}" + (f", exit code {code})" if code else ")")
        reason += f": {facts['job.log']}" if facts.get("job.log") else ""
    elif told or facts.get("job.log"):
        reason = "Slurm does not know its job any more, and it left no word: its node failed, or it was killed"
    elif facts.get("number"):
        which = f"Slurm job {facts['number']}"
        reason = f"{which} was lost before it began, as the latest are when the controller crashes; submit it again"
    else:
        reason = "who submitted it was interrupted, and Slurm does not know of its job; submit it again"
    return State(state, reason, code, started, ended, attempts)


def listed(ids: Collection[str]) -> dict[str, Job]:
    """The tasks' jobs that squeue knows, all by one question. Raises BackendUnavailable."""
    if not ids:
        return {}
    listing = slurmsays.run("squeue", "-h", "-t", "all", "-u", str(os.getuid()), "-o", slurmsays.SQUEUE)
    jobs = {name.removeprefix(NAME): job for name, job in slurmsays.jobs_of(listing).items()}
    return {task_id: jobs[task_id] for task_id in ids if task_id in jobs}


def accounted(numbers: Mapping[str, str]) -> dict[str, Job]:
    """The jobs of tasks that Slurm's accounting knows, where there is such a thing: by task, given their numbers.

    Those whose number is not known ("") are asked for by name: then it tells of jobs only that once could have begun.
    """
    if not numbers:
        return {}
    names = ",".join(f"{NAME}{task_id}" for task_id in numbers)
    known = [number for number in numbers.values() if number]
    which = [["-j", ",".join(known)]] if known else []
    which += [["-S", "now-30days"]] if len(known) < len(numbers) else []
    environ = {**slurmsays.environment(), "SLURM_TIME_FORMAT": "%s"}
    found: dict[str, Job] = {}
    for words in which:
        try:
            said = slurmsays.run("sacct", "-n", "-P", "-X", *words, f"--name={names}", "-o", SACCT, environ=environ)
        except FlowError:
            return {}  # no accounting here
        found = accounts_of(said) | found
    return {name.removeprefix(NAME): job for name, job in found.items()}


def accounts_of(listing: str) -> dict[str, Job]:
    """The jobs in what `sacct -n -P -X -o SACCT` printed, by name; of several of a name the last."""
    jobs = {}
    for line in listing.splitlines():
        fields = line.split("|", 6)
        if len(fields) == 7:
            name, number, state, nodes, code, ended, reason = fields
            status, _, signal = code.partition(":")
            exit_code = int(status) if status.isdigit() and signal in ("", "0") else None
            ended_at = float(ended) if ended.isdigit() else None
            jobs[name] = Job(name, number, state, nodes, "", reason, exit_code, ended_at)
    return jobs
