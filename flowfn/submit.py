"""From a plan to a running supervisor: the task's directory, its row, and a process that belongs to nobody."""

from __future__ import annotations

import errno
import marshal
import os
import re
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from flowfn_runtime import paths, project, taskdb, taskdir
from flowfn_runtime.data.spec import Mount
from flowfn_runtime.errors import FlowError, ResourceUnavailable
from flowfn_runtime.tasksql import explain

from . import config as configuration
from .plan import Call, code_store
from .plan import plan as make_plan

if TYPE_CHECKING:
    from .taskconfig import TaskConfig

_LISTED_COMMAND = 200  # characters of a command that listings keep
# What the shell between client and supervisor runs: it ends at once, so the supervisor is nobody's child.
_DETACH = '"$@" &'
# Where Python is told to keep no bytecode beside the sources, the supervisor keeps its own in our cache: compiling
# would take half of its start.
_SUPERVISOR = """
import sys
sys.path.append(sys.argv.pop(1))
if sys.dont_write_bytecode:
    sys.pycache_prefix, sys.dont_write_bytecode = sys.argv[1], False
del sys.argv[1]
from flowfn_runtime.supervisor import main
main()
"""


def submit(task: TaskConfig, *, settings: configuration.Config | None = None, call: Call | None = None) -> str:
    """Start a task; returns its id. It belongs to nobody then: it runs on when this process ends.

    Raises `ValidationError`, `VolumeNotFound`, `ResourceUnavailable`, `NameConflict`, `SandboxError` or `TaskError`
    before anything is started.
    """
    settings = settings or configuration.load()
    _refuse_read_only_home()
    with project.guarded(code_store()):  # until the register knows that the task needs what is kept there
        return _start(make_plan(task, settings, call), settings, task, call)


def _refuse_read_only_home() -> None:
    home = paths.home()
    if os.path.exists(home) and not os.access(home, os.W_OK):
        raise explain(PermissionError(errno.EACCES, "no permission to write, or a read-only file system", home))


def run_here(task: TaskConfig, *, settings: configuration.Config) -> tuple[str, str, int | None]:
    """Run a task in this process, on this process's terminal: its state, why, and its exit code."""
    from flowfn_runtime.supervisor import Supervisor

    _refuse_read_only_home()
    with project.guarded(code_store()):
        plan = make_plan(task, settings, None)
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
            raise explain(error) from error
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
        raise explain(error) from error
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
            raise explain(error) from error
        raise
    return directory, lock


def remove(rows: Sequence[taskdb.TaskRow]) -> int:
    """Remove tasks that have ended, with their logs, results and what only they needed; the bytes of the latter."""
    with project.guarded(code_store(), cleaning=True):
        taskdb.remove([row.id for row in rows])
        needed: set[str] = set()
        for name in os.listdir(taskdir.tasks_root()):
            if name.startswith("task_") and (spec := taskdir.read_json(taskdir.task_dir(name), "spec.json")):
                needed.add(spec["code"])
        return project.clean(code_store(), needed)


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
        bytecode = os.path.join(paths.private_dir(paths.cache()), "bytecode")
        numbers = [str(first), str(first + 1)]
        program = [sys.executable, "-c", _SUPERVISOR, plan["runtime"], bytecode, directory, *numbers]
        shell = ["/bin/sh", "-c", _DETACH, "sh", *program]
        pid = os.posix_spawn(shell[0], shell, env, file_actions=actions, setsid=True)
        if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0:
            raise ResourceUnavailable(
                "the task's supervisor could not be started", hint="Is the process limit reached?"
            )
    finally:
        for fd in (source, log, null):
            os.close(fd)
