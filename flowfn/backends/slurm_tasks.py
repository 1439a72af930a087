"""Tasks as Slurm jobs, of a cluster that this machine belongs to, or through a login node elsewhere.

What they are to Slurm and on the disk is `flowfn_runtime.slurmtasks`, which runs here or on the login node. What they
ask Slurm for is decided here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from flowfn import slurm_options
from flowfn.backends import openssh
from flowfn.backends.jobs import Jobs, More, State, starting
from flowfn.backends.ssh_session import RemoteJobs
from flowfn.bundle import bundle
from flowfn_runtime import project
from flowfn_runtime.errors import ConfigError, FlowError, ResourceUnavailable
from flowfn_runtime.slurmtasks import Tasks

if TYPE_CHECKING:
    from flowfn.backends.slurm import SlurmBackend
    from flowfn.plan import Draft
    from flowfn.slurm_options import Node, Slurm


class Ask(NamedTuple):
    """What `slurmtasks` is told of a task."""

    plan: dict[str, Any]
    how: dict[str, Any]  # the options of `Tasks.start` that are about Slurm and Python


def asking(draft: Draft, options: Slurm, nodes: Sequence[Node]) -> Ask:
    """A task in Slurm's words. Raises what is wrong with it. Pure."""
    from flowfn.spec import FunctionSpec
    from flowfn_runtime.gpu_request import GpuRequest

    if isinstance(draft.image, str):
        raise ConfigError(
            f"image={draft.image!r}: the slurm backend has no containers",
            hint="say what to install: image=flow.Image.python('3.12').pip_install(...)",
        )
    wanted = draft.wanted
    gpus = tuple(GpuRequest(*request) for request in wanted["gpus"])
    spec = FunctionSpec(gpu=gpus, cpu=wanted["cpus"], memory=wanted["memory_bytes"])
    need, _ = slurm_options.choose(spec, slurm_options.partition_nodes(nodes, options.partition))
    plan = {**wanted, "box": "sandbox if needed", "gpus": None}  # Slurm gives them, and the variables
    plan["cache"] = options.cache
    if draft.image is not None:
        plan["environment"] = draft.image.to_dict()
    how = {
        "options": [*need.arguments(), *options.arguments()],
        "program": starting("taskjob", python=options.python),
        "python_first": options.python is None,
    }
    return Ask(plan, how)


class SlurmJobs(Jobs):
    """The tasks of one flowfn home on a cluster that this machine belongs to."""

    label = "slurm"

    def __init__(self, place: Mapping[str, Any], backend: SlurmBackend | None = None) -> None:
        self.place = place
        self._backend = backend  # for starting; who only asks needs none
        self._tasks = Tasks(place["home"])

    def check(self, draft: Draft) -> None:
        self._ask(draft)

    def _ask(self, draft: Draft) -> Ask:
        assert self._backend is not None
        return asking(draft, self._backend.options, self._backend.queue.nodes())

    def start(self, draft: Draft) -> None:
        assert self._backend is not None
        plan, how = self._ask(draft)
        plan["cache"] = plan["cache"] and os.path.abspath(os.path.expanduser(plan["cache"]))

        def bring(store: str) -> None:
            for snapshot in draft.snapshots:
                project.keep(snapshot, store)

        def runtime() -> str:
            return bundle().place(os.path.join(self.place["home"], "runtime"))

        self._tasks.start(plan, draft.payload, runtime=runtime, bring=bring, there=self._backend.there, **how)

    def held(self, wanted: Mapping[str, Any]) -> list[str]:
        return self._tasks.held(wanted)

    def states(self, ids: Sequence[str]) -> dict[str, State | FlowError]:
        return self._tasks.states(ids)

    def read(self, task_id: str, name: str, offset: int = 0) -> bytes:
        return self._tasks.read(task_id, name, offset)

    def end_of(self, task_id: str, name: str, lines: int) -> int:
        return self._tasks.end_of(task_id, name, lines)

    def more(self, task_id: str, offsets: Mapping[str, int], timeout: float) -> More:
        return self._tasks.more(task_id, offsets, timeout)

    def wait(self, task_id: str, state: str, timeout: float) -> None:
        self._tasks.wait(task_id, state, timeout)

    def cancel(self, task_id: str, reason: str) -> None:
        self._tasks.cancel(task_id, reason)

    def forget(self, ids: Sequence[str]) -> None:
        self._tasks.forget(ids)

    def address(self, task_id: str) -> str:
        return self._tasks.address(task_id)


class LoginJobs(RemoteJobs):
    """The tasks of one flowfn home on a cluster whose login node answers for them."""

    of = "slurm"

    def __init__(self, place: Mapping[str, Any], options: Slurm | None = None) -> None:
        super().__init__(place, openssh.Client(openssh.Address.parse(place["login"]), place["ssh_config"]))
        self.label = f"slurm://{self._client.address}"
        self._options = options  # for starting; who only asks needs none

    def check(self, draft: Draft) -> None:
        self._asking(draft)

    def _asking(self, draft: Draft) -> tuple[Ask, str]:
        assert self._options is not None
        nodes = slurm_options.nodes_of(self._ask({"do": "nodes", "format": slurm_options.SINFO})[0])
        return asking(draft, self._options, nodes), slurm_options.summary(nodes)

    def start(self, draft: Draft) -> None:
        (plan, how), there = self._asking(draft)
        self._ask({"do": "start", "plan": plan, "there": there, **how}, draft.payload or b"", draft)

    def held(self, wanted: Mapping[str, Any]) -> list[str]:
        if not wanted["volumes"]:
            return []
        needed = {name: wanted[name] for name in ("volumes", "project", "environ")}
        names: list[str] = self._ask({"do": "held", "wanted": needed})[0]
        return names

    def address(self, task_id: str) -> str:
        node = self._ask({"do": "address", "id": task_id})[0]
        raise ResourceUnavailable(
            f"the task's ports are on {node}, which is reached through the login node",
            hint=f"{self._client.by_hand} -L PORT:{node}:PORT",
        )
