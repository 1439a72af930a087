"""Runs a task as a job of an engine: the supervisor, in a directory that the engine's machines and the client share.

Started by the engine's own script with the arguments `run` and the directory. There is no register here and nobody to
tell: what the client wants to know lies in the directory. Beside the files of every task (`taskdir`):

```
plan.json     what is wanted (`taskstart`), with the values of env; gone when the task has ended
state.json    how it is: state, reason, started_at, attempts, node, address
taken         what the engine said of the job when it ended it
job.log       what the engine's script prints
```

An engine may end the job at any time and may run it again. So being ended is no outcome: what it was is the engine's to
say. A job of several nodes starts the same with `rank` on each of them: through srun, or through Ray (`rayranks`).
"""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from . import limits, taskdb, taskdir, taskstart
from .errors import FlowError
from .supervisor import Ended, Supervisor
from .tasknode import Nodes

ANSWER_S = 10.0  # how long the engine may take to say how the job is
# How long one that the engine has lost sight of is waited for. Servers of files forget dead nodes sooner.
LOCK_S = 300.0
LOOK_S = 0.5
# For the ranks: where all nodes are, where they meet, and which one it is, unless srun says so.
ADDRESSES, PORT, RANK = "FLOW_JOB_ADDRESSES", "FLOW_JOB_PORT", "FLOW_JOB_RANK"


def main() -> None:
    """Entry point: `run` or `rank`, and the task's directory."""
    what, directory = sys.argv[1:]
    os.umask(0o022)
    plan = taskdir.read_json(directory, "plan.json")
    if plan is None:  # it had ended, and the engine runs it again all the same
        sys.exit(0)
    os.environ.update(plan["environ"])
    os.environ["FLOW_HOME"] = plan["home"]
    if plan["cache"]:
        os.environ["FLOW_CACHE"] = os.path.expanduser(plan["cache"])
    sys.exit(_rank(directory, plan) if what == "rank" else _run(directory, plan))


def _run(directory: str, plan: dict[str, Any]) -> int:
    lock = _lock(os.path.join(directory, "lock"))
    if not os.path.exists(os.path.join(directory, "plan.json")):  # the other one has brought it to its end
        return 0
    before = taskdir.read_json(directory, "state.json") or {}
    for name in ("started", "result.part", "pid", "taken", "preempted"):  # of an attempt that the engine has ended
        if os.path.exists(os.path.join(directory, name)):
            os.unlink(os.path.join(directory, name))
    taskdir.remove_tree(os.path.join(directory, "scratch"))
    os.mkdir(os.path.join(directory, "scratch"), 0o700)
    job = Job(directory, lock, {**plan, "after": []}, before.get("attempts", 0))
    ended = job.run()
    code = ended.exit_code or 0
    return 0 if ended.state == taskdb.COMPLETED else code if 0 < code < 256 else 1


