"""Starts a task on this host: what is wanted, checked against what is here, becomes a directory, a row and a process.

`wanted` comes from the client, which may be on another machine. It is a dictionary that JSON can hold:

- `id`, `task_id` (what the client calls it), `project`, `name`, `command`, `call` (whether it is one), `listed` (the
  command, for listings), `gpu` and `backend` (the same)
- `env`; `mounts` of anything but volumes; `volumes`, named ones, as fields of `VolumeSpec` with `target` and `inside`;
  `ephemeral`, targets of unnamed ones; `region`, `image`
- `gpus` of a node, most wanted first; `nodes`, `ports`, `cpus`, `memory_bytes`, `max_run_time_s`, `grace_s`
- `retry_delays_s`, `depends_on`
- `code`, the digest of the project; `roots`, those of further directories that modules are imported from; `sys_path`, a
  path as it is here, or [0, place in the project], [n, place in the n-th root]; `working_dir`
- `readable`, what the sandbox has to show of this host; `box`: "sandbox", "sandbox if possible", "sandbox if needed",
  or how to make containers (`taskcontainer`)

The client may know `python` and `runtime`, if they are its own. Whatever is wrong is found before anything is started;
volumes are created last.
"""

from __future__ import annotations

import marshal
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from . import paths, project, taskdb, taskdir
from .data.spec import Mount
from .data.volumes import Volume
from .errors import FlowError, ResourceUnavailable, SandboxError, ValidationError, VolumeNotFound
from .tasksql import explain

# What the shell between this process and the supervisor runs: it ends at once, so the supervisor is nobody's child.
_DETACH = '"$@" &'
# Where Python is told to keep no bytecode beside the sources, the supervisor keeps its own in our cache: compiling
# would take half of its start.
_SUPERVISOR = """
import sys
sys.path.insert(int(sys.argv.pop(1)), sys.argv.pop(1))
if sys.dont_write_bytecode:
    sys.pycache_prefix, sys.dont_write_bytecode = sys.argv[1], False
del sys.argv[1]
from flowfn_runtime.supervisor import main
main()
"""


def start(wanted: Mapping[str, Any], payload: bytes | None = None, *, gpus: str | None = None) -> str:
    """Start a task; returns its id. It belongs to nobody then. `payload`: the call's; `gpus`: slots that are declared.

    Raises `ValidationError`, `VolumeNotFound`, `ResourceUnavailable`, `NameConflict`, `SandboxError` or `TaskError`
    before anything is started. What it needs of the project is in `code_store()`, and guarded.
    """
    spec = complete(wanted, gpus=gpus)
    directory, lock = register(spec, payload)
    try:
        _launch(directory, lock, spec, gpus)
    except BaseException as error:
        taskdb.forget(spec["id"])
        taskdir.remove_tree(directory)
        if isinstance(error, OSError) and not isinstance(error, FlowError):
            raise explain(error) from error
        raise
    finally:
        os.close(lock)  # the supervisor holds it now
    task_id: str = spec["id"]
    return task_id


def code_store() -> str:
    """Where the projects of tasks are kept."""
    return os.path.join(paths.home(), "code")


def check(wanted: Mapping[str, Any], *, gpus: str | None = None) -> None:
    """Raise whatever `start` would raise on account of this host; nothing is made."""
    _check(wanted, gpus)
    for volume in wanted["volumes"]:
        _find(volume, wanted["region"], wanted["project"])


def complete(wanted: Mapping[str, Any], *, gpus: str | None = None) -> dict[str, Any]:
    """What the supervisor is to do: `wanted`, with what this host has."""
    import flowfn_runtime

    box, depends_on = _check(wanted, gpus)
    # Last, since it may create volumes: nothing is created for a task that is refused.
    mounts, block, urls = _volumes(wanted)
    return {
        "python": sys.executable,
        "runtime": os.path.dirname(os.path.dirname(os.path.abspath(flowfn_runtime.__file__))),
        **wanted,
        "box": box,
        "mounts": [*wanted["mounts"], *mounts],
        "volume_urls": urls,
        "block_volumes": block,
        "depends_on": depends_on,
        "readable": [*own_paths(), *wanted["readable"]],
    }


