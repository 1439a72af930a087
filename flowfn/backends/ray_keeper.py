"""What keeps the tasks of a Ray cluster: one detached actor on its head, with a directory in Ray's session.

It hands tasks to Ray's Jobs server, keeps what they need until they start, and what they leave: each job's driver
(`flowfn_runtime.raytask`) sends its files here as they grow, so that they outlive the job's node. Whoever asks for a
task asks here, and clients reach the Jobs server from anywhere. What lies on the disk outlives the actor, too.

It goes to the head by value and needs nothing of flowfn's there.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray

NAME = "tasks-1"  # the number is that of what it is asked and answers
NAMESPACE = "flowfn"
CHUNK_BYTES = 1 << 22
LOOK_S = 2.0  # how old what Ray says of its jobs may be for those who wait
_TASK = re.compile(r"task_\w+")
_FILE = re.compile(r"\d+\.(out|err)|result|call|plan|started|(outcome|state|needs)\.json|supervisor\.log")
_BLOB = re.compile(r"(code|runtime)-[0-9a-f]+")

# What a job runs. The runtime is put into the node's cache, and takes over.
_BOOT = """
import io, os, shutil, sys, tempfile, zipfile
def begin(keeper, task_id):
    order = ray.get(keeper.take.remote(task_id))
    if order is None:
        sys.exit("flow: the task was cancelled before it began")
    plan = json.loads(order)
    if plan["version"] != list(sys.version_info[:2]):
        sys.exit("flow: the cluster's Python is %d.%d (" % sys.version_info[:2] + sys.executable
                 + "), and the task was submitted by Python %d.%d" % tuple(plan["version"]))
    cache = os.environ.get("FLOW_CACHE") or plan["cache"]
    cache = cache or (os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) + "/flowfn"
    place = os.path.join(os.path.abspath(os.path.expanduser(cache)), "runtime", plan["digest"])
    if not os.path.isdir(place):
        os.makedirs(os.path.dirname(place), mode=0o700, exist_ok=True)
        new = tempfile.mkdtemp(dir=os.path.dirname(place))
        data = b""
        while piece := ray.get(keeper.blob.remote("runtime-" + plan["digest"], len(data))):
            data += piece
        try:
            zipfile.ZipFile(io.BytesIO(data)).extractall(new)
            os.rename(new, place)
        except BaseException:
            shutil.rmtree(new, True)
            if not os.path.isdir(place):
                raise
    sys.path[:] = [place] + [p for p in sys.path if p]
    from flowfn_runtime import raytask
    status = raytask.main(keeper, task_id, plan, place)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # all is told; Ray's own way out spoils the status while a thread waits for the keeper
