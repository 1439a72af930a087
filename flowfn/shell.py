"""Entering a running task: a shell among its processes, with its files."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

from flowfn_runtime import limits, proctree, taskdir
from flowfn_runtime.errors import BackendUnavailable, TaskError

if TYPE_CHECKING:
    from .task import Task


NS_GET_USERNS = 0xB701  # ioctl_ns(2)


def enter(task: Task, command: str | None, node: int) -> int:
    """Run a shell, or `command`, in the namespaces of a node's sandbox, on this process's own terminal."""
    import subprocess

    if task.backend != "local":
        raise TaskError(f"task {task.name} is on {task.backend}; only tasks of this host can be entered")
    if task.status != "running":
        raise TaskError(f"task {task.name} is {task.status}; only a running one can be entered")
    nsenter = shutil.which("nsenter")
    if nsenter is None:
        raise BackendUnavailable("nsenter is not installed", hint="apt-get install util-linux")
    init = _namespace_init(task.task_id, node)
    inner = _first_child(init)
    env = _environment(inner)
    flags = ["--mount", "--pid", "--ipc"]
    owner = _owner(f"/proc/{init}/ns/mnt")
    if not os.path.samestat(os.fstat(owner), os.stat("/proc/self/ns/user")):
        flags += [f"--user=/proc/self/fd/{owner}", "--preserve-credentials"]
    shell = shutil.which("bash") or "/bin/sh"
    program = [shell, "-c", command] if command is not None else [shell, "-i"]
    cwd = os.readlink(f"/proc/{inner}/cwd")
    argv = [nsenter, f"--target={init}", *flags, f"--wdns={cwd}", *program]
    try:
        return subprocess.run(argv, env=env, pass_fds=[owner], check=False).returncode
    finally:
        os.close(owner)


def _owner(namespace: str) -> int:
    """A descriptor of the user namespace that owns a namespace, which need not be the one its processes are in."""
    import fcntl

    fd = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return fcntl.ioctl(fd, NS_GET_USERNS)
    finally:
        os.close(fd)


def _namespace_init(task_id: str, node: int) -> int:
    """The process that is number 1 of a node's sandbox."""
    directory = taskdir.task_dir(task_id)
    try:
        with open(os.path.join(directory, "pid")) as file:
            supervisor = int(file.read())
    except (FileNotFoundError, ValueError):
        supervisor = 0
    inits = [pid for pid in limits.descendants(supervisor) if supervisor and proctree.is_namespace_init(pid)]
    for pid in inits:
        if _environment(pid).get("FLOW_NODE_RANK") == str(node):
            return pid
    raise TaskError(f"node {node} of task {task_id} is not running (any more)")


def _first_child(pid: int) -> int:
    return next(iter(limits.descendants(pid)), pid)


def _environment(pid: int) -> dict[str, str]:
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            pairs = (entry.partition(b"=") for entry in file.read().split(b"\0") if entry)
            return {os.fsdecode(name): os.fsdecode(value) for name, _, value in pairs}
    except (FileNotFoundError, ProcessLookupError):
        return {}