def _check(wanted: Mapping[str, Any], gpus: str | None) -> tuple[Any, list[str]]:
    """How the task is boxed, and the ids of the tasks that it depends on."""
    box = wanted["box"]
    if isinstance(box, str):
        box = _box(box, bool(wanted["mounts"] or wanted["volumes"] or wanted["ephemeral"]))
    _check_gpus(wanted, gpus)
    refuse_taken_ports(wanted["ports"])
    return box, [taskdb.find(other, wanted["project"]).id for other in wanted["depends_on"]]


def _box(box: str, needed: bool) -> str:
    from . import sandbox

    if box == "sandbox if needed" and not needed:
        return "plain"
    try:
        sandbox.check()
    except SandboxError:
        if box == "sandbox" or needed:
            raise
        return "plain"
    return "sandbox"


def _check_gpus(wanted: Mapping[str, Any], declared: str | None) -> None:
    if not wanted["gpus"]:
        return
    from . import gpus
    from .gpu_request import GpuRequest

    requests = [GpuRequest(*request) for request in wanted["gpus"]]
    everything = [request._replace(count=request.count * wanted["nodes"]) for request in requests]
    gpus.check(everything, gpus.inventory(declared))


def refuse_taken_ports(ports: Sequence[int]) -> None:
    """Raise `ResourceUnavailable` if one of these is somebody's."""
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


def own_paths() -> list[str]:
    """What this Python needs to run: itself, and where its packages are. Not the project, which goes as a snapshot."""
    prefixes = {sys.prefix, sys.base_prefix, os.path.dirname(os.path.abspath(sys.executable))}
    packages = {
        path for path in sys.path if os.path.isabs(path) and path.endswith(("-packages", ".zip", "/lib-dynload"))
    }
    # An editable installation is a checkout, and that may lie where a sandbox has a place of its own: /tmp.
    package = os.path.dirname(os.path.abspath(__file__))
    runtime = os.path.dirname(package)
    sent = path_position(runtime) == "0"  # then with cloudpickle beside it
    return sorted(prefixes | packages | {runtime if sent else package})


# -- volumes -----------------------------------------------------------------------------------------------------------


def _volumes(wanted: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[str], dict[str, str]]:
    """The named volumes as mounts, the ids of those that no other task may have meanwhile, and where volumes are by
    their URLs. Those that are lacking are created."""
    region, name = wanted["region"], wanted["project"]
    found = [(_find(volume, region, name), volume) for volume in wanted["volumes"]]
    mounts: list[dict[str, Any]] = []
    block: list[str] = []
    urls: dict[str, str] = {}
    for there, volume in found:
        here = there or _create(volume, region, name, wanted["nodes"])
        inside, target = volume["inside"], volume["target"]
        mounts.append(Mount(f"volume://{here.id}{inside}", target).to_dict())
        for label in (here.id, here.name):
            urls |= {f"volume://{label}{inside}": target} if label else {}
        if here.interface == "block":
            block.append(here.id)
    return mounts, sorted(set(block)), urls


def _find(volume: Mapping[str, Any], region: str | None, owner: str) -> Volume | None:
    from .data import volumes

    wanted = volume["volume_id"] or volume["name"] or ""
    found = volumes.get(wanted, owner) if volume["volume_id"] else volumes.find(wanted, owner)
    if found is None:
        if not volume["create_if_missing"]:
            raise VolumeNotFound(
                f"project {owner!r} has no volume {wanted!r}, and create_if_missing=False",
                hint=f"Create it: flow volume create {wanted} --size {volume['size_gb']}",
            )
        return None
    if region and found.region and found.region != region:
        raise ValidationError(
            f"volume {found.label} is in region {found.region!r}, the task in {region!r}",
            hint=f"Run the task with region={found.region!r}, or use a volume of {region!r}.",
        )
    return found


def _create(volume: Mapping[str, Any], region: str | None, owner: str, nodes: int) -> Volume:
    from .data import volumes

    assert volume["name"] is not None  # an unknown id was refused
    return volumes.find_or_create(
        volume["name"],
        size_gb=volume["size_gb"],
        interface="file" if nodes > 1 else volume["interface"],  # several nodes share it
        region=volume["region"] or region,
        project=owner,
    )


# -- what is written and started ---------------------------------------------------------------------------------------


def path_position(runtime: str) -> str:
    """Where in `sys.path` the runtime belongs: first if it was sent here, before an installed one; else last."""
    parent, name = os.path.split(runtime)
    return "0" if os.path.basename(parent) == "runtime" and len(name) == 32 else str(sys.maxsize)


