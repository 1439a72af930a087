"""What a task comes to: a `TaskConfig` as what is wanted of the place that runs it, and the project's files.

Whatever can be found wrong here is, before anything is started. What only the place itself knows (`taskstart`) is
checked there: its GPUs, ports, volumes and other tasks.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flowfn_runtime import paths, project
from flowfn_runtime.data.spec import Mount, normalise_target
from flowfn_runtime.errors import ValidationError
from flowfn_runtime.taskstart import code_store

from . import config as configuration

if TYPE_CHECKING:
    from flowfn_runtime.project import Snapshot

    from .taskconfig import TaskConfig, VolumeSpec

_LISTED_COMMAND = 200  # characters of a command that listings keep


@dataclass(frozen=True, kw_only=True)
class Call:
    """A call made durable, as the task runs it."""

    payload: bytes
    title: str  # for listings
    mounts: tuple[Mount, ...] = ()  # data that its arguments name
    cpus: float | None = None  # cores
    memory_bytes: int | None = None  # of all its processes together
    image: Any = None  # what it runs in, of places that have a choice


@dataclass(frozen=True)
class Draft:
    """A task as it goes to the place that runs it."""

    wanted: dict[str, Any]  # see `flowfn_runtime.taskstart`; holds the values of env, and credentials
    payload: bytes | None  # of a call
    code: Snapshot | None  # the project's files
    roots: tuple[Snapshot, ...] = ()  # further directories of the user's that modules are imported from
    image: Any = None  # what the task runs in, of places that have a choice

    @property
    def snapshots(self) -> tuple[Snapshot, ...]:
        """All files that the place has to have."""
        return self.roots if self.code is None else (self.code, *self.roots)


def draft(task: TaskConfig, settings: configuration.Config, call: Call | None, *, here: bool) -> Draft:
    """What to do. `here`: on this machine, where the user's modules need not be sent. Raises what is wrong."""
    task_id = "task_" + os.urandom(6).hex()
    code = _snapshot(task)
    retries = task.retry_policy()
    volumes, ephemeral, mounts = _named_volumes(task, settings)
    mounts += call.mounts if call else ()
    wanted: dict[str, Any] = {
        "id": task_id,
        "task_id": task_id,
        "project": settings.project,
        "name": _name(task, task_id),
        "command": task.command,
        "call": call is not None,
        "listed": _listed(task, call),
        "env": dict(task.env),
        "environ": settings.data_environment(task.env),  # the supervisor's own
        "mounts": [mount.to_dict() for mount in mounts],
        "volumes": volumes,
        "ephemeral": ephemeral,
        "gpus": _gpus(task),
        "gpu": task.gpu(),
        "nodes": task.num_instances,
        "ports": task.ports,
        "working_dir": task.working_dir,
        "code": code and code.digest,
        "roots": [],
        "max_run_time_s": (task.max_run_time_hours or 0) * 3600,
        "retry_delays_s": [retries.delay(attempt, task_id) for attempt in range(1, retries.max_retries + 1)],
        "depends_on": task.depends_on,
        "cpus": call.cpus if call else None,
        "memory_bytes": call.memory_bytes if call else None,
        "sys_path": [],
        "readable": [],
        "grace_s": _grace_s(),
        "region": task.region or settings.region,
        "image": task.image,
        "box": "sandbox",
    }
    roots: tuple[Snapshot, ...] = ()
    if here:
        wanted["readable"] = [os.path.dirname(os.path.abspath(__file__))]
        if call:
            wanted["sys_path"] = path = _import_path(task)
            wanted["readable"] += filter(_is_some_project, path)
    elif call:
        roots, wanted["sys_path"] = _roots(code)
        wanted["roots"] = [root.digest for root in roots]
    return Draft(wanted, call.payload if call else None, code, roots, call.image if call else task.image)


def _listed(task: TaskConfig, call: Call | None) -> str:
    command = call.title if call else task.command
    text = " ".join(command) if isinstance(command, list) else command or "sleep infinity"
    return re.sub(r"\s*\n\s*", "; ", text.strip())[:_LISTED_COMMAND]


def _grace_s() -> float:
    from flowfn_runtime.supervisor import GRACE_S

    text = os.environ.get("FLOW_GRACE_S", "")
    try:
        seconds = float(text) if text else GRACE_S
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= 3600:
        raise ValidationError(f"FLOW_GRACE_S={text!r}: seconds are wanted, from 0 to 3600")
    return seconds


def _name(task: TaskConfig, task_id: str) -> str:
    if task.name is None:
        return f"task-{task_id[-6:]}"
    return f"{task.name}-{task_id[-6:]}" if task.unique_name else task.name


