"""From a `TaskConfig` to a running supervisor: everything is checked first, then made, then started."""

from __future__ import annotations

import marshal
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import flowfn_runtime
from flowfn_runtime import paths, project, taskdb, taskdir
from flowfn_runtime.data.spec import Mount, normalise_target
from flowfn_runtime.data.volumes import Volume
from flowfn_runtime.errors import FlowError, ResourceUnavailable, ValidationError, VolumeNotFound

from . import config as configuration

if TYPE_CHECKING:
    from .taskconfig import TaskConfig, VolumeSpec

_LISTED_COMMAND = 200  # characters of a command that listings keep
# What the shell between client and supervisor runs: it ends at once, so the supervisor is nobody's child.
_DETACH = '"$@" &'
_SUPERVISOR = "import sys; sys.path.append(sys.argv.pop(1)); from flowfn_runtime.supervisor import main; main()"


@dataclass(frozen=True, kw_only=True)
class Call:
    """A call made durable, as the task runs it."""

    payload: bytes
    title: str  # for listings
    mounts: tuple[Mount, ...] = ()  # data that its arguments name
    cpus: float | None = None  # cores
    memory_bytes: int | None = None  # of all its processes together


def submit(task: TaskConfig, *, settings: configuration.Config | None = None, call: Call | None = None) -> str:
    """Start a task; returns its id. It belongs to nobody then: it runs on when this process ends.

    Raises `ValidationError`, `VolumeNotFound`, `ResourceUnavailable`, `NameConflict`, `SandboxError` or `TaskError`
    before anything is started.
    """
    settings = settings or configuration.load()
    with project.guarded(_code_store()):  # until the register knows that the task needs what is kept there
        return _start(_plan(task, settings, call), settings, task, call)


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


def run_here(task: TaskConfig, *, settings: configuration.Config) -> tuple[str, str, int | None]:
    """Run a task in this process, on this process's terminal: its state, why, and its exit code."""
    from flowfn_runtime.supervisor import Supervisor

    with project.guarded(_code_store()):
        plan = _plan(task, settings, None)
        directory, lock = _register(plan, settings, task, None)
    if settings.gpus:
        os.environ["FLOW_GPUS"] = settings.gpus
    ended = Supervisor(directory, lock, plan, terminal=True).run()
    return ended.state, ended.reason, ended.exit_code


def _start(plan: dict[str, Any], settings: configuration.Config, task: TaskConfig, call: Call | None) -> str:
    task_id: str = plan["id"]
    directory, lock = _register(plan, settings, task, call)
    try:
        _launch(directory, lock, plan, settings)
    except BaseException as error:
        taskdb.forget(task_id)
        taskdir.remove_tree(directory)
        if isinstance(error, OSError) and not isinstance(error, FlowError):
            raise taskdb.explain(error) from error
        raise
    finally:
        os.close(lock)  # the supervisor holds it now
    return task_id


def _register(
    plan: dict[str, Any], settings: configuration.Config, task: TaskConfig, call: Call | None
) -> tuple[str, int]:
    """Make the task's directory and its row; returns the directory and the lock, held."""
    try:
        directory, lock = taskdir.create(plan["id"])
    except OSError as error:
        raise taskdb.explain(error) from error
    try:
        if call is not None:
            _write_private(os.path.join(directory, "call"), call.payload)
        taskdir.write_json(directory, "spec.json", _public(plan, task))
        row = _row(plan, task, call, settings)
        _seq, plan["after"] = taskdb.add(row, plan.pop("block_volumes"), plan["depends_on"])
    except BaseException as error:
        os.close(lock)
        taskdir.remove_tree(directory)
        if isinstance(error, OSError) and not isinstance(error, FlowError):
            raise taskdb.explain(error) from error
        raise
    return directory, lock


# -- what is to be done ------------------------------------------------------------------------------------------------


def _plan(task: TaskConfig, settings: configuration.Config, call: Call | None) -> dict[str, Any]:
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
        "readable": _readable(),
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


