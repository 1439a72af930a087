"""Runs a task in a job of Ray: the driver that Ray knows, and below it the supervisor (`taskjob`), as in other engines.

It gets what is to be done from the cluster's keeper (`flowfn.backends.ray_keeper`), and sends there what the task
leaves, as it grows. How it ended is sent last, when nothing of the task is left on this node. A task of several nodes
runs on others (`rayranks`); this is the cluster's head then.
"""

from __future__ import annotations

import fcntl
import functools
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from . import limits, paths, project, taskdir
from .watch import Watch

CHUNK_BYTES = 1 << 22
PATIENCE_S = 600.0  # for the keeper to be there again
LOOK_S = 1.0
FRESH_S = 60.0  # how old a directory without a driver has to be to be taken for left behind
_START = (
    "import sys; sys.path[:] = [p for p in sys.path if p]; sys.path.insert(0, sys.argv.pop(1)); "
    "from flowfn_runtime.taskjob import main; main()"
)
STOPPED = "its Ray job was stopped from outside"


def main(keeper: Any, task_id: str, plan: dict[str, Any], runtime: str) -> int:
    """Take the task to its end; the driver's exit status."""
    configure(plan)
    directory = make_directory(task_id)
    courier = Courier(keeper, task_id, directory, plan["nodes"])
    signal.signal(signal.SIGTERM, courier.on_sigterm)
    limits.set_subreaper()
    threading.Thread(target=courier.await_cancel, daemon=True).start()
    gang = None
    outcome: dict[str, Any] = {"state": "failed", "reason": "", "ended_at": 0.0}
    try:
        if plan["nodes"] > 1:
            from .rayranks import Gang

            # Nothing is staged or taken here.
            courier.fetch({**plan, "mounts": [], "volumes": [], "ephemeral": [], "ports": []})
            gang = Gang(courier, keeper, task_id, plan)
        else:
            courier.fetch(plan)
        outcome["reason"] = _run(courier, directory, runtime, plan)
        outcome = taskdir.read_json(directory, "outcome.json") or outcome
    except Exception as error:
        outcome["reason"] = f"the Ray job failed: {type(error).__name__}: {error}"
    if (why := taskdir.cancel_reason(directory)) is not None and outcome["state"] != "completed":
        outcome |= {"state": "cancelled", "reason": why}
    outcome["ended_at"] = outcome["ended_at"] or time.time()
    limits.kill_orphans()
    if gang is not None:
        gang.finish()
    courier.send(last=True)
    taskdir.remove_tree(directory)
    courier.ask("add", task_id, [("outcome.json", -1, json.dumps(outcome).encode())])
    return 0 if outcome["state"] == "completed" else outcome.get("exit_code") or 1


def configure(plan: Mapping[str, Any]) -> None:
    """Have this process, and what it starts, use the directories of this node that the client has named."""
    for option, variable in (("home", "FLOW_HOME"), ("cache", "FLOW_CACHE")):
        if plan[option]:
            os.environ[variable] = os.path.abspath(os.path.expanduser(plan[option]))


