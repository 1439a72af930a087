"""What keeps the tasks of a Ray cluster: one detached actor on its head, with a directory in Ray's session.

It hands tasks to Ray's Jobs server, keeps what they need until they start, and what they leave: each job's driver
(`flowfn_runtime.raytask`) sends its files here as they grow, so that they outlive the job's node. Whoever asks for a
task asks here, and clients reach the Jobs server from anywhere. What lies on the disk outlives the actor, too.

A task that has to wait for others is held back until its turn comes: Ray's jobs know no order, and one that waited
itself would hold what others need.

It goes to the head by value and needs nothing of flowfn's there.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray

from flowfn.backends import ray_server, ray_shelf, ray_turns

NAME = "tasks-2"  # the number is that of what it is asked and answers
NAMESPACE = "flowfn"
LOOK_S = 2.0  # how old what Ray says of its jobs may be for those who wait
ENDED = {"SUCCEEDED": "completed", "FAILED": "failed", "STOPPED": "cancelled"}  # what Ray says of a job, if that is all

# What a node runs first: the runtime is put into its cache, and takes over.
_BOOT = """
import io, json, os, ray, shutil, sys, tempfile, zipfile
def runtime(keeper, plan):
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
    return place
def begin(keeper, task_id):
    order = ray.get(keeper.take.remote(task_id))
    if order is None:
        sys.exit("flow: the task was cancelled before it began")
    plan = json.loads(order)
    if plan["version"] != list(sys.version_info[:2]):
        sys.exit("flow: the cluster's Python is %d.%d (" % sys.version_info[:2] + sys.executable
                 + "), and the task was submitted by Python %d.%d" % tuple(plan["version"]))
    place = runtime(keeper, plan)
    from flowfn_runtime import raytask
    status = raytask.main(keeper, task_id, plan, place)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # all is told; Ray's own way out spoils the status while a thread waits for the keeper
