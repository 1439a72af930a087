"""What a task comes to: a `TaskConfig` checked against this host and its volumes, as the record its supervisor follows.

Whatever is wrong is found here, before anything is started; volumes are created last.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import flowfn_runtime
from flowfn_runtime import paths, project, taskdb
from flowfn_runtime.data.spec import Mount, normalise_target
from flowfn_runtime.data.volumes import Volume
from flowfn_runtime.errors import ResourceUnavailable, ValidationError, VolumeNotFound

from . import config as configuration

if TYPE_CHECKING:
    from .taskconfig import TaskConfig, VolumeSpec


@dataclass(frozen=True, kw_only=True)
class Call:
    """A call made durable, as the task runs it."""

    payload: bytes
    title: str  # for listings
    mounts: tuple[Mount, ...] = ()  # data that its arguments name
    cpus: float | None = None  # cores
    memory_bytes: int | None = None  # of all its processes together


def check(task: TaskConfig, settings: configuration.Config) -> None:
    """Raise whatever `submit` would raise on account of the task; nothing is made."""
    from flowfn_runtime import sandbox

    sandbox.check()
    _gpus(task, settings)
    _refuse_taken_ports(task.ports)
    for wanted in task.depends_on:
        taskdb.find(wanted, settings.project)
    if root := _code_root(task):
        project.snapshot(root, exclude=(paths.home(), paths.cache()))
    for spec in _named_volumes(task, settings)[0]:
        _find(spec[0], task.region or settings.region, settings)


def plan(task: TaskConfig, settings: configuration.Config, call: Call | None) -> dict[str, Any]:
    """What the supervisor is to do. Raises what is wrong with the task."""
    from flowfn_runtime import sandbox

    sandbox.check()
    task_id = "task_" + os.urandom(6).hex()
    gpus = _gpus(task, settings)
    _refuse_taken_ports(task.ports)
    depends_on = [taskdb.find(wanted, settings.project).id for wanted in task.depends_on]
    code = _snapshot(task)
    # Last, since it may create volumes: nothing is created for a task that is refused.
    mounts, ephemeral, block, urls = _volumes(task, settings)
    mounts += call.mounts if call else ()
    retries = task.retry_policy()
    return {
        "id": task_id,
        "project": settings.project,
        "name": _name(task, task_id),
        "command": task.command,
        "call": call is not None,
        "env": dict(task.env),
        "mounts": [mount.to_dict() for mount in mounts],
        "ephemeral": ephemeral,
        "volume_urls": urls,
        "gpus": gpus,
        "nodes": task.num_instances,
        "ports": task.ports,
        "working_dir": task.working_dir,
        "code": code,
        "max_run_time_s": (task.max_run_time_hours or 0) * 3600,
        "retry_delays_s": [retries.delay(attempt, task_id) for attempt in range(1, retries.max_retries + 1)],
        "depends_on": depends_on,
        "cpus": call.cpus if call else None,
        "memory_bytes": call.memory_bytes if call else None,
        "sys_path": _import_path(task) if call else [],
        "grace_s": _grace_s(),
        "block_volumes": block,
        "python": sys.executable,
        "readable": [*_readable(), *(filter(_is_some_project, _import_path(task)) if call else ())],
        "runtime": os.path.dirname(os.path.dirname(os.path.abspath(flowfn_runtime.__file__))),
    }


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


def _is_some_project(path: str) -> bool:
    """Whether a directory of modules may be shown to a durable call: not one that is anything but that."""
    return os.path.isdir(path) and path not in ("/", "/tmp", "/var/tmp", os.path.expanduser("~"))


def _readable() -> list[str]:
    """What this Python needs to run: itself, and where its packages are. Not the project, which goes as a snapshot."""
    prefixes = {sys.prefix, sys.base_prefix, os.path.dirname(os.path.abspath(sys.executable))}
    packages = {
        path for path in sys.path if os.path.isabs(path) and path.endswith(("-packages", ".zip", "/lib-dynload"))
    }
    # An editable installation is a checkout, and that may lie where a sandbox has a place of its own: /tmp.
    here = os.path.dirname(os.path.abspath(__file__))
    runtime = os.path.dirname(os.path.abspath(flowfn_runtime.__file__))
    return sorted(prefixes | packages | {here, runtime})


def _name(task: TaskConfig, task_id: str) -> str:
    if task.name is None:
        return f"task-{task_id[-6:]}"
    return f"{task.name}-{task_id[-6:]}" if task.unique_name else task.name


def _gpus(task: TaskConfig, settings: configuration.Config) -> list[list[Any]]:
    from flowfn_runtime.gpu_request import GpuRequest, parse_gpu

    requests = parse_gpu(task.instance_type, option="instance_type")
    if memory := task.min_gpu_memory_gb:
        requests = tuple(r._replace(memory_gb=max(r.memory_gb or 0, memory)) for r in requests or (GpuRequest(),))
    if not requests:
        return []
    from flowfn_runtime import gpus

    everything = [r._replace(count=r.count * task.num_instances) for r in requests]
    gpus.check(everything, gpus.inventory(settings.gpus))
    return [list(request) for request in requests]


def _refuse_taken_ports(ports: Sequence[int]) -> None:
    import socket

    for port in ports:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError as error:
                raise ResourceUnavailable(
                    f"port {port} of this host can't be had: {error.strerror}",
                    hint=f"Choose another port, or see who has it: ss -ltnp 'sport = :{port}'",
                ) from None


def _snapshot(task: TaskConfig) -> str | None:
    root = _code_root(task)
    if root is None:
        return None
    taken = project.snapshot(root, exclude=(paths.home(), paths.cache()))
    project.keep(taken, code_store())
    return taken.digest


def code_store() -> str:
    """Where the projects of tasks are kept."""
    return os.path.join(paths.home(), "code")


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


def _volumes(
    task: TaskConfig, settings: configuration.Config
) -> tuple[tuple[Mount, ...], list[str], list[str], dict[str, str]]:
    """The mounts, the targets of unnamed volumes, the ids of the volumes that no other task may have meanwhile, and
    where volumes are by their URLs."""
    region = task.region or settings.region
    named, ephemeral, mounts = _named_volumes(task, settings)
    found = [(_find(spec, region, settings), spec, target, inside) for spec, target, inside in named]
    block: list[str] = []
    urls: dict[str, str] = {}
    for volume, spec, target, inside in found:
        volume = volume or _create(spec, region, settings, task.num_instances)
        mounts.append(Mount(f"volume://{volume.id}{inside}", target))
        for name in (volume.id, volume.name):
            urls |= {f"volume://{name}{inside}": target} if name else {}
        if volume.interface == "block":
            block.append(volume.id)
    return tuple(mounts), ephemeral, sorted(set(block)), urls


def _named_volumes(
    task: TaskConfig, settings: configuration.Config
) -> tuple[list[tuple[VolumeSpec, str, str]], list[str], list[Mount]]:
    """Named volumes with where they go and what of them; the targets of unnamed ones; all other mounts."""
    named: list[tuple[VolumeSpec, str, str]] = []
    ephemeral: list[str] = []
    plain: list[Mount] = []
    for spec in task.volume_specs():
        target = normalise_target(spec.target, allow_docker_cache=task.allow_docker_cache)
        if spec.name or spec.volume_id:
            named.append((spec, target, ""))
        else:
            ephemeral.append(target)
    for mount in task.mounts():
        if mount.scheme == "volume":
            named.append((_spec_of(mount), mount.target, _inside(mount)))
        else:
            plain.append(_with_options(mount, settings))
    return named, ephemeral, plain


def _spec_of(mount: Mount) -> VolumeSpec:
    from .taskconfig import VolumeSpec

    name = mount.source.removeprefix("volume://").partition("/")[0]
    key = "volume_id" if name.startswith("vol_") else "name"
    return VolumeSpec(**{"size_gb": 100, "mount_path": mount.target, key: name, **(mount.storage_options or {})})


def _inside(mount: Mount) -> str:
    slash, path = mount.source.removeprefix("volume://").partition("/")[1:]
    return slash + path


def _find(spec: VolumeSpec, region: str | None, settings: configuration.Config) -> Volume | None:
    from flowfn_runtime.data import volumes

    wanted = spec.volume_id or spec.name or ""
    volume = volumes.get(wanted, settings.project) if spec.volume_id else volumes.find(wanted, settings.project)
    if volume is None:
        if not spec.create_if_missing:
            raise VolumeNotFound(
                f"project {settings.project!r} has no volume {wanted!r}, and create_if_missing=False",
                hint=f"Create it: flow volume create {wanted} --size {spec.size_gb}",
            )
        return None
    if region and volume.region and volume.region != region:
        raise ValidationError(
            f"volume {volume.label} is in region {volume.region!r}, the task in {region!r}",
            hint=f"Run the task with region={volume.region!r}, or use a volume of {region!r}.",
        )
    return volume


def _create(spec: VolumeSpec, region: str | None, settings: configuration.Config, nodes: int) -> Volume:
    from flowfn_runtime.data import volumes

    assert spec.name is not None  # an unknown id was refused
    return volumes.find_or_create(
        spec.name,
        size_gb=spec.size_gb,
        interface="file" if nodes > 1 else spec.interface,  # several nodes share it
        region=spec.region or region,
        project=settings.project,
    )


def _with_options(mount: Mount, settings: configuration.Config) -> Mount:
    configured = settings.storage_options(mount.source)
    return replace(mount, storage_options={**configured, **(mount.storage_options or {})}) if configured else mount