def environment(plan: Mapping[str, Any]) -> dict[str, str]:
    """The variables of what is started for the task."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_JOB", "SLURMD_"))}
    if not plan["cpus"]:
        env.pop("OMP_NUM_THREADS", None)  # Ray sets it by what a job asks for
    return env


def make_directory(task_name: str) -> str:
    """Make a directory for a task on this node; remove those of drivers that were killed."""
    root = paths.private_dir(os.path.join(paths.private_dir(paths.home()), "ray-jobs"))
    for name in os.listdir(root):
        other = os.path.join(root, name)
        try:
            if not taskdir.is_held(other, "driver") and time.time() - os.stat(other).st_mtime > FRESH_S:
                taskdir.remove_tree(other)
        except OSError:
            pass  # it has just ended by itself
    directory = os.path.join(root, task_name)
    os.mkdir(directory, 0o700)
    lock = os.open(os.path.join(directory, "driver"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)  # until this process ends
    return directory


def _run(courier: Courier, directory: str, runtime: str, plan: Mapping[str, Any]) -> str:
    """Run the supervisor, and send what the task leaves; returns how the supervisor ended."""
    with open(os.path.join(directory, "supervisor.log"), "ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", _START, runtime, "run", directory],
            env=environment(plan),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            # It ends the task, and all that is of it, if this process is killed.
            preexec_fn=functools.partial(limits.set_pdeathsig, signal.SIGTERM),
        )
    ended = mark_end(process, directory)
    with Watch(directory) as watch:
        while not ended.is_set():
            watch.wait(time.monotonic() + LOOK_S)
            courier.send()
    return f"its supervisor ended without a word (exit status {process.returncode})"


def mark_end(process: subprocess.Popen[bytes], directory: str) -> threading.Event:
    """An event for the end of the process; who watches the directory is woken by it as well."""
    ended = threading.Event()

    def look() -> None:
        process.wait()
        ended.set()
        with open(os.path.join(directory, "ended"), "w"):
            pass

    threading.Thread(target=look, daemon=True).start()
    return ended


class Courier:
    """What goes between the task's directory and the keeper."""

    def __init__(self, keeper: Any, task_id: str, directory: str, nodes: int = 1) -> None:
        import ray

        self.directory = directory
        self.address: str = ray.util.get_node_ip_address()  # where the task's ports answer

        self._keeper = keeper
        self._task_id = task_id
        self._growing = [f"{node}.{stream}" for node in range(nodes) for stream in ("out", "err")] + ["supervisor.log"]
        self._sent: dict[str, int] = {}
        self._told: dict[str, Any] = {}

    def ask(self, method: str, *arguments: Any) -> Any:
        """Ask the keeper, which may be away for a while."""
        import ray

        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                return ray.get(getattr(self._keeper, method).remote(*arguments))
            except (ray.exceptions.RayActorError, ray.exceptions.RaySystemError):
                if time.monotonic() > deadline:
                    raise
                time.sleep(1.0)

    def on_sigterm(self, *_: object) -> None:
        """Ray stops the job: its supervisor gets the same signal, and sees to the end of it all."""
        try:
            taskdir.cancel(self.directory, STOPPED)
        except OSError:
            pass

    def await_cancel(self) -> None:
        """Have the task end when somebody asks for that."""
        try:
            taskdir.cancel(self.directory, self.ask("cancelled", self._task_id))
        except Exception:
            pass  # the directory is gone, and so is the task

    def fetch(self, plan: dict[str, Any]) -> None:
        """Put the task's files where its supervisor looks for them."""
        home = paths.home()
        store = os.path.join(home, "code")
        with project.guarded(store):
            for digest in filter(None, [plan["code"], *plan["roots"]]):
                if not os.path.exists(os.path.join(store, "trees", digest)):
                    blob = functools.partial(self.ask, "blob", f"code-{digest}")
                    project.unpack(io.BufferedReader(_Pieces(blob)), store)
        if plan["call"]:
            fd = os.open(os.path.join(self.directory, "call"), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(fd, "wb") as file:
                while piece := self.ask("read", self._task_id, "call", file.tell()):
                    file.write(piece)
        taskdir.reserve_outcome(self.directory)
        told = {**plan, "home": home, "cache": os.environ.get("FLOW_CACHE")}
        taskdir.write_private(self.directory, "plan.json", json.dumps(told).encode())

    def send(self, *, last: bool = False) -> None:
        """What is new in the task's files; the result only when it is whole."""
        # First of all where it is: who reads that it listens may want to connect.
        told = {**(taskdir.read_json(self.directory, "state.json") or {}), "address": self.address}
        if told != self._told:
            self.ask("add", self._task_id, [("state.json", -1, json.dumps(told).encode())])
            self._told = told
        for name in [*self._growing, "result"] if last else self._growing:
            while piece := self._piece(name):
                self.ask("add", self._task_id, [(name, self._sent.get(name, 0), piece)])
                self._sent[name] = self._sent.get(name, 0) + len(piece)
        if "started" not in self._sent and os.path.exists(os.path.join(self.directory, "started")):
            self.ask("add", self._task_id, [("started", -1, b"")])
            self._sent["started"] = 0

    def _piece(self, name: str) -> bytes:
        try:
            fd = os.open(os.path.join(self.directory, name), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return b""
        try:
            return os.pread(fd, CHUNK_BYTES, self._sent.get(name, 0))
        finally:
            os.close(fd)


class _Pieces(io.RawIOBase):
    """A file that is asked for piece by piece."""

    def __init__(self, ask: Callable[[int], bytes]) -> None:
        self._ask = ask
        self._offset = 0
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not len(self._rest):
            self._rest = memoryview(self._ask(self._offset))
            self._offset += len(self._rest)
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count