def register(spec: dict[str, Any], payload: bytes | None) -> tuple[str, int]:
    """Make the task's directory and its row; returns the directory and the lock, held."""
    try:
        directory, lock = taskdir.create(spec["id"])
    except OSError as error:
        raise explain(error) from error
    try:
        if payload is not None:
            taskdir.write_private(directory, "call", payload)
        taskdir.write_json(directory, "spec.json", public(spec))
        _seq, spec["after"] = taskdb.add(row(spec), spec.pop("block_volumes"), spec["depends_on"])
    except BaseException as error:
        os.close(lock)
        taskdir.remove_tree(directory)
        if isinstance(error, OSError) and not isinstance(error, FlowError):
            raise explain(error) from error
        raise
    return directory, lock


def row(spec: Mapping[str, Any], *, backend: str = "", place: str = "") -> taskdb.TaskRow:
    """The task as it is listed at first."""
    waits = ", ".join(spec["depends_on"])
    return taskdb.TaskRow(
        seq=0,
        id=spec["id"],
        project=spec["project"],
        name=spec["name"],
        state=taskdb.PENDING,
        reason=f"it waits for {waits}" if waits else "",
        command=spec["listed"],
        gpu=spec["gpu"],
        nodes=spec["nodes"],
        ports=tuple(spec["ports"]),
        created_at=time.time(),
        started_at=None,
        ended_at=None,
        exit_code=None,
        attempts=0,
        boot_id=taskdir.boot_id(),
        backend=backend or spec.get("backend", taskdb.LOCAL),
        place=place,
    )


def public(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The task as it may lie on a disk: names of variables, not their values; no credentials."""
    mounts = [Mount.from_dict(mount).to_dict(secrets=False) for mount in spec["mounts"]]
    return {**spec, "env": sorted(spec["env"]), "environ": sorted(spec["environ"]), "mounts": mounts}


def remove(rows: Sequence[taskdb.TaskRow]) -> int:
    """Remove tasks that have ended, with their logs, results and what only they needed; the bytes of the latter."""
    with project.guarded(code_store(), cleaning=True):
        taskdb.remove([row.id for row in rows])
        needed: set[str] = set()
        for name in os.listdir(taskdir.tasks_root()):
            if name.startswith("task_") and (spec := taskdir.read_json(taskdir.task_dir(name), "spec.json")):
                needed.update((spec["code"], *spec.get("roots", ())))
        return project.clean(code_store(), needed)


def _launch(directory: str, lock: int, spec: dict[str, Any], gpus: str | None) -> None:
    """Start the supervisor in a session of its own, with the lock and the spec in descriptors."""
    source = os.memfd_create("flowfn-task")  # never on a disk: it holds the values of env, and credentials
    log = os.open(os.path.join(directory, "supervisor.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    null = os.open(os.devnull, os.O_RDWR)
    try:
        with open(source, "wb", closefd=False) as file:
            file.write(marshal.dumps(spec))
        first = max(lock, source, log, null) + 1  # numbers that none of them has: each is copied, not clobbered
        actions = [
            *((os.POSIX_SPAWN_DUP2, fd, target) for fd, target in ((null, 0), (null, 1), (log, 2))),
            (os.POSIX_SPAWN_DUP2, lock, first),
            (os.POSIX_SPAWN_DUP2, source, first + 1),
        ]
        env = os.environ | spec["environ"] | {"FLOW_HOME": paths.home(), "FLOW_CACHE": paths.cache()}
        env.pop("FLOW_TASK_ID", None)  # a task that another one submits outlives it
        if gpus:
            env["FLOW_GPUS"] = gpus
        bytecode = os.path.join(paths.private_dir(paths.cache()), "bytecode")
        numbers = [str(first), str(first + 1)]
        where = [path_position(spec["runtime"]), spec["runtime"]]
        program = [sys.executable, "-c", _SUPERVISOR, *where, bytecode, directory, *numbers]
        shell = ["/bin/sh", "-c", _DETACH, "sh", *program]
        pid = os.posix_spawn(shell[0], shell, env, file_actions=actions, setsid=True)
        if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0:
            raise ResourceUnavailable(
                "the task's supervisor could not be started", hint="Is the process limit reached?"
            )
    finally:
        for fd in (source, log, null):
            os.close(fd)