def _readable() -> list[str]:
    """What this Python needs to run: itself, and where its packages are. Not the project, which goes as a snapshot."""
    prefixes = {sys.prefix, sys.base_prefix, os.path.dirname(os.path.abspath(sys.executable))}
    packages = {
        path for path in sys.path if os.path.isabs(path) and path.endswith(("-packages", ".zip", "/lib-dynload"))
    }
    return sorted(prefixes | packages)


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
    project.keep(taken, _code_store())
    return taken.digest


def _code_store() -> str:
    return os.path.join(paths.home(), "code")


def remove(rows: Sequence[taskdb.TaskRow]) -> int:
    """Remove tasks that have ended, with their logs, results and what only they needed; the bytes of the latter."""
    with project.guarded(_code_store(), cleaning=True):
        taskdb.remove([row.id for row in rows])
        needed: set[str] = set()
        for name in os.listdir(taskdir.tasks_root()):
            if name.startswith("task_") and (spec := taskdir.read_json(taskdir.task_dir(name), "spec.json")):
                needed.add(spec["code"])
        return project.clean(_code_store(), needed)


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


# -- what is written and started ---------------------------------------------------------------------------------------


def _row(plan: dict[str, Any], task: TaskConfig, call: Call | None, settings: configuration.Config) -> taskdb.TaskRow:
    command = call.title if call else task.command
    text = " ".join(command) if isinstance(command, list) else command or "sleep infinity"
    listed = re.sub(r"\s*\n\s*", "; ", text.strip())
    waits = ", ".join(plan["depends_on"])
    return taskdb.TaskRow(
        seq=0,
        id=plan["id"],
        project=settings.project,
        name=plan["name"],
        state=taskdb.PENDING,
        reason=f"it waits for {waits}" if waits else "",
        command=listed[:_LISTED_COMMAND],
        gpu=task.gpu(),
        nodes=task.num_instances,
        ports=tuple(task.ports),
        created_at=time.time(),
        started_at=None,
        ended_at=None,
        exit_code=None,
        attempts=0,
        boot_id=taskdir.boot_id(),
    )


def _public(plan: dict[str, Any], task: TaskConfig) -> dict[str, Any]:
    """The plan as it may lie on a disk: names of variables, not their values; no credentials."""
    mounts = [Mount.from_dict(mount).to_dict(secrets=False) for mount in plan["mounts"]]
    return plan | {"env": sorted(plan["env"]), "mounts": mounts, "region": task.region, "image": task.image}


def _write_private(path: str, content: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(content)


def _launch(directory: str, lock: int, plan: dict[str, Any], settings: configuration.Config) -> None:
    """Start the supervisor in a session of its own, with the lock and the plan in descriptors."""
    source = os.memfd_create("flowfn-task")  # never on a disk: it holds the values of env, and credentials
    log = os.open(os.path.join(directory, "supervisor.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    null = os.open(os.devnull, os.O_RDWR)
    try:
        with open(source, "wb", closefd=False) as file:
            file.write(marshal.dumps(plan))
        first = max(lock, source, log, null) + 1  # numbers that none of them has: each is copied, not clobbered
        actions = [
            *((os.POSIX_SPAWN_DUP2, fd, target) for fd, target in ((null, 0), (null, 1), (log, 2))),
            (os.POSIX_SPAWN_DUP2, lock, first),
            (os.POSIX_SPAWN_DUP2, source, first + 1),
        ]
        env = os.environ | {"FLOW_HOME": paths.home(), "FLOW_CACHE": paths.cache()}
        if settings.gpus:
            env["FLOW_GPUS"] = settings.gpus
        program = [sys.executable, "-c", _SUPERVISOR, plan["runtime"], directory, str(first), str(first + 1)]
        shell = ["/bin/sh", "-c", _DETACH, "sh", *program]
        pid = os.posix_spawn(shell[0], shell, env, file_actions=actions, setsid=True)
        if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0:
            raise ResourceUnavailable(
                "the task's supervisor could not be started", hint="Is the process limit reached?"
            )
    finally:
        for fd in (source, log, null):
            os.close(fd)
