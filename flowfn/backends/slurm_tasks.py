"""Tasks as Slurm jobs: `sbatch` starts them, one `squeue` (or `sacct`) says how all of them are.

A task's directory lies in the flowfn home, which a cluster's login and compute nodes share, as they share the user's
home. There the job (`flowfn_runtime.taskjob`) leaves what is to be known; nothing is asked of Slurm of those that have
said how they ended. The job's name has the task's id in it, so a task is found whatever became of who submitted it.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import time
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flowfn import slurm_options
from flowfn.backends import slurm_queue
from flowfn.backends.jobs import Jobs, More, State, pauses, starting
from flowfn.bundle import bundle
from flowfn_runtime import paths, project, taskdb, taskdir, tasklogs, taskserver, taskstart
from flowfn_runtime.errors import BackendUnavailable, ConfigError, FlowError, ResourceUnavailable

if TYPE_CHECKING:
    from flowfn.backends.slurm import SlurmBackend
    from flowfn.backends.slurm_queue import Job
    from flowfn.plan import Draft

NAME = "flowfn-"  # before the task's id, in the job's name
PASSING = ("PREEMPTED", "NODE_FAIL")  # a job of such a state may have another one soon
PASSING_S = 5.0
LOOK_S = 5.0  # how often Slurm is asked for a task that is waited for; its files are looked at more often
WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "CONFIGURING")


class SlurmJobs(Jobs):
    """The tasks of one flowfn home on a cluster."""

    label = "slurm"

    def __init__(self, place: Mapping[str, Any], backend: SlurmBackend | None = None) -> None:
        self.place = place
        self._home: str = place["home"]
        self._backend = backend  # for starting; who only asks needs none

    # starting

    def check(self, draft: Draft) -> None:
        self._need(draft)

    def _need(self, draft: Draft) -> slurm_options.Need:
        from flowfn.spec import FunctionSpec
        from flowfn_runtime.gpu_request import GpuRequest

        assert self._backend is not None
        if isinstance(draft.image, str):
            raise ConfigError(
                f"image={draft.image!r}: the slurm backend has no containers",
                hint="say what to install: image=flow.Image.python('3.12').pip_install(...)",
            )
        wanted = draft.wanted
        gpus = tuple(GpuRequest(*request) for request in wanted["gpus"])
        spec = FunctionSpec(gpu=gpus, cpu=wanted["cpus"], memory=wanted["memory_bytes"])
        return self._backend.choose(spec)[0]

    def start(self, draft: Draft) -> None:
        assert self._backend is not None
        options, need = self._backend.options, self._need(draft)
        task_id: str = draft.wanted["id"]
        directory = self._directory(task_id)
        paths.private_dir(directory)
        try:
            with project.guarded(self._store):
                for snapshot in draft.snapshots:
                    project.keep(snapshot, self._store)
                self._write(directory, draft)
            words = ["sbatch", "--parsable", f"--job-name={NAME}{task_id}", f"--output={directory}/job.log"]
            words += ["--open-mode=append", "--requeue", f"--nodes={draft.wanted['nodes']}", "--ntasks-per-node=1"]
            words += [*need.arguments(), *options.arguments(), *self._dependencies(draft.wanted)]
            asked = " ".join([*need.arguments(), *options.arguments()])
            submit(words, self._script(directory), self._backend, asked)
        except BaseException as error:
            if isinstance(error, Exception):
                taskdir.remove_tree(directory)
            raise

    def _write(self, directory: str, draft: Draft) -> None:
        assert self._backend is not None
        options = self._backend.options
        plan = {**draft.wanted, "box": "sandbox if needed", "gpus": None}  # Slurm gives them, and the variables
        plan |= {"runtime": bundle().place(os.path.join(self._home, "runtime"))}
        plan |= {"home": self._home, "cache": options.cache and os.path.abspath(os.path.expanduser(options.cache))}
        if draft.image is not None:
            plan["environment"] = draft.image.to_dict()
        taskdir.reserve_outcome(directory)
        taskdir.write_json(directory, "spec.json", taskstart.public(draft.wanted))
        taskdir.write_private(directory, "plan.json", json.dumps(plan).encode())
        if draft.payload is not None:
            taskdir.write_private(directory, "call", draft.payload)

    def _script(self, directory: str) -> str:
        assert self._backend is not None
        runtime = os.path.join(self._home, "runtime", bundle().digest)
        program = starting("taskjob", runtime, "run", directory, python=self._backend.options.python)
        return f"#!/bin/sh\nexec {shlex.join(program)}\n"

    def _dependencies(self, wanted: Mapping[str, Any]) -> list[str]:
        """The options that have Slurm wait for other tasks, and cancel this one if one that it depends on fails."""
        active = {task_id: self._read(task_id)[0] for task_id in wanted["depends_on"]}
        if failed := [task_id for task_id, state in active.items() if state and state.state != taskdb.COMPLETED]:
            raise ResourceUnavailable(f"the task depends on {failed[0]}, which has not completed")
        waits = []
        # Those whose volumes it uses may end as they like.
        for kind, ids in (
            ("afterok", [one for one, state in active.items() if state is None]),
            ("afterany", wanted["after"]),
        ):
            if jobs := listed(ids) if ids else {}:
                waits.append(f"{kind}:" + ":".join(job.number for job in jobs.values()))
        return [f"--dependency={','.join(waits)}", "--kill-on-invalid-dep=yes"] if waits else []

    # asking

    def states(self, ids: Sequence[str]) -> dict[str, State | FlowError]:
        found: dict[str, State | FlowError] = {}
        for task_id in ids:
            if (state := self._read(task_id)[0]) is not None:
                found[task_id] = state
        rest = [task_id for task_id in ids if task_id not in found]
        if not rest:
            return found
        try:
            jobs = listed(rest)
            past = {} if len(jobs) == len(rest) else accounted([task_id for task_id in rest if task_id not in jobs])
        except BackendUnavailable as error:
            return found | dict.fromkeys(rest, error)
        for task_id in rest:
            # In this order: what it left before its end is read after that was seen.
            ended, facts = self._read(task_id)
            job = jobs.get(task_id) or past.get(task_id)
            if ended is not None or job is not None or facts:
                found[task_id] = ended or self._believe(task_id, job, judge(job, facts))
        return found

    def _believe(self, task_id: str, job: Job | None, state: State) -> State:
        """The state, unless the job may be put into the queue again in a moment: it reads as preempted until it is."""
        if job is None or not job.over or job.state not in PASSING or state.state != taskdb.FAILED:
            return state
        mark = os.path.join(self._directory(task_id), "preempted")
        try:
            os.close(os.open(mark, os.O_CREAT | os.O_WRONLY | os.O_EXCL | os.O_CLOEXEC, 0o600))
        except FileExistsError:
            if time.time() - os.stat(mark).st_mtime > PASSING_S:
                return state
        except OSError:
            return state
        return state._replace(state=taskdb.PENDING, ended_at=None)

    def _read(self, task_id: str) -> tuple[State | None, dict[str, Any]]:
        """How it ended, if it has said so; and what else lies in its directory."""
        directory = self._directory(task_id)
        if outcome := taskdir.read_json(directory, "outcome.json"):
            return State(**outcome), {}
        if not os.path.isdir(directory):
            return None, {}
        facts: dict[str, Any] = {"state": taskdir.read_json(directory, "state.json") or {}}
        facts["cancel"] = taskdir.cancel_reason(directory)
        facts["begun"] = os.path.exists(os.path.join(directory, "started"))
        for name in ("taken", "job.log"):
            try:
                with open(os.path.join(directory, name), errors="replace") as file:
                    facts[name] = file.read()[-2000:].strip()
            except FileNotFoundError:
                facts[name] = ""
        return None, facts

    def read(self, task_id: str, name: str, offset: int = 0) -> bytes:
        return taskserver.read(self._directory(task_id), name, offset)

    def end_of(self, task_id: str, name: str, lines: int) -> int:
        return tasklogs.start_of(os.path.join(self._directory(task_id), name), lines)

    def more(self, task_id: str, offsets: Mapping[str, int], timeout: float) -> More:
        # Nobody tells of files that another machine writes to.
        for _ in self._while_active(task_id, timeout):
            added = {name: self.read(task_id, name, offset) for name, offset in offsets.items()}
            if any(added.values()):
                return More(added, False)
        ended = not self._active(task_id)
        return More({name: self.read(task_id, name, offset) for name, offset in offsets.items()}, ended)

    def wait(self, task_id: str, state: str, timeout: float) -> None:
        for _ in self._while_active(task_id, timeout):
            told = taskdir.read_json(self._directory(task_id), "state.json") or {}
            if told.get("state", state) != state:
                return

    def _while_active(self, task_id: str, timeout: float) -> Any:
        """Longer and longer pauses, until the task has ended or the time is over. Slurm is asked now and then."""
        asked = time.monotonic()
        yield
        for _ in pauses(timeout, most=1.0):
            if self._read(task_id)[0] is not None:
                return
            if time.monotonic() - asked > LOOK_S:
                if not self._active(task_id):
                    return
                asked = time.monotonic()
            yield

    def _active(self, task_id: str) -> bool:
        state = self.states([task_id]).get(task_id)
        if isinstance(state, FlowError):
            raise state
        return state is not None and state.state in taskdb.ACTIVE

    # ending

    def cancel(self, task_id: str, reason: str) -> None:
        directory = self._directory(task_id)
        if not os.path.isdir(directory):
            return
        taskdir.request_cancel(directory, reason)
        name = f"--name={NAME}{task_id}"
        for words in ([name, "--state=PENDING"], [name, "--batch", "--signal=TERM"]):
            try:
                # One that runs is told, and ends its processes itself.
                slurm_queue.run("scancel", "-Q", *words)
            except ResourceUnavailable:
                pass
            except BackendUnavailable as error:
                if not re.search(r"[Ii]nvalid job|already", error.message):
                    raise

    def forget(self, ids: Sequence[str]) -> None:
        with project.guarded(self._store, cleaning=True):
            for task_id in ids:
                taskdir.remove_tree(self._directory(task_id))
            needed: set[str] = set()
            for folder in ("jobs", "tasks"):
                root = os.path.join(self._home, folder)
                for name in os.listdir(root) if os.path.isdir(root) else ():
                    if spec := taskdir.read_json(os.path.join(root, name), "spec.json"):
                        needed.update((spec["code"], *spec["roots"]))
            project.clean(self._store, needed)

    def address(self, task_id: str) -> str:
        told = taskdir.read_json(self._directory(task_id), "state.json") or {}
        if not told.get("address"):
            raise ResourceUnavailable("the task has no node yet", hint="wait for it: task.wait_started()")
        address: str = told["address"]
        return address

    # places

    def _directory(self, task_id: str) -> str:
        return os.path.join(self._home, "jobs", task_id)

    @property
    def _store(self) -> str:
        return os.path.join(self._home, "code")


def judge(job: Job | None, facts: Mapping[str, Any]) -> State:
    """How a task is that has not said how it ended: from what Slurm says of its job, and what the job left. Pure."""
    told: Mapping[str, Any] = facts.get("state") or {}
    attempts: int = told.get("attempts", 0)
    started: float | None = told.get("started_at")
    if job is not None and not job.over:
        if job.state.startswith(WAITING):
            ever = ", and would for ever" if slurm_queue.hopeless(job.reason) else ""
            why = f"Slurm job {job.number} waits in the queue{ever}: {job.reason}"
            return State(taskdb.PENDING, why, None, started, None, attempts)
        if facts.get("begun"):
            return State(taskdb.RUNNING, told.get("reason", ""), None, started, None, attempts)
        return State(taskdb.PENDING, told.get("reason") or f"Slurm job {job.number} starts", None, None, None, attempts)
    if job is not None and job.state == "COMPLETING" and facts.get("begun"):
        return State(taskdb.RUNNING, told.get("reason", ""), None, started, None, attempts)
    said = f"{job.state} {job.reason}" if job is not None else facts.get("taken", "")
    which = f"Slurm job {job.number}" if job is not None else "its Slurm job"
    words = slurm_queue.end_of(said)
    state, ended = taskdb.FAILED, time.time()
    reason: str
    if facts.get("cancel") is not None:
        state, reason = taskdb.CANCELLED, facts["cancel"]
    elif words == slurm_queue.CANCELLED or said.startswith("COMPLETING"):
        state, reason = taskdb.CANCELLED, f"{which} was cancelled from outside"
    elif words is not None:
        reason = f"{which} {words}"
    elif job is not None:
        reason = f"{which} ended without a word ({job.state})"
        reason += f": {facts['job.log']}" if facts.get("job.log") else ""
    else:
        reason = "Slurm does not know its job any more, and it left no word: its node failed, or it was killed"
    return State(state, reason, None, started, ended, attempts)


def listed(ids: Collection[str]) -> dict[str, Job]:
    """The tasks' jobs that squeue knows, all by one question. Raises BackendUnavailable."""
    if not ids:
        return {}
    listing = slurm_queue.run("squeue", "-h", "-t", "all", "-u", str(os.getuid()), "-o", slurm_queue.SQUEUE)
    jobs = {name.removeprefix(NAME): job for name, job in slurm_queue.jobs_of(listing).items()}
    return {task_id: jobs[task_id] for task_id in ids if task_id in jobs}


