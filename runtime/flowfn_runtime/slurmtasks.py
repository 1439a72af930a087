"""Tasks as Slurm jobs, where Slurm's commands are: `sbatch` starts them, one `squeue` or `sacct` says how they are.

A task's directory lies in the flowfn home, which a cluster's login and compute nodes share, as they share the user's
home. There the job (`taskjob`) leaves what is to be known; nothing is asked of Slurm of those that have said how they
ended. The job's name has the task's id in it, so a task is found whatever became of who submitted it.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from . import paths, project, slurmsays, taskdb, taskdir, tasklogs, taskserver, taskstart
from .errors import BackendUnavailable, FlowError, ResourceUnavailable
from .slurmsays import Job
from .slurmstate import NAME, accounted, judge, listed
from .taskstate import More, State

PASSING = ("PREEMPTED", "NODE_FAIL")  # a job of such a state may have another one soon
PASSING_S = 5.0
LOOK_S = 5.0  # how often Slurm is asked for a task that is waited for; its files are looked at more often
PAUSES_S = (0.1, 1.0)  # between looks at the files: at first, and at last


class Tasks:
    """The tasks of one flowfn home."""

    def __init__(self, home: str) -> None:
        self._home = home

    # starting

    def start(
        self,
        plan: Mapping[str, Any],
        payload: bytes | None,
        *,
        runtime: Callable[[], str],
        program: Sequence[str],
        options: Sequence[str],
        python_first: bool,
        bring: Callable[[str], None],
        there: Callable[[], str],
    ) -> None:
        """Submit a task, once at most however often this is called.

        `plan`: what `taskjob` is to do; `runtime` says where the runtime lies; `program`: the command line that runs
        `taskjob` by the right Python, its arguments excepted; `options`: sbatch's, for what it needs; `python_first`:
        see `slurmsays.environment`; `bring` gets the project's files into a store; `there`: what the cluster has.
        Raises what Slurm refuses, and BackendUnavailable.
        """
        task_id: str = plan["id"]
        directory = self._directory(task_id)
        try:
            place = runtime()
            if not os.path.isdir(directory):
                plan = {**plan, "runtime": place, "home": self._home}
                with project.guarded(self._store):
                    bring(self._store)
                    self._write(directory, plan, payload)
        except OSError as failure:
            if isinstance(failure, FlowError):
                raise
            raise FlowError(
                f"the task can't be put into {self._home}: {failure.strerror}",
                hint="another directory that the nodes see may do: home=",
            ) from failure
        try:
            taskdir.write_private(directory, "submitted", b"")
        except FileExistsError:  # by who was asked before, and could not say what came of it
            if listed([task_id]) or accounted({task_id: ""}) or self._read(task_id)[0]:
                return
            error = BackendUnavailable("it is not known whether Slurm has the task's job")
            error.uncertain = True
            raise error from None
        try:
            words = ["sbatch", "--parsable", f"--job-name={NAME}{task_id}", f"--output={directory}/job.log"]
            words += ["--open-mode=append", "--requeue", f"--nodes={plan['nodes']}", "--ntasks-per-node=1"]
            words += [*options, *self._dependencies(plan)]
            script = f"#!/bin/sh\nexec {shlex.join([*program, place, 'run', directory])}\n"
            environ = slurmsays.environment(python_first=python_first)
            asked = " ".join(options)
            number = slurmsays.run(*words, given=script, environ=environ, asked=asked, there=there)
        except FlowError as error:
            if not getattr(error, "uncertain", False):
                taskdir.remove_tree(directory)
            raise
        try:
            taskdir.write_private(directory, "number", number.strip().encode())
        except OSError:
            pass  # Slurm has the job, and knows it by its name

    def _write(self, directory: str, plan: Mapping[str, Any], payload: bytes | None) -> None:
        """Make the task's directory, whole or not at all."""
        new = tempfile.mkdtemp(prefix=".new-", dir=paths.private_dir(os.path.dirname(directory)))
        try:
            taskdir.reserve_outcome(new)
            taskdir.write_json(new, "spec.json", taskstart.public(plan))
            taskdir.write_private(new, "plan.json", json.dumps(plan).encode())
            if payload is not None:
                taskdir.write_private(new, "call", payload)
            os.rename(new, directory)
        except BaseException:
            taskdir.remove_tree(new)
            raise

    def held(self, wanted: Mapping[str, Any]) -> list[str]:
        """What the volumes that the task has to itself are called: by name and by id, as far as they are there yet."""
        if not wanted["volumes"]:
            return []
        from .data import volumes

        names: list[str] = []
        for volume in wanted["volumes"]:
            called = volume["volume_id"] or volume["name"]
            there = volumes.find(called, wanted["project"], home=self._home)
            if (there.interface if there else volume["interface"]) != "file":
                names += dict.fromkeys(filter(None, (called, *((there.id, there.name) if there else ()))))
        return names

    def _dependencies(self, plan: Mapping[str, Any]) -> list[str]:
        """The options that have Slurm wait for other tasks, and cancel this one if one that it depends on fails."""
        active = {task_id: self._read(task_id)[0] for task_id in plan["depends_on"]}
        if failed := [task_id for task_id, state in active.items() if state and state.state != taskdb.COMPLETED]:
            raise ResourceUnavailable(f"the task depends on {failed[0]}, which has not completed")
        waits = []
        # Those whose volumes it uses may end as they like.
        for kind, ids in (
            ("afterok", [one for one, state in active.items() if state is None]),
            ("afterany", plan["after"]),
        ):
            if jobs := listed(ids) if ids else {}:
                waits.append(f"{kind}:" + ":".join(job.number for job in jobs.values()))
        return [f"--dependency={','.join(waits)}", "--kill-on-invalid-dep=yes"] if waits else []

    # asking

    def states(self, ids: Sequence[str]) -> dict[str, State | FlowError]:
        """How these tasks are; of those of which nothing can be told at the moment, why not."""
        found: dict[str, State | FlowError] = {}
        for task_id in ids:
            if (state := self._read(task_id)[0]) is not None:
                found[task_id] = state
        rest = [task_id for task_id in ids if task_id not in found]
        if not rest:
            return found
        try:
            jobs = listed(rest)
            past = accounted({task_id: self._number(task_id) for task_id in rest if task_id not in jobs})
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
        facts["number"] = self._number(task_id)
        facts["submitting"] = self._is_being_submitted(directory)
        for name in ("taken", "job.log"):
            try:
                with open(os.path.join(directory, name), errors="replace") as file:
                    facts[name] = file.read()[-2000:].strip()
            except FileNotFoundError:
                facts[name] = ""
        return None, facts

    def _is_being_submitted(self, directory: str) -> bool:
        """Whether sbatch may be on its way: whoever called it has not said what came of it."""
        if os.path.exists(os.path.join(directory, "number")):
            return False
        try:
            return time.time() - os.stat(os.path.join(directory, "submitted")).st_mtime < slurmsays.COMMAND_S
        except FileNotFoundError:
            return False

    def _number(self, task_id: str) -> str:
        """Its job's, "" if nobody has written it down."""
        try:
            with open(os.path.join(self._directory(task_id), "number")) as file:
                return file.read().partition(";")[0]  # after it, the cluster's name
        except FileNotFoundError:
            return ""

    def read(self, task_id: str, name: str, offset: int) -> bytes:
        """A piece of one of its files."""
        return taskserver.read(self._directory(task_id), name, offset)

    def end_of(self, task_id: str, name: str, lines: int) -> int:
        """Where the last lines of one of its files begin."""
        return tasklogs.start_of(os.path.join(self._directory(task_id), name), lines)

    def more(self, task_id: str, offsets: Mapping[str, int], timeout: float) -> More:
        """What was added to its files since; waits for something, or for its end."""
        # Nobody tells of files that another machine writes to.
        for _ in self._while_active(task_id, timeout):
            added = {name: self.read(task_id, name, offset) for name, offset in offsets.items()}
            if any(added.values()):
                return More(added, False)
        ended = not self._active(task_id)
        return More({name: self.read(task_id, name, offset) for name, offset in offsets.items()}, ended)

    def wait(self, task_id: str, state: str, timeout: float) -> None:
        """Return when it may have another state than this."""
        for _ in self._while_active(task_id, timeout):
            told = taskdir.read_json(self._directory(task_id), "state.json") or {}
            if told.get("state", state) != state:
                return

    def _while_active(self, task_id: str, timeout: float) -> Iterator[None]:
        """Longer and longer pauses, until the task has ended or the time is over. Slurm is asked now and then."""
        asked = time.monotonic()
        deadline = asked + timeout
        pause, most = PAUSES_S
        yield
        while (left := deadline - time.monotonic()) > 0:
            time.sleep(min(pause, left))
            pause = min(pause * 1.4, most)
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

    def address(self, task_id: str) -> str:
        """The node that it runs on. Raises ResourceUnavailable if it has none yet."""
        told = taskdir.read_json(self._directory(task_id), "state.json") or {}
        if not told.get("address"):
            raise ResourceUnavailable("the task has no node yet", hint="wait for it: task.wait_started()")
        address: str = told["address"]
        return address

    # ending

    def cancel(self, task_id: str, reason: str) -> None:
        """Have it ended."""
        directory = self._directory(task_id)
        if not os.path.isdir(directory):
            return
        taskdir.request_cancel(directory, reason)
        name = f"--name={NAME}{task_id}"
        for words in ([name, "--state=PENDING"], [name, "--batch", "--signal=TERM"]):
            try:
                # One that runs is told, and ends its processes itself.
                slurmsays.run("scancel", "-Q", *words)
            except ResourceUnavailable:
                pass
            except BackendUnavailable as error:
                if not re.search(r"[Ii]nvalid job|already", error.message):
                    raise

    def forget(self, ids: Sequence[str]) -> None:
        """Remove all that is left of tasks that have ended."""
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

    # places

    def _directory(self, task_id: str) -> str:
        return os.path.join(self._home, "jobs", task_id)

    @property
    def _store(self) -> str:
        return os.path.join(self._home, "code")