"""


class Keeper:
    """The actor. What it raises: ValueError, what was wrong with the question; ConnectionError, no Jobs server."""

    def __init__(self) -> None:
        from ray._private import worker

        self._shelf = ray_shelf.Shelf(os.path.join(worker._global_node.get_session_dir_path(), "flowfn"))
        self._server = ray_server.Server(ray_server.address)
        self._happened: dict[str, asyncio.Event] = {}
        self._turned = asyncio.Event()  # somebody's turn may have come
        self._held = {task_id: "" for task_id in self._shelf.tasks() if self._is_held(task_id)}  # and why
        self._last = 0  # number of a turn
        self._order = asyncio.get_running_loop().create_task(self._keep_order())

    # submitting

    async def lacks(self, names: Sequence[str]) -> list[str]:
        return self._shelf.lacks(names)

    async def keep(self, name: str, part: str, offset: int, data: bytes, last: bool) -> None:
        self._shelf.keep(name, part, offset, data, last)

    async def put(self, task_id: str, name: str, offset: int, data: bytes) -> None:
        """A piece of a file of a task that is to be submitted."""
        self._shelf.put(task_id, name, offset, data)

    async def submit(self, task_id: str, options: Mapping[str, Any], turn: Mapping[str, Any]) -> None:
        """Have Ray run the task, whose files are here, as soon as its turn has come. `turn`: see `ray_turns`."""
        self._last = max(self._last + 1, time.time_ns())  # this actor may have been another one before
        told = {**turn, "number": self._last, "options": dict(options), "held": True}
        self._shelf.set_json(task_id, "turn.json", told)
        self._held[task_id] = ""
        if not turn["depends_on"] and not ray_turns.rivals(task_id, self._turns()):
            await self._submit(task_id, options)
        self._turned.set()

    async def _submit(self, task_id: str, options: Mapping[str, Any]) -> None:
        import shlex
        import sys

        text = f"import ray; ray.init('auto', namespace={NAMESPACE!r}, log_to_driver=False, logging_level='ERROR');"
        text += f" keeper = ray.get_actor({NAME!r}); exec(ray.get(keeper.boot.remote())); begin(keeper, {task_id!r})"
        python = shlex.quote(sys.executable)
        command = f"p={python}; [ -x $p ] || p=python3; exec $p -c {shlex.quote(text)} {task_id}"
        try:
            await self._server.submit(entrypoint=command, submission_id=task_id, **options)
        except RuntimeError as error:
            if "already exists" not in str(error):  # this actor was killed in the middle of it
                raise
        self._held.pop(task_id, None)
        if turn := self._shelf.json(task_id, "turn.json"):
            self._shelf.set_json(task_id, "turn.json", {**turn, "held": False})

    async def nodes(self) -> list[dict[str, float]]:
        """The resources of the nodes that are alive. Raises if there is no Jobs server."""
        await self._server.ask("get_version")
        return [node["Resources"] for node in ray.nodes() if node["Alive"]]

    # for the job

    async def boot(self) -> str:
        return _BOOT

    async def take(self, task_id: str) -> bytes | None:
        """What is to be done, once; None if not any more."""
        return self._shelf.take(task_id, "plan")

    async def blob(self, name: str, offset: int) -> bytes:
        return self._shelf.blob(name, offset)

    async def add(self, task_id: str, pieces: Sequence[tuple[str, int, bytes]]) -> bool:
        """What was added to the task's files; `offset` -1: the whole of a file. False if it was forgotten."""
        if not self._shelf.knows(task_id):
            return False
        for name, offset, data in pieces:
            if offset < 0:
                self._shelf.replace(task_id, name, data)
            else:
                self._shelf.put(task_id, name, offset, data)
            if name == "outcome.json":
                self._turned.set()
        self._tell(task_id)
        return True

    async def cancelled(self, task_id: str) -> str:
        """Why the task is to be cancelled, as soon as it is."""
        while True:
            event = self._event(task_id)
            if (reason := self._shelf.text(task_id, "cancel")) is not None:
                return reason
            await event.wait()

    # asking

    async def facts(self, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
        """What is known of these tasks; of those that are not known nothing."""
        found: dict[str, dict[str, Any]] = {}
        for task_id in filter(self._shelf.knows, ids):
            found[task_id] = {name: self._shelf.json(task_id, f"{name}.json") for name in ("outcome", "state")}
            found[task_id]["started"] = self._shelf.has(task_id, "started")
            found[task_id]["cancel"] = self._shelf.text(task_id, "cancel")
            if task_id in self._held:
                found[task_id]["held"] = self._held[task_id] or "it is its turn"
        rest = [task_id for task_id, facts in found.items() if not facts["outcome"] and "held" not in facts]
        if rest:
            try:
                jobs = await self._server.jobs()
            except ConnectionError as error:
                for task_id in rest:
                    found[task_id]["unknown"] = str(error)
            else:
                for task_id in rest:
                    # In this order: what it left before its end is read after that was seen.
                    found[task_id]["job"] = jobs.get(task_id)
                    found[task_id]["outcome"] = self._shelf.json(task_id, "outcome.json")
        return found

    async def read(self, task_id: str, name: str, offset: int) -> bytes:
        return self._shelf.read(task_id, name, offset)

    async def end_of(self, task_id: str, name: str, lines: int) -> int:
        return self._shelf.end_of(task_id, name, lines)

    async def more(self, task_id: str, offsets: Mapping[str, int], timeout: float) -> tuple[dict[str, bytes], bool]:
        """What was added to these files since, and whether that is all there will be."""
        deadline = time.monotonic() + timeout
        while True:
            event = self._event(task_id)
            ended = await self._ended(task_id)
            added = {name: self._shelf.read(task_id, name, offset) for name, offset in offsets.items()}
            if ended or any(added.values()) or not await _wait(event, deadline):
                return added, ended

    async def wait(self, task_id: str, state: str, timeout: float) -> None:
        """Until the task may have another state than this."""
        deadline = time.monotonic() + timeout
        while True:
            event = self._event(task_id)
            told = self._shelf.json(task_id, "state.json") or {}
            if told.get("state", state) != state or await self._ended(task_id) or not await _wait(event, deadline):
                return

    async def cancel(self, task_id: str, reason: str) -> None:
        if not self._shelf.knows(task_id) or self._shelf.has(task_id, "cancel"):
            return
        self._shelf.replace(task_id, "cancel", reason.encode())
        if self._shelf.take(task_id, "plan") is not None:  # it has not begun, and won't
            held = self._held.pop(task_id, None) is not None
            self._end(task_id, "cancelled", reason)
            try:
                if not held:
                    await self._server.ask("stop_job", task_id)
            except (ConnectionError, RuntimeError):
                pass  # it ends as soon as it starts
        self._tell(task_id)

    async def forget(self, ids: Sequence[str]) -> None:
        for task_id in ids:
            self._held.pop(task_id, None)
            self._shelf.remove(task_id)
            self._tell(task_id)
            self._happened.pop(task_id, None)
            try:
                await self._server.ask("delete_job", task_id)
            except (ConnectionError, RuntimeError):
                pass  # it is gone, or ends only now: Ray forgets old jobs by itself
        self._turned.set()
        self._shelf.clean()

    # the order of tasks

    async def _keep_order(self) -> None:
        """Give those to Ray that were held back, when their turn comes."""
        while True:
            self._turned.clear()
            for task_id in list(self._held):
                try:
                    await self._try(task_id)
                except ConnectionError as error:
                    self._held[task_id] = str(error)
                except Exception as error:
                    self._end(task_id, "failed", f"it can't be given to Ray: {error}")
            try:
                await asyncio.wait_for(self._turned.wait(), LOOK_S if self._held else None)
            except asyncio.TimeoutError:
                pass  # a job may have ended without a word

    async def _try(self, task_id: str) -> None:
        turns = self._turns()
        if task_id not in turns:
            return
        before = {*turns[task_id].depends_on, *ray_turns.rivals(task_id, turns)}
        ended = {other: state for other in before & turns.keys() if (state := await self._end_of(other))}
        what, why = ray_turns.decide(task_id, turns, ended)
        if task_id not in self._held:
            return  # it was cancelled meanwhile
        if what == ray_turns.FAIL:
            self._end(task_id, "failed", why)
        elif what == ray_turns.WAIT:
            self._held[task_id] = why
        elif turn := self._shelf.json(task_id, "turn.json"):
            await self._submit(task_id, turn["options"])
            self._tell(task_id)

    def _turns(self) -> dict[str, ray_turns.Turn]:
        found = {task_id: self._shelf.json(task_id, "turn.json") for task_id in self._shelf.tasks()}
        return {
            task_id: ray_turns.Turn(turn["number"], turn["name"], tuple(turn["depends_on"]), tuple(turn["volumes"]))
            for task_id, turn in found.items()
            if turn
        }

    def _is_held(self, task_id: str) -> bool:
        turn = self._shelf.json(task_id, "turn.json")
        return bool(turn and turn["held"] and not self._shelf.json(task_id, "outcome.json"))

    async def _end_of(self, task_id: str) -> str | None:
        """The state that the task has ended in, if it has."""
        if task_id in self._held:
            return None
        job = (await self._server.jobs(LOOK_S)).get(task_id)
        # In this order: what it said before its end is read after that was seen.
        if outcome := self._shelf.json(task_id, "outcome.json"):
            state: str = outcome["state"]
            return state
        return "failed" if job is None else ENDED.get(job["status"])

    def _end(self, task_id: str, state: str, reason: str) -> None:
        """It has ended, and never ran."""
        self._held.pop(task_id, None)
        if self._shelf.knows(task_id):
            self._shelf.take(task_id, "plan")
            self._shelf.set_json(task_id, "outcome.json", {"state": state, "reason": reason, "ended_at": time.time()})
        self._turned.set()
        self._tell(task_id)

    # within

    async def _ended(self, task_id: str) -> bool:
        if not self._shelf.knows(task_id) or self._shelf.json(task_id, "outcome.json"):
            return True
        try:
            return await self._end_of(task_id) is not None
        except ConnectionError:
            return False

    def _event(self, task_id: str) -> asyncio.Event:
        return self._happened.setdefault(task_id, asyncio.Event())

    def _tell(self, task_id: str) -> None:
        event = self._happened.pop(task_id, None)
        if event is not None:
            event.set()


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