def accounted(ids: Collection[str]) -> dict[str, Job]:
    """The tasks' jobs that Slurm's accounting knows, where there is such a thing."""
    names = ",".join(f"{NAME}{task_id}" for task_id in ids)
    try:
        said = slurm_queue.run("sacct", "-n", "-P", "-X", "-S", "now-30days", f"--name={names}", "-o", SACCT)
    except FlowError:
        return {}  # no accounting here
    found = {}
    for line in said.splitlines():
        name, number, state, nodes, reason = (line.split("|", 4) + [""] * 4)[:5]
        found[name.removeprefix(NAME)] = slurm_queue.Job(name, number, state, nodes, "", reason)
    return found


SACCT = "JobName,JobID,State,NodeList,Reason"


def submit(words: Sequence[str], script: str, backend: SlurmBackend, asked: str) -> None:
    """Run sbatch with a script. Raises what it means if it refuses; `uncertain` where it may have started the job."""
    try:
        done = subprocess.run(
            [*words],
            input=script,
            env=backend.environment(),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=slurm_queue.COMMAND_S,
            start_new_session=True,
        )
    except OSError as error:
        raise slurm_queue.missing(words[0], error) from None
    except subprocess.TimeoutExpired:
        late = BackendUnavailable("sbatch did not answer in time", hint="is slurmctld running? scontrol ping")
        late.uncertain = True
        raise late from None
    if done.returncode:
        raise slurm_queue.meaning(done.stderr, asked, backend.there()) or BackendUnavailable(
            f"sbatch failed:\n{done.stderr.strip()}"
        )