def _gpus(task: TaskConfig) -> list[list[Any]]:
    from flowfn_runtime.gpu_request import GpuRequest, parse_gpu

    requests = parse_gpu(task.instance_type, option="instance_type")
    if memory := task.min_gpu_memory_gb:
        requests = tuple(r._replace(memory_gb=max(r.memory_gb or 0, memory)) for r in requests or (GpuRequest(),))
    return [list(request) for request in requests]


# -- the project -------------------------------------------------------------------------------------------------------


def keep_code(draft: Draft) -> None:
    """Put the project's files where a task of this host finds them. The caller guards the store."""
    for snapshot in draft.snapshots:
        project.keep(snapshot, code_store())


def _snapshot(task: TaskConfig) -> Snapshot | None:
    root = _code_root(task)
    return None if root is None else project.snapshot(root, exclude=(paths.home(), paths.cache()))


def _code_root(task: TaskConfig) -> str | None:
    """The directory whose files go along, if any do."""
    if not task.upload_code:
        return None
    try:
        root = os.path.abspath(os.path.expanduser(task.code_root or os.getcwd()))
    except FileNotFoundError:
        hint = "Set code_root=, or upload_code=False."
        raise ValidationError("the working directory was removed", hint=hint) from None
    if task.code_root is None and root in ("/", os.path.expanduser("~"), "/tmp"):
        return None  # nobody's project, and it may hold keys
    if not os.path.isdir(root):
        raise ValidationError(f"code_root={root!r} is no directory")
    return root


def _import_path(task: TaskConfig) -> list[str]:
    """Where this process finds modules, as a task finds them: the project's directories are where its files are."""
    root = _code_root(task)
    found = []
    for entry in sys.path:
        path = os.path.abspath(entry or ".")
        if root is not None and (path == root or path.startswith(root + "/")) and "-packages" not in path:
            path = os.path.normpath(os.path.join(task.working_dir, os.path.relpath(path, root)))
        found.append(path)
    return found


def _is_some_project(path: str) -> bool:
    """Whether a directory of modules may be shown to a durable call: not one that is anything but that."""
    return os.path.isdir(path) and path not in ("/", "/tmp", "/var/tmp", os.path.expanduser("~"))


def _roots(code: Snapshot | None) -> tuple[tuple[Snapshot, ...], list[list[Any]]]:
    """Which of the user's directories go along for a call elsewhere, and where modules are looked for in them."""
    from . import userproject

    there = userproject.code()
    same = {n for n, root in enumerate(there.roots) if code is not None and root.digest == code.digest}
    others = [n for n in range(len(there.roots)) if n not in same]
    number = dict.fromkeys(same, 0) | {n: place for place, n in enumerate(others, 1)}
    return tuple(there.roots[n] for n in others), [[number[n], path] for n, path in there.sys_path]


# -- volumes -----------------------------------------------------------------------------------------------------------


def _named_volumes(
    task: TaskConfig, settings: configuration.Config
) -> tuple[list[dict[str, Any]], list[str], list[Mount]]:
    """Named volumes with where they go and what of them; the targets of unnamed ones; all other mounts."""
    named: list[dict[str, Any]] = []
    ephemeral: list[str] = []
    plain: list[Mount] = []
    for spec in task.volume_specs():
        target = normalise_target(spec.target, allow_docker_cache=task.allow_docker_cache)
        if spec.name or spec.volume_id:
            named.append(_volume(spec, target, ""))
        else:
            ephemeral.append(target)
    for mount in task.mounts():
        if mount.scheme == "volume":
            named.append(_volume(_spec_of(mount), mount.target, _inside(mount)))
        else:
            plain.append(settings.with_options(mount))
    return named, ephemeral, plain


def _volume(spec: VolumeSpec, target: str, inside: str) -> dict[str, Any]:
    fields = ("name", "volume_id", "size_gb", "interface", "create_if_missing", "region")
    return {field: getattr(spec, field) for field in fields} | {"target": target, "inside": inside}


def _spec_of(mount: Mount) -> VolumeSpec:
    from .taskconfig import VolumeSpec

    name = mount.source.removeprefix("volume://").partition("/")[0]
    key = "volume_id" if name.startswith("vol_") else "name"
    return VolumeSpec(**{"size_gb": 100, "mount_path": mount.target, key: name, **(mount.storage_options or {})})


def _inside(mount: Mount) -> str:
    slash, path = mount.source.removeprefix("volume://").partition("/")[1:]
    return slash + path