def _lock(path: str) -> int:
    """Be the only one that runs the task: the engine may think that another one is gone while it still runs."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + LOCK_S
    while time.monotonic() < deadline:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            time.sleep(LOOK_S)
        except OSError:
            break  # a filesystem without locks: the engine sees to it that a job runs once at a time
    return fd


class Job(Supervisor):
    """The supervisor of a task that an engine started."""

    def __init__(self, directory: str, lock_fd: int, plan: dict[str, Any], attempts: int) -> None:
        error: FlowError | None = None
        try:
            spec = taskstart.complete({**plan, "depends_on": []})
        except FlowError as refused:
            error, spec = refused, {**plan, "depends_on": [], "box": "plain", "volume_urls": {}}
        self._refused = error
        self._state: dict[str, Any] = {"node": os.environ.get("SLURMD_NODENAME", ""), "address": _address()}
        super().__init__(directory, lock_fd, spec)
        self._attempts = attempts
        self._plain = self._plain or spec["nodes"] > 1  # srun stands for the nodes, or processes of ours

    def _make_nodes(self) -> Nodes:
        if self._refused is not None:
            raise self._refused
        if self.spec["nodes"] > 1:
            if "ranks" in self.spec:
                from .rayranks import Ranks

                return Ranks(self.directory, self.spec)
            return Steps(self.directory, self.spec)
        return Nodes(self.directory, self.spec)

    def _record(self, **fields: Any) -> None:
        self._state |= fields
        try:
            taskdir.write_json(self.directory, "state.json", self._state)
        except OSError as error:
            raise FlowError(f"the task's state can't be written: {error}") from None

    def _finish(self, ended: Ended) -> None:
        asked = taskdir.cancel_reason(self.directory) is not None
        if ended.state != taskdb.COMPLETED and not asked and (taken := _taken()):
            # Not by itself: it was cancelled or preempted from outside, or ran out of its time.
            with open(os.path.join(self.directory, "taken"), "w") as file:
                file.write(taken)
            if self._nodes is not None:
                self._nodes.close()
            return
        super()._finish(ended)
        os.unlink(os.path.join(self.directory, "plan.json"))


def _taken() -> str:
    """What Slurm is doing to this job, if it is ending it; "" if it is not."""
    if (number := os.environ.get("SLURM_JOB_ID")) is None:
        return ""
    try:
        said = subprocess.run(
            ["squeue", "-h", "-t", "all", "-j", number, "-o", "%T %r"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=ANSWER_S,
        ).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return "" if said.startswith("RUNNING") else said


# -- several nodes -----------------------------------------------------------------------------------------------------


class Steps(Nodes):
    """The nodes of a job, each with a process of its own that srun starts and ends with the others."""

    def acquire(self, report: Callable[[str], None]) -> None:
        """Each node gets its own."""

    def build(self) -> None:
        """Say where the nodes meet."""
        from .taskbox import Command

        port = self._rendezvous()
        for fd in self._fds[-1:]:  # the port's lock: it is node 0's to use
            os.close(fd)
            self._fds.remove(fd)
        addresses = _addresses(os.environ.get("SLURM_JOB_NODELIST", ""))
        boot = (
            "import sys; sys.path[:] = [p for p in sys.path if p]; sys.path.insert(0, sys.argv.pop(1)); "
            "from flowfn_runtime.taskjob import main; main()"
        )
        words = ["srun", f"--nodes={self._count}", f"--ntasks={self._count}", "--ntasks-per-node=1", "--mpi=none"]
        words += [
            "--kill-on-bad-exit=1",
            "--open-mode=append",
            f"--cpus-per-task={os.environ.get('SLURM_CPUS_PER_TASK', '1')}",
        ]
        words += [f"--output={self._directory}/%t.out", f"--error={self._directory}/%t.err"]
        argv = [*words, sys.executable, "-c", boot, self._spec["runtime"], "rank", self._directory]
        env = {**os.environ, ADDRESSES: ",".join(addresses), PORT: str(port)}
        self._commands = [Command(argv, env)]


class Rank(Nodes):
    """One node of several, in its own process, whose standard streams are the node's."""

    def __init__(self, directory: str, spec: dict[str, Any], rank: int) -> None:
        super().__init__(directory, spec, terminal=True, tree=f"tree.{rank}")
        self._rank = rank

    def build(self) -> None:
        shared = [] if self._staged is None else list(self._staged.binds)
        self._commands.append(self._command(self._rank, shared, int(os.environ[PORT])))

    def _addresses(self) -> list[str]:
        return os.environ[ADDRESSES].split(",")


def _rank(directory: str, plan: dict[str, Any]) -> int:
    """One node of several: get ready, run the command, and end as it does."""
    limits.set_subreaper()
    try:
        spec = taskstart.complete({**plan, "depends_on": []})
        watcher = Supervisor(directory, -1, {**spec, "after": []}, terminal=True)
        nodes = Rank(directory, spec, int(os.environ.get(RANK) or os.environ["SLURM_PROCID"]))
        nodes.acquire(lambda reason: None)
        nodes.build()
    except FlowError as error:
        print(f"flow: {error}", file=sys.stderr)
        return 1
    ended = watcher._watch(nodes.start(), None)
    code = 0 if ended.state == taskdb.COMPLETED else ended.exit_code or 143
    try:
        if not code:
            nodes.commit()
    except FlowError as error:
        print(f"flow: {error}", file=sys.stderr)
        code = 1
    nodes.close()
    return code


def _addresses(nodelist: str) -> list[str]:
    """Where the job's nodes are, in the order of their ranks."""
    try:
        said = subprocess.run(
            ["scontrol", "show", "node", "--oneliner", nodelist], capture_output=True, text=True, timeout=ANSWER_S
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        said = ""
    found = [word.removeprefix("NodeAddr=") for word in said.split() if word.startswith("NodeAddr=")]
    return found or [socket.gethostname()]


def _address() -> str:
    return _addresses(os.environ.get("SLURMD_NODENAME", ""))[0]
