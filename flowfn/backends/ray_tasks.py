"""Tasks on Ray, as jobs of its Jobs server: they survive who submitted them, and are found again from anywhere.

A task's job has the task's id. What it needs and what it leaves lies with the cluster's keeper (`ray_keeper`), which is
asked through a program of its own (`ray_talk`); one list of Ray's jobs says how all are that have not said how they
ended.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from flowfn.backends import ray_resources
from flowfn.backends.jobs import CHUNK_BYTES, Jobs, More, State
from flowfn.backends.ray_talk import Line
from flowfn.bundle import bundle
from flowfn_runtime import project, taskdb
from flowfn_runtime.errors import BackendUnavailable, ConfigError, FlowError, ResourceUnavailable
from flowfn_runtime.raytask import STOPPED

if TYPE_CHECKING:
    from flowfn.image import Image
    from flowfn.plan import Draft
    from flowfn.spec import FunctionSpec
    from flowfn_runtime.project import Snapshot

_lines: dict[str, Line] = {}
_lock = threading.Lock()


class Starting(NamedTuple):
    """How a backend has tasks started."""

    resources: Mapping[str, float]
    cache: str | None
    home: str | None
    image: Callable[[FunctionSpec], tuple[Image | None, dict[str, Any]]]  # what to build there, and options for Ray


class _Asked(NamedTuple):
    """What Ray is asked for."""

    job: dict[str, Any]  # what the Jobs server is told
    image: Image | None  # to be built there
    ranks: dict[str, Any] | None  # what an actor takes on each node, where there are several


class RayJobs(Jobs):
    """The tasks of one cluster."""

    label = "ray"

    def __init__(self, place: Mapping[str, Any], starting: Starting | None = None) -> None:
        self.place = place
        self._address: str = place["address"]
        self._starting = starting  # who only asks needs none

    # starting

    def check(self, draft: Draft) -> None:
        self._options(draft)

    def start(self, draft: Draft) -> None:
        assert self._starting is not None
        task_id: str = draft.wanted["id"]
        options, image, ranks = self._options(draft)
        blobs = {f"runtime-{bundle().digest}": None, **{f"code-{one.digest}": one for one in draft.snapshots}}
        plan = {**draft.wanted, "box": "sandbox if needed", "gpus": None}  # Ray gives them, and the variable
        plan |= {"digest": bundle().digest, "version": list(sys.version_info[:2]), "cache": self._starting.cache}
        plan["home"] = self._starting.home
        if ranks is not None:
            plan["ranks"] = ranks
        if image is not None:
            plan["environment"] = image.to_dict()
        try:
            needs = json.dumps({"blobs": list(blobs)}).encode()
            self._ask("put", task_id, "needs.json", 0, needs)
            for name in self._ask("lacks", list(blobs)):
                pieces = _pieces(bundle().pack()) if (one := blobs[name]) is None else _packed(one)
                part = os.urandom(8).hex()
                for offset, piece, last in pieces:
                    self._ask("keep", name, part, offset, piece, last)
            for offset, piece, _ in _pieces(draft.payload or b""):
                self._ask("put", task_id, "call", offset, piece)
            for offset, piece, _ in _pieces(json.dumps(plan).encode()):
                self._ask("put", task_id, "plan", offset, piece)
            self._ask("submit", task_id, options, self._turn(draft.wanted))
        except FlowError as error:
            if not getattr(error, "uncertain", False):
                self._ask("forget", [task_id])
            raise

    def _options(self, draft: Draft) -> _Asked:
        from flowfn.spec import FunctionSpec
        from flowfn_runtime.gpu_request import GpuRequest

        assert self._starting is not None
        wanted = draft.wanted
        gpus = tuple(GpuRequest(*request) for request in wanted["gpus"])
        spec = FunctionSpec(gpu=gpus, cpu=wanted["cpus"], memory=wanted["memory_bytes"], image=draft.image)
        image, runtime_env = self._starting.image(spec)
        need = ray_resources.choose(spec, self._ask("nodes"), self._starting.resources, count=wanted["nodes"])
        resources = dict(need.options.get("resources", {}))
        if model := need.options.get("accelerator_type"):
            resources[f"accelerator_type:{model}"] = 0.001
        takes = {
            "num_cpus": need.options["num_cpus"],
            "num_gpus": need.options.get("num_gpus"),
            "memory": need.options.get("memory"),
            "resources": resources or None,
        }
        several = wanted["nodes"] > 1  # the job itself takes nothing then, and runs on the head
        options = {f"entrypoint_{name}": None if several else amount for name, amount in takes.items()}
        options |= {"runtime_env": runtime_env.get("runtime_env"), "metadata": {"flowfn_name": wanted["name"]}}
        return _Asked(options, image, takes if several else None)

    def _turn(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        """What the task has to wait for; volumes that one task has at a time are those of a home there."""
        assert self._starting is not None
        block = [volume for volume in wanted["volumes"] if volume.get("interface") != "file"]
        where = f"{self._starting.home or ''} {wanted['project']}"
        return {
            "name": wanted["name"],
            # The cluster may have been started anew since those ended that are known to have.
            "depends_on": [one for one in wanted["depends_on"] if taskdb.get(one).state != taskdb.COMPLETED],
            "volumes": [f"{where}/{volume.get('volume_id') or volume.get('name')}" for volume in block],
        }

    # asking

    def states(self, ids: Sequence[str]) -> dict[str, State | FlowError]:
        facts = self._ask("facts", list(ids))
        return {task_id: judge(facts[task_id]) for task_id in ids if task_id in facts}

    def read(self, task_id: str, name: str, offset: int = 0) -> bytes:
        piece: bytes = self._ask("read", task_id, name, offset)
        return piece

    def end_of(self, task_id: str, name: str, lines: int) -> int:
        offset: int = self._ask("end_of", task_id, name, lines)
        return offset

    def more(self, task_id: str, offsets: Mapping[str, int], timeout: float) -> More:
        return More(*self._ask("more", task_id, dict(offsets), timeout))

    def wait(self, task_id: str, state: str, timeout: float) -> None:
        self._ask("wait", task_id, state, timeout)

    # ending

    def cancel(self, task_id: str, reason: str) -> None:
        self._ask("cancel", task_id, reason)

    def forget(self, ids: Sequence[str]) -> None:
        self._ask("forget", list(ids))

    def address(self, task_id: str) -> str:
        facts = self._ask("facts", [task_id]).get(task_id) or {}
        told = (facts.get("state") or {}).get("address")
        if not told:
            raise ResourceUnavailable("the task has no node yet", hint="wait for it: task.wait_started()")
        address: str = told
        return address

    def close(self) -> None:
        with _lock:
            found = _lines.get(self._address)
            for name in [name for name, other in _lines.items() if other is found]:
                del _lines[name]
        if found is not None:
            found.close()

    def _ask(self, method: str, *arguments: Any) -> Any:
        return line(self._address).ask(method, *arguments)


def jobs(address: str | None, starting: Starting, *, connected: bool) -> RayJobs:
    """Who runs tasks on the cluster of a backend. `connected`: this process is; that cluster is meant then."""
    where = address or os.environ.get("RAY_ADDRESS") or "auto"
    if connected and not where.startswith("ray://"):
        import ray
        from ray._private import worker

        node = worker._global_node
        if node is not None and node.is_head():
            where = "local"
        else:
            where = ray.get_runtime_context().gcs_address
    if where == "local":
        raise ConfigError(
            "tasks outlive this program, and the Ray cluster that was started in it does not",
            hint="start one with `ray start --head`, and name its address",
        )
    return RayJobs({"backend": "ray", "address": line(where).address}, starting)


def line(address: str) -> Line:
    """The connection of this process to a cluster."""
    with _lock:
        found = _lines.get(address)
        if found is not None and not found.usable:
            for name in [name for name, other in _lines.items() if other is found]:
                del _lines[name]
            found.close()
            found = None
        if found is None:
            found = Line(address)
            _lines[address] = _lines[found.address] = found
        return found


def judge(facts: Mapping[str, Any]) -> State | FlowError:
    """How a task is: from what it said itself, and what Ray says of its job. Pure."""
    told: Mapping[str, Any] = facts.get("state") or {}
    started, attempts = told.get("started_at"), told.get("attempts", 0)
    if outcome := facts.get("outcome"):
        return State(**{"started_at": started, "attempts": attempts, **outcome})
    if "held" in facts:
        return State(taskdb.PENDING, facts["held"])
    if "unknown" in facts:
        return BackendUnavailable(facts["unknown"])
    job = facts.get("job")
    status = job["status"] if job else ""
    if job and status in ("RUNNING", "PENDING"):
        if facts.get("started"):
            return State(taskdb.RUNNING, told.get("reason", ""), None, started, None, attempts)
        why = told.get("reason") or "its Ray job starts"
        if status == "PENDING":
            why = "its Ray job waits: " + " ".join((job["message"] or "it is not scheduled").split())
        return State(taskdb.PENDING, why, None, started, None, attempts)
    ended = job["end_time"] / 1000 if job and job["end_time"] else time.time()
    if facts.get("cancel") is not None:
        return State(taskdb.CANCELLED, facts["cancel"], None, started, ended, attempts)
    if status == "STOPPED":
        return State(taskdb.CANCELLED, STOPPED, None, started, ended, attempts)
    if not job:
        reason = "Ray does not know its job any more, and it left no word"
    else:
        said = "\n".join((job["message"] or "no reason given").strip().splitlines()[-12:])
        reason = f"its Ray job ended without a word, {status.lower()}: {said}"
    return State(taskdb.FAILED, reason, None, started, ended, attempts)


def _pieces(data: bytes) -> Iterator[tuple[int, bytes, bool]]:
    """(offset, piece, whether it is the last)."""
    for offset in range(0, len(data), CHUNK_BYTES):
        yield offset, data[offset : offset + CHUNK_BYTES], offset + CHUNK_BYTES >= len(data)


def _packed(snapshot: Snapshot) -> Iterator[tuple[int, bytes, bool]]:
    import tempfile

    with tempfile.TemporaryFile() as file:
        project.pack(snapshot, file)
        size, offset = file.tell(), 0
        file.seek(0)
        while piece := file.read(CHUNK_BYTES):
            yield offset, piece, offset + len(piece) >= size
            offset += len(piece)


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()
    for left in set(_lines.values()):
        left.left()
    _lines.clear()


os.register_at_fork(after_in_child=_after_fork)