begin(keeper, sys.argv[1])
"""


class Keeper:
    """The actor. What it raises: ValueError, what was wrong with the question; ConnectionError, no Jobs server."""

    def __init__(self) -> None:
        from ray._private import worker

        self._root = os.path.join(worker._global_node.get_session_dir_path(), "flowfn")
        os.makedirs(self._root, mode=0o700, exist_ok=True)
        self._server: Any = None
        self._listed: tuple[float, dict[str, dict[str, Any]]] = (-LOOK_S, {})
        self._listing = asyncio.Lock()
        self._submitted = 0.0  # when the last one was
        self._happened: dict[str, asyncio.Event] = {}

    # submitting

    async def lacks(self, names: Sequence[str]) -> list[str]:
        """Which of these blobs are not here."""
        return [name for name in names if not os.path.exists(self._blob(name))]

    async def keep(self, name: str, part: str, offset: int, data: bytes, last: bool) -> None:
        """A piece of a blob; `part` names who sends it. It is there when the last one is."""
        path = f"{self._blob(name)}.{int(part, 16):x}"
        _write(path, offset, data)
        if last:
            os.rename(path, self._blob(name))

    async def put(self, task_id: str, name: str, offset: int, data: bytes) -> None:
        """A piece of a file of a task that is to be submitted."""
        os.makedirs(self._directory(task_id), mode=0o700, exist_ok=True)
        _write(self._path(task_id, name), offset, data)

    async def submit(self, task_id: str, options: Mapping[str, Any]) -> None:
        """Have Ray run the task, whose files are here."""
        import shlex
        import sys

        text = (
            f"import ray,json; ray.init('auto', namespace={NAMESPACE!r}, log_to_driver=False, logging_level='ERROR');"
        )
        text += f" keeper = ray.get_actor({NAME!r}); exec(ray.get(keeper.boot.remote()))"
        python = shlex.quote(sys.executable)
        command = f"p={python}; [ -x $p ] || p=python3; exec $p -c {shlex.quote(text)} {task_id}"
        await self._jobs("submit_job", entrypoint=command, submission_id=task_id, **options)
        self._submitted = time.monotonic()

    async def nodes(self) -> list[dict[str, float]]:
        """The resources of the nodes that are alive. Raises if there is no Jobs server."""
        await self._jobs("get_version")
        return [node["Resources"] for node in ray.nodes() if node["Alive"]]

    # for the job

    async def boot(self) -> str:
        return _BOOT

    async def take(self, task_id: str) -> bytes | None:
        """What is to be done, once; None if not any more."""
        path = self._path(task_id, "plan")
        try:
            with open(path, "rb") as file:
                plan = file.read()
        except FileNotFoundError:
            return None
        os.unlink(path)
        return plan

    async def blob(self, name: str, offset: int) -> bytes:
        return _read(self._blob(name), offset)

    async def add(self, task_id: str, pieces: Sequence[tuple[str, int, bytes]]) -> bool:
        """What was added to the task's files; `offset` -1: the whole of a file. False if it was forgotten."""
        if not os.path.isdir(self._directory(task_id)):
            return False
        for name, offset, data in pieces:
            path = self._path(task_id, name)
            if offset < 0:
                _write(path + ".new", 0, data)
                os.rename(path + ".new", path)
            else:
                _write(path, offset, data)
        self._tell(task_id)
        return True

    async def cancelled(self, task_id: str) -> str:
        """Why the task is to be cancelled, as soon as it is."""
        while True:
            event = self._event(task_id)
            try:
                with open(self._directory(task_id) + "/cancel", encoding="utf-8") as file:
                    return file.read()
            except FileNotFoundError:
                await event.wait()

    # asking

    async def facts(self, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
        """What is known of these tasks; of those that are not known nothing."""
        found: dict[str, dict[str, Any]] = {}
        for task_id in ids:
            directory = self._directory(task_id)
            if os.path.isdir(directory):
                found[task_id] = {name: _json(directory, f"{name}.json") for name in ("outcome", "state")}
                found[task_id]["started"] = os.path.exists(f"{directory}/started")
                found[task_id]["cancel"] = _text(f"{directory}/cancel")
        rest = [task_id for task_id, facts in found.items() if not facts["outcome"]]
        if rest:
            try:
                jobs = await self._list()
            except ConnectionError as error:
                for task_id in rest:
                    found[task_id]["unknown"] = str(error)
            else:
                for task_id in rest:
                    # In this order: what it left before its end is read after that was seen.
                    found[task_id]["job"] = jobs.get(task_id)
                    found[task_id]["outcome"] = _json(self._directory(task_id), "outcome.json")
        return found

    async def read(self, task_id: str, name: str, offset: int) -> bytes:
        return _read(self._path(task_id, name), offset)

    async def end_of(self, task_id: str, name: str, lines: int) -> int:
        """Where the last lines of a file begin."""
        path = self._path(task_id, name)
        position = size = os.path.getsize(path) if os.path.exists(path) else 0
        if lines <= 0 or not size:
            return size
        tail = b""
        with open(path, "rb") as file:
            while position and tail.count(b"\n") <= lines:
                step = min(1 << 16, position)
                position -= step
                tail = os.pread(file.fileno(), step, position) + tail
        kept = tail.split(b"\n")[-lines - (1 if tail.endswith(b"\n") else 0) :]
        return size - len(b"\n".join(kept))

    async def more(self, task_id: str, offsets: Mapping[str, int], timeout: float) -> tuple[dict[str, bytes], bool]:
        """What was added to these files since, and whether that is all there will be."""
        deadline = time.monotonic() + timeout
        while True:
            event = self._event(task_id)
            ended = await self._ended(task_id)
            added = {name: _read(self._path(task_id, name), offset) for name, offset in offsets.items()}
            if ended or any(added.values()) or not await _wait(event, deadline):
                return added, ended

    async def wait(self, task_id: str, state: str, timeout: float) -> None:
        """Until the task may have another state than this."""
        deadline = time.monotonic() + timeout
        while True:
            event = self._event(task_id)
            told = _json(self._directory(task_id), "state.json") or {}
            if told.get("state", state) != state or await self._ended(task_id) or not await _wait(event, deadline):
                return

    async def cancel(self, task_id: str, reason: str) -> None:
        directory = self._directory(task_id)
        if not os.path.isdir(directory) or os.path.exists(f"{directory}/cancel"):
            return
        _write(f"{directory}/cancel", 0, reason.encode())
        if os.path.exists(f"{directory}/plan"):  # it has not begun, and won't
            os.unlink(f"{directory}/plan")
            outcome = {"state": "cancelled", "reason": reason, "ended_at": time.time()}
            _write(f"{directory}/outcome.json", 0, json.dumps(outcome).encode())
            try:
                await self._jobs("stop_job", task_id)
            except (ConnectionError, RuntimeError):
                pass  # it ends as soon as it starts
        self._tell(task_id)

    async def forget(self, ids: Sequence[str]) -> None:
        for task_id in ids:
            shutil.rmtree(self._directory(task_id), ignore_errors=True)
            self._tell(task_id)
            self._happened.pop(task_id, None)
            try:
                await self._jobs("delete_job", task_id)
            except (ConnectionError, RuntimeError):
                pass  # it is gone, or ends only now: Ray forgets old jobs by itself
        needed: set[str] = set()
        for name in os.listdir(self._root):
            if _TASK.fullmatch(name):
                needed.update((_json(f"{self._root}/{name}", "needs.json") or {}).get("blobs", ()))
        for name in os.listdir(self._root):
            if name.startswith("code-") and name not in needed and _age(f"{self._root}/{name}") > 600:
                os.unlink(f"{self._root}/{name}")

    # within

    async def _ended(self, task_id: str) -> bool:
        if not os.path.isdir(self._directory(task_id)) or _json(self._directory(task_id), "outcome.json"):
            return True
        try:
            job = (await self._list(LOOK_S)).get(task_id)
        except ConnectionError:
            return False
        return job is None or job["status"] in ("SUCCEEDED", "FAILED", "STOPPED")

    async def _list(self, age: float = 0.0) -> dict[str, dict[str, Any]]:
        """All jobs by what they were submitted as, by one question for all; not older than `age` seconds."""
        asked = time.monotonic()
        async with self._listing:
            if self._listed[0] < max(asked - age, self._submitted):
                begun = time.monotonic()
                fields = ("status", "message", "start_time", "end_time")
                jobs = {
                    job.submission_id: {field: getattr(job, field) for field in fields}
                    for job in await self._jobs("list_jobs")
                    if job.submission_id
                }
                self._listed = begun, jobs
            return self._listed[1]

    async def _jobs(self, method: str, *args: Any, **options: Any) -> Any:
        """Ask the Jobs server."""

        def ask() -> Any:
            import requests

            if self._server is None:
                self._server = _server()
            try:
                return getattr(self._server, method)(*args, **options)
            except (ConnectionError, requests.exceptions.RequestException) as error:
                self._server = None
                raise ConnectionError(f"Ray's Jobs server does not answer: {error}") from None

        return await asyncio.to_thread(ask)

    def _event(self, task_id: str) -> asyncio.Event:
        return self._happened.setdefault(task_id, asyncio.Event())

    def _tell(self, task_id: str) -> None:
        event = self._happened.pop(task_id, None)
        if event is not None:
            event.set()

    def _directory(self, task_id: str) -> str:
        if not _TASK.fullmatch(task_id):
            raise ValueError(f"{task_id!r} is no task")
        return os.path.join(self._root, task_id)

    def _path(self, task_id: str, name: str) -> str:
        if not _FILE.fullmatch(name):
            raise ValueError(f"{name!r} is no file of a task")
        return os.path.join(self._directory(task_id), name)

    def _blob(self, name: str) -> str:
        if not _BLOB.fullmatch(name):
            raise ValueError(f"{name!r} is not kept here")
        return os.path.join(self._root, name)


def _server() -> Any:
    """A client of the Jobs server of this cluster."""
    from ray._private import ray_constants
    from ray.experimental import internal_kv

    where = internal_kv._internal_kv_get(
        ray_constants.DASHBOARD_ADDRESS, namespace=ray_constants.KV_NAMESPACE_DASHBOARD
    )
    if not where:
        raise ConnectionError("tasks on Ray take its Jobs server, and the cluster's head runs without the dashboard")
    try:
        from ray.job_submission import JobSubmissionClient

        return JobSubmissionClient(f"http://{where.decode()}")
    except (ImportError, RuntimeError, ConnectionError) as error:
        raise ConnectionError(
            f"tasks on Ray take its Jobs server, which does not answer on the cluster's head: {error} "
            "(is ray[default] installed there, and the dashboard on?)"
        ) from None


async def _wait(event: asyncio.Event, deadline: float) -> bool:
    """Until something happens, or it is time to ask Ray again; False when the time is over."""
    left = deadline - time.monotonic()
    if left <= 0:
        return False
    try:
        await asyncio.wait_for(event.wait(), min(left, LOOK_S))
    except asyncio.TimeoutError:
        pass
    return True


def _write(path: str, offset: int, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | (0 if offset else os.O_TRUNC), 0o600)
    try:
        view = memoryview(data)
        while len(view):
            count = os.pwrite(fd, view, offset)
            view, offset = view[count:], offset + count
    finally:
        os.close(fd)


def _read(path: str, offset: int) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return b""
    try:
        return os.pread(fd, CHUNK_BYTES, offset)
    finally:
        os.close(fd)


def _json(directory: str, name: str) -> dict[str, Any] | None:
    try:
        with open(f"{directory}/{name}", "rb") as file:
            value: dict[str, Any] = json.loads(file.read())
            return value
    except (FileNotFoundError, ValueError):
        return None


def _text(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except FileNotFoundError:
        return None


def _age(path: str) -> float:
    return time.time() - os.stat(path).st_mtime
